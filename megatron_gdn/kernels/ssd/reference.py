"""Mamba2's state-space model, token by token: the definition that every backend is compared with.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t^T x_t        y_t = C_t S_t + D x_t

Row vectors, S `[N, P]`, one A and D per head (arXiv 2405.21060, equation 2 with a scalar decay and the skip D).
"""

import torch
from torch import Tensor


def recurrent_ssd_ref(
    x: Tensor,
    *,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence in plain torch; differentiable, slow, exact in float64.

    Arguments and results of `megatron_gdn.kernels.ssd.api.ssd`, with the bounds as a tensor.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    values, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    batch, num_tokens, num_heads, P = x.shape
    B, C = (t.repeat_interleave(num_heads // t.shape[2], dim=2) for t in (B, C))
    bounds = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = values.new_zeros(batch, num_heads, B.shape[-1], P)
        if initial_state is not None:
            state = (initial_state if cu_seqlens is None else initial_state[n : n + 1]).to(dtype)
        for t in range(start, end):
            write = B[:, t, :, :, None] * (dt[:, t, :, None] * values[:, t])[:, :, None, :]
            state = state * (dt[:, t] * A).exp()[..., None, None] + write
            outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], state))
        finals.append(state)
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(values)
    if D is not None:
        y = y + D.to(dtype)[:, None] * values
    return y.to(x.dtype), torch.cat(finals) if output_final_state else None
