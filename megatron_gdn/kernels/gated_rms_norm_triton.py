"""Gated RMSNorm in Triton; formulas in gated_rms_norm.py, inputs are checked there.

Bytes per row of D elements of e bytes, with a gate: forward 3 e D + 4, backward 5 e D + 4; for bfloat16 and D = 128,
772 and 1284, which takes 0.26 ns and 0.43 ns at 3.0 TB/s. The backward pass recomputes h and the gate; each program
adds up its part of dw in float32, and torch adds the parts in a fixed order.
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
def _load_weight(p_weight, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if D == BLOCK_D:
        return tl.load(p_weight + o_d).to(tl.float32)
    else:
        return tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def gated_rms_norm_forward_kernel(
    p_x,
    p_weight,
    p_z,
    p_y,
    p_r,
    num_rows,
    eps,
    size_1,
    size_2,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_z0,
    stride_z1,
    stride_z2,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes BLOCK_R rows, and keeps r of each for the backward pass."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = row < num_rows
    o_d = tl.arange(0, BLOCK_D)
    mask = mask_of(m_row, D, BLOCK_D)
    o_x = row_offsets(row, size_1, size_2, stride_x0, stride_x1, stride_x2)
    x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    y = x * r[:, None] * _load_weight(p_weight, o_d, D, BLOCK_D)[None, :]
    if GATED:
        o_z = row_offsets(row, size_1, size_2, stride_z0, stride_z1, stride_z2)
        z = tl.load(p_z + o_z[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z)
        if SILU:
            gate = z * gate
        y = y * gate
    store(p_y + (row.to(tl.int64) * D)[:, None] + o_d[None, :], y, mask=mask)
    tl.store(p_r + row, r, mask=m_row)


@triton.jit(do_not_specialize=["num_rows", "steps"])
def gated_rms_norm_backward_kernel(
    p_dy,
    p_x,
    p_weight,
    p_z,
    p_r,
    p_dx,
    p_dz,
    p_dweight,
    num_rows,
    steps,
    size_1,
    size_2,
    stride_dy0,
    stride_dy1,
    stride_dy2,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_z0,
    stride_z1,
    stride_z2,
    stride_dz0,
    stride_dz1,
    stride_dz2,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes `steps` blocks of rows one after the other, and writes its sum of dw to its row of p_dweight."""
    o_d = tl.arange(0, BLOCK_D)
    weight = _load_weight(p_weight, o_d, D, BLOCK_D)
    dweight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = tl.program_id(0) * steps
    for step in range(0, steps):
        row = (first + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = row < num_rows
        mask = mask_of(m_row, D, BLOCK_D)
        o_x = row_offsets(row, size_1, size_2, stride_x0, stride_x1, stride_x2)
        o_dy = row_offsets(row, size_1, size_2, stride_dy0, stride_dy1, stride_dy2)
        x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o_dy[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        r = tl.load(p_r + row, mask=m_row, other=0.0)
        h = x * r[:, None]
        if GATED:
            o_z = row_offsets(row, size_1, size_2, stride_z0, stride_z1, stride_z2)
            o_dz = row_offsets(row, size_1, size_2, stride_dz0, stride_dz1, stride_dz2)
            z = tl.load(p_z + o_z[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
            s = tl.sigmoid(z)
            if SILU:
                gate = z * s
                slope = s * (1 + z * (1 - s))
            else:
                gate = s
                slope = s * (1 - s)
            store(p_dz + o_dz[:, None] + o_d[None, :], dy * h * weight[None, :] * slope, mask=mask)
            dy = dy * gate
        dweight += dy * h
        dh = dy * weight[None, :]
        dx = (dh - h * (tl.sum(h * dh, 1) / D)[:, None]) * r[:, None]
        store(p_dx + (row.to(tl.int64) * D)[:, None] + o_d[None, :], dx, mask=mask)
    p_dweight += tl.program_id(0).to(tl.int64) * D
    if D == BLOCK_D:
        tl.store(p_dweight + o_d, tl.sum(dweight, 0))
    else:
        tl.store(p_dweight + o_d, tl.sum(dweight, 0), mask=o_d < D)


def forward(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, activation: str) -> tuple[Tensor, Tensor]:
    """y in x's dtype, contiguous, and r `[rows]` float32."""
    rows, D = Rows(x, x if z is None else z), x.shape[-1]
    launch = config("gated_rms_norm_forward", architecture(x.device), V=D)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = torch.empty(rows.num_rows, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows.num_rows, dict(launch.block)["BLOCK_R"]),)
    if x.numel():
        with torch.cuda.device_of(x):
            gated_rms_norm_forward_kernel[grid](
                rows.tensors[0],
                weight.contiguous(),
                rows.tensors[1],
                y,
                r,
                rows.num_rows,
                eps,
                *rows.sizes,
                *rows.strides[0],
                *rows.strides[1],
                GATED=z is not None,
                SILU=activation == "silu",
                D=D,
                **launch.launch,
            )
    return y, r


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    r: Tensor,
    activation: str,
    *,
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx in x's dtype, contiguous; dweight in weight's; dz in z's, None without z.

    Args:
        dz: where to write dz, of z's shape and dtype, the last dimension contiguous, any other strides; None: new
            memory.
    """
    D = x.shape[-1]
    launch = config("gated_rms_norm_backward", architecture(x.device), V=D)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if z is not None and dz is None:
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    assert dz is None or (dz.shape == z.shape and (D == 1 or dz.stride(-1) == 1)), "dz must be z's shape, D contiguous"
    rows = Rows(dy, x, x if z is None else z, dx if dz is None else dz)
    target = rows.tensors[3]
    programs, steps = split_rows(rows.num_rows, dict(launch.block)["BLOCK_R"])
    dweight = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            gated_rms_norm_backward_kernel[(programs,)](
                rows.tensors[0],
                rows.tensors[1],
                weight.contiguous(),
                rows.tensors[2],
                r,
                dx,
                target,
                dweight,
                rows.num_rows,
                steps,
                *rows.sizes,
                *(stride for strides in rows.strides for stride in strides),
                GATED=z is not None,
                SILU=activation == "silu",
                D=D,
                **launch.launch,
            )
    if dz is not None and target is not dz:
        dz.copy_(target)
    return dx, dweight.sum(0).to(weight.dtype), dz


class GatedRMSNormTriton(torch.autograd.Function):
    """Saves the inputs and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, z, eps, activation):
        y, r = forward(x, weight, z, eps, activation)
        ctx.save_for_backward(x, weight, z, r)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *backward(dy, *ctx.saved_tensors, ctx.activation), None, None


def compile_cases(arch: str) -> list[Case]:
    """The kernels as shipped, with SiLU."""
    cases = []
    for D, dtype in ((128, "bf16"), (64, "bf16"), (384, "bf16"), (512, "bf16"), (128, "fp32"), (128, "fp16")):
        signature = {f"stride_{x}{i}": "i32" for x in ("x", "z", "dy", "dz") for i in range(3)}
        signature |= {f"p_{x}": f"*{dtype}" for x in ("x", "weight", "z", "y", "dy", "dx", "dz")}
        signature |= dict(num_rows="i32", steps="i32", eps="fp32", size_1="i32", size_2="i32")
        signature |= dict(p_r="*fp32", p_dweight="*fp32")
        for kernel in (gated_rms_norm_forward_kernel, gated_rms_norm_backward_kernel):
            name = kernel.__name__.removesuffix("_kernel")
            cases.append(
                Case(
                    name=f"{name} {D} {dtype}",
                    kernel=kernel,
                    signature=signature,
                    constexprs=dict(D=D, GATED=True, SILU=True),
                    config=config(name, arch, V=D),
                    default=(D, dtype) == (128, "bf16"),
                )
            )
    return cases
