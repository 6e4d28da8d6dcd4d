"""The model that a checkpoint describes, in plain PyTorch and float32, from its weights one layer at a time.

Written from the formulas, without Megatron and without kernels, so that `verify` can compare a checkpoint with what
another library makes of the converted folder. Slow and meant for some hundred tokens.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.convert.architecture import Architecture, layer_key

_L2_EPSILON = 1e-6


def hidden_states(architecture: Architecture, read: Callable[[str], Tensor], tokens: Tensor) -> Iterator[Tensor]:
    """What enters the first layer, what leaves each layer (`[b, s, h]`), and at last the logits `[b, s, vocabulary]`.

    Args:
        architecture: of the model.
        read: gives a weight by our key, in any floating-point dtype.
        tokens: `[b, s]`.
    """
    model = architecture.model
    center = float(model.zero_centered_norm)

    def weight(key: str) -> Tensor:
        return read(key).float()

    def norm(x: Tensor, key: str) -> Tensor:
        return rms_norm(x, weight(key) + center, model.norm_epsilon)

    x = weight("embedding.word_embeddings.weight")[tokens]
    yield x
    for i, layer in enumerate(architecture.layers):

        def own(name: str, i: int = i) -> Tensor:
            return weight(layer_key(i, f"self_attention.{name}"))

        h = norm(x, layer_key(i, "input_layernorm.weight"))
        if layer.symbol == "G":
            x = x + gated_delta_net(h, own, architecture)
        elif layer.symbol == "M":
            x = x + mamba2(h, own, architecture)
        else:
            x = x + attention(h, own, architecture, i)
        if layer.mlp:

            def part(name: str, i: int = i) -> Tensor:
                return weight(layer_key(i, f"mlp.{name}"))

            h = norm(x, layer_key(i, "pre_mlp_layernorm.weight"))
            if architecture.has_experts(i):
                x = x + mixture(h, part, architecture)
            else:
                x = x + swiglu(h, part("linear_fc1.weight"), part("linear_fc2.weight"))
        yield x
    x = norm(x, "decoder.final_layernorm.weight")
    output = "embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"
    yield x @ weight(output).T


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


def swiglu(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """fc2(silu(gate) * up), with the gate in the first half of fc1's rows."""
    gate, up = (x @ fc1.T).chunk(2, -1)
    return (F.silu(gate) * up) @ fc2.T


def mixture(x: Tensor, part: Callable[[str], Tensor], architecture: Architecture) -> Tensor:
    """The experts that a token chooses, weighted, and the one that it shares with all."""
    shares = (x @ part("router.weight").T).softmax(-1)
    chosen, ids = shares.topk(architecture.experts.top_k, dim=-1)
    chosen = chosen / chosen.sum(-1, keepdim=True)
    shared = swiglu(x, part("shared_experts.linear_fc1.weight"), part("shared_experts.linear_fc2.weight"))
    y = shared * (x @ part("shared_experts.gate_weight").T).sigmoid()
    for e in ids.unique().tolist():
        names = [f"experts.experts.linear_fc{n}.weight#{e}" for n in (1, 2)]
        share = (chosen * (ids == e)).sum(-1)
        where = share > 0
        y[where] += share[where].unsqueeze(-1) * swiglu(x[where], *map(part, names))
    return y


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise and causal, then SiLU; x `[b, s, channels]`, kernel `[channels, 1, width]`."""
    padded = F.pad(x.transpose(1, 2), (kernel.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded, kernel, bias, groups=len(kernel)).transpose(1, 2))


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Token by token: S = exp(g) S, S += k beta (v - S^T k), o = S^T q / sqrt(K).

    Args:
        q, k: `[b, s, heads, K]`, of length one.
        v: `[b, s, heads, V]`.
        g, beta: `[b, s, heads]`.

    Returns:
        `[b, s, heads, V]`.
    """
    S, outputs = v.new_zeros(*v.shape[:1], v.shape[2], k.shape[3], v.shape[3]), []
    for t in range(v.shape[1]):
        S = S * g[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], error * beta[:, t, :, None])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / math.sqrt(k.shape[3]))
    return torch.stack(outputs, 1)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + _L2_EPSILON).rsqrt()


def gated_delta_net(h: Tensor, own: Callable[[str], Tensor], architecture: Architecture) -> Tensor:
    """The layer of megatron_gdn/gated_delta_net.py."""
    model = architecture.model
    group, V = model.linear_num_value_heads // model.linear_num_key_heads, model.linear_value_head_dim

    def heads(name: str, size: int) -> Tensor:
        return convolve(h @ own(f"in_proj.weight.{name}").T, own(f"conv1d.weight.{name}")).unflatten(-1, (-1, size))

    q, k = (heads(name, model.linear_key_head_dim).repeat_interleave(group, 2) for name in ("query", "key"))
    if model.use_qk_l2norm:
        q, k = unit(q), unit(k)
    beta = (h @ own("in_proj.weight.beta").T).sigmoid() * (2 if model.allow_neg_eigval else 1)
    g = torch.zeros_like(beta)
    if model.use_decay:
        g = -own("A_log").exp() * F.softplus(h @ own("in_proj.weight.alpha").T + own("dt_bias"))
    o = delta_rule(q, k, heads("value", V), g, beta)
    o = rms_norm(o, own("out_norm.weight") + float(architecture.zero_centered_out_norm), model.norm_epsilon)
    if model.use_output_gate:
        o = o * F.silu(h @ own("in_proj.weight.z").T).unflatten(-1, (-1, V))
    return o.flatten(2) @ own("out_proj.weight").T


def mamba2(h: Tensor, own: Callable[[str], Tensor], architecture: Architecture) -> Tensor:
    """The layer of megatron_gdn/mamba2.py, token by token: S = exp(dt A) S, S += dt B x, y = C S + D x."""
    model = architecture.model
    num_heads, groups = model.mamba_num_heads, model.mamba_num_groups
    x, B, C = (
        convolve(h @ own(f"in_proj.weight.{name}").T, own(f"conv1d.weight.{name}"), own(f"conv1d.bias.{name}"))
        for name in "xBC"
    )
    x = x.unflatten(-1, (num_heads, -1))
    B, C = (y.unflatten(-1, (groups, -1)).repeat_interleave(num_heads // groups, 2) for y in (B, C))
    dt = F.softplus(h @ own("in_proj.weight.dt").T + own("dt_bias"))
    decay, D = (-own("A_log").exp() * dt).exp(), own("D")
    S, outputs = x.new_zeros(len(x), num_heads, B.shape[3], x.shape[3]), []
    for t in range(x.shape[1]):
        written = torch.einsum("bhn,bhp->bhnp", B[:, t] * dt[:, t, :, None], x[:, t])
        S = S * decay[:, t, :, None, None] + written
        outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], S) + D[:, None] * x[:, t])
    y = (torch.stack(outputs, 1).flatten(2) * F.silu(h @ own("in_proj.weight.z").T)).unflatten(-1, (groups, -1))
    y = y * (y.square().mean(-1, keepdim=True) + model.norm_epsilon).rsqrt()
    return (y.flatten(2) * own("norm.weight")) @ own("out_proj.weight").T


def attention(h: Tensor, own: Callable[[str], Tensor], architecture: Architecture, layer: int) -> Tensor:
    """The layer of megatron_gdn/attention.py."""
    model, (heads, groups, D) = architecture.model, architecture.attention_heads(layer)
    options = architecture.attention_layers[layer]
    each = heads // groups
    sizes = [each, each, 1, 1] if options.output_gate else [each, 1, 1]
    fused = (h @ own("linear_qkv.weight").T).unflatten(-1, (groups, sum(sizes), D)).split(sizes, dim=3)
    q, *gate, k, v = (x.flatten(2, 3) for x in fused)
    if options.qk_norm:
        center = float(model.zero_centered_norm)
        q = rms_norm(q, own("q_layernorm.weight") + center, model.norm_epsilon)
        k = rms_norm(k, own("k_layernorm.weight") + center, model.norm_epsilon)
    if options.rope:
        q, k = (rotate(x, int(D * options.rotary_percent), model.rotary_base) for x in (q, k))
    o = attend(q, k, v, options.window)
    if options.output_gate:
        o = o * gate[0].sigmoid()
    return o.flatten(2) @ own("linear_proj.weight").T


def rotate(x: Tensor, width: int, base: float) -> Tensor:
    """Rotary embedding of the first `width` dimensions, the first half of them against the second."""
    frequencies = base ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
    cos, sin = (f(angles)[None, :, None] for f in (torch.cos, torch.sin))
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    turned = [first * cos - second * sin, first * sin + second * cos]
    return torch.cat([*turned, x[..., width:]], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention, `[b, s, heads, D]`; a token sees `window` tokens, itself included."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    s, t = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    seen = (t <= s) if window is None else (t <= s) & (t > s - window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
