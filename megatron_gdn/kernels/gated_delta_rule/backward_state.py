"""Gradient of the state between chunks, in reverse: the sequential part of the backward pass.

Per chunk, from dS, the gradient of the state that leaves it (kernels/README.md has the derivation):

    dU  = s P^T dO + diag(lambda) k dS          P_ij = D_ij q_i . k_j, i >= j
    dB  = T^T dU                                gradient of the right-hand side R of (I + A) U = R
    dS' = gamma_C dS + s (diag(gamma) q)^T dO - (diag(beta gamma) k)^T dB       of the chunk before

Two kernels. `scores` computes s P^T of all chunks at once, as (k q^T) D^T: transposing the result of a dot is
miscompiled on Hopper (fla issue 640). `state_gradients` walks through the chunks of a sequence and value head with
K x BV of dS in float32. With P^T inside, the walk would compute it once per block of V and spill 96 bytes per thread at
K = V = 128; and it is the walk that takes the time, as it has few programs. A fused L2 norm enters as factors of rows,
on P, dO and dB, so q and k are multiplied as they were stored.

Per token and value head (K = V = 128, two value heads per key head, 16 bits):

    scores           2 CK / GROUP = 8 k FLOP      reads q, k: 256 B, writes P^T: 128 B
    state_gradients  6 KV + 4 CV = 131 k FLOP     reads q, k, P^T, T, dO: 768 B, writes dS (2 KV / C) and dB: 768 B

where the V / BV programs of a head share q, k, P^T and T in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.triton_support.configs import Config, architecture, config
from megatron_gdn.kernels.triton_support.language import dot
from megatron_gdn.kernels.triton_support.offline import Case
from megatron_gdn.kernels.triton_support.sequences import locate_sequence
from megatron_gdn.kernels.triton_support.tiles import load_tile, store_tile, with_unit_stride
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit
def scores_kernel(
    q,
    k,
    G,
    rq,
    rk,
    PT,
    chunk_bounds,
    scale,
    num_tokens,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    H,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """P^T of a chunk, for the value heads of one key head."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    MK: tl.constexpr = K % BK != 0
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, end = tl.load(chunk_bounds + 2 * i_c), tl.load(chunk_bounds + 2 * i_c + 1)
    i_b, i_t = (start // num_tokens).to(tl.int64), (start % num_tokens).to(tl.int64)
    q += i_b * q_b + i_t * q_t + i_h * q_h
    k += i_b * k_b + i_t * k_t + i_h * k_h
    o_c = tl.arange(0, C)
    b_kq = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = load_tile(k, o_c, o_k, k_t, end - start, K, True, MK)
        b_q = load_tile(q, o_c, o_k, q_t, end - start, K, True, MK)
        b_kq += dot(b_k, tl.trans(b_q), DTYPE)
    b_kq *= scale
    if L2NORM:
        i_norm = (i_c * H + i_h) * C
        b_kq *= tl.load(rk + i_norm + o_c)[:, None] * tl.load(rq + i_norm + o_c)[None, :]
    for i_g in range(GROUP):
        i_ch = (i_c * H + i_h) * GROUP + i_g
        b_G = tl.load(G + i_ch * C + o_c)
        upper = o_c[:, None] <= o_c[None, :]
        decay = tl.exp2(tl.where(upper, b_G[None, :] - b_G[:, None], float("-inf")))
        store_tile(PT + i_ch * C * C, b_kq * decay, o_c, o_c, C, C, C, False, False)


@triton.jit
def state_gradients_kernel(
    q,
    k,
    beta,
    do,
    G,
    T,
    PT,
    rq,
    rk,
    dfinal,
    dS,
    dB,
    dinitial,
    first_chunk,
    chunk_bounds,
    scale,
    num_tokens,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    beta_b,
    beta_t,
    beta_h,
    do_b,
    do_t,
    do_h,
    HV,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    L2NORM: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    NEEDS_DINITIAL: tl.constexpr,
):
    """A program takes BV columns of the state of a sequence and value head, from the last chunk to the first."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    MK: tl.constexpr = BK != K
    MV: tl.constexpr = V % BV != 0
    i_v = tl.program_id(0)
    i_nh = tl.program_id(1).to(tl.int64)
    i_n, i_hv = i_nh // HV, i_nh % HV
    i_h = i_hv // GROUP
    first, num_chunks, i_b, i_t, length = locate_sequence(i_n, first_chunk, chunk_bounds, num_tokens)
    q += i_b * q_b + i_t * q_t + i_h * q_h
    k += i_b * k_b + i_t * k_t + i_h * k_h
    beta += i_b * beta_b + i_t * beta_t + i_hv * beta_h
    do += i_b * do_b + i_t * do_t + i_hv * do_h
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)

    b_dS = tl.zeros([BK, BV], tl.float32)
    if HAS_DFINAL:
        b_dS += load_tile(dfinal + i_nh * K * V, o_k, o_v, V, K, V, MK, MV).to(tl.float32)
    for i in range(num_chunks):
        i_in = (num_chunks - 1 - i).to(tl.int64)
        i_ch = (first + i_in) * HV + i_hv
        num_rows = (length - i_in * C).to(tl.int32)
        m_c = o_c < num_rows
        b_q = load_tile(q + i_in * C * q_t, o_c, o_k, q_t, num_rows, K, True, MK)
        b_k = load_tile(k + i_in * C * k_t, o_c, o_k, k_t, num_rows, K, True, MK)
        b_do = load_tile(do + i_in * C * do_t, o_c, o_v, do_t, num_rows, V, True, MV)
        b_PT = load_tile(PT + i_ch * C * C, o_c, o_c, C, C, C, False, False)
        b_T = load_tile(T + i_ch * C * C, o_c, o_c, C, C, C, False, False)
        b_beta = tl.load(beta + i_in * C * beta_t + o_c * beta_t, mask=m_c, other=0.0).to(tl.float32)
        b_G = tl.load(G + i_ch * C + o_c)
        G_last = tl.load(G + i_ch * C + C - 1)
        gamma, write = tl.exp2(b_G), tl.exp2(G_last - b_G)
        of_q, of_k = scale * tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
        if L2NORM:
            i_norm = ((first + i_in) * (HV // GROUP) + i_h) * C
            of_q *= tl.load(rq + i_norm + o_c)
            of_k *= tl.load(rk + i_norm + o_c)
        store_tile(dS + i_ch * K * V, b_dS, o_k, o_v, V, K, V, MK, MV)

        b_dU = dot(b_k, b_dS, DTYPE) * (write * of_k)[:, None]
        b_dU += dot(b_PT, b_do, DTYPE)
        b_dB = dot(tl.trans(b_T), b_dU, DTYPE)
        store_tile(dB + i_ch * C * V, b_dB, o_c, o_v, V, C, V, False, MV)
        b_dS *= tl.exp2(G_last)
        b_dS += dot(tl.trans(b_q), b_do.to(tl.float32) * (gamma * of_q)[:, None], DTYPE)
        b_dS += dot(tl.trans(b_k), b_dB * (-b_beta * gamma * of_k)[:, None], DTYPE)
    if NEEDS_DINITIAL:
        store_tile(dinitial + i_nh * K * V, b_dS, o_k, o_v, V, K, V, MK, MV)


def config_of(kernel: str, dtype: str, arch: str, K: int, V: int) -> Config:
    """Row of the launch table: float32 tiles take twice the shared memory, so they have rows of their own."""
    return config(f"{kernel} float32" if dtype == "fp32" else kernel, arch, K, V)


def state_gradients(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    do: Tensor,
    prepared,
    dfinal: Tensor | None,
    *,
    table: ChunkTable,
    scale: float,
    needs_dinitial: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the states and of the right-hand sides of all chunks.

    Args:
        q, k: `[B, T, H, K]`, any strides but 1 in K.
        beta: `[B, T, HV]`, any float dtype.
        do: `[B, T, HV, V]`, gradient of o, in the dtype of q and k.
        prepared: `Prepared` of the forward pass; with rq and rk where the L2 norm is fused.
        dfinal: `[N, HV, K, V]`, gradient of the final states, any float dtype; None: 0.
        table: chunks of the batch.
        scale: of o.
        needs_dinitial: return the gradient of the initial states.

    Returns:
        dS `[NC, HV, K, V]`, gradient of the state that leaves each chunk, and dB `[NC, HV, 64, V]`, both in the
        dtype of q; the gradient of the initial states `[N, HV, K, V]` in float32 or None.
    """
    (_, num_tokens, H, K), (HV, V), N = q.shape, do.shape[2:], len(table.lengths)
    do = with_unit_stride(do)
    dS = q.new_empty(table.num_chunks, HV, K, V)
    dB = q.new_empty(table.num_chunks, HV, CHUNK_SIZE, V)
    PT = q.new_empty(table.num_chunks, HV, CHUNK_SIZE, CHUNK_SIZE)
    dinitial = q.new_empty(N, HV, K, V, dtype=torch.float32) if needs_dinitial else None
    dtype, arch = "fp32" if q.dtype == torch.float32 else "", architecture(q.device)
    launch = config_of("state_gradients", dtype, arch, K, V)
    common = dict(GROUP=HV // H, K=K, C=CHUNK_SIZE, L2NORM=prepared.rk is not None)
    with torch.cuda.device_of(q):
        if table.num_chunks:
            scores_kernel[(table.num_chunks, H)](
                q,
                k,
                prepared.G,
                prepared.rq,
                prepared.rk,
                PT,
                table.chunk_bounds,
                scale,
                num_tokens,
                *q.stride()[:3],
                *k.stride()[:3],
                H,
                **common,
                **config_of("scores", dtype, arch, K, V).launch,
            )
        # Without tokens the kernel still hands dfinal on; its tables are empty, and nothing is read from them.
        state_gradients_kernel[(triton.cdiv(V, dict(launch.block)["BV"]), N * HV)](
            q,
            k,
            beta,
            do,
            prepared.G,
            prepared.T,
            PT,
            prepared.rq,
            prepared.rk,
            None if dfinal is None else dfinal.contiguous(),
            dS,
            dB,
            dinitial,
            table.first_chunk,
            table.chunk_bounds,
            scale,
            max(num_tokens, 1),
            *q.stride()[:3],
            *k.stride()[:3],
            *beta.stride(),
            *do.stride()[:3],
            HV,
            V=V,
            BK=max(16, triton.next_power_of_2(K)),
            HAS_DFINAL=dfinal is not None,
            NEEDS_DINITIAL=needs_dinitial,
            **common,
            **launch.launch,
        )
    return dS, dB, dinitial


SHAPES = (
    (128, 128, "bf16"),
    (64, 64, "bf16"),
    (192, 384, "bf16"),
    (256, 512, "bf16"),
    (128, 128, "fp32"),
    (128, 128, "fp16"),
)
"""Head sizes and dtypes that are compiled offline; the first is launched by default."""


def compile_cases(arch: str) -> list[Case]:
    """The kernels as shipped, with two value heads for each key head."""
    cases = []
    for K, V, dtype in SHAPES:
        signature = {name: f"*{dtype}" for name in ("q", "k", "do", "T", "PT", "dS", "dB")}
        signature |= {name: "*fp32" for name in ("beta", "G", "rq", "rk", "dfinal", "dinitial")}
        signature |= dict(first_chunk="*i32", chunk_bounds="*i32", scale="fp32", num_tokens="i32", H="i32", HV="i32")
        signature |= {f"{x}_{axis}": "i32" for x in ("q", "k", "beta", "do") for axis in "bth"}
        common = dict(GROUP=2, K=K, C=CHUNK_SIZE, L2NORM=True)
        walk = dict(V=V, BK=max(16, triton.next_power_of_2(K)), HAS_DFINAL=True, NEEDS_DINITIAL=True)
        for kernel, constexprs in ((scores_kernel, common), (state_gradients_kernel, common | walk)):
            name = kernel.__name__.removesuffix("_kernel")
            cases.append(
                Case(
                    name=f"{name} {K} {V} {dtype}",
                    kernel=kernel,
                    signature=signature,
                    constexprs=constexprs,
                    config=config_of(name, dtype, arch, K, V),
                    default=(K, V, dtype) == SHAPES[0],
                )
            )
    return cases
