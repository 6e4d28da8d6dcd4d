"""Log-decay and write strength in Triton, one launch for both; formulas in gate.py, inputs are checked there.

Bytes per token and head with alpha and b in bfloat16: forward 12, backward 16; 4 ps and 5.3 ps at 3.0 TB/s. The
backward pass recomputes softplus and sigmoid; each program adds up its part of dA_log and ddt_bias in float32, and
torch adds the parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.triton_support.configs import architecture, config
from megatron_gdn.kernels.triton_support.language import store
from megatron_gdn.kernels.triton_support.offline import Case
from megatron_gdn.kernels.triton_support.rows import Rows, mask_of, row_offsets, split_rows


@triton.jit
def softplus(x):
    """log(1 + exp(x)) for any x, with a small relative error where it is almost 0: Triton has no log1p.

    With e = exp(-|x|): max(x, 0) + log1p(e), and log1p(e) = 2 artanh(s), s = e / (2 + e) <= 1/3. Seven terms of
    artanh leave 2e-8 of the sum.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    s2 = s * s
    series = 1 / 11 + s2 * (1 / 13)
    series = 1 / 9 + s2 * series
    series = 1 / 7 + s2 * series
    series = 1 / 5 + s2 * series
    series = 1 / 3 + s2 * series
    series = 1 + s2 * series
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit(do_not_specialize=["num_rows"])
def gates_forward_kernel(
    p_alpha,
    p_b,
    p_A_log,
    p_dt_bias,
    p_g,
    p_beta,
    num_rows,
    size_1,
    size_2,
    stride_alpha0,
    stride_alpha1,
    stride_alpha2,
    stride_b0,
    stride_b1,
    stride_b2,
    HAS_BETA: tl.constexpr,
    BETA_MAX: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row is a token, its D columns are heads."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = row < num_rows
    o_d = tl.arange(0, BLOCK_D)
    mask = mask_of(m_row, D, BLOCK_D)
    o_row = row.to(tl.int64) * D
    rate = tl.exp(tl.load(p_A_log + o_d, mask=o_d < D, other=0.0))
    dt_bias = tl.load(p_dt_bias + o_d, mask=o_d < D, other=0.0)
    o_alpha = row_offsets(row, size_1, size_2, stride_alpha0, stride_alpha1, stride_alpha2)
    alpha = tl.load(p_alpha + o_alpha[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    g = -rate[None, :] * softplus(alpha + dt_bias[None, :])
    tl.store(p_g + o_row[:, None] + o_d[None, :], g, mask=mask)
    if HAS_BETA:
        o_b = row_offsets(row, size_1, size_2, stride_b0, stride_b1, stride_b2)
        b = tl.load(p_b + o_b[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(p_beta + o_row[:, None] + o_d[None, :], BETA_MAX * tl.sigmoid(b), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "steps"])
def gates_backward_kernel(
    p_dg,
    p_dbeta,
    p_alpha,
    p_b,
    p_A_log,
    p_dt_bias,
    p_dalpha,
    p_db,
    p_sums,
    num_rows,
    steps,
    size_1,
    size_2,
    stride_dg0,
    stride_dg1,
    stride_dg2,
    stride_dbeta0,
    stride_dbeta1,
    stride_dbeta2,
    stride_alpha0,
    stride_alpha1,
    stride_alpha2,
    stride_b0,
    stride_b1,
    stride_b2,
    stride_dalpha0,
    stride_dalpha1,
    stride_dalpha2,
    stride_db0,
    stride_db1,
    stride_db2,
    HAS_BETA: tl.constexpr,
    BETA_MAX: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes `steps` blocks of tokens; its sums of dA_log and ddt_bias are p_sums[program] `[2, D]`."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    rate = tl.exp(tl.load(p_A_log + o_d, mask=m_d, other=0.0))
    dt_bias = tl.load(p_dt_bias + o_d, mask=m_d, other=0.0)
    dA_log = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    ddt_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = tl.program_id(0) * steps
    for step in range(0, steps):
        row = (first + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = mask_of(row < num_rows, D, BLOCK_D)
        o_alpha = row_offsets(row, size_1, size_2, stride_alpha0, stride_alpha1, stride_alpha2)
        o_dg = row_offsets(row, size_1, size_2, stride_dg0, stride_dg1, stride_dg2)
        o_dalpha = row_offsets(row, size_1, size_2, stride_dalpha0, stride_dalpha1, stride_dalpha2)
        x = tl.load(p_alpha + o_alpha[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32) + dt_bias[None, :]
        dg = tl.load(p_dg + o_dg[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        dg = -rate[None, :] * dg
        dalpha = tl.sigmoid(x) * dg
        store(p_dalpha + o_dalpha[:, None] + o_d[None, :], dalpha, mask=mask)
        dA_log += dg * softplus(x)
        ddt_bias += dalpha
        if HAS_BETA:
            o_b = row_offsets(row, size_1, size_2, stride_b0, stride_b1, stride_b2)
            o_dbeta = row_offsets(row, size_1, size_2, stride_dbeta0, stride_dbeta1, stride_dbeta2)
            o_db = row_offsets(row, size_1, size_2, stride_db0, stride_db1, stride_db2)
            b = tl.load(p_b + o_b[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
            dbeta = tl.load(p_dbeta + o_dbeta[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
            # 1 - sigmoid(b) loses digits where b is large, sigmoid(-b) does not.
            db = BETA_MAX * dbeta * tl.sigmoid(b) * tl.sigmoid(-b)
            store(p_db + o_db[:, None] + o_d[None, :], db, mask=mask)
    p_sums += tl.program_id(0).to(tl.int64) * (2 * D)
    tl.store(p_sums + o_d, tl.sum(dA_log, 0), mask=m_d)
    tl.store(p_sums + D + o_d, tl.sum(ddt_bias, 0), mask=m_d)


def forward(
    alpha: Tensor, b: Tensor | None, A_log: Tensor, dt_bias: Tensor, beta_max: float
) -> tuple[Tensor, Tensor | None]:
    """g and beta, float32 and contiguous; beta is None without b."""
    rows, HV = Rows(alpha, alpha if b is None else b), alpha.shape[-1]
    launch = config("gates_forward", architecture(alpha.device), V=HV)
    g = torch.empty(alpha.shape, dtype=torch.float32, device=alpha.device)
    beta = None if b is None else torch.empty_like(g)
    grid = (triton.cdiv(rows.num_rows, dict(launch.block)["BLOCK_R"]),)
    if alpha.numel():
        with torch.cuda.device_of(alpha):
            gates_forward_kernel[grid](
                *rows.tensors,
                A_log.contiguous(),
                dt_bias.contiguous(),
                g,
                g if beta is None else beta,
                rows.num_rows,
                *rows.sizes,
                *rows.strides[0],
                *rows.strides[1],
                HAS_BETA=b is not None,
                BETA_MAX=beta_max,
                D=HV,
                **launch.launch,
            )
    return g, beta


def backward(
    dg: Tensor,
    dbeta: Tensor | None,
    alpha: Tensor,
    b: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    beta_max: float,
    *,
    dalpha: Tensor | None = None,
    db: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """dalpha, db (None without b), dA_log, ddt_bias, each in the dtype of its input.

    Args:
        dalpha, db: where to write them, heads contiguous, any other strides; None: new memory.
    """
    HV = alpha.shape[-1]
    launch = config("gates_backward", architecture(alpha.device), V=HV)
    dalpha = torch.empty(alpha.shape, dtype=alpha.dtype, device=alpha.device) if dalpha is None else dalpha
    if b is not None and db is None:
        db = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    for target in (dalpha, db):
        assert target is None or HV == 1 or target.stride(-1) == 1, "dalpha and db must have heads contiguous"
    given = (dg, dg, alpha, alpha, dalpha, dalpha) if b is None else (dg, dbeta, alpha, b, dalpha, db)
    rows = Rows(*given)
    programs, steps = split_rows(rows.num_rows, dict(launch.block)["BLOCK_R"])
    sums = torch.empty(programs, 2, HV, dtype=torch.float32, device=alpha.device)
    if alpha.numel():
        with torch.cuda.device_of(alpha):
            gates_backward_kernel[(programs,)](
                *rows.tensors[:4],
                A_log.contiguous(),
                dt_bias.contiguous(),
                *rows.tensors[4:],
                sums,
                rows.num_rows,
                steps,
                *rows.sizes,
                *(stride for strides in rows.strides for stride in strides),
                HAS_BETA=b is not None,
                BETA_MAX=beta_max,
                D=HV,
                **launch.launch,
            )
    for target, written in ((dalpha, rows.tensors[4]), (db, rows.tensors[5])):
        if target is not None and written is not target:
            target.copy_(written)
    dA_log, ddt_bias = sums.sum(0)
    return dalpha, db, dA_log, ddt_bias


class GatesTriton(torch.autograd.Function):
    """Saves only the inputs."""

    @staticmethod
    def forward(ctx, alpha, b, A_log, dt_bias, beta_max):
        ctx.save_for_backward(alpha, b, A_log, dt_bias)
        ctx.beta_max = beta_max
        return forward(alpha, b, A_log, dt_bias, beta_max)

    @staticmethod
    @once_differentiable
    def backward(ctx, dg, dbeta):
        return *backward(dg, dbeta, *ctx.saved_tensors, ctx.beta_max), None


def compile_cases(arch: str) -> list[Case]:
    """The kernels as shipped; D is the number of heads of a rank."""
    cases = []
    names = ("alpha", "b", "dg", "dbeta", "dalpha", "db")
    for heads, dtype in ((32, "bf16"), (64, "bf16"), (6, "bf16"), (32, "fp32"), (32, "fp16")):
        signature = {f"stride_{x}{i}": "i32" for x in names for i in range(3)}
        signature |= {f"p_{x}": f"*{dtype}" for x in ("alpha", "b", "dalpha", "db")}
        signature |= {f"p_{x}": "*fp32" for x in ("A_log", "dt_bias", "g", "beta", "dg", "dbeta", "sums")}
        signature |= dict(num_rows="i32", steps="i32", size_1="i32", size_2="i32")
        for kernel in (gates_forward_kernel, gates_backward_kernel):
            name = kernel.__name__.removesuffix("_kernel")
            cases.append(
                Case(
                    name=f"{name} {heads} {dtype}",
                    kernel=kernel,
                    signature=signature,
                    constexprs=dict(D=heads, HAS_BETA=True, BETA_MAX=1.0),
                    config=config(name, arch, V=heads),
                    default=(heads, dtype) == (32, "bf16"),
                )
            )
    return cases
