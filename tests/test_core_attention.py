"""The core of an attention layer: windows that the host names, Transformer Engine's core, devices, refusals."""

import re

import pytest
import torch

from tests import attention_layer
from tests.attention_layer import TOKENS
from tests.ranks import RankError, pool


def windows_of_layers(**settings):
    from megatron_gdn.core_attention import SlidingWindowAttention

    config = attention_layer.layer_config(num_layers=4, **settings)
    return [SlidingWindowAttention(config, number).window for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(), [None] * 4),
        (dict(window_size=(6, 0)), [7] * 4),
        (dict(window_size=(-1, 0)), [None] * 4),
        (dict(window_size=(6, 0), window_attn_skip_freq=2), [7, None, 7, None]),
        (dict(window_size=(6, 0), window_attn_skip_freq=[1, 0, 0, 1]), [7, None, None, 7]),
    ],
)
def test_core_follows_the_hosts_windows(settings, expected):
    """In Megatron's own SelfAttention, without HybridSelfAttention."""
    assert pool(1).run(windows_of_layers, groups={}, **settings) == [expected]


def transformer_engines_core():
    """What Megatron's wrapper of Transformer Engine would be built with."""
    import sys
    import types
    from unittest import mock

    from megatron_gdn import core_attention

    class Recorder(torch.nn.Module):
        def __init__(self, config, layer_number, **arguments):
            super().__init__()
            self.seen = (config.window_size, layer_number, sorted(arguments), arguments["softmax_scale"])

    fake = types.SimpleNamespace(TEDotProductAttention=Recorder)
    config = attention_layer.layer_config()
    with (
        mock.patch.dict(sys.modules, {"megatron.core.extensions.transformer_engine": fake}),
        mock.patch.object(core_attention, "resolve_attention_backend", lambda *_, **__: "te"),
    ):
        layers = [attention_layer.build_attention(config, 2, window=w, softmax_scale=0.5) for w in (7, None)]
    assert config.window_size is None and config.softmax_scale is None  # those of the whole model
    return [layer.core_attention.seen for layer in layers]


def test_transformer_engine_gets_the_window():
    arguments = ["attention_type", "attn_mask_type", "cp_comm_type", "pg_collection", "softmax_scale"]
    [seen] = pool(1).run(transformer_engines_core, groups={})
    assert seen == [((6, 0), 2, arguments, 0.5), (None, 2, arguments, 0.5)]


def core(config_options=None, **options):
    from megatron_gdn.core_attention import SlidingWindowAttention

    return SlidingWindowAttention(attention_layer.layer_config(**(config_options or {})), 1, **options)


def call_core(keys=TOKENS, mask_type="causal", bias=False, qkv_format=None):
    from megatron.core.transformer.enums import AttnMaskType

    query, key = torch.randn(TOKENS, 1, 8, 6), torch.randn(keys, 1, 4, 6)
    documents = attention_layer.packed(TOKENS) if qkv_format else None
    if documents:
        documents.qkv_format = qkv_format
    core()(
        query,
        key,
        key,
        None,
        attn_mask_type=AttnMaskType[mask_type],
        attention_bias=torch.zeros(1) if bias else None,
        packed_seq_params=documents,
    )


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (core, dict(attention_type="cross"), "attention_type (cross) must be 'self'"),
        (core, dict(attention_dropout=0.1), "attention_dropout (0.1) must be 0.0"),
        (core, dict(config_options=dict(window_size=(6, 6))), "window_size ((6, 6)) must be (window - 1, 0): causal"),
        (core, dict(config_options=dict(window_size=(-2, 0))), "window_size ((-2, 0)) must be (window - 1, 0): causal"),
        (core, dict(config_options=dict(window_size=(6, 0)), window=8), "window (8) and window_size ((6, 0)) differ"),
        (call_core, dict(mask_type="no_mask"), "attn_mask_type (no_mask) must be causal"),
        (call_core, dict(mask_type="padding_causal"), "attn_mask_type (padding_causal) needs packed_seq_params"),
        (call_core, dict(bias=True), "attention_bias ([1]) must be None: use backend 'te'"),
        (call_core, dict(keys=50), "key (50 tokens) must have the tokens of query (40): there is no cached"),
        (call_core, dict(qkv_format="sbhd"), "qkv_format (sbhd) must be thd"),
    ],
)
def test_core_refuses(function, arguments, message):
    with pytest.raises(RankError, match=re.escape(message)):
        pool(1).run(function, groups={}, **arguments)


def core_on_a_cpu_beside_a_gpu():
    """Of a model that stays on the CPU, built where there is CUDA, and of one built without."""
    from unittest import mock

    from megatron_gdn.core_attention import CoreAttention

    query, key = torch.randn(TOKENS, 1, 8, 6), torch.randn(TOKENS, 1, 4, 6)
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        core = CoreAttention(attention_layer.layer_config(), 1, window=7)
        found = core(query, key, key)
    return found, CoreAttention(attention_layer.layer_config(), 1, window=7, backend="torch")(query, key, key)


def test_the_device_of_the_tensors_chooses_the_backend():
    [(found, expected)] = pool(1).run(core_on_a_cpu_beside_a_gpu, groups={})
    assert torch.equal(found, expected)


def core_on_a_cpu_beside_transformer_engine():
    """Of models built where there are CUDA and Transformer Engine, stood in for; the last tensors are on CUDA."""
    import sys
    import types
    from unittest import mock

    from megatron_gdn import core_attention

    class OnlyCuda(torch.nn.Module):
        """Has a key on disk and no kernel for a CPU."""

        def __init__(self, config, layer_number, **arguments):
            super().__init__()
            self.register_buffer("extra_state", torch.zeros(1))

        def forward(self, query, key, value, *, attn_mask_type):
            assert query.device.type == "cuda", "no kernel"
            return "Transformer Engine's"

    query, key = torch.randn(TOKENS, 1, 8, 6), torch.randn(TOKENS, 1, 4, 6)
    on_cuda = types.SimpleNamespace(device=torch.device("cuda", 0))
    config = attention_layer.layer_config()
    expected = core_attention.CoreAttention(config, 1, window=7, backend="torch", softmax_scale=0.5)(query, key, key)
    fake = types.SimpleNamespace(TEDotProductAttention=OnlyCuda)
    with (
        mock.patch.dict(sys.modules, {"megatron.core.extensions.transformer_engine": fake}),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch("megatron_gdn.kernels.sliding_window._installed", lambda name: name == "transformer_engine"),
        mock.patch("megatron_gdn.kernels.sliding_window.require", lambda *_, **__: None),
    ):
        auto, by_name = (
            core_attention.CoreAttention(config, 1, window=7, backend=backend, softmax_scale=0.5)
            for backend in ("auto", "te")
        )
        assert isinstance(auto, OnlyCuda) and list(auto.state_dict()) == ["extra_state"]
        found = auto(query, key, key, attn_mask_type=None)
        with pytest.raises(ValueError) as error:
            by_name(query, key, key, attn_mask_type=None)
        assert list(auto.state_dict()) == ["extra_state"]
        computed = [core(on_cuda, on_cuda, on_cuda, attn_mask_type=None) for core in (auto, by_name)]
        config.attention_dropout = 0.1  # which Transformer Engine has
        dropping = core_attention.CoreAttention(config, 1, window=7)
        with pytest.raises(ValueError) as dropout_error:
            dropping(query, key, key, attn_mask_type=None)
    return found, expected, computed, str(error.value), str(dropout_error.value)


def test_a_model_on_a_cpu_does_not_use_transformer_engine():
    found, expected, computed, error, dropout = pool(1).run(core_on_a_cpu_beside_transformer_engine, groups={})[0]
    assert torch.equal(found, expected) and computed == ["Transformer Engine's"] * 2
    assert error == (
        "attention backend (te) needs tensors on CUDA, and they are on cpu: move the model to the GPU, or use 'auto'."
    )
    assert dropout.startswith("attention_dropout (0.1) must be 0.0 with attention backend 'auto': set it to 0, or use")
