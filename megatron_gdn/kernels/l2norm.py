"""L2 norm of the last dimension, as q and k get before the gated delta rule.

y = x r,  r = (sum x^2 + eps)^-1/2        dx = r (dy - y (y . dy))
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.backend import accumulate_dtype, check_floats, check_triton_dtypes, resolve_backend

L2NORM_EPS = 1e-6


def l2norm_ref(x: Tensor, *, eps: float = L2NORM_EPS) -> Tensor:
    """The formula in plain torch; arguments as `l2norm`."""
    wide = x.to(accumulate_dtype(x.dtype))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


class _L2Norm(torch.autograd.Function):
    """Saves the input and one number per row."""

    @staticmethod
    def forward(ctx, x, eps):
        wide = x.to(accumulate_dtype(x.dtype))
        r = wide.square().sum(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r)
        return (wide * r).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, r = ctx.saved_tensors
        dy = dy.to(r.dtype)
        y = x.to(r.dtype) * r
        return ((dy - y * (y * dy).sum(-1, keepdim=True)) * r).to(x.dtype), None


def l2norm(x: Tensor, *, eps: float = L2NORM_EPS, backend: str = "auto") -> Tensor:
    """x divided by its L2 norm over the last dimension.

    Args:
        x: `[..., D]`, any float dtype; float32 inside, float64 stays float64. The Triton backend takes D up to 512
            and no float64.
        eps: added to the sum of squares.
        backend: see `megatron_gdn.kernels.backend`.

    Returns:
        `[..., D]` in x's dtype.

    Raises:
        ValueError: an x that is not a float tensor, or that the backend cannot take; an unknown backend.
    """
    backend = resolve_backend(backend, x.device)
    check_floats(x=x)
    if backend == "triton":
        check_triton_dtypes(x=x)
        from megatron_gdn.kernels.l2norm_triton import L2NormTriton

        return L2NormTriton.apply(x, eps)
    return _L2Norm.apply(x, eps)
