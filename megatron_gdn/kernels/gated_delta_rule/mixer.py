"""All of a Gated DeltaNet layer between its projections, for callers that need nothing from in between.

    q, k, v = silu(conv1d(mixed))    g = -exp(A_log) softplus(alpha + dt_bias)    beta = sigmoid(b)
    y = rms_norm(rule(q, k, v, g, beta)) weight silu(z)

Backend torch calls the public operations one after the other; backend triton joins them where that saves traffic
(mixer_triton.py), with the same rule kernels.
"""

import torch
from torch import Tensor

from megatron_gdn.kernels.backend import accumulate_dtype, check_floats, check_triton_dtypes, resolve_backend
from megatron_gdn.kernels.causal_conv1d import causal_conv1d, check_width
from megatron_gdn.kernels.gated_delta_rule.api import chunk_gated_delta_rule
from megatron_gdn.kernels.gated_delta_rule.gate import gates as gates_of
from megatron_gdn.kernels.gated_rms_norm import rms_norm_gated
from megatron_gdn.kernels.l2norm import L2NORM_EPS
from megatron_gdn.kernels.varlen import ChunkTable, table_of_batch


def gated_delta_mixer(
    mixed: Tensor,
    gates: Tensor,
    *,
    conv_weight: Tensor,
    norm_weight: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    eps: float = 1e-5,
    allow_neg_eigval: bool = False,
    use_qk_l2norm: bool = True,
    cu_seqlens: Tensor | ChunkTable | None = None,
    backend: str = "auto",
) -> Tensor:
    """From the projections of a layer to what its last projection reads, with gradients.

    Args:
        mixed: `[B, T, 2 H K + HV V]` columns of q, k, v, or HV V more of z, the output gate; any strides.
        gates: `[B, T, 2 HV]`, b and alpha; without A_log `[B, T, HV]`, b.
        conv_weight: `[2 H K + HV V, W]`, W up to 4 with backend triton.
        norm_weight: `[V]`.
        A_log, dt_bias: `[HV]` float32; None: no decay.
        num_key_heads, num_value_heads, key_head_dim: H, HV, K.
        eps: of the gated norm.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        use_qk_l2norm: L2-normalise q and k.
        cu_seqlens: bounds of documents packed in B = 1, or their table from `prepare_chunk_table`.
        backend: see `megatron_gdn.kernels.backend`.

    Returns:
        y `[B, T, HV, V]` in mixed's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not match or that the backend cannot take, an unknown backend.
    """
    backend = resolve_backend(backend, mixed.device)
    H, HV, K, V = num_key_heads, num_value_heads, key_head_dim, norm_weight.shape[0]
    width = 2 * H * K + HV * V
    if mixed.dim() != 3 or mixed.shape[2] not in (width, width + HV * V):
        raise ValueError(
            f"mixed ({list(mixed.shape)}) must be [B, T, {width}] for q, k, v, or [B, T, {width + HV * V}] with z."
        )
    if gates.shape != (*mixed.shape[:2], HV if A_log is None else 2 * HV):
        raise ValueError(
            f"gates ({list(gates.shape)}) must be [B, T, 2 HV], b and alpha, for HV {HV} and mixed "
            f"({list(mixed.shape)}), or [B, T, HV] without A_log."
        )
    if conv_weight.dim() != 2 or conv_weight.shape[0] != width:
        raise ValueError(f"conv_weight ({list(conv_weight.shape)}) must be [{width}, W]: a row per channel.")
    if (A_log is None) != (dt_bias is None):
        raise ValueError("A_log and dt_bias must both be given, or neither: without decay there is none of them.")
    check_floats(
        mixed=mixed, gates=gates, conv_weight=conv_weight, norm_weight=norm_weight, A_log=A_log, dt_bias=dt_bias
    )
    if backend == "triton":
        return _run_triton(
            mixed, gates, conv_weight, norm_weight, A_log, dt_bias,
            (H, HV), (K, V), eps, allow_neg_eigval, use_qk_l2norm, cu_seqlens,
        )  # fmt: skip
    qkv, _ = causal_conv1d(mixed[..., :width], conv_weight, cu_seqlens=cu_seqlens, backend=backend)
    q, k, v = qkv.split([H * K, H * K, HV * V], -1)
    if A_log is None:
        beta = gates.to(accumulate_dtype(gates.dtype)).sigmoid() * (2 if allow_neg_eigval else 1)
        g = torch.zeros_like(beta)
    else:
        b, alpha = gates.split(HV, -1)
        g, beta = gates_of(alpha, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval, backend=backend)
    o, _ = chunk_gated_delta_rule(
        q.unflatten(-1, (H, K)),
        k.unflatten(-1, (H, K)),
        v.unflatten(-1, (HV, V)),
        g=g,
        beta=beta,
        use_qk_l2norm_in_kernel=use_qk_l2norm,
        cu_seqlens=cu_seqlens,
        allow_neg_eigval=allow_neg_eigval,
        backend=backend,
    )
    z = mixed[..., width:].unflatten(-1, (HV, V)) if mixed.shape[2] > width else None
    return rms_norm_gated(o, norm_weight, z, eps=eps, backend=backend)


def _run_triton(
    mixed, gates, conv_weight, norm_weight, A_log, dt_bias, heads, sizes, eps, allow_neg_eigval, l2norm, cu_seqlens
) -> Tensor:
    check_width(conv_weight)
    check_triton_dtypes(mixed=mixed, gates=gates, conv_weight=conv_weight, norm_weight=norm_weight)
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.dtype != torch.float32:
            raise ValueError(f"{name} ({x.dtype}) must be float32: convert it, a 16-bit {name} changes the decay.")
    from megatron_gdn.kernels.first_use import check_rule
    from megatron_gdn.kernels.gated_delta_rule.mixer_triton import MixerSetting, TritonMixer
    from megatron_gdn.kernels.gated_delta_rule.triton_chunk import TritonSetting

    table = table_of_batch(mixed, cu_seqlens)
    rule = TritonSetting(
        table=table,
        scale=sizes[0] ** -0.5,
        l2norm_eps=L2NORM_EPS if l2norm else None,
        negative_eigenvalues=allow_neg_eigval,
    )
    check_rule(mixed, heads, sizes, rule, has_state=False, norms=l2norm)
    documents = None if cu_seqlens is None else table
    setting = MixerSetting(heads=heads, sizes=sizes, eps=eps, rule=rule, documents=documents)
    return TritonMixer.apply(mixed, gates, conv_weight, norm_weight, A_log, dt_bias, setting)
