"""RMSNorm with an output gate: normalise, scale, then gate (the order of Megatron-Core and fla).

h = x r,  r = (mean x^2 + eps)^-1/2        y = h w act(z)
dh = dy act(z) w        dx = r (dh - h mean(h dh))        dw = sum dy act(z) h        dz = dy h w act'(z)
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.backend import accumulate_dtype, check_floats, check_triton_dtypes, resolve_backend

ACTIVATIONS = ("silu", "sigmoid")


def rms_norm_gated_ref(
    x: Tensor, weight: Tensor, z: Tensor | None = None, *, eps: float = 1e-5, activation: str = "silu"
) -> Tensor:
    """The formula in plain torch; arguments as `rms_norm_gated`."""
    wide = x.to(accumulate_dtype(x.dtype))
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide.dtype)
    if z is not None:
        z = z.to(wide.dtype)
        y = y * (torch.nn.functional.silu(z) if activation == "silu" else z.sigmoid())
    return y.to(x.dtype)


class _GatedRMSNorm(torch.autograd.Function):
    """Saves the inputs and one number per row."""

    @staticmethod
    def forward(ctx, x, weight, z, eps, activation):
        wide = x.to(accumulate_dtype(x.dtype))
        r = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = (wide * r).mul_(weight)
        if z is not None:
            y.mul_(_gate(z.to(wide.dtype), activation)[0])
        ctx.save_for_backward(x, weight, z, r)
        ctx.activation = activation
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, z, r = ctx.saved_tensors
        h, dy = x.to(r.dtype) * r, dy.to(r.dtype)
        dz = None
        if z is not None:
            gate, slope = _gate(z.to(r.dtype), ctx.activation)
            dz = (dy * h).mul_(weight).mul_(slope).to(z.dtype)
            dy = dy * gate
        dweight = (dy * h).sum_to_size(weight.shape).to(weight.dtype)
        dh = dy * weight
        dx = (dh - h * (h * dh).mean(-1, keepdim=True)).mul_(r).to(x.dtype)
        return dx, dweight, dz, None, None


def _gate(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(z) and its derivative."""
    s = z.sigmoid()
    if activation == "sigmoid":
        return s, s * (1 - s)
    return z * s, s * (1 + z * (1 - s))


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """x / rms(x) * weight * act(z) over the last dimension.

    Args:
        x: `[..., D]`, any float dtype; float32 inside, float64 stays float64. The Triton backend takes D up to 512
            and no float64.
        weight: `[D]`.
        z: `[..., D]`, the output gate before its activation; None for no gate.
        eps: added to the mean square.
        activation: "silu" or "sigmoid".
        backend: see `megatron_gdn.kernels.backend`.

    Returns:
        `[..., D]` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not match or that the backend cannot take, an unknown activation
            or backend.
    """
    backend = resolve_backend(backend, x.device)
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight ({list(weight.shape)}) must have the last dimension of x ({list(x.shape)}): one per channel."
        )
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z ({list(z.shape)}) must have the shape of x ({list(x.shape)}): one gate per element.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation ({activation}) must be 'silu' or 'sigmoid': pick one.")
    check_floats(x=x, weight=weight, z=z)
    if backend == "triton":
        check_triton_dtypes(x=x, weight=weight, z=z)
        from megatron_gdn.kernels.gated_rms_norm_triton import GatedRMSNormTriton

        return GatedRMSNormTriton.apply(x, weight, z, eps, activation)
    return _GatedRMSNorm.apply(x, weight, z, eps, activation)
