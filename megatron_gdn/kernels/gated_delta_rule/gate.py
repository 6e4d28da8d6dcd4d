"""The gates: log-decay and write strength per token and head from their projections.

g = -exp(A_log) softplus(alpha + dt_bias)               beta = sigmoid(b), doubled with allow_neg_eigval
dalpha = -exp(A_log) sigmoid(alpha + dt_bias) dg        dA_log = sum g dg        ddt_bias = sum dalpha
db = beta (1 - sigmoid(b)) dbeta
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_gdn.kernels.backend import accumulate_dtype, check_floats, check_triton_dtypes, resolve_backend


def gated_delta_gate_ref(alpha: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """The formula in plain torch; arguments as `gated_delta_gate`."""
    dtype = accumulate_dtype(A_log.dtype)
    return -A_log.to(dtype).exp() * F.softplus(alpha.to(dtype) + dt_bias.to(dtype))


def gates_ref(
    alpha: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *, allow_neg_eigval: bool = False
) -> tuple[Tensor, Tensor]:
    """The formulas in plain torch; arguments as `gates`."""
    beta = b.to(accumulate_dtype(A_log.dtype)).sigmoid()
    return gated_delta_gate_ref(alpha, A_log, dt_bias), beta * 2 if allow_neg_eigval else beta


class _Gate(torch.autograd.Function):
    """Saves only the inputs."""

    @staticmethod
    def forward(ctx, alpha, A_log, dt_bias, dtype):
        ctx.save_for_backward(alpha, A_log, dt_bias)
        ctx.dtype = dtype
        return F.softplus(alpha.to(dtype) + dt_bias.to(dtype)).mul_(-A_log.to(dtype).exp())

    @staticmethod
    @once_differentiable
    def backward(ctx, dg):
        alpha, A_log, dt_bias = ctx.saved_tensors
        x = alpha.to(ctx.dtype) + dt_bias.to(ctx.dtype)
        dg = dg * -A_log.to(ctx.dtype).exp()
        dalpha = x.sigmoid().mul_(dg)
        dA_log = dg.mul_(F.softplus(x)).sum_to_size(A_log.shape)
        ddt_bias = dalpha.sum_to_size(dt_bias.shape)
        return dalpha.to(alpha.dtype), dA_log.to(A_log.dtype), ddt_bias.to(dt_bias.dtype), None


def gated_delta_gate(alpha: Tensor, A_log: Tensor, dt_bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Log-decay per step, as Mamba2 parametrises it (arXiv 2412.06464, section 3.1).

    Args:
        alpha: `[..., HV]`, the projection, any float dtype.
        A_log: `[HV]` float32 (or float64), log of the decay's rate.
        dt_bias: `[HV]` float32 (or float64).
        backend: see `megatron_gdn.kernels.backend`.

    Returns:
        g `[..., HV]`, never positive, float32, or float64 for float64 A_log.

    Raises:
        ValueError: shapes or devices that do not match, A_log or dt_bias below float32, dtypes that the backend cannot
            take, an unknown backend.
    """
    backend = resolve_backend(backend, alpha.device)
    _check(alpha, None, A_log, dt_bias)
    if backend == "triton":
        return _gates_triton(alpha, None, A_log, dt_bias, beta_max=1.0)[0]
    return _Gate.apply(alpha, A_log, dt_bias, accumulate_dtype(A_log.dtype))


def gates(
    alpha: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    allow_neg_eigval: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-decay and write strength per step; the Triton backend computes both in one launch.

        g = -exp(A_log) softplus(alpha + dt_bias)        beta = sigmoid(b)

    Args:
        alpha: `[..., HV]`, the projection of the decay, any float dtype and strides.
        b: `[..., HV]`, the projection of beta, any float dtype and strides.
        A_log: `[HV]` float32 (or float64), log of the decay's rate.
        dt_bias: `[HV]` float32 (or float64).
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        backend: see `megatron_gdn.kernels.backend`.

    Returns:
        g, never positive, and beta, both `[..., HV]` float32, or float64 for float64 A_log.

    Raises:
        ValueError: shapes or devices that do not match, A_log or dt_bias below float32, dtypes that the backend cannot
            take, an unknown backend.
    """
    backend = resolve_backend(backend, alpha.device)
    _check(alpha, b, A_log, dt_bias)
    if backend == "triton":
        return _gates_triton(alpha, b, A_log, dt_bias, beta_max=2.0 if allow_neg_eigval else 1.0)
    dtype = accumulate_dtype(A_log.dtype)
    beta = b.to(dtype).sigmoid()
    return _Gate.apply(alpha, A_log, dt_bias, dtype), beta * 2 if allow_neg_eigval else beta


def _gates_triton(alpha, b, A_log, dt_bias, *, beta_max: float) -> tuple[Tensor, Tensor | None]:
    check_triton_dtypes(alpha=alpha, b=b, A_log=A_log, dt_bias=dt_bias)
    from megatron_gdn.kernels.gated_delta_rule.gate_triton import GatesTriton

    return GatesTriton.apply(alpha, b, A_log, dt_bias, beta_max)


def _check(alpha: Tensor, b: Tensor | None, A_log: Tensor, dt_bias: Tensor) -> None:
    """Raise ValueError for inputs that do not fit together."""
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x.shape != alpha.shape[-1:]:
            raise ValueError(
                f"{name} ({list(x.shape)}) must have the last dimension of alpha ({list(alpha.shape)}): one per head."
            )
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} ({x.dtype}) must be float32: convert it, a 16-bit {name} changes the decay by percents."
            )
    if b is not None and b.shape != alpha.shape:
        raise ValueError(f"b ({list(b.shape)}) must have the shape of alpha ({list(alpha.shape)}): one per head.")
    check_floats(alpha=alpha, b=b, A_log=A_log, dt_bias=dt_bias)
