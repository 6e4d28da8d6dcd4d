"""fla's `GatedDeltaNetForCausalLM` in plain PyTorch and float32, from the names and settings of its folder alone.

fla's own model needs Triton and a GPU. This one reads the same config.json and safetensors, by the same names and not
through a converter's table, and is compared with fla's own in tests/tools/test_fla_model.py.
"""

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn import functional as F

from tools.convert.forward import attend, convolve, delta_rule, rms_norm, rotate, unit
from tools.convert.settings import HfConfig


def hidden_states(config: HfConfig, read: Callable[[str], Tensor], tokens: Tensor) -> Iterator[Tensor]:
    """What enters the first layer, what leaves each layer (`[b, s, h]`), and at last the logits `[b, s, vocabulary]`.

    Args:
        config: of `config.json`.
        read: gives a weight by its name.
        tokens: `[b, s]`.
    """
    epsilon = config["norm_eps"]

    def weight(name: str) -> Tensor:
        return read(name).float()

    x = weight("model.embeddings.weight")[tokens]
    yield x
    attention = config.get("attn") or []
    attention = [attention] if isinstance(attention, dict) else attention
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        entry = next((entry for entry in attention if i in entry["layers"]), None)

        def linear(x: Tensor, name: str, prefix: str = prefix) -> Tensor:
            return F.linear(x, weight(f"{prefix}{name}.weight"))

        h = rms_norm(x, weight(prefix + "attn_norm.weight"), epsilon)
        if entry is None:
            x = x + _gated_delta_net(h, config, lambda name, prefix=prefix: weight(f"{prefix}attn.{name}"))
        else:
            x = x + _attention(h, config, entry, linear)
        h = rms_norm(x, weight(prefix + "mlp_norm.weight"), epsilon)
        x = x + linear(F.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj"), "mlp.down_proj")
        yield x
    tied = config.get("tie_word_embeddings", False)
    x = rms_norm(x, weight("model.norm.weight"), epsilon)
    yield F.linear(x, weight("model.embeddings.weight" if tied else "lm_head.weight"))


def _gated_delta_net(h: Tensor, config: HfConfig, own: Callable[[str], Tensor]) -> Tensor:
    key_heads, K = config["num_heads"], config["head_dim"]
    value_heads, V = config.get("num_v_heads") or key_heads, int(K * config["expand_v"])

    def project(name: str) -> Tensor:
        return F.linear(h, own(f"{name}_proj.weight"))

    q, k, v = (convolve(project(name), own(f"{name}_conv1d.weight")) for name in "qkv")
    q, k = (unit(x.unflatten(-1, (key_heads, K))).repeat_interleave(value_heads // key_heads, 2) for x in (q, k))
    beta = project("b").sigmoid()
    if config.get("allow_neg_eigval", False):
        beta = 2 * beta
    g = -own("A_log").exp() * F.softplus(project("a") + own("dt_bias"))
    o = rms_norm(delta_rule(q, k, v.unflatten(-1, (value_heads, V)), g, beta), own("o_norm.weight"), config["norm_eps"])
    if config.get("use_gate", True):
        o = o * F.silu(project("g").unflatten(-1, (value_heads, V)))
    return F.linear(o.flatten(2), own("o_proj.weight"))


def _attention(h: Tensor, config: HfConfig, entry: dict, linear: Callable[[Tensor, str], Tensor]) -> Tensor:
    D = config["hidden_size"] // entry["num_heads"]
    q, k, v = (linear(h, f"attn.{name}_proj").unflatten(-1, (-1, D)) for name in "qkv")
    q, k = (rotate(x, D, entry.get("rope_theta", 10000.0)) for x in (q, k))
    return linear(attend(q, k, v, entry.get("window_size")).flatten(2), "attn.o_proj")


def logits(config: HfConfig, read: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    """`[b, s, vocabulary]`."""
    *_, last = hidden_states(config, read, tokens)
    return last
