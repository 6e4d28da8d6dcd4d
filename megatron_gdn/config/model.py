"""The model's section: shape, initialisation and backends, and the options of its attention layers."""

import difflib
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from megatron_gdn.config.types import Count, Positive, lower_first, section
from megatron_gdn.hybrid.pattern import parse_pattern

_NEEDED_FIELDS = {
    "G": ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "M": ("mamba_num_heads",),
    "S": ("num_attention_heads",),
    "*": ("num_attention_heads",),
}


@section
class AttentionConfig:
    """Options of the attention layers of one symbol."""

    window: Positive | None = None
    """Tokens that a token sees, itself included; None: all before it."""
    rope: bool = True
    """Rotate q and k by position; False: no positions (NoPE)."""
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head that is rotated."""
    qk_norm: bool = False
    """RMSNorm of each q and k head."""
    output_gate: bool = False
    """Multiply the output by sigmoid of a gate that is projected beside q (Qwen3-Next)."""
    num_query_groups: Positive | None = None
    """Key/value heads; None: the model's."""


@section
class ModelConfig:
    """Shape and initialisation of the model; field names are Megatron-Core's."""

    pattern: str
    """Mixers and MLPs, see megatron_gdn/hybrid/pattern.py."""
    hidden_size: Positive
    """Width of the residual stream."""
    ffn_hidden_size: Positive
    """Inner width of the SwiGLU MLP."""
    linear_num_key_heads: Positive | None = None
    """Heads of q and k in Gated DeltaNet layers."""
    linear_num_value_heads: Positive | None = None
    """Heads of v and z; a multiple of linear_num_key_heads."""
    linear_key_head_dim: Positive | None = None
    """K: size of one q or k head."""
    linear_value_head_dim: Positive | None = None
    """V: size of one v head."""
    linear_conv_kernel_dim: Annotated[Count, Field(ge=2, le=4)] = 4
    """Width of the causal convolution, tokens."""
    allow_neg_eigval: bool = False
    """beta in (0, 2): the state transition may have negative eigenvalues (arXiv 2411.12537)."""
    use_output_gate: bool = True
    """Multiply the normalised output by silu(z)."""
    use_qk_l2norm: bool = True
    """L2-normalise q and k."""
    use_decay: bool = True
    """False: no alpha, the state keeps what is not overwritten (DeltaNet, arXiv 2406.06484)."""
    mamba_num_heads: Positive | None = None
    """Heads of Mamba2 layers."""
    mamba_head_dim: Positive = 64
    """P: size of one Mamba2 head."""
    mamba_state_dim: Positive = 128
    """N: size of B and C, rows of a head's state."""
    mamba_num_groups: Positive = 1
    """Groups of Mamba2 heads that share B and C."""
    num_attention_heads: Positive | None = None
    """Query heads of attention layers."""
    num_query_groups: Positive | None = None
    """Key/value heads of attention layers; None: as many as query heads."""
    kv_channels: Positive | None = None
    """Size of an attention head; None: hidden_size / num_attention_heads."""
    rotary_base: Positive = 10000
    """Base of the rotary embedding of attention layers."""
    full_attention: AttentionConfig = Field(default_factory=AttentionConfig)
    """Options of layers `*`."""
    sliding_attention: AttentionConfig = Field(default_factory=lambda: AttentionConfig(window=2048))
    """Options of layers `S`."""
    attention_layers: dict[Positive, dict[str, Any]] = Field(default_factory=dict)
    """Options of single attention layers in place of their symbol's, by the layer's number from 1, such as
    `{4: {window: 512}, 12: {rope: false}}`."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight, and the weight starts at 0."""
    vocab_size: Positive | None = None
    """Tokens of the vocabulary; None: as the training data's manifest says."""
    vocab_multiple: Positive = 128
    """The embedding has vocab_size rounded up to this, at every tensor-parallel size."""
    tie_embeddings: bool = False
    """Use the embedding as the output layer."""
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in every RMSNorm."""
    initialization: Literal["megatron", "paper"] = "megatron"
    """megatron: normal with init_method_std, weights that write to the residual stream / sqrt(2 * layers). paper: as in
    the paper's code, uniform in +-1/sqrt(inputs), those of MLPs, attention and Mamba2 that write to the residual stream
    / sqrt(2 * layers), those of Gated DeltaNet not; embeddings normal with 0.02."""
    init_method_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights of initialization megatron."""
    provider: Literal["local", "te"] = "local"
    """Who makes linear layers and norms: Megatron's own modules, or Transformer Engine's, which need CUDA."""
    kernel_backend: Literal["auto", "torch", "triton"] = "auto"
    """Backend of the kernels of Gated DeltaNet and Mamba2; auto: triton on CUDA, torch on a CPU."""
    attention_backend: Literal["auto", "torch", "te", "flash", "flex"] = "auto"
    """Who computes attention; auto: te, flash or flex on CUDA, the first that is installed, torch on a CPU."""

    def __post_init__(self):
        symbols = self.symbols
        for symbol, names in _NEEDED_FIELDS.items():
            for name in names:
                if symbol in symbols and getattr(self, name) is None:
                    raise ValueError(f"{name} is required by the layers {symbol} of the pattern: set model.{name}.")
        keys, values = self.linear_num_key_heads, self.linear_num_value_heads
        if "G" in symbols and values % keys:
            raise ValueError(
                f"linear_num_value_heads ({values}) must be divisible by linear_num_key_heads ({keys}): "
                f"use {keys * max(1, values // keys)} value heads."
            )
        self._check_attention_layers()
        if symbols & {"S", "*"}:
            self._check_attention()
        if "M" in symbols and self.mamba_num_heads % self.mamba_num_groups:
            raise ValueError(
                f"mamba_num_heads ({self.mamba_num_heads}) must be divisible by mamba_num_groups "
                f"({self.mamba_num_groups}): every group serves the same number of heads."
            )

    @property
    def symbols(self) -> set[str]:
        """Mixers that the pattern names."""
        return {layer.symbol for layer in parse_pattern(self.pattern)}

    @property
    def attention_head_dim(self) -> int:
        """Size of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def _check_attention(self) -> None:
        heads = self.num_attention_heads
        if self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads ({heads}): set kv_channels "
                "or change the number of heads."
            )
        for number, layer in enumerate(parse_pattern(self.pattern), start=1):
            if layer.symbol in ("S", "*"):
                self._check_attention_layer(layer.symbol, self.attention_options(number))

    def _check_attention_layer(self, symbol: str, options: AttentionConfig) -> None:
        heads, groups = self.num_attention_heads, options.num_query_groups
        if heads % groups:
            raise ValueError(
                f"num_attention_heads ({heads}) must be divisible by num_query_groups ({groups}): every key/value head "
                "serves the same number of query heads."
            )
        if symbol == "*" and options.window is not None:
            raise ValueError(f"full_attention.window ({options.window}) must be null: layers with a window are S.")
        if symbol == "S" and options.window is None:
            raise ValueError("sliding_attention.window (null) must be a number of tokens: full attention is *.")
        turned = int(self.attention_head_dim * options.rotary_percent)
        if options.rope and (turned < 2 or turned % 2):
            raise ValueError(
                f"rotary_percent ({options.rotary_percent}) of attention heads of {self.attention_head_dim} must be an "
                f"even number of dimensions, not {turned}: dimensions turn in pairs; change it, kv_channels, or set "
                "rope to false."
            )

    def attention_options(self, number: int) -> AttentionConfig:
        """Options of an attention layer, those of `attention_layers` and the model's key/value heads filled in.

        Args:
            number: of the layer, from 1.
        """
        layers = parse_pattern(self.pattern)
        symbol = layers[number - 1].symbol
        options = self.sliding_attention if symbol == "S" else self.full_attention
        groups = options.num_query_groups or self.num_query_groups or self.num_attention_heads
        return replace(options, **{"num_query_groups": groups, **self.attention_layers.get(number, {})})

    def _check_attention_layers(self) -> None:
        layers, known = parse_pattern(self.pattern), [field.name for field in fields(AttentionConfig)]
        attention = [number for number, layer in enumerate(layers, start=1) if layer.symbol in ("S", "*")]
        for number, options in self.attention_layers.items():
            if number not in attention:
                raise ValueError(
                    f"attention_layers has options of layer {number}, which must be one of the attention layers of the "
                    f"pattern: {', '.join(map(str, attention)) or 'there are none'}."
                )
            for key in options.keys() - set(known):
                near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known
                raise ValueError(f"attention_layers.{number}.{key} is not a known key: did you mean {', '.join(near)}?")
            try:
                self.attention_options(number)
            except ValidationError as error:
                details = error.errors()[0]
                name = ".".join(["attention_layers", str(number), *map(str, details["loc"])])
                raise ValueError(f"{name} ({details['input']!r}): {lower_first(details['msg'])}.") from None
