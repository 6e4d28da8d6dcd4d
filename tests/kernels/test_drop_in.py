"""The kernels in the place of what other packages use: their own modules, with our functions under their names.

Megatron-Core's and transformers' Gated DeltaNet modules run once with their own torch functions and once with ours;
outputs and all gradients must agree. What surrounds the functions is theirs in both runs.
"""

import functools
import importlib
import inspect
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from megatron_gdn.kernels import causal_conv1d, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, l2norm
from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from tests import gdn_layer
from tests.kernels.data import bounds, loss, rms_error
from tests.ranks import pool

LENGTHS = (1, 30, 0, 64, 55)
# The modules compute in float32 (unit roundoff 6e-8); a result is a chain of some ten sums of up to hundreds of terms.
# Gradients of the gates are small differences of large sums, and those of A_log and dt_bias sums over all tokens that
# nearly cancel. Measured against the recurrence in float64 in the same place, our errors are up to 2.5e-6, for the
# gates up to 2.6e-5; between their functions and ours, up to 6e-6 and 1.4e-4.
EXACT, EXACT_GATES = 5e-6, 5e-5
THEIRS, THEIR_GATES = 1e-5, 5e-4


def assert_agree(ours: dict, theirs: dict, *, exact: bool = False) -> None:
    """Outputs and gradients by name, within the tolerance of their kind."""
    assert ours.keys() == theirs.keys()
    tolerance, gates = (EXACT, EXACT_GATES) if exact else (THEIRS, THEIR_GATES)
    for name, expected in theirs.items():
        error = rms_error(ours[name], expected)
        of_gate = any(part in name for part in ("A_log", "dt_bias", "in_proj_ba"))
        assert error <= (gates if of_gate else tolerance), f"{name}: relative error {error:.1e}"


def exact_rule(q, k, v, *, cu_seqlens=None, **keywords):
    """The recurrence in float64, results in float32 as a module expects them."""
    keywords = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
    o, state = recurrent_gated_delta_rule_ref(q.double(), k.double(), v.double(), cu_seqlens=cu_seqlens, **keywords)
    return o.to(q.dtype), state if state is None else state.float()


def channels_first(cu_seqlens=None, calls: list | None = None):
    """Our convolution with the arguments of causal_conv1d's function: x `[B, D, T]` in and out, one result."""

    def causal_conv1d_fn(x, weight, bias=None, activation=None, **_):
        if calls is not None:
            calls.append("conv")
        y, _ = causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation, cu_seqlens=cu_seqlens)
        return y.transpose(1, 2)

    return causal_conv1d_fn


def fla_conv(*, cu_seqlens=None, packed=None, **keywords):
    """Our convolution as it is, called as fla's."""
    return causal_conv1d(**keywords, cu_seqlens=packed)


def counted(function, calls: list, **given):
    """The function, noting the names of the keywords of each call; `given` take the place of the caller's."""

    def call(*args, **keywords):
        calls.append(sorted(keywords))
        return function(*args, **{**keywords, **given})

    return call


def results(module, x: torch.Tensor, call) -> dict[str, torch.Tensor]:
    """Output and gradients of the input and of every parameter; `call(module, x)` returns the output."""
    module.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    y = call(module, leaf)
    loss(y).backward()
    grads = {f"grad {name}": param.grad.clone() for name, param in module.named_parameters()}
    return {"output": y.detach(), "grad input": leaf.grad} | grads


# Megatron-Core


def megatron_layer(deterministic: bool, **overrides):
    """Megatron-Core's own module; its deterministic mode uses its torch function, the other one fla's name."""
    import megatron.core.ssm.gated_delta_net as theirs
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_gdn.norms import RMSNorm

    config = gdn_layer.layer_config(deterministic_mode=deterministic, activation_func=F.silu, **overrides)
    submodules = theirs.GatedDeltaNetSubmodules(ColumnParallelLinear, RMSNorm, RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return theirs.GatedDeltaNet(config, submodules, layer_number=1, pg_collection=groups)


def in_megatron(overrides: dict, lengths: tuple[int, ...] | None):
    """Results with their rule, with ours, with the exact one, and the calls of ours; on a rank of the pool."""
    packed, calls = None if lengths is None else bounds(*lengths), []
    x = gdn_layer.inputs(tokens=sum(lengths or (150,)), batch=1 if lengths else 2)[0]
    with pytest.MonkeyPatch.context() as patch:
        replace = functools.partial(gdn_layer.replace_in_megatrons_layer, patch.setattr)
        replace(HAVE_FLA=True, l2norm=gdn_layer.l2norm_in_torch)
        host = megatron_layer(True, **overrides)
        reference = results(host, x, lambda module, leaf: per_document(module, leaf, packed))
        # Megatron-Core up to 0.17 takes the convolution from causal_conv1d, later ones take fla's.
        replace(l2norm=l2norm, causal_conv1d_fn=channels_first(packed, calls))
        # The module of 0.16 knows no packed sequences: the bounds are bound to the functions.
        replace(causal_conv1d=lambda **keywords: calls.append("conv") or fla_conv(**keywords, packed=packed))
        exact, ours = (
            with_rule(counted(rule, calls, cu_seqlens=packed), host, x, replace, overrides)
            for rule in (exact_rule, chunk_gated_delta_rule)
        )
    return reference, ours, exact, calls[2:]  # those before are of the exact rule


def with_rule(rule, host, x, replace, overrides: dict):
    """Results of Megatron's layer with a function in the place of fla's, which it may look up when it is built."""
    replace(chunk_gated_delta_rule=rule)
    layer = megatron_layer(False, **overrides)
    layer.load_state_dict(host.state_dict())
    return results(layer, x, lambda module, leaf: module(leaf, None)[0])


def per_document(module, x: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
    """The module on each document by itself."""
    if packed is None:
        return module(x, None)[0]
    spans = zip(packed[:-1].tolist(), packed[1:].tolist(), strict=True)
    return torch.cat([module(x[start:end], None)[0] for start, end in spans if end > start])


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["batch", "packed"])
@pytest.mark.parametrize("heads", [(4, 8), (2, 2)], ids=["grouped value heads", "as many keys"])
def test_in_megatron_cores_module(heads, lengths):
    overrides = dict(linear_num_key_heads=heads[0], linear_num_value_heads=heads[1])
    [(theirs, ours, exact, calls)] = pool(1).run(in_megatron, overrides, lengths, groups={})
    assert_agree(ours, theirs)
    assert_agree(ours, exact, exact=True)
    conv, rule = calls
    assert conv == "conv"
    needed = ["beta", "g", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"]
    assert [name for name in rule if name != "cu_seqlens"] == needed  # cu_seqlens since 0.18


# transformers


@pytest.fixture(scope="module")
def modeling():
    """transformers' module of Qwen3-Next; its functions are looked up there when the layer runs."""
    pytest.importorskip("transformers")
    return pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")


def qwen_layer(modeling, heads=(2, 4)):
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

    config = Qwen3NextConfig(
        hidden_size=24,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=heads[0],
        linear_num_value_heads=heads[1],
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        linear_conv_kernel_dim=4,
    )
    torch.manual_seed(0)
    layer = modeling.Qwen3NextGatedDeltaNet(config, layer_idx=0)
    with torch.no_grad():  # weights of a scale at which every part of the layer matters
        for param in layer.parameters():
            if param.dim() > 1:
                param.normal_(std=0.3)
    return layer, config


def hidden(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("heads", [(2, 4), (3, 3)], ids=["grouped value heads", "as many keys"])
def test_in_transformers_module(modeling, monkeypatch, heads):
    layer, _ = qwen_layer(modeling, heads)
    x, calls = hidden(150, batch=2), []
    theirs = results(layer, x, lambda module, leaf: module(leaf))
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", exact_rule)
    exact = results(layer, x, lambda module, leaf: module(leaf))
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", counted(chunk_gated_delta_rule, calls))
    monkeypatch.setattr(modeling, "causal_conv1d_fn", channels_first(calls=calls))
    ours = results(layer, x, lambda module, leaf: module(leaf))
    assert_agree(ours, theirs)
    assert_agree(ours, exact, exact=True)
    keywords = ["beta", "cu_seqlens", "g", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"]
    assert calls == ["conv", keywords]


def as_fla(monkeypatch, modeling):
    """Our functions where transformers looks for fla's, with transformers' own wrapper around them."""
    offered = dict(
        chunk_gated_delta_rule=chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule=fused_recurrent_gated_delta_rule,
    )
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fla"].ops = sys.modules["fla.ops"]
    sys.modules["fla.ops"].gated_delta_rule = sys.modules["fla.ops.gated_delta_rule"]
    vars(sys.modules["fla.ops.gated_delta_rule"]).update(offered)
    hub = importlib.import_module("transformers.integrations.hub_kernels")
    for name, own in (
        ("chunk_gated_delta_rule", "torch_chunk_gated_delta_rule"),
        ("fused_recurrent_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    ):
        wrap = hub.use_kernel_func_from_hub_with_fallback(name, "fla")
        monkeypatch.setattr(modeling, own, wrap(inspect.unwrap(getattr(modeling, own))))


def test_packed_in_transformers_module(modeling, monkeypatch):
    """With every keyword of transformers' packing collator; transformers itself refuses to pack without fla."""
    layer, _ = qwen_layer(modeling)
    x, packed = hidden(sum(LENGTHS)), bounds(*LENGTHS)
    keywords = dict(cu_seq_lens_q=packed, cu_seq_lens_k=packed, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS))
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        layer(x, **keywords)
    spans = [(a, b) for a, b in zip(packed[:-1].tolist(), packed[1:].tolist(), strict=True) if b > a]
    theirs = results(layer, x, lambda module, leaf: torch.cat([module(leaf[:, a:b]) for a, b in spans], 1))
    as_fla(monkeypatch, modeling)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", channels_first(packed))
    assert_agree(results(layer, x, lambda module, leaf: module(leaf, **keywords)), theirs)


def test_prefill_and_decode_in_transformers_module(modeling, monkeypatch):
    """A cache: the state after 70 tokens, then 3 tokens one by one."""
    from transformers.cache_utils import DynamicCache

    layer, config = qwen_layer(modeling)
    x = hidden(73, batch=2)

    def generate():
        cache = DynamicCache(config=config)
        with torch.no_grad():
            return torch.cat([layer(part, cache_params=cache) for part in x.split([70, 1, 1, 1], 1)], 1)

    with torch.no_grad():
        whole = layer(x)
    theirs = generate()
    as_fla(monkeypatch, modeling)
    assert_agree({"output": generate()}, {"output": theirs})
    assert_agree({"output": generate()}, {"output": whole})


# Every keyword that a caller of fla's function passes and ours takes; what is not here is an error, never dropped.
@pytest.mark.parametrize("unknown", ["use_gate_in_kernel", "head_first", "chunk_size"])
def test_keywords_that_are_not_taken_are_errors(unknown):
    x = torch.zeros(1, 3, 1, 4)
    with pytest.raises(TypeError, match=unknown):
        chunk_gated_delta_rule(x, x, x, g=x[..., 0], beta=x[..., 0], **{unknown: 64})
