"""Public function of Mamba2's state-space model: check once, then run a backend."""

import torch
from torch import Tensor

from megatron_gdn.kernels.backend import accumulate_dtype, check_floats, check_triton_dtypes, resolve_backend
from megatron_gdn.kernels.ssd.chunk import ChunkSSD, Setting
from megatron_gdn.kernels.varlen import ChunkTable, table_of_batch


def ssd(
    x: Tensor,
    *,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | ChunkTable | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mamba2's state-space duality over chunks of 64 tokens (arXiv 2405.21060, section 6), with gradients.

        S_t = exp(dt_t A) S_{t-1} + dt_t B_t^T x_t        y_t = C_t S_t + D x_t

    Backend torch computes in float32, or float64 where x is float64; triton multiplies in x's dtype, sums in float32.

    Args:
        x: `[batch, T, H, P]`, any float dtype, any strides.
        dt: `[batch, T, H]`, float32 (any float dtype), the step after its softplus, >= 0.
        A: `[H]`, float32 (any float dtype), rate of the decay, <= 0; exp(dt A) multiplies the state.
        B, C: `[batch, T, G, N]` in x's dtype, what writes and what reads; H a multiple of G, head h uses group
            h // (H / G).
        D: `[H]`, float32 (any float dtype), the skip; None for none.
        initial_state: `[M, H, N, P]`, M = batch or the number of packed documents; None for zeros.
        output_final_state: return the state after each sequence.
        cu_seqlens: `[M + 1]` int32 or int64, bounds of documents packed in batch = 1; the state restarts at each,
            documents may be empty. A table from `prepare_chunk_table` saves reading the bounds in every call.
        backend: see `megatron_gdn.kernels.backend`.

    Returns:
        y `[batch, T, H, P]` in x's dtype, and the final states `[M, H, N, P]` in float32 (float64) or None. T may be 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, bad bounds, an unknown backend.
    """
    backend = resolve_backend(backend, x.device)
    table = _check(x, dt, A, B, C, D, initial_state, cu_seqlens)
    if backend == "triton":
        from megatron_gdn.kernels.first_use import check_ssd
        from megatron_gdn.kernels.ssd.triton_ssd import TritonSSD

        check_triton_dtypes(x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
        check_ssd(x, B, D, initial_state)
        y, final_state = TritonSSD.apply(x, dt, B, C, A, D, initial_state, table)
        return y, final_state if output_final_state else None
    setting = Setting(table=table, dtype=accumulate_dtype(x.dtype), grad_enabled=torch.is_grad_enabled())
    tokens = (t.flatten(0, 1) for t in (x, dt, B, C))
    y, final_state = ChunkSSD.apply(*tokens, A, D, initial_state, setting)
    return y.unflatten(0, x.shape[:2]), final_state if output_final_state else None


def _check(x, dt, A, B, C, D, initial_state, cu_seqlens) -> ChunkTable:
    """Raise ValueError for inputs that do not fit together; returns the table of the batch."""
    if B.dim() != 4 or B.shape != C.shape:
        raise ValueError(
            f"B ({list(B.shape)}) and C ({list(C.shape)}) must both be [batch, T, G, N]: give them one shape."
        )
    if x.dim() != 4 or x.shape[:2] != B.shape[:2]:
        raise ValueError(
            f"x ({list(x.shape)}) must be [batch, T, H, P] with batch and T of B ({list(B.shape)}): the layout is "
            "token by token, not head by head."
        )
    if 0 in (x.shape[0], *x.shape[2:], *B.shape[2:]):
        raise ValueError(f"x ({list(x.shape)}) and B ({list(B.shape)}) must not be empty but in T: drop the call.")
    if x.shape[2] % B.shape[2]:
        raise ValueError(
            f"x's heads ({x.shape[2]}) must be a multiple of B's groups ({B.shape[2]}): every group serves the same "
            "number of heads."
        )
    if dt.shape != x.shape[:3]:
        raise ValueError(f"dt ({list(dt.shape)}) must be [batch, T, H] = {list(x.shape[:3])}: one step per head.")
    for name, parameter in (("A", A), ("D", D)):
        if parameter is not None and parameter.shape != x.shape[2:3]:
            raise ValueError(f"{name} ({list(parameter.shape)}) must be [H] = [{x.shape[2]}]: one number per head.")
    check_floats(x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    if not x.dtype == B.dtype == C.dtype:
        raise ValueError(f"x ({x.dtype}), B ({B.dtype}) and C ({C.dtype}) must have one dtype: convert them.")
    table = table_of_batch(x, cu_seqlens)
    expected = (len(table.lengths), x.shape[2], B.shape[3], x.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"initial_state ({list(initial_state.shape)}) must be [M, H, N, P] = {list(expected)}: one state per "
            "sequence or packed document."
        )
    return table
