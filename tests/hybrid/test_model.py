"""Initial weights of whole models."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.ranks import RankError, pool
from tests.training.test_engine import VOCABULARY, run_config

WIDTH, LAYERS = 96, 3


def initial_weights(**model):
    """Weights of a model by name."""
    from megatron_gdn.hybrid.model import build_model, transformer_config

    mamba = dict(mamba_num_heads=6, mamba_head_dim=32, mamba_state_dim=48)
    config = run_config("G-*-M-", hidden_size=WIDTH, ffn_hidden_size=192, **mamba, **model)
    host = transformer_config(config.model, config.parallel)
    gpt = build_model(host, config.model, vocab_size=VOCABULARY, max_sequence_length=64, seed=3)
    return {name: param.detach() for name, param in gpt.named_parameters()}


# Standard deviation over that of the method without scaling, by the end of the name.
RESIDUAL = (2 * LAYERS) ** -0.5
# The paper's code leaves Gated DeltaNet's projection out as it is.
SCALED = {
    "megatron": ("layers.0.self_attention.out_proj", "layers.2.self_attention.out_proj", "linear_proj", "linear_fc2"),
    "paper": ("layers.2.self_attention.out_proj", "linear_proj", "linear_fc2"),
}


@pytest.mark.parametrize("method", SCALED)
def test_spread_of_initial_weights(method):
    [weights] = pool(1).run(initial_weights, initialization=method, init_method_std=0.05, groups={})
    checked = 0
    for name, weight in weights.items():
        module = name.split(".")[-2]
        if weight.dim() != 2:
            continue
        scaled = name.removesuffix(".weight").endswith(SCALED[method])
        if method == "megatron" or module == "word_embeddings":
            expected = 0.05 if method == "megatron" else 0.02
        else:
            expected = weight.shape[1] ** -0.5 / math.sqrt(3)  # uniform in +-a has a deviation of a / sqrt(3)
            bound = weight.shape[1] ** -0.5 * (RESIDUAL if scaled else 1)
            assert weight.abs().max() <= bound
        if scaled:
            expected *= RESIDUAL
        # The deviation of n normal numbers has a relative error of 1 / sqrt(2 n); five of them.
        assert weight.std().item() == pytest.approx(expected, rel=5 * (2 * weight.numel()) ** -0.5), name
        checked += 1
    # Embedding and output; in_proj, in_proj_ba and out_proj; qkv and proj; in_proj, in_proj_dt and out_proj; MLPs.
    assert checked == 2 + 3 + 2 + 3 + 3 * 2


def test_deltanet_has_no_decay():
    [weights] = pool(1).run(initial_weights, use_decay=False, groups={})
    assert not any("layers.0." in name and name.endswith(("A_log", "dt_bias")) for name in weights)
    assert torch.isfinite(torch.cat([weight.flatten() for weight in weights.values()])).all()


def mixers_of_a_run():
    """Kernel backend and exchange of states of each mixer of a whole model."""
    from megatron_gdn.hybrid.model import build_model, transformer_config

    mamba = dict(mamba_num_heads=6, mamba_head_dim=32, mamba_state_dim=48)
    config = run_config("GM", kernel_backend="triton", **mamba)
    host = transformer_config(config.model, config.parallel)
    options = dict(vocab_size=VOCABULARY, max_sequence_length=64, seed=None, state_exchange="scan")
    mixers = [layer.self_attention for layer in build_model(host, config.model, **options).decoder.layers]
    return [(type(mixer).__name__, mixer.backend, mixer.state_exchange) for mixer in mixers]


def test_settings_that_change_no_number_reach_the_mixers():
    """Results are the same with every backend and exchange, so no result shows that a setting is lost."""
    [found] = pool(1).run(mixers_of_a_run, groups={})
    assert found == [("GatedDeltaNet", "triton", "scan"), ("Mamba2", "triton", "scan")]


def specs_of_two_layers(num_layers):
    from megatron_gdn.hybrid.layer_specs import decoder_spec

    decoder_spec(SimpleNamespace(num_layers=num_layers), run_config("G-*-").model)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_other_numbers_of_layers_than_the_patterns_are_refused(num_layers):
    message = rf"num_layers \({num_layers}\) must be the number of mixers in the pattern \(2\): set num_layers to 2"
    with pytest.raises(RankError, match=message):
        pool(1).run(specs_of_two_layers, num_layers, groups={})
