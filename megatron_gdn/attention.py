"""Causal attention layers with options per layer: window, positions, norms of q and k, output gate.

Megatron's SelfAttention does the work: projections, tensor and sequence parallelism, RoPE, and since 0.16 the output
gate. Its options are fields of the one TransformerConfig of all layers. What each offers in megatron-core 0.16.1, and
what is done here:

    window_size, window_attn_skip_freq   one size, layers by number; the local path builds a T x T mask
    no_rope_freq                         layers by number
    num_attention_heads, num_query_groups   all layers; multiples of the tensor-parallel size
    attention_output_gate                all layers; breaks where num_query_groups is below the tensor-parallel size
    qk_layernorm                         the spec's norms build per layer, but their gradients are summed over
                                         tensor-parallel ranks only where this is set for the whole model
    rotary_percent, rotary_base          arguments of GPTModel, which makes one embedding for all layers

`HybridSelfAttention` gives the host's code a copy of the configuration with this layer's fields, and has a rotary
embedding of its own where the layer's differs. Where the ranks do not divide the heads, it has ghost heads of zeros
(`megatron_gdn.sections`). On disk the keys are the host's, and ghosts are not there.
"""

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_gdn.config import FP8Config
from megatron_gdn.core_attention import CoreAttention, with_window
from megatron_gdn.norms import HeadRMSNorm
from megatron_gdn.parallel.fragments import Fragments
from megatron_gdn.parallel.host import FragmentParams, fragments_of
from megatron_gdn.providers import get_provider
from megatron_gdn.sections import attention_sections, held_heads
from megatron_gdn.sharded_sections import split_on_disk

# The host's settings for all layers -> the layer's option that takes their place.
_LAYER_OPTIONS = {
    "window_size": "window",
    "window_attn_skip_freq": "window",
    "no_rope_freq": "rope",
    "attention_output_gate": "output_gate",
    "qk_layernorm": "qk_norm",
    "qk_l2_norm": "qk_norm",
}
# Fused weights -> the dimension along which their heads lie.
_SECTION_DIMS = {"linear_qkv": 0, "linear_proj": 1}
_LAST_QUERIES = 16


class HybridSelfAttention(SelfAttention):
    """Megatron's SelfAttention with the options of this layer; norms of q and k come with the submodules.

    Args:
        config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection: the host's.
        num_attention_heads: query heads of this layer; None: config's.
        num_query_groups: key heads of this layer; None: as many as query heads, config's where those are config's.
        window: tokens that a token sees, itself included; None: all before it.
        softmax_scale: None: config's, or kv_channels ** -0.5.
        rope: rotate q and k by position; False: no positions (NoPE).
        rotary_percent: share of each head, its first part, that is rotated; None: what the model's embedding rotates,
            nothing where it has none.
        rotary_base: base of this layer's own rotary embedding; None: the model's, of the same share.
        output_gate: multiply the output by the sigmoid of a gate that is projected beside q (Qwen3-Next). Rows of
            linear_qkv: for each key head its query heads, their gates, k, v.
        host_kwargs: what later hosts add.

    Raises:
        ValueError: a setting for all layers beside the layer's; a share that leaves no even number of dimensions;
            query heads that key heads do not divide.
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
        num_attention_heads: int | None = None,
        num_query_groups: int | None = None,
        window: int | None = None,
        softmax_scale: float | None = None,
        rope: bool = True,
        rotary_percent: float | None = 1.0,
        rotary_base: float | None = None,
        output_gate: bool = False,
        **host_kwargs,
    ):
        for name, option in _LAYER_OPTIONS.items():
            if value := getattr(config, name, None):
                raise ValueError(f"{name} ({value}) must not be set for all layers: give this one {option}=...")
        rotary_dim = None if rotary_percent is None else int(config.kv_channels * rotary_percent)
        if (
            rope
            and rotary_dim is not None
            and not (0 < rotary_percent <= 1 and rotary_dim >= 2 and rotary_dim % 2 == 0)
        ):
            raise ValueError(
                f"rotary_percent ({rotary_percent}) of kv_channels ({config.kv_channels}) must be an even number of "
                f"dimensions from 2 to {config.kv_channels}, not {rotary_dim}: dimensions turn in pairs."
            )
        groups = num_query_groups or num_attention_heads or config.num_query_groups
        heads = num_attention_heads or config.num_attention_heads
        check_query_groups(heads, groups)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        layer_config = with_window(config, window)
        layer_config.attention_output_gate = output_gate
        layer_config.qk_layernorm = submodules.q_layernorm is not None  # 0.19 asks for it beside the norms
        layer_config.num_attention_heads, layer_config.num_query_groups = held_heads(
            heads, groups, pg_collection.tp.size()
        )
        if softmax_scale is not None:
            layer_config.softmax_scale = softmax_scale
        super().__init__(
            layer_config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection, **host_kwargs
        )
        self.sections = attention_sections(
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=config.kv_channels,
            output_gate=output_gate,
        )
        self.has_ghosts = layer_config.num_query_groups != groups
        self.observer = None
        """Called with the logits of the last queries of the next forward pass, see megatron_gdn/training/health.py."""
        self.window = window
        if config.context_parallel_size == 1:  # else a rank does not have all keys
            self.core_attention.register_forward_pre_hook(self._observe, with_kwargs=True)
        if self.has_ghosts and config.perform_initialization:
            self._clear_ghosts()
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
        ranks = self.world_size if self.config.sequence_parallel else 1
        num_tokens = hidden_states.shape[0] * ranks
        fragments = fragments_of(packed_seq_params, num_tokens, self.pg_collection.cp, device=hidden_states.device)
        if fragments is not None:
            packed_seq_params = FragmentParams.of(fragments)  # for the core
            rotary_pos_emb = self._rotary_of_fragments(rotary_pos_emb, fragments)
        else:
            rotary_pos_emb = self._rotary(num_tokens, rotary_pos_emb, packed_seq_params)
        return super().forward(
            hidden_states,
            attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **host_kwargs,
        )

    def get_query_key_value_tensors(self, *args, output_gate: bool = False, **kwargs):
        """The host's; where ranks share a key head, this rank's part of the gate too, which 0.16.1 forgets."""
        found = super().get_query_key_value_tensors(*args, output_gate=output_gate, **kwargs)
        if not output_gate or found[0].shape == found[3].shape:
            return found
        query, key, value, gate = found
        sharing = self.world_size // self.config.num_query_groups
        return query, key, value, gate.chunk(sharing, dim=2)[self.tp_group.rank() % sharing]

    def _observe(self, core, arguments: tuple, options: dict) -> None:
        """Before the core: logits of its last document's last queries, of this rank's own heads, to the observer."""
        if self.observer is None:
            return
        query, key = arguments[:2]
        documents = options.get("packed_seq_params")
        if isinstance(documents, FragmentParams):  # of one rank
            start = documents.fragments.bounds[-2]
            query, key = query[start:], key[start:]
        elif documents is not None:
            bounds = documents.cu_seqlens_q_padded
            bounds = documents.cu_seqlens_q if bounds is None else bounds
            start = int(bounds[bounds < len(query)].max())  # waits for the device, in a sampled step only
            query, key = query[start:].unsqueeze(1), key[start:].unsqueeze(1)
        scale = self.config.softmax_scale
        scale = self.config.kv_channels**-0.5 if scale is None else scale
        logits = last_logits(query.detach(), key.detach(), scale=scale, window=self.window)
        if self.has_ghosts:
            logits = logits[:, : self.sections["linear_proj"][0].local_heads(self.tp_group.rank(), self.world_size)]
        self.observer({"logits": logits})

    @torch.no_grad()
    def _clear_ghosts(self) -> None:
        rank, size = self.tp_group.rank(), self.world_size
        for name, dim in _SECTION_DIMS.items():
            (section,) = self.sections[name]
            rows = section.local_rows(rank, size)
            weight = getattr(self, name).weight
            weight.narrow(dim, rows.stop - rows.start, weight.shape[dim] - (rows.stop - rows.start)).zero_()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """The host's sharded tensors, without ghost heads; arguments as of the host."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.has_ghosts:
            for name, dim in _SECTION_DIMS.items():
                key = f"{prefix}{name}.weight"
                state[key] = split_on_disk(
                    state[key], key, self.sections[name], rank=self.tp_group.rank(), size=self.world_size, dim=dim
                )
        return state

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        if x.is_cuda:
            return super()._apply_output_gate(x, gate)
        # The host's is a torch.compile, which on a CPU wants a C++ compiler and seconds.
        return (x * gate.reshape(x.shape).float().sigmoid()).to(x.dtype)

    def _rotary_of_fragments(self, given, fragments: Fragments):
        """The embedding of this rank's tokens, by their places in their documents."""
        if not self.rope:
            return None
        if self.rotary_pos_emb is None:
            if given is not None and (fragments.packed or fragments.layout != "zigzag"):
                raise ValueError(
                    f"rotary_pos_emb (the model's) must be this layer's own with fragments ({fragments.layout}, "
                    f"{'packed' if fragments.packed else 'not packed'}): Megatron's is for zigzag batches of one "
                    "document; give the layer a rotary_base."
                )
            return self._model_rotary(given)
        inv_freq = self.rotary_pos_emb.inv_freq.to(fragments.device)
        freqs = torch.outer(fragments.positions.to(inv_freq.dtype), inv_freq)
        if self.rotary_pos_emb.rotary_interleaved:
            return freqs.repeat_interleave(2, dim=-1)[:, None, None]
        return torch.cat([freqs, freqs], -1)[:, None, None]  # [s, 1, 1, dimensions]

    def _rotary(self, num_tokens: int, given, packed_seq_params: PackedSeqParams | None):
        """The embedding that the host applies: none, this layer's, or the model's."""
        if not self.rope:
            return None
        if self.rotary_pos_emb is not None:
            if packed_seq_params is None:
                return self.rotary_pos_emb(num_tokens)
            longest = packed_seq_params.max_seqlen_q
            if longest is None:
                bounds = packed_seq_params.cu_seqlens_q_padded
                bounds = packed_seq_params.cu_seqlens_q if bounds is None else bounds
                longest = int(bounds.diff().max())  # waits for the device; the loader's max_seqlen_q does not
            return self.rotary_pos_emb(int(longest), packed_seq=True)
        return self._model_rotary(given)

    def _model_rotary(self, given):
        """The model's embedding, as wide as this layer's."""
        if self.rotary_dim is None:
            return given
        width = None if given is None else (given[0] if isinstance(given, tuple) else given).shape[-1]
        if width != self.rotary_dim:
            raise ValueError(
                f"rotary_pos_emb (width {width}) must have this layer's {self.rotary_dim} rotated dimensions: give "
                "the layer a rotary_base of its own, or rope=False."
            )
        return given


def attention_spec(
    *,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    window: int | None = None,
    rope: bool = True,
    rotary_percent: float | None = 1.0,
    rotary_base: float | None = None,
    qk_norm: bool = False,
    output_gate: bool = False,
    zero_centered_norm: bool = False,
    softmax_scale: float | None = None,
    backend: str = "auto",
    provider: str = "local",
    fp8: FP8Config | None = None,
    fuse_input_norm: bool = False,
) -> ModuleSpec:
    """Spec of a causal attention layer, usable as `self_attention` of a TransformerLayer.

    Args:
        num_attention_heads, num_query_groups: see `HybridSelfAttention`.
        window, rope, rotary_percent, rotary_base, output_gate, softmax_scale: likewise.
        qk_norm: RMSNorm of each q and k head, before the rotation.
        zero_centered_norm: those norms multiply by 1 + weight.
        backend: of the scores: "auto", "te", "flash", "flex" or "torch".
        provider, fp8: of the linear layers, see `megatron_gdn.providers`.
        fuse_input_norm: linear_qkv includes the norm before the layer, where the provider has such a module; the
            TransformerLayer then has no `input_layernorm`.

    Raises:
        ValueError: an unknown provider, or fuse_input_norm with one that cannot; zero_centered_norm without qk_norm.
        MissingPackageError: provider "te" without Transformer Engine.
    """
    if zero_centered_norm and not qk_norm:
        raise ValueError("zero_centered_norm (True) needs qk_norm: it is about the norms of q and k.")
    norm = ModuleSpec(module=HeadRMSNorm, params={"zero_centered": zero_centered_norm}) if qk_norm else None
    modules = get_provider(provider, fp8=fp8)
    if fuse_input_norm and modules.norm_column is None:
        raise ValueError(f"fuse_input_norm (True) needs provider 'te', not {provider!r}: its norms are modules apart.")
    return ModuleSpec(
        module=HybridSelfAttention,
        params=dict(
            attn_mask_type=AttnMaskType.causal,
            num_attention_heads=num_attention_heads,
            num_query_groups=num_query_groups,
            window=window,
            rope=rope,
            rotary_percent=rotary_percent,
            rotary_base=rotary_base,
            output_gate=output_gate,
            softmax_scale=softmax_scale,
        ),
        metainfo={"fuse_input_layernorm": fuse_input_norm},
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules.norm_column if fuse_input_norm else modules.column,
            core_attention=ModuleSpec(module=CoreAttention, params={"backend": backend}),
            linear_proj=modules.row,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def last_logits(query: Tensor, key: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """Logits of the last queries of a sequence, for `attention_entropy` and `attention_max_logit`.

    Args:
        query, key: `[s, b, heads, D]`; a key head serves neighbouring query heads.
        scale: of the logits.
        window: tokens that a query sees, itself included; None: all before it.

    Returns:
        `[b, heads, n, s]` float32, n of at most 16 last queries, -inf where a query does not see a key.
    """
    length, n = len(key), min(_LAST_QUERIES, len(query))
    group = query.shape[2] // key.shape[2]
    q, k = query[-n:].float(), key.float().repeat_interleave(group, dim=2)
    logits = torch.einsum("sbhd,tbhd->bhst", q, k) * scale
    position = torch.arange(length - n, length, device=key.device).unsqueeze(1)
    other = torch.arange(length, device=key.device)
    seen = other <= position
    if window is not None:
        seen &= other > position - window
    return logits.masked_fill(~seen, -math.inf)


def check_query_groups(num_attention_heads: int, num_query_groups: int) -> None:
    """Raise ValueError when key heads do not divide query heads."""
    if num_attention_heads % num_query_groups:
        raise ValueError(
            f"num_attention_heads ({num_attention_heads}) must be divisible by num_query_groups ({num_query_groups}): "
            "every key/value head serves the same number of query heads."
        )
