"""The rule's inputs from the layer's projections, in one launch: convolution, SiLU, norms of q and k, gates.

    q, k, v = silu(conv1d(mixed))      rq, rk = 1 / |q|, 1 / |k|      g = -exp(A_log) softplus(alpha + dt_bias)
    beta = sigmoid(b)

A program has a chunk of 64 tokens and a head of q or k, a block of channels of v, or all heads' gates. Heads of q and k
are whole in a program, so their norms, of the rounded numbers that it stores, cost no memory traffic: the first stage
of the rule need not read q at all. Per token, for 16 and 32 heads of 128 in 16 bits:

    here                                         2 (2 H K + HV V) 2 B + 8 H B + 12 HV B = 33.3 kB
    convolution, gates, and q read for its norm  2 (2 H K + HV V) 2 B + 8 H B + 12 HV B + 2 H K B = 37.4 kB

and a launch instead of two. Backward, the kernels of the convolution and of the gates serve as they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.gated_delta_rule.gate_triton import softplus
from megatron_gdn.kernels.triton_support.configs import architecture, config
from megatron_gdn.kernels.triton_support.language import round_to, store
from megatron_gdn.kernels.triton_support.offline import Case
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit(do_not_specialize=["num_tokens"])
def inputs_kernel(
    p_mixed,
    p_weight,
    p_alpha,
    p_b,
    p_A_log,
    p_dt_bias,
    p_y,
    p_rq,
    p_rk,
    p_g,
    p_beta,
    p_bounds,
    p_chunk_bounds,
    p_chunk_sequence,
    num_tokens,
    eps,
    stride_mb,
    stride_mt,
    stride_gb,
    stride_gt,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    L2NORM: tl.constexpr,
    DECAY: tl.constexpr,
    BETA_MAX: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Programs of a chunk are neighbours: 2 H heads of q and k, the blocks of v, the gates."""
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    C: tl.constexpr = BLOCK_I * RUN
    D: tl.constexpr = 2 * H * K + HV * V
    NUM_V: tl.constexpr = (HV * V + BLOCK_V - 1) // BLOCK_V
    NUM: tl.constexpr = 2 * H + NUM_V + 1
    i = tl.program_id(0).to(tl.int64)
    i_c, i_d = i // NUM, i % NUM
    n = tl.load(p_chunk_sequence + i_c)
    first, end = tl.load(p_chunk_bounds + 2 * i_c), tl.load(p_chunk_bounds + 2 * i_c + 1)
    # Rows are counted from the chunk's first token.
    start, end = (tl.load(p_bounds + n) - first).to(tl.int32), end - first
    i_b, i_t = (first // num_tokens).to(tl.int64), (first % num_tokens).to(tl.int64)
    p_mixed += i_b * stride_mb + i_t * stride_mt
    p_y += first.to(tl.int64) * D
    if i_d < 2 * H:
        o_d = tl.arange(0, BLOCK_D)
        squares = _convolve(
            p_mixed + i_d * K, p_weight + i_d * K * WIDTH, p_y + i_d * K, start, end, stride_mt, D,
            o_d, o_d < K, WIDTH, BLOCK_I, RUN, DTYPE,
        )  # fmt: skip
        if L2NORM:
            p_r = tl.where(i_d < H, p_rq, p_rk) + (i_c * H + i_d % H) * C + tl.arange(0, BLOCK_I) * RUN
            for j in tl.static_range(RUN):
                tl.store(p_r + j, tl.rsqrt(squares[j] + eps))
    elif i_d < NUM - 1:
        o_v = (i_d - 2 * H) * BLOCK_V + tl.arange(0, BLOCK_V)
        _convolve(
            p_mixed + 2 * H * K, p_weight + 2 * H * K * WIDTH, p_y + 2 * H * K, start, end, stride_mt, D,
            o_v, o_v < HV * V, WIDTH, BLOCK_I, RUN, DTYPE,
        )  # fmt: skip
    else:
        o_c, o_h = tl.arange(0, C), tl.arange(0, BLOCK_H)
        m_h = o_h < HV
        mask = (o_c < end)[:, None] & m_h[None, :]
        o_gate = i_b * stride_gb + (i_t + o_c)[:, None] * stride_gt + o_h[None, :]
        o_out = (first.to(tl.int64) + o_c)[:, None] * HV + o_h[None, :]
        b = tl.load(p_b + o_gate, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_beta + o_out, BETA_MAX * tl.sigmoid(b), mask=mask)
        if DECAY:
            rate = tl.exp(tl.load(p_A_log + o_h, mask=m_h, other=0.0))
            dt_bias = tl.load(p_dt_bias + o_h, mask=m_h, other=0.0)
            alpha = tl.load(p_alpha + o_gate, mask=mask, other=0.0).to(tl.float32)
            tl.store(p_g + o_out, -rate[None, :] * softplus(alpha + dt_bias[None, :]), mask=mask)
        else:
            tl.store(p_g + o_out, tl.zeros([C, BLOCK_H], tl.float32), mask=mask)


@triton.jit
def _convolve(
    p_x,
    p_weight,
    p_y,
    start,
    end,
    stride_x,
    stride_y,
    o_d,
    m_d,
    WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RUN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Store silu(conv1d(x)) of a chunk; sums of squares of what is stored, RUN times `[BLOCK_I]`.

    start, end: rows of the sequence's first token and of the one after the chunk's last; a thread has RUN neighbours.
    """
    token = tl.arange(0, BLOCK_I) * RUN
    taps = ()
    for j in tl.static_range(WIDTH):
        taps = taps + (tl.load(p_weight + o_d * WIDTH + j, mask=m_d, other=0.0).to(tl.float32),)
    x = ()
    for j in tl.static_range(RUN + WIDTH - 1):
        row = token + (j - WIDTH + 1)
        mask = ((row >= start) & (row < end))[:, None] & m_d[None, :]
        x = x + (tl.load(p_x + row[:, None] * stride_x + o_d[None, :], mask=mask, other=0.0).to(tl.float32),)
    squares = ()
    for i in tl.static_range(RUN):
        y = x[i] * taps[0][None, :]
        for j in tl.static_range(1, WIDTH):
            y += x[i + j] * taps[j][None, :]
        y = round_to(y * tl.sigmoid(y), DTYPE)
        store(p_y + (token + i)[:, None] * stride_y + o_d[None, :], y, mask=(token + i < end)[:, None] & m_d[None, :])
        squares = squares + (tl.sum(tl.where((token + i < end)[:, None], y * y, 0.0), 1),)
    return squares


def inputs(
    mixed: Tensor,
    alpha: Tensor | None,
    b: Tensor,
    conv_weight: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    table: ChunkTable,
    l2norm_eps: float | None,
    beta_max: float,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """What the rule reads.

    Args:
        mixed: `[B, T, 2 H K + HV V or more]`, channels of q, k, v, then others; channels contiguous.
        alpha, b: `[B, T, HV]` of equal strides, heads contiguous; alpha None: no decay, g is 0.
        conv_weight: `[2 H K + HV V, W]`, W up to 4.
        A_log, dt_bias: `[HV]` float32; None without alpha.
        heads: H, HV.
        sizes: K, V.
        table: of the batch.
        l2norm_eps: in the sums of squares of q and k; None: no norms.
        beta_max: 1 or 2.

    Returns:
        q, k, v `[B, T, 2 H K + HV V]` contiguous in mixed's dtype; g, beta `[B, T, HV]` float32; (rq, rk) of `Prepared`
        or None.
    """
    (B, T, _), (H, HV), (K, V) = mixed.shape, heads, sizes
    channels = 2 * H * K + HV * V
    y = mixed.new_empty(B, T, channels)
    g, beta = (mixed.new_empty(B, T, HV, dtype=torch.float32) for _ in range(2))
    norms = None
    if l2norm_eps is not None:
        norms = tuple(mixed.new_empty(table.num_chunks, H, CHUNK_SIZE, dtype=torch.float32) for _ in range(2))
    launch = config("inputs", architecture(mixed.device), K, V)
    num_blocks = 2 * H + triton.cdiv(HV * V, dict(launch.block)["BLOCK_V"]) + 1
    alpha_or_b = b if alpha is None else alpha
    assert alpha_or_b.stride() == b.stride() and b.stride(-1) == 1 or HV == 1, "alpha and b must have equal strides"
    with torch.cuda.device_of(mixed):
        if table.num_chunks:
            inputs_kernel[(table.num_chunks * num_blocks,)](
                mixed,
                conv_weight.contiguous(),
                alpha_or_b,
                b,
                b if A_log is None else A_log.contiguous(),
                b if dt_bias is None else dt_bias.contiguous(),
                y,
                *(norms or (y, y)),
                g,
                beta,
                table.bounds,
                table.chunk_bounds,
                table.chunk_sequence,
                T,
                0.0 if l2norm_eps is None else l2norm_eps,
                mixed.stride(0),
                mixed.stride(1),
                b.stride(0),
                b.stride(1),
                H=H,
                HV=HV,
                K=K,
                V=V,
                WIDTH=conv_weight.shape[1],
                L2NORM=norms is not None,
                DECAY=alpha is not None,
                BETA_MAX=beta_max,
                BLOCK_D=triton.next_power_of_2(K),
                BLOCK_H=triton.next_power_of_2(HV),
                **launch.launch,
            )
    return y, g, beta, norms


def compile_cases(arch: str) -> list[Case]:
    """The kernel as shipped, at the heads of Qwen3-Next and at other sizes."""
    cases = []
    for H, HV, K, V, dtype in (
        (16, 32, 128, 128, "bf16"),
        (4, 8, 64, 64, "bf16"),
        (4, 8, 192, 384, "bf16"),
        (6, 6, 256, 512, "bf16"),
        (16, 32, 128, 128, "fp16"),
        (16, 32, 128, 128, "fp32"),
    ):
        signature = {f"p_{x}": f"*{dtype}" for x in ("mixed", "weight", "alpha", "b", "y")}
        signature |= {f"p_{x}": "*fp32" for x in ("A_log", "dt_bias", "rq", "rk", "g", "beta")}
        signature |= dict(p_bounds="*i64", p_chunk_bounds="*i32", p_chunk_sequence="*i32", num_tokens="i32", eps="fp32")
        signature |= dict(stride_mb="i32", stride_mt="i32", stride_gb="i32", stride_gt="i32")
        constexprs = dict(H=H, HV=HV, K=K, V=V, WIDTH=4, L2NORM=True, DECAY=True, BETA_MAX=1.0)
        constexprs |= dict(BLOCK_D=triton.next_power_of_2(K), BLOCK_H=triton.next_power_of_2(HV))
        cases.append(
            Case(
                name=f"inputs {H}/{HV} heads of {K}/{V} {dtype}",
                kernel=inputs_kernel,
                signature=signature,
                constexprs=constexprs,
                config=config("inputs", arch, K, V),
                default=(K, V, dtype) == (128, 128, "bf16"),
            )
        )
    return cases
