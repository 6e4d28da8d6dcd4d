"""Public functions of the gated delta rule: check once, then run a backend."""

import torch
from torch import Tensor

from megatron_gdn.kernels.backend import accumulate_dtype, check_floats, check_triton_dtypes, resolve_backend
from megatron_gdn.kernels.gated_delta_rule.chunk import ChunkGatedDeltaRule, Setting
from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from megatron_gdn.kernels.l2norm import L2NORM_EPS
from megatron_gdn.kernels.varlen import ChunkTable, table_of_batch


def chunk_gated_delta_rule(
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
    cu_seqlens: Tensor | ChunkTable | None = None,
    allow_neg_eigval: bool = False,
    recompute_states: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over chunks of 64 tokens (arXiv 2412.06464, section 3.3), with gradients.

        S_t = exp(g_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t        o_t = scale q_t S_t

    Arithmetic is float32, or float64 where v is float64.

    Args:
        q, k: `[B, T, H, K]`, any float dtype, any strides; k of norm at most 1, or use_qk_l2norm_in_kernel.
        v: `[B, T, HV, V]` in their dtype; HV a multiple of H, value head h uses key head h // (HV / H).
        g: `[B, T, HV]`, float32 (any float dtype), log-decay per step (natural log), <= 0; exp(g) multiplies the state.
        beta: `[B, T, HV]`, likewise, strength of the write, in (0, 1), or (0, 2) with negative eigenvalues.
        scale: of o; None: K ** -0.5.
        initial_state: `[N, HV, K, V]`, N = B or the number of packed documents; None for zeros.
        output_final_state: return the state after each sequence.
        use_qk_l2norm_in_kernel: L2-normalise q and k, eps 1e-6 in the sum of squares.
        cu_seqlens: `[N + 1]` int32 or int64, bounds of documents packed in B = 1; the state restarts at each, documents
            may be empty. A table from `prepare_chunk_table` saves reading the bounds in every call.
        allow_neg_eigval: beta may exceed 1; backend triton then solves each chunk with more digits.
        recompute_states: compute the states of the chunks again in the backward pass instead of keeping them; None: as
            the backend does (triton recomputes, torch keeps).
        backend: see `megatron_gdn.kernels.backend`; also "fla".

    Returns:
        o `[B, T, HV, V]` in v's dtype, and the final states `[N, HV, K, V]` in float32 (float64) or None. T may be 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, bad bounds, an unknown backend, an option that the
            backend does not have.
        RuntimeError: a Triton that compiles the kernels to wrong code, known or found on first use (`first_use.py`).
    """
    backend = resolve_backend(backend, v.device, offered=("torch", "triton", "fla"))
    table = _check(q, k, v, g, beta, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if recompute_states is not None and recompute_states != (backend == "fla") and backend != "triton":
        does = "computes the states again" if backend == "fla" else "keeps the states"
        raise ValueError(f"recompute_states ({recompute_states}) must be None with backend {backend}, which {does}.")
    l2norm_eps = L2NORM_EPS if use_qk_l2norm_in_kernel else None
    if backend == "triton":
        from megatron_gdn.kernels.first_use import check_rule
        from megatron_gdn.kernels.gated_delta_rule.triton_chunk import TritonChunkGatedDeltaRule, TritonSetting

        check_triton_dtypes(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
        triton_setting = TritonSetting(
            table=table,
            scale=scale,
            l2norm_eps=l2norm_eps,
            negative_eigenvalues=allow_neg_eigval,
            recompute_states=recompute_states is not False,
        )
        heads, sizes = (k.shape[2], v.shape[2]), (k.shape[3], v.shape[3])
        check_rule(v, heads, sizes, triton_setting, has_state=initial_state is not None)
        o, final_state = TritonChunkGatedDeltaRule.apply(q, k, v, g, beta, initial_state, triton_setting)
        return o, final_state if output_final_state else None
    if backend == "fla":
        return _run_fla(
            q,
            k,
            v,
            g=g,
            beta=beta,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=None if cu_seqlens is None else table.bounds,
        )
    setting = Setting(
        table=table,
        scale=scale,
        l2norm_eps=l2norm_eps,
        dtype=accumulate_dtype(v.dtype),
    )
    tokens = (x.flatten(0, 1) for x in (q, k, v, g.unsqueeze(-1), beta.unsqueeze(-1)))
    o, final_state = ChunkGatedDeltaRule.apply(*tokens, initial_state, setting)
    return o.unflatten(0, v.shape[:2]), final_state if output_final_state else None


def fused_recurrent_gated_delta_rule(
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
    cu_seqlens: Tensor | ChunkTable | None = None,
    update_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule token by token, for decoding; arguments and results of `chunk_gated_delta_rule`.

    The torch backend is the reference itself. The triton backend has no gradients: it raises where one is needed.

    Args:
        update_state: write the states after the tokens over `initial_state`, a contiguous pool in any float dtype, and
            return it; only without gradients, and for backend triton.
    """
    backend = resolve_backend(backend, v.device)
    table = _check(q, k, v, g, beta, initial_state, cu_seqlens)
    if backend == "triton":
        from megatron_gdn.kernels.gated_delta_rule.recurrent import recurrent

        check_triton_dtypes(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
        return recurrent(
            q,
            k,
            v,
            g=g,
            beta=beta,
            table=table,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            l2norm_eps=L2NORM_EPS if use_qk_l2norm_in_kernel else None,
            in_place=update_state,
        )
    if update_state:
        raise ValueError("update_state (True) must be False with backend torch, which returns new states: copy them.")
    return recurrent_gated_delta_rule_ref(
        q,
        k,
        v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=None if cu_seqlens is None else table.bounds,
    )


def _run_fla(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None, **options) -> tuple[Tensor, Tensor | None]:
    """flash-linear-attention's function, to compare with; its errors are its own."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule

    return rule(q, k, v, cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int64), **options)


def _check(q, k, v, g, beta, initial_state, cu_seqlens) -> ChunkTable:
    """Raise ValueError for inputs that do not fit together; returns the table of the batch."""
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(f"q ({list(q.shape)}) and k ({list(k.shape)}) must both be [B, T, H, K]: give them one shape.")
    if v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"v ({list(v.shape)}) must be [B, T, HV, V] with B and T of q ({list(q.shape)}): the layout is token by "
            "token, not head by head."
        )
    if 0 in (q.shape[0], *q.shape[2:], *v.shape[2:]):
        raise ValueError(f"q ({list(q.shape)}) and v ({list(v.shape)}) must not be empty but in T: drop the call.")
    if v.shape[2] % q.shape[2]:
        raise ValueError(
            f"v's heads ({v.shape[2]}) must be a multiple of q's heads ({q.shape[2]}): every key head serves the same "
            "number of value heads."
        )
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != v.shape[:3]:
            raise ValueError(f"{name} ({list(x.shape)}) must be [B, T, HV] = {list(v.shape[:3])}: one per value head.")
    check_floats(v=v, q=q, k=k, g=g, beta=beta, initial_state=initial_state)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q ({q.dtype}), k ({k.dtype}) and v ({v.dtype}) must have one dtype: convert them.")
    table = table_of_batch(v, cu_seqlens)
    expected = (len(table.lengths), v.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"initial_state ({list(initial_state.shape)}) must be [N, HV, K, V] = {list(expected)}: one state per "
            "sequence or packed document."
        )
    return table
