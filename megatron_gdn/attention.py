"""Causal attention layers with options per layer: window, positions, norms of q and k, output gate.

Megatron's SelfAttention does the work: projections, tensor and sequence parallelism, RoPE, and since 0.16 the output
gate. Its options are fields of the one TransformerConfig of all layers. What each offers in megatron-core 0.16.1, and
what is done here:

    window_size, window_attn_skip_freq   one size, layers by number; the local path builds a T x T mask
    no_rope_freq                         layers by number
    attention_output_gate                all layers; breaks where num_query_groups is below the tensor-parallel size
    qk_layernorm                         the spec's norms build per layer, but their gradients are summed over
                                         tensor-parallel ranks only where this is set for the whole model
    rotary_percent, rotary_base          arguments of GPTModel, which makes one embedding for all layers

`HybridSelfAttention` gives the host's code a copy of the configuration with this layer's fields, and has a rotary
embedding of its own where the layer's differs. On disk the keys are the host's.
"""

import copy

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_gdn.kernels.sliding_window import check_window, resolve_attention_backend, sliding_window_attention
from megatron_gdn.norms import HeadRMSNorm
from megatron_gdn.optional import require

# What the core cannot do: field of TransformerConfig -> the only value it takes, and the remedy.
_CORE_LIMITS = {
    "context_parallel_size": (1, "use tensor and sequence parallelism for long sequences, or backend 'te'"),
    "attention_dropout": (0.0, "set it to 0, or use backend 'te'"),
    "softmax_type": ("vanilla", "use backend 'te'"),
    "qk_clip": (False, "use qk_norm, or backend 'te'"),
    "log_max_attention_logit": (False, "turn it off, or use backend 'te'"),
}
# The host's settings for all layers -> the layer's option that takes their place.
_LAYER_OPTIONS = {
    "window_size": "window",
    "window_attn_skip_freq": "window",
    "no_rope_freq": "rope",
    "attention_output_gate": "output_gate",
    "qk_layernorm": "qk_norm",
    "qk_l2_norm": "qk_norm",
}


class SlidingWindowAttention(MegatronModule):
    """Megatron's `core_attention` over `megatron_gdn.kernels.sliding_window`; has no parameters.

    Args:
        config: Megatron's TransformerConfig.
        layer_number: global number of the layer, from 1.
        attn_mask_type: causal.
        attention_type: "self".
        attention_dropout: must be 0; None: config's.
        softmax_scale: None: kv_channels ** -0.5.
        window: tokens that a token sees, itself included; None: by config's window_size and window_attn_skip_freq,
            which is all tokens where they are not set.
        backend: "torch", "flash" or "flex".

    Raises:
        ValueError: a setting of config that this core does not have; a window_size that is not causal, or two windows.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        window: int | None = None,
        backend: str = "torch",
        **host_kwargs,
    ):
        super().__init__(config)
        for name, (only, remedy) in _CORE_LIMITS.items():
            value = getattr(config, name, only)
            if name == "attention_dropout" and attention_dropout is not None:
                value = attention_dropout
            if value != only:
                raise ValueError(f"{name} ({value}) must be {only} with attention backend {backend!r}: {remedy}.")
        if attention_type != "self":
            raise ValueError(f"attention_type ({attention_type}) must be 'self': use Megatron's cross attention.")
        self.attn_mask_type, self.backend, self.softmax_scale = attn_mask_type, backend, softmax_scale
        self.window = _window(config, layer_number, window)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[sq, b, np, hn]` of this rank's heads; packed `[t, np, hn]`.
            key, value: `[sq, b, ng, hn]`, packed `[t, ng, hn]`; the head size of value may differ.
            attention_mask: ignored, as by Transformer Engine: the mask is causal.
            attn_mask_type: None: the one given at the start.
            attention_bias: must be None.
            packed_seq_params: format thd; reads cu_seqlens_q_padded, else cu_seqlens_q.

        Returns:
            `[sq, b, np * hn]`; packed `[t, np * hn]`.

        Raises:
            ValueError: a mask that is not causal, a bias, keys of other tokens than the queries, another packed format.
        """
        mask_type = attn_mask_type or self.attn_mask_type
        if mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"attn_mask_type ({mask_type.name}) must be causal: this attention looks back only.")
        if attention_bias is not None:
            raise ValueError(f"attention_bias ({list(attention_bias.shape)}) must be None: use backend 'te'.")
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"key ({key.shape[0]} tokens) must have the tokens of query ({query.shape[0]}): there is no cached "
                "decoding, run the whole sequence."
            )
        if packed_seq_params is None:
            if mask_type == AttnMaskType.padding_causal:
                raise ValueError("attn_mask_type (padding_causal) needs packed_seq_params: pad behind, and use causal.")
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            return self._attend(q, k, v).transpose(0, 1).flatten(2)
        if packed_seq_params.qkv_format != "thd":
            raise ValueError(f"qkv_format ({packed_seq_params.qkv_format}) must be thd: pack the documents in one row.")
        bounds = packed_seq_params.cu_seqlens_q_padded
        bounds = packed_seq_params.cu_seqlens_q if bounds is None else bounds
        q, k, v = (x.unsqueeze(0) for x in (query, key, value))
        return self._attend(q, k, v, bounds).squeeze(0).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """`[b, s, heads, size]` to `[b, s, np, V]`."""
        options = dict(window=self.window, scale=self.softmax_scale, backend=self.backend)
        return sliding_window_attention(q, k, v, cu_seqlens=cu_seqlens, **options)


class CoreAttention:
    """Builds the `core_attention` of a backend: Transformer Engine's through Megatron, or `SlidingWindowAttention`.

    A class that returns another's instance, as Megatron's TENorm: specs want a class, and a module around
    Transformer Engine's would change its keys on disk.

    Args:
        config, layer_number, window and all else: as of `SlidingWindowAttention`.
        backend: see `megatron_gdn.kernels.sliding_window.resolve_attention_backend`; the device is CUDA where there is
            one.
    """

    def __new__(
        cls, config: TransformerConfig, layer_number: int, *, window: int | None = None, backend: str = "auto", **kwargs
    ):
        backend = resolve_attention_backend(
            backend,
            "cuda" if torch.cuda.is_available() else "cpu",
            dtype=config.params_dtype,
            head_dims=(config.kv_channels, config.kv_channels),
        )
        if backend != "te":
            return SlidingWindowAttention(config, layer_number, window=window, backend=backend, **kwargs)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        window = _window(config, layer_number, window)
        config = _with_window(config, window)
        return TEDotProductAttention(config=config, layer_number=layer_number, **kwargs)


class HybridSelfAttention(SelfAttention):
    """Megatron's SelfAttention with the options of this layer; norms of q and k come with the submodules.

    Args:
        config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection: the host's.
        window: tokens that a token sees, itself included; None: all before it.
        softmax_scale: None: config's, or kv_channels ** -0.5.
        rope: rotate q and k by position; False: no positions (NoPE).
        rotary_percent: share of each head, its first part, that is rotated.
        rotary_base: base of this layer's own rotary embedding; None: the model's, of the same share.
        output_gate: multiply the output by the sigmoid of a gate that is projected beside q (Qwen3-Next). Rows of
            linear_qkv: for each key head its query heads, their gates, k, v.
        host_kwargs: what later hosts add.

    Raises:
        ValueError: a setting for all layers beside the layer's; a share that leaves no even number of dimensions;
            an output gate with fewer key heads than ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        window: int | None = None,
        softmax_scale: float | None = None,
        rope: bool = True,
        rotary_percent: float = 1.0,
        rotary_base: float | None = None,
        output_gate: bool = False,
        **host_kwargs,
    ):
        for name, option in _LAYER_OPTIONS.items():
            if value := getattr(config, name, None):
                raise ValueError(f"{name} ({value}) must not be set for all layers: give this one {option}=...")
        rotary_dim = int(config.kv_channels * rotary_percent)
        if rope and not (0 < rotary_percent <= 1 and rotary_dim >= 2 and rotary_dim % 2 == 0):
            raise ValueError(
                f"rotary_percent ({rotary_percent}) of kv_channels ({config.kv_channels}) must be an even number of "
                f"dimensions from 2 to {config.kv_channels}, not {rotary_dim}: dimensions turn in pairs."
            )
        layer_config = _with_window(config, window)
        layer_config.attention_output_gate = output_gate
        if softmax_scale is not None:
            layer_config.softmax_scale = softmax_scale
        super().__init__(
            layer_config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection, **host_kwargs
        )
        if output_gate and config.num_query_groups < self.world_size:
            # 0.16.1 takes this rank's part of q, but not of the gate.
            raise ValueError(
                f"num_query_groups ({config.num_query_groups}) must be at least tensor_model_parallel_size "
                f"({self.world_size}) with output_gate: use more groups or fewer ranks."
            )
        for norm in (self.q_layernorm, self.k_layernorm):
            if isinstance(norm, HeadRMSNorm):
                norm.tp_group = self.tp_group
        self.rope, self.rotary_dim, self.rotary_pos_emb = rope, rotary_dim, None
        if rope and rotary_base is not None:
            self.rotary_pos_emb = RotaryEmbedding(
                config.kv_channels,
                rotary_percent,
                rotary_interleaved=config.rotary_interleaved,
                rotary_base=rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_context=None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **host_kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens, `[s, b, h]` in and out; arguments as of the host's SelfAttention.

        Raises:
            ValueError: an inference context; RoPE without an embedding of the layer's width.
        """
        if inference_context is not None:
            raise ValueError(
                f"inference_context ({type(inference_context).__name__}) must be None: hybrid models have no cached "
                "decoding under Megatron; run the whole sequence."
            )
        return super().forward(
            hidden_states,
            attention_mask,
            rotary_pos_emb=self._rotary(hidden_states, rotary_pos_emb, packed_seq_params),
            packed_seq_params=packed_seq_params,
            **host_kwargs,
        )

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        if x.is_cuda:
            return super()._apply_output_gate(x, gate)
        # The host's is a torch.compile, which on a CPU wants a C++ compiler and seconds.
        return (x * gate.reshape(x.shape).float().sigmoid()).to(x.dtype)

    def _rotary(self, hidden_states: Tensor, given, packed_seq_params: PackedSeqParams | None):
        """The embedding that the host applies: none, this layer's, or the model's."""
        if not self.rope:
            return None
        if self.rotary_pos_emb is not None:
            if packed_seq_params is None:
                ranks = self.world_size if self.config.sequence_parallel else 1
                return self.rotary_pos_emb(hidden_states.shape[0] * ranks * self.config.context_parallel_size)
            longest = packed_seq_params.max_seqlen_q
            if longest is None:
                bounds = packed_seq_params.cu_seqlens_q_padded
                bounds = packed_seq_params.cu_seqlens_q if bounds is None else bounds
                longest = int(bounds.diff().max())  # waits for the device; the loader's max_seqlen_q does not
            return self.rotary_pos_emb(int(longest), packed_seq=True)
        width = None if given is None else (given[0] if isinstance(given, tuple) else given).shape[-1]
        if width != self.rotary_dim:
            raise ValueError(
                f"rotary_pos_emb (width {width}) must have this layer's {self.rotary_dim} rotated dimensions: give "
                "the layer a rotary_base of its own, or rope=False."
            )
        return given


def attention_spec(
    *,
    window: int | None = None,
    rope: bool = True,
    rotary_percent: float = 1.0,
    rotary_base: float | None = None,
    qk_norm: bool = False,
    output_gate: bool = False,
    zero_centered_norm: bool = False,
    softmax_scale: float | None = None,
    backend: str = "auto",
    provider: str = "local",
) -> ModuleSpec:
    """Spec of a causal attention layer, usable as `self_attention` of a TransformerLayer.

    Args:
        window, rope, rotary_percent, rotary_base, output_gate, softmax_scale: see `HybridSelfAttention`.
        qk_norm: RMSNorm of each q and k head, before the rotation.
        zero_centered_norm: those norms multiply by 1 + weight.
        backend: of the scores: "auto", "te", "flash", "flex" or "torch".
        provider: of the linear layers: "local", Megatron's, or "te", Transformer Engine's. The norm before the layer
            stays the TransformerLayer's own `input_layernorm` with both.

    Raises:
        ValueError: an unknown provider; zero_centered_norm without qk_norm.
        MissingPackageError: provider "te" without Transformer Engine.
    """
    if zero_centered_norm and not qk_norm:
        raise ValueError("zero_centered_norm (True) needs qk_norm: it is about the norms of q and k.")
    norm = ModuleSpec(module=HeadRMSNorm, params={"zero_centered": zero_centered_norm}) if qk_norm else None
    column, row = _linears(provider)
    return ModuleSpec(
        module=HybridSelfAttention,
        params=dict(
            attn_mask_type=AttnMaskType.causal,
            window=window,
            rope=rope,
            rotary_percent=rotary_percent,
            rotary_base=rotary_base,
            output_gate=output_gate,
            softmax_scale=softmax_scale,
        ),
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=ModuleSpec(module=CoreAttention, params={"backend": backend}),
            linear_proj=row,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _linears(provider: str) -> tuple[type, type]:
    """Column- and row-parallel linear layers."""
    if provider == "local":
        return ColumnParallelLinear, RowParallelLinear
    if provider == "te":
        require("transformer_engine", extra="te", purpose="attention_spec(provider='te')")
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return TEColumnParallelLinear, TERowParallelLinear
    raise ValueError(
        f"provider ({provider}) must be 'local' or 'te': Megatron's linear layers or Transformer Engine's."
    )


def _window(config: TransformerConfig, layer_number: int, window: int | None) -> int | None:
    """Tokens that a token of this layer sees, from its own option or the host's settings; None: all before it."""
    check_window(window)
    size = config.window_size
    if not is_layer_window_attention(size, config.window_attn_skip_freq, layer_number):
        return window
    left, right = size
    if right != 0 or left < -1:
        raise ValueError(f"window_size ({tuple(size)}) must be (window - 1, 0): causal attention looks back only.")
    from_host = None if left == -1 else left + 1
    if window not in (None, from_host):
        raise ValueError(f"window ({window}) and window_size ({tuple(size)}) differ: set one of them.")
    return from_host


def _with_window(config: TransformerConfig, window: int | None) -> TransformerConfig:
    """A copy for one layer; the host does the same where it changes num_query_groups."""
    check_window(window)
    layer_config = copy.copy(config)
    layer_config.window_size = None if window is None else (window - 1, 0)
    layer_config.window_attn_skip_freq = None
    return layer_config
