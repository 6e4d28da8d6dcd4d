"""Causal attention cores, Megatron's `core_attention`: ours, and Transformer Engine's with a window."""

import copy
import functools

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_gdn.documents import chunk_table_of
from megatron_gdn.kernels import ChunkTable
from megatron_gdn.kernels.sliding_window import check_window, resolve_attention_backend, sliding_window_attention
from megatron_gdn.parallel.context_attention import check_exchange, context_attention
from megatron_gdn.parallel.host import fragments_of

# What the core cannot do: field of TransformerConfig -> the only value it takes, and the remedy.
_CORE_LIMITS = {
    "attention_dropout": (0.0, "set it to 0, or use backend 'te'"),
    "softmax_type": ("vanilla", "use backend 'te'"),
    "qk_clip": (False, "use qk_norm, or backend 'te'"),
    "log_max_attention_logit": (False, "turn it off, or use backend 'te'"),
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
        cp_comm_type: what context-parallel ranks exchange without a window: "all_gather", keys and values, or "a2a",
            heads for tokens; None: "all_gather". With a window they exchange the keys and values of the window.
        pg_collection: process groups; reads `cp`.
        window: tokens that a token sees, itself included; None: by config's window_size and window_attn_skip_freq,
            which is all tokens where they are not set.
        backend: "torch", "flash", "flex", or "auto": by the device of the tensors.

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
        self.cp_group, self.cp_comm_type = None, cp_comm_type or "all_gather"
        if config.context_parallel_size > 1:
            self.cp_group = (pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])).cp
            check_exchange(self.cp_comm_type, self.window)

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
            packed_seq_params: format thd, see `chunk_table_of`. Under context parallelism `FragmentParams`, or None for
                Megatron's zigzag batches.

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
        fragments = fragments_of(packed_seq_params, query.shape[0], self.cp_group, device=query.device)
        if fragments is not None:
            o = context_attention(
                query,
                key,
                value,
                fragments=fragments,
                window=self.window,
                scale=self.softmax_scale,
                cp_comm_type=self.cp_comm_type,
                backend=self.backend,
            )
            return o.flatten(2)
        if packed_seq_params is None:
            if mask_type == AttnMaskType.padding_causal:
                raise ValueError("attn_mask_type (padding_causal) needs packed_seq_params: pad behind, and use causal.")
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            return self._attend(q, k, v).transpose(0, 1).flatten(2)
        if packed_seq_params.qkv_format != "thd":
            raise ValueError(f"qkv_format ({packed_seq_params.qkv_format}) must be thd: pack the documents in one row.")
        documents = chunk_table_of(packed_seq_params, device=query.device)
        q, k, v = (x.unsqueeze(0) for x in (query, key, value))
        return self._attend(q, k, v, documents).squeeze(0).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, documents: ChunkTable | None = None) -> Tensor:
        """`[b, s, heads, size]` to `[b, s, np, V]`."""
        options = dict(window=self.window, scale=self.softmax_scale, backend=self.backend)
        return sliding_window_attention(q, k, v, cu_seqlens=documents, **options)


class CoreAttention:
    """Builds the `core_attention` of a backend: Transformer Engine's through Megatron, or `SlidingWindowAttention`.

    A class that returns another's instance, as Megatron's TENorm: specs want a class, and a module around
    Transformer Engine's would change its keys on disk.

    Args:
        config, layer_number, window and all else: as of `SlidingWindowAttention`.
        backend: see `megatron_gdn.kernels.sliding_window.resolve_attention_backend`. The device of the tensors chooses.
            Where there is CUDA and Transformer Engine, its module is built, as it has keys on disk of its own; tensors
            on a CPU, for which it has no kernel, go by "auto" to `SlidingWindowAttention` and by "te" to an error.
    """

    def __new__(
        cls, config: TransformerConfig, layer_number: int, *, window: int | None = None, backend: str = "auto", **kwargs
    ):
        alone = config.context_parallel_size == 1
        if backend == "te" and not alone:
            raise ValueError(
                f"attention backend (te) must be another with context_parallel_size {config.context_parallel_size}: "
                "Transformer Engine knows no fragments; use 'flash' or 'flex'."
            )
        chosen = resolve_attention_backend(
            backend,
            "cuda" if torch.cuda.is_available() else "cpu",
            dtype=config.params_dtype,
            head_dims=(config.kv_channels, config.kv_channels),
            te=alone,
        )
        if chosen != "te":
            # What was asked for, not what was chosen: a model on the CPU of a machine with a GPU runs there too.
            return SlidingWindowAttention(config, layer_number, window=window, backend=backend, **kwargs)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        def elsewhere() -> SlidingWindowAttention:
            return SlidingWindowAttention(config, layer_number, window=window, backend=backend, **kwargs)

        layer_config = with_window(config, _window(config, layer_number, window))
        core = _by_device(TEDotProductAttention)(config=layer_config, layer_number=layer_number, **kwargs)
        core.elsewhere = functools.cache(elsewhere) if backend == "auto" else None
        return core


@functools.cache
def _by_device(transformer_engines: type) -> type:
    """Transformer Engine's module for tensors on CUDA, another for those on a CPU; `elsewhere` makes that one."""

    class ByDevice(transformer_engines):
        def forward(self, query: Tensor, *args, **kwargs) -> Tensor:
            if query.device.type == "cuda":
                return super().forward(query, *args, **kwargs)
            if self.elsewhere is None:
                raise ValueError(
                    f"attention backend (te) needs tensors on CUDA, and they are on {query.device}: move the model to "
                    "the GPU, or use 'auto'."
                )
            return self.elsewhere()(query, *args, **kwargs)

    return ByDevice


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


def with_window(config: TransformerConfig, window: int | None) -> TransformerConfig:
    """A copy for one layer; the host does the same where it changes num_query_groups."""
    check_window(window)
    layer_config = copy.copy(config)
    layer_config.window_size = None if window is None else (window - 1, 0)
    layer_config.window_attn_skip_freq = None
    return layer_config
