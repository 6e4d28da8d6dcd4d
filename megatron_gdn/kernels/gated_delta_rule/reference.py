"""The gated delta rule, token by token: the definition that every backend is compared with.

    S' = exp(g_t) S_{t-1}        u_t = beta_t (v_t - k_t S')        S_t = S' + k_t^T u_t        o_t = scale q_t S_t

Decay first, then the error, then the write (arXiv 2412.06464, equation 10, with S transposed: `[K, V]` here).
"""

import torch
from torch import Tensor


def recurrent_gated_delta_rule_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence in plain torch; differentiable, slow, exact in float64.

    Arguments and results are those of `megatron_gdn.kernels.chunk_gated_delta_rule`.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, values, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    batch, tokens, num_heads, K = q.shape
    num_value_heads, V = values.shape[2:]
    q, k = (x.repeat_interleave(num_value_heads // num_heads, dim=2) for x in (q, k))
    scale = K**-0.5 if scale is None else scale
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = values.new_zeros(batch, num_value_heads, K, V)
        if initial_state is not None:
            state = (initial_state if cu_seqlens is None else initial_state[n : n + 1]).to(dtype)
        for t in range(start, end):
            state = state * g[:, t, :, None, None].exp()
            u = beta[:, t, :, None] * (values[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
            state = state + k[:, t, :, :, None] * u[:, :, None, :]
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        finals.append(state)
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(values)
    return o.to(v.dtype), torch.cat(finals) if output_final_state else None
