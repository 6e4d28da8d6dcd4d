"""Hybrid models in plain PyTorch, written from the formulas: no chunks, no shards, weights by their keys on disk."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_gdn.config import AttentionConfig, ModelConfig
from tests.hybrid.test_pattern import symbols


def logits(model: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """`[b, s, vocabulary]` for tokens `[b, s]`."""
    center = 1.0 if model.zero_centered_norm else 0.0

    def norm(x: Tensor, name: str, eps: float = model.norm_epsilon) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weights[name] + center)

    x = weights["embedding.word_embeddings.weight"][tokens]
    layer = -1
    for symbol in symbols(model.pattern):
        if symbol == "-":
            h = norm(x, f"decoder.layers.{layer}.pre_mlp_layernorm.weight")
            gate, up = (h @ weights[f"decoder.layers.{layer}.mlp.linear_fc1.weight"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ weights[f"decoder.layers.{layer}.mlp.linear_fc2.weight"].T
            continue
        layer += 1
        prefix = f"decoder.layers.{layer}.self_attention."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        h = norm(x, f"decoder.layers.{layer}.input_layernorm.weight")
        options = model.sliding_attention if symbol == "S" else model.full_attention
        options = replace(options, **model.attention_layers.get(layer + 1, {}))
        x = x + {"G": gated_delta_net, "M": mamba2, "S": attention, "*": attention}[symbol](h, own, model, options)
    x = norm(x, "decoder.final_layernorm.weight")
    return x @ weights["embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"].T


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise and causal, then SiLU; x `[b, s, channels]`, kernel `[channels, 1, width]`."""
    width = kernel.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = sum(padded[:, j : j + x.shape[1]] * kernel[:, 0, j] for j in range(width))
    return F.silu(y if bias is None else y + bias)


def gated_delta_net(h: Tensor, w: dict[str, Tensor], model: ModelConfig, _) -> Tensor:
    group = model.linear_num_value_heads // model.linear_num_key_heads

    def heads(name: str, convolved: bool = True) -> Tensor:
        x = h @ w[f"in_proj.weight.{name}"].T
        x = convolve(x, w[f"conv1d.weight.{name}"]) if convolved else x
        size = model.linear_key_head_dim if name in ("query", "key") else model.linear_value_head_dim
        return x.unflatten(-1, (-1, size))

    q, k = (heads(name).repeat_interleave(group, 2) for name in ("query", "key"))
    if model.use_qk_l2norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    v = heads("value")
    beta = (h @ w["in_proj.weight.beta"].T).sigmoid() * (2 if model.allow_neg_eigval else 1)
    alpha = torch.ones_like(beta)
    if model.use_decay:
        dt = F.softplus(h @ w["in_proj.weight.alpha"].T + w["dt_bias"])
        alpha = (-w["A_log"].exp() * dt).exp()
    S = h.new_zeros(h.shape[0], v.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(h.shape[1]):
        S = S * alpha[:, t, :, None, None]
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], error * beta[:, t, :, None])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / math.sqrt(q.shape[3]))
    o = torch.stack(outputs, 1)
    o = o * (o.square().mean(-1, keepdim=True) + model.norm_epsilon).rsqrt() * w["out_norm.weight"]
    if model.use_output_gate:
        o = o * F.silu(heads("z", convolved=False))
    return o.flatten(2) @ w["out_proj.weight"].T


def mamba2(h: Tensor, w: dict[str, Tensor], model: ModelConfig, _) -> Tensor:
    x, B, C = (
        convolve(h @ w[f"in_proj.weight.{name}"].T, w[f"conv1d.weight.{name}"], w[f"conv1d.bias.{name}"])
        for name in "xBC"
    )
    z = h @ w["in_proj.weight.z"].T
    heads, groups = model.mamba_num_heads, model.mamba_num_groups
    x = x.unflatten(-1, (heads, -1))
    B, C = (y.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 2) for y in (B, C))
    dt = F.softplus(h @ w["in_proj.weight.dt"].T + w["dt_bias"])
    decay = (-w["A_log"].exp() * dt).exp()
    S = h.new_zeros(h.shape[0], heads, B.shape[3], x.shape[3])
    outputs = []
    for t in range(h.shape[1]):
        S = S * decay[:, t, :, None, None] + torch.einsum("bhn,bhp->bhnp", B[:, t] * dt[:, t, :, None], x[:, t])
        outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], S) + w["D"][:, None] * x[:, t])
    y = (torch.stack(outputs, 1).flatten(2) * F.silu(z)).unflatten(-1, (groups, -1))
    y = (y * (y.square().mean(-1, keepdim=True) + model.norm_epsilon).rsqrt()).flatten(2) * w["norm.weight"]
    return y @ w["out_proj.weight"].T


def attention(h: Tensor, w: dict[str, Tensor], model: ModelConfig, options: AttentionConfig) -> Tensor:
    heads = model.num_attention_heads
    groups = options.num_query_groups or model.num_query_groups or heads
    D, per_group = model.kv_channels or model.hidden_size // heads, heads // groups
    sizes = [per_group, per_group, 1, 1] if options.output_gate else [per_group, 1, 1]
    fused = (h @ w["linear_qkv.weight"].T).unflatten(-1, (groups, sum(sizes), D)).split(sizes, dim=3)
    q, *gate, k, v = fused
    q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
    if options.qk_norm:
        center = 1.0 if model.zero_centered_norm else 0.0
        q, k = (
            x * (x.square().mean(-1, keepdim=True) + model.norm_epsilon).rsqrt() * (w[f"{name}.weight"] + center)
            for x, name in ((q, "q_layernorm"), (k, "k_layernorm"))
        )
    if options.rope:
        q, k = (rotate(x, int(D * options.rotary_percent), model.rotary_base) for x in (q, k))
    k, v = (x.repeat_interleave(per_group, 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(D)
    s, t = torch.arange(h.shape[1])[:, None], torch.arange(h.shape[1])
    seen = (t <= s) if options.window is None else (t <= s) & (t > s - options.window)
    o = torch.einsum("bhst,bthd->bshd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
    if options.output_gate:
        o = o * gate[0].flatten(2, 3).sigmoid()
    return o.flatten(2) @ w["linear_proj.weight"].T


def rotate(x: Tensor, size: int, base: float) -> Tensor:
    """The first `size` dimensions of each head, in halves."""
    turned, rest = x[..., :size], x[..., size:]
    frequency = base ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequency
    cos, sin = (f(angle)[:, None].repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)
