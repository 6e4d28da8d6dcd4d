"""Gradients of q, k, v, g and beta: the kernel of the backward pass that runs over all chunks at once.

A program has a chunk and a key head. It goes three times through V: for dq, for what k reads (x, with dv and dbeta),
for what k writes (y); all at once would not fit into registers. Every product is needed once as computed and once
transposed, dP and E: they are stored on the way, 256 bytes per token and value head, and come back from the cache as
tiles in shared memory. Computing them a second time, transposed, costs 4 C V FLOPs more, 32 k, and spills 232 bytes per
thread on sm_90 at K = V = 128 with two value heads per key head, where this takes 248 registers and spills none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.gated_delta_rule.backward_state import SHAPES, config_of
from megatron_gdn.kernels.triton_support.configs import architecture
from megatron_gdn.kernels.triton_support.language import dot, store
from megatron_gdn.kernels.triton_support.offline import Case
from megatron_gdn.kernels.triton_support.tiles import load_tile, store_tile, with_unit_stride
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit
def input_gradients_kernel(
    q,
    k,
    v,
    beta,
    do,
    G,
    rq,
    rk,
    S,
    U,
    dS,
    dB,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    p_dP,
    p_E,
    chunk_bounds,
    scale,
    num_tokens,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    beta_b,
    beta_t,
    beta_h,
    do_b,
    do_t,
    do_h,
    dq_t,
    dk_t,
    dv_t,
    H,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """A program takes a chunk and a key head, with all GROUP value heads that share it."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    MK: tl.constexpr = BK != K
    MV: tl.constexpr = V % BV != 0
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    HV = H * GROUP
    start, end = tl.load(chunk_bounds + 2 * i_c), tl.load(chunk_bounds + 2 * i_c + 1)
    num_rows = end - start
    i_b, i_t = (start // num_tokens).to(tl.int64), (start % num_tokens).to(tl.int64)
    i_n = start.to(tl.int64)
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    m_c = o_c < num_rows
    lower = o_c[:, None] >= o_c[None, :]
    diagonal = o_c[:, None] == o_c[None, :]

    p_q = q + i_b * q_b + i_t * q_t + i_h * q_h
    p_k = k + i_b * k_b + i_t * k_t + i_h * k_h
    of_q, of_k = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    if L2NORM:
        of_q = tl.load(rq + (i_c * H + i_h) * C + o_c)
        of_k = tl.load(rk + (i_c * H + i_h) * C + o_c)
    o_g = tl.arange(0, BG)

    # dq, and its part of dG: row i_g of the group in column i_g.
    b_dq, q_dq = tl.zeros([C, BK], tl.float32), tl.zeros([C], tl.float32)
    b_dG = tl.zeros([C, BG], tl.float32)
    for i_g in range(GROUP):
        i_hv = i_h * GROUP + i_g
        i_ch = i_c * HV + i_hv
        p_do = do + i_b * do_b + i_t * do_t + i_hv * do_h
        b_x, b_dP = tl.zeros([C, BK], tl.float32), tl.zeros([C, C], tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_do = load_tile(p_do, o_c, o_v, do_t, num_rows, V, True, MV)
            b_U = load_tile(U + i_ch * C * V, o_c, o_v, V, C, V, False, MV)
            b_S = load_tile(S + i_ch * K * V, o_k, o_v, V, K, V, MK, MV)
            b_x += dot(b_do, tl.trans(b_S), DTYPE)
            b_dP += dot(b_do, tl.trans(b_U), DTYPE)
        b_G = tl.load(G + i_ch * C + o_c)
        b_dP *= scale * tl.exp2(tl.where(lower, b_G[:, None] - b_G[None, :], float("-inf")))
        store_tile(p_dP + i_ch * C * C, b_dP * of_q[:, None], o_c, o_c, C, C, C, False, False)
        b_dP *= of_k[None, :]
        b_k = load_tile(p_k, o_c, o_k, k_t, num_rows, K, True, MK)
        b_x *= (scale * tl.exp2(b_G))[:, None]
        b_x += dot(b_dP, b_k, DTYPE)
        b_q = load_tile(p_q, o_c, o_k, q_t, num_rows, K, True, MK)
        row = of_q * tl.sum(b_q.to(tl.float32) * b_x, 1)
        b_dG = tl.where((o_g == i_g)[None, :], row[:, None], b_dG)
        q_dq += row
        b_dq += b_x
    if L2NORM:
        b_q = load_tile(p_q, o_c, o_k, q_t, num_rows, K, True, MK)
        b_dq = (b_dq - b_q.to(tl.float32) * (of_q * q_dq)[:, None]) * of_q[:, None]
    store_tile(dq + i_n * dq_t + i_h * K, b_dq, o_c, o_k, dq_t, num_rows, K, True, MK)

    # dk, from the right-hand side (x) and from what is written (y), and with them dv, dbeta and dg.
    b_dk, k_dk = tl.zeros([C, BK], tl.float32), tl.zeros([C], tl.float32)
    for i_g in range(GROUP):
        i_hv = i_h * GROUP + i_g
        i_ch = i_c * HV + i_hv
        p_do = do + i_b * do_b + i_t * do_t + i_hv * do_h
        p_v = v + i_b * v_b + i_t * v_t + i_hv * v_h
        p_beta = beta + i_b * beta_b + i_t * beta_t + i_hv * beta_h
        b_beta = tl.load(p_beta + o_c * beta_t, mask=m_c, other=0.0).to(tl.float32)
        b_x, b_E = tl.zeros([C, BK], tl.float32), tl.zeros([C, C], tl.float32)
        b_db = tl.zeros([C], tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_dB = load_tile(dB + i_ch * C * V, o_c, o_v, V, C, V, False, MV)
            b_U = load_tile(U + i_ch * C * V, o_c, o_v, V, C, V, False, MV)
            b_S = load_tile(S + i_ch * K * V, o_k, o_v, V, K, V, MK, MV)
            b_v = load_tile(p_v, o_c, o_v, v_t, num_rows, V, True, MV)
            b_x += dot(b_dB, tl.trans(b_S), DTYPE)
            b_E += dot(b_dB, tl.trans(b_U), DTYPE)
            b_dv = b_dB.to(tl.float32)
            b_db += tl.sum(b_dv * b_v.to(tl.float32), 1)
            store_tile(dv + i_n * dv_t + i_hv * V, b_dv * b_beta[:, None], o_c, o_v, dv_t, num_rows, V, True, MV)
        b_G = tl.load(G + i_ch * C + o_c)
        decay = tl.exp2(tl.where(lower, b_G[:, None] - b_G[None, :], float("-inf")))
        b_E = tl.where(diagonal, 0.0, b_E * decay)
        store_tile(p_E + i_ch * C * C, b_E * (b_beta * of_k)[:, None], o_c, o_c, C, C, C, False, False)
        b_E *= of_k[None, :]
        b_k = load_tile(p_k, o_c, o_k, k_t, num_rows, K, True, MK)
        b_x *= tl.exp2(b_G)[:, None]
        b_x += dot(b_E, b_k, DTYPE)
        row = of_k * tl.sum(b_k.to(tl.float32) * b_x, 1)
        b_db -= row
        k_dk -= b_beta * row
        dG = tl.sum(tl.where((o_g == i_g)[None, :], b_dG, 0.0), 1) - b_beta * row
        b_dk -= b_x * b_beta[:, None]
        p_gate = (i_n * HV + i_hv) + o_c * HV
        store(dbeta + p_gate, b_db, mask=m_c)

        b_y, kept = tl.zeros([C, BK], tl.float32), 0.0
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_U = load_tile(U + i_ch * C * V, o_c, o_v, V, C, V, False, MV)
            b_S = load_tile(S + i_ch * K * V, o_k, o_v, V, K, V, MK, MV)
            b_dS = load_tile(dS + i_ch * K * V, o_k, o_v, V, K, V, MK, MV)
            b_y += dot(b_U, tl.trans(b_dS), DTYPE)
            kept += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32))
        b_G = tl.load(G + i_ch * C + o_c)
        G_last = tl.load(G + i_ch * C + C - 1)
        b_k = load_tile(p_k, o_c, o_k, k_t, num_rows, K, True, MK)
        b_y *= tl.exp2(G_last - b_G)[:, None]
        last = kept * tl.exp2(G_last) + tl.sum(of_k * tl.sum(b_k.to(tl.float32) * b_y, 1))
        b_q = load_tile(p_q, o_c, o_k, q_t, num_rows, K, True, MK)
        # What other threads of the program stored.
        tl.debug_barrier()
        b_dP = load_tile(p_dP + i_ch * C * C, o_c, o_c, C, C, C, False, False)
        b_E = load_tile(p_E + i_ch * C * C, o_c, o_c, C, C, C, False, False)
        # y - dot(...) keeps the two products apart: where one accumulates into the other, the compiler gives all warps
        # to the rows, 128 where there are 64.
        b_y += dot(tl.trans(b_dP), b_q, DTYPE)
        b_y -= dot(tl.trans(b_E), b_k, DTYPE)
        row = of_k * tl.sum(b_k.to(tl.float32) * b_y, 1)
        k_dk += row
        b_dk += b_y
        store(dg + p_gate, tl.cumsum(dG - row, 0, reverse=True) + last, mask=m_c)
    if L2NORM:
        b_k = load_tile(p_k, o_c, o_k, k_t, num_rows, K, True, MK)
        b_dk = (b_dk - b_k.to(tl.float32) * (of_k * k_dk)[:, None]) * of_k[:, None]
    store_tile(dk + i_n * dk_t + i_h * K, b_dk, o_c, o_k, dk_t, num_rows, K, True, MK)


def input_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    do: Tensor,
    prepared,
    S: Tensor,
    U: Tensor,
    dS: Tensor,
    dB: Tensor,
    *,
    table: ChunkTable,
    scale: float,
    l2norm: bool,
    dg_dtype: torch.dtype = torch.float32,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs.

    Args:
        q, k: `[B, T, H, K]`, any strides but 1 in K.
        v: `[B, T, HV, V]` in their dtype, any strides but 1 in V.
        beta: `[B, T, HV]`, any float dtype.
        do: `[B, T, HV, V]`, gradient of o, in the dtype of q.
        prepared: `Prepared` of the forward pass.
        S: `[NC, HV, K, V]`, states that enter the chunks.
        U: `[NC, HV, 64, V]`.
        dS, dB: from `state_gradients`.
        table: chunks of the batch.
        scale: of o.
        l2norm: q and k were normalised, with the factors in prepared; the gradients are those before.
        dg_dtype: of g.
        into: where to write dq, dk and dv, such as slices of one contiguous `[B, T, channels]`; heads lie one after the
            other, and rows of the batch follow each other. None: new memory.

    Returns:
        dq, dk `[B, T, H, K]`, summed in float32 over the value heads of a key head, dv `[B, T, HV, V]`, dg and dbeta
        `[B, T, HV]`; dg in dg_dtype, the others in the dtypes of their inputs; contiguous but for `into`.
    """
    (_, num_tokens, H, K), (HV, V) = q.shape, v.shape[2:]
    do = with_unit_stride(do)
    dq, dk, dv = into or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    for x in (dq, dk, dv):
        assert x.stride()[2:] == (x.shape[3], 1), "heads of gradients must lie one after the other"
    dg, dbeta = beta.new_empty(beta.shape, dtype=dg_dtype), beta.new_empty(beta.shape)
    dP, E = (q.new_empty(table.num_chunks, HV, CHUNK_SIZE, CHUNK_SIZE) for _ in range(2))
    launch = config_of("input_gradients", "fp32" if q.dtype == torch.float32 else "", architecture(q.device), K, V)
    if table.num_chunks:
        with torch.cuda.device_of(q):
            input_gradients_kernel[(table.num_chunks, H)](
                q,
                k,
                v,
                beta,
                do,
                prepared.G,
                prepared.rq,
                prepared.rk,
                S,
                U,
                dS,
                dB,
                dq,
                dk,
                dv,
                dg,
                dbeta,
                dP,
                E,
                table.chunk_bounds,
                scale,
                num_tokens,
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                *beta.stride(),
                *do.stride()[:3],
                dq.stride(1),
                dk.stride(1),
                dv.stride(1),
                H,
                GROUP=HV // H,
                K=K,
                V=V,
                C=CHUNK_SIZE,
                BK=max(16, triton.next_power_of_2(K)),
                BG=triton.next_power_of_2(HV // H),
                L2NORM=l2norm,
                **launch.launch,
            )
    return dq, dk, dv, dg, dbeta


def compile_cases(arch: str) -> list[Case]:
    """The kernel as shipped; a group of two value heads for each key head, and one of one."""
    cases = []
    for (K, V, dtype), group in [(shape, 2) for shape in SHAPES] + [(SHAPES[0], 1)]:
        tensors = ("q", "k", "v", "do", "S", "U", "dS", "dB", "dq", "dk", "dv", "p_dP", "p_E")
        signature = {name: f"*{dtype}" for name in tensors}
        signature |= {name: "*fp32" for name in ("beta", "G", "rq", "rk", "dg", "dbeta")}
        signature |= dict(chunk_bounds="*i32", scale="fp32", num_tokens="i32", H="i32")
        signature |= {f"{x}_{axis}": "i32" for x in ("q", "k", "v", "beta", "do") for axis in "bth"}
        signature |= dict(dq_t="i32", dk_t="i32", dv_t="i32")
        constexprs = dict(GROUP=group, K=K, V=V, C=CHUNK_SIZE, BK=max(16, triton.next_power_of_2(K)), L2NORM=True)
        constexprs |= dict(BG=triton.next_power_of_2(group))
        cases.append(
            Case(
                name=f"input_gradients {K} {V} {dtype} group {group}",
                kernel=input_gradients_kernel,
                signature=signature,
                constexprs=constexprs,
                config=config_of("input_gradients", dtype, arch, K, V),
                default=(K, V, dtype) == SHAPES[0],
            )
        )
    return cases
