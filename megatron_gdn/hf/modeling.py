"""Hybrid models in transformers: forward, loss and cached generation on this project's kernels.

Names of weights are those of the training model on one rank; fused weights hold the sections of
`megatron_gdn.sections` in order. Gates, states and norms are float32 inside, as in training.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from megatron_gdn.config import AttentionConfig, ModelConfig
from megatron_gdn.hf.configuration import MegatronGDNConfig
from megatron_gdn.hybrid.pattern import parse_pattern
from megatron_gdn.kernels import (
    causal_conv1d,
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_gate,
    rms_norm_gated,
    ssd,
)
from megatron_gdn.kernels.sliding_window import sliding_window_attention
from megatron_gdn.sections import Section, gated_delta_net_sections, mamba2_sections


@dataclass
class HybridCache:
    """What each layer keeps of the tokens before.

    num_tokens: tokens seen.
    layers: by layer, its mixer's own state: `conv` and `state`, or `key` and `value`.
    """

    num_tokens: int = 0
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, under transformers' name."""
        return self.num_tokens


@dataclass
class HybridOutput(ModelOutput):
    """Result of a forward pass.

    loss: mean cross-entropy of the next tokens, where labels were given.
    logits: `[b, s, vocabulary]`.
    cache: for the next call.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: HybridCache | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, or (1 + weight) where norms are centred at zero; float32 inside."""

    def __init__(self, size: int, eps: float, zero_centered: bool):
        super().__init__()
        self.eps, self.zero_centered = eps, zero_centered
        self.weight = nn.Parameter(torch.zeros(size) if zero_centered else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight.float() if self.zero_centered else self.weight.float()
        return (F.rms_norm(x.float(), weight.shape, eps=self.eps) * weight).to(x.dtype)


class Linear(nn.Linear):
    """Without a bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)


class ShortConv1d(nn.Module):
    """Weight `[channels, 1, width]` of the causal convolution, and its bias."""

    def __init__(self, channels: int, width: int, bias: bool = False):
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, states: dict[str, Tensor] | None, backend: str) -> Tensor:
        """x `[b, s, channels]`; reads and writes `conv` of the states."""
        y, last = causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation="silu",
            initial_state=None if states is None else states.get("conv"),
            output_final_state=states is not None,
            backend=backend,
        )
        if states is not None:
            states["conv"] = last
        return y


class GatedDeltaNet(nn.Module):
    """The mixer of `megatron_gdn.gated_delta_net` on one rank."""

    def __init__(self, settings: ModelConfig):
        super().__init__()
        self.settings = settings
        self.sections = gated_delta_net_sections(
            num_key_heads=settings.linear_num_key_heads,
            num_value_heads=settings.linear_num_value_heads,
            key_head_dim=settings.linear_key_head_dim,
            value_head_dim=settings.linear_value_head_dim,
            output_gate=settings.use_output_gate,
            decay=settings.use_decay,
        )
        rows = {name: sum(_sizes(sections)) for name, sections in self.sections.items()}
        self.in_proj = Linear(settings.hidden_size, rows["in_proj"])
        self.in_proj_ba = Linear(settings.hidden_size, rows["in_proj_ba"])
        self.conv1d = ShortConv1d(rows["conv1d"], settings.linear_conv_kernel_dim)
        if settings.use_decay:
            heads = settings.linear_num_value_heads
            self.A_log = nn.Parameter(torch.rand(heads, dtype=torch.float32).mul_(15).add_(1).log_())
            self.dt_bias = nn.Parameter(torch.full((heads,), -4.0, dtype=torch.float32))
        self.out_norm = nn.Module()
        self.out_norm.weight = nn.Parameter(torch.ones(settings.linear_value_head_dim))
        self.out_proj = Linear(rows["out_proj"], settings.hidden_size)

    def forward(self, x: Tensor, states: dict[str, Tensor] | None, start: int) -> Tensor:
        settings, backend = self.settings, self.settings.kernel_backend
        sizes = _sizes(self.sections["conv1d"])
        mixed = self.in_proj(x)
        q, k, v = self.conv1d(mixed[..., : sum(sizes)], states, backend).split(sizes, -1)
        z = None
        if settings.use_output_gate:
            z = mixed[..., sum(sizes) :].unflatten(-1, (-1, settings.linear_value_head_dim))
        q, k = (y.unflatten(-1, (-1, settings.linear_key_head_dim)) for y in (q, k))
        beta, *alpha = self.in_proj_ba(x).split(_sizes(self.sections["in_proj_ba"]), -1)
        beta = beta.float().sigmoid() * (2.0 if settings.allow_neg_eigval else 1.0)
        g = torch.zeros_like(beta)
        if settings.use_decay:
            g = gated_delta_gate(alpha[0], self.A_log.float(), self.dt_bias.float(), backend=backend)
        one_token = states is not None and x.shape[1] == 1
        rule = fused_recurrent_gated_delta_rule if one_token else chunk_gated_delta_rule
        o, state = rule(
            q,
            k,
            v.unflatten(-1, (-1, settings.linear_value_head_dim)),
            g=g,
            beta=beta,
            initial_state=None if states is None else states.get("state"),
            output_final_state=states is not None,
            use_qk_l2norm_in_kernel=settings.use_qk_l2norm,
            backend=backend,
        )
        if states is not None:
            states["state"] = state
        o = rms_norm_gated(o, self.out_norm.weight, z, eps=settings.norm_epsilon, backend=backend)
        return self.out_proj(o.flatten(2))


class Mamba2(nn.Module):
    """The mixer of `megatron_gdn.mamba2` on one rank."""

    def __init__(self, settings: ModelConfig):
        super().__init__()
        self.settings = settings
        self.sections = mamba2_sections(
            num_heads=settings.mamba_num_heads,
            head_dim=settings.mamba_head_dim,
            num_groups=settings.mamba_num_groups,
            state_dim=settings.mamba_state_dim,
        )
        rows = {name: sum(_sizes(sections)) for name, sections in self.sections.items()}
        self.in_proj = Linear(settings.hidden_size, rows["in_proj"])
        self.in_proj_dt = Linear(settings.hidden_size, rows["in_proj_dt"])
        self.conv1d = ShortConv1d(rows["conv1d"], settings.linear_conv_kernel_dim, bias=True)
        heads = settings.mamba_num_heads
        self.A_log = nn.Parameter(torch.rand(heads, dtype=torch.float32).mul_(15).add_(1).log_())
        self.dt_bias = nn.Parameter(torch.full((heads,), -4.0, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(rows["norm"]))
        self.out_proj = Linear(rows["out_proj"], settings.hidden_size)

    def forward(self, h: Tensor, states: dict[str, Tensor] | None, start: int) -> Tensor:
        settings, backend = self.settings, self.settings.kernel_backend
        groups = settings.mamba_num_groups
        z, *_ = sizes = _sizes(self.sections["in_proj"])
        z, xBC = self.in_proj(h).split([z, sum(sizes) - z], -1)
        x, B, C = self.conv1d(xBC, states, backend).split(_sizes(self.sections["conv1d"]), -1)
        y, state = ssd(
            x.unflatten(-1, (-1, settings.mamba_head_dim)),
            dt=F.softplus(self.in_proj_dt(h).float() + self.dt_bias.float()),
            A=-self.A_log.float().exp(),
            B=B.unflatten(-1, (groups, -1)),
            C=C.unflatten(-1, (groups, -1)),
            D=self.D.float(),
            initial_state=None if states is None else states.get("state"),
            output_final_state=states is not None,
            backend=backend,
        )
        if states is not None:
            states["state"] = state
        gated = (y.flatten(2).float() * F.silu(z.float())).unflatten(-1, (groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=settings.norm_epsilon).flatten(2) * self.norm.weight.float()
        return self.out_proj(normed.to(h.dtype))


class Attention(nn.Module):
    """Causal attention of `megatron_gdn.attention` on one rank; fused rows as Megatron's `linear_qkv`."""

    def __init__(self, settings: ModelConfig, options: AttentionConfig):
        super().__init__()
        self.settings, self.options = settings, options
        heads, groups, size = settings.num_attention_heads, options.num_query_groups, settings.attention_head_dim
        self.per_group, gates = heads // groups, 2 if options.output_gate else 1
        self.linear_qkv = Linear(settings.hidden_size, groups * (gates * self.per_group + 2) * size)
        self.linear_proj = Linear(heads * size, settings.hidden_size)
        if options.qk_norm:
            norm = (size, settings.norm_epsilon, settings.zero_centered_norm)
            self.q_layernorm, self.k_layernorm = RMSNorm(*norm), RMSNorm(*norm)

    def forward(self, x: Tensor, states: dict[str, Tensor] | None, start: int) -> Tensor:
        options, size = self.options, self.settings.attention_head_dim
        sizes = [self.per_group] * (2 if options.output_gate else 1) + [1, 1]
        fused = self.linear_qkv(x).unflatten(-1, (options.num_query_groups, sum(sizes), size)).split(sizes, 3)
        q, *gate, k, v = (part.flatten(2, 3) for part in fused)
        if options.qk_norm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if options.rope:
            dims = int(size * options.rotary_percent)
            q, k = (rotate(y, dims, self.settings.rotary_base, start) for y in (q, k))
        past = states is not None and "key" in states
        if past:
            k, v = torch.cat([states["key"], k], 1), torch.cat([states["value"], v], 1)
        if states is not None:
            kept = k.shape[1] if options.window is None else min(options.window - 1, k.shape[1])
            states["key"], states["value"] = (y[:, y.shape[1] - kept :] for y in (k, v))
        if past:
            o = _attend_after(q, k, v, options.window)
        else:
            o = sliding_window_attention(q, k, v, window=options.window, backend=_attention_backend(self.settings))
        if options.output_gate:
            o = (o * gate[0].float().sigmoid()).to(x.dtype)
        return self.linear_proj(o.flatten(2))


def _attention_backend(settings: ModelConfig) -> str:
    """Transformer Engine's is a module of the training model."""
    return "auto" if settings.attention_backend == "te" else settings.attention_backend


def _attend_after(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of the last tokens to all keys at hand, `[b, s, heads, D]` to `[b, s, heads, D]`."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
    s, t = q.shape[2], k.shape[2]
    behind = torch.arange(t - s, t, device=q.device)[:, None] - torch.arange(t, device=q.device)
    seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def rotate(x: Tensor, dims: int, base: float, start: int) -> Tensor:
    """Rotary embedding of the first `dims` dimensions, in halves; x `[b, s, heads, D]` at positions from `start`."""
    turned, rest = x.float().split([dims, x.shape[-1] - dims], -1)
    frequency = base ** (-torch.arange(0, dims, 2, device=x.device, dtype=torch.float32) / dims)
    angle = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float32)[:, None, None] * frequency
    low, high = turned.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1).to(x.dtype)


class SwiGLU(nn.Module):
    """Gate rows, then up rows, in one weight."""

    def __init__(self, settings: ModelConfig):
        super().__init__()
        self.linear_fc1 = Linear(settings.hidden_size, 2 * settings.ffn_hidden_size)
        self.linear_fc2 = Linear(settings.ffn_hidden_size, settings.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear_fc1(x).chunk(2, -1)
        return self.linear_fc2(F.silu(gate) * up)


class Layer(nn.Module):
    """Norm, mixer, residual, and norm, MLP, residual where the pattern has an MLP."""

    def __init__(self, settings: ModelConfig, number: int, symbol: str, mlp: bool):
        super().__init__()
        norm = (settings.hidden_size, settings.norm_epsilon, settings.zero_centered_norm)
        self.input_layernorm = RMSNorm(*norm)
        if symbol in "GM":
            self.self_attention = {"G": GatedDeltaNet, "M": Mamba2}[symbol](settings)
        else:
            self.self_attention = Attention(settings, settings.attention_options(number))
        if mlp:
            self.pre_mlp_layernorm, self.mlp = RMSNorm(*norm), SwiGLU(settings)

    def forward(self, x: Tensor, states: dict[str, Tensor] | None, start: int) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), states, start)
        return x + self.mlp(self.pre_mlp_layernorm(x)) if hasattr(self, "mlp") else x


class MegatronGDNForCausalLM(PreTrainedModel, GenerationMixin):
    """A hybrid language model.

    Args:
        config: with the `model` section of the run.
    """

    config_class = MegatronGDNConfig
    base_model_prefix = "decoder"
    _no_split_modules = ["Layer"]
    _is_stateful = True  # states cannot go back: no assisted or contrastive generation
    _tied_weights_keys = {"output_layer.weight": "embedding.word_embeddings.weight"}
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D"]

    def __init__(self, config: MegatronGDNConfig):
        super().__init__(config)
        settings = config.settings
        self.embedding = nn.Module()
        self.embedding.word_embeddings = nn.Embedding(config.vocab_size, settings.hidden_size)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(
            Layer(settings, number, layer.symbol, layer.mlp)
            for number, layer in enumerate(parse_pattern(settings.pattern), start=1)
        )
        norm = (settings.hidden_size, settings.norm_epsilon, settings.zero_centered_norm)
        self.decoder.final_layernorm = RMSNorm(*norm)
        self.output_layer = Linear(settings.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=self.config.settings.init_method_std)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.embedding.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer."""
        return self.output_layer

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output layer."""
        self.output_layer = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass makes its own

    def prepare_inputs_for_generation(self, input_ids, cache=None, attention_mask=None, use_cache=True, **kwargs):
        """Inputs of the next step: all tokens that the cache has not seen."""
        seen = 0 if cache is None else cache.num_tokens
        inputs = dict(input_ids=input_ids[:, seen:], cache=cache, attention_mask=attention_mask, use_cache=use_cache)
        return inputs | {"logits_to_keep": kwargs.get("logits_to_keep", 0)}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: HybridCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> HybridOutput:
        """Logits of the next token at every position.

        Args:
            input_ids: `[b, s]`; with a cache, the tokens that follow those it has seen.
            attention_mask: None or all ones: states have no padding.
            cache: from an earlier call.
            labels: `[b, s]`, shifted by one inside; -100 has no loss.
            use_cache: return a cache.
            logits_to_keep: last positions whose logits are wanted; 0: all.
            return_dict: must be True.

        Raises:
            ValueError: padding in the mask.
        """
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise ValueError(
                "attention_mask has padding, and states would run through it: give sequences of equal lengths, or one "
                "at a time."
            )
        if use_cache and cache is None:
            cache = HybridCache()
        start = 0 if cache is None else cache.num_tokens
        x = self.embedding.word_embeddings(input_ids)
        for i, layer in enumerate(self.decoder.layers):
            x = layer(x, None if cache is None else cache.layers.setdefault(i, {}), start)
        if cache is not None:
            cache.num_tokens += input_ids.shape[1]
        x = self.decoder.final_layernorm(x)
        logits = self.output_layer(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return HybridOutput(loss=loss, logits=logits, cache=cache)


def _sizes(sections: list[Section]) -> list[int]:
    return [section.num_rows for section in sections]
