"""Initial weights of whole models."""

import math

import pytest
import torch

from tests.ranks import pool
from tests.training.test_engine import VOCABULARY, run_config

WIDTH, LAYERS = 96, 4


def initial_weights(**model):
    """Weights of a model by name."""
    from megatron_gdn.hybrid.model import build_model, transformer_config

    config = run_config("G-*-G-*-", hidden_size=WIDTH, ffn_hidden_size=192, **model)
    host = transformer_config(config.model, config.parallel)
    gpt = build_model(host, config.model, vocab_size=VOCABULARY, max_sequence_length=64, seed=3)
    return {name: param.detach() for name, param in gpt.named_parameters()}


# Standard deviation over that of the method without scaling, by the end of the name.
RESIDUAL = (2 * LAYERS) ** -0.5
SCALED = {"megatron": ("out_proj", "linear_proj", "linear_fc2"), "paper": ("linear_proj", "linear_fc2")}


@pytest.mark.parametrize("method", SCALED)
def test_spread_of_initial_weights(method):
    [weights] = pool(1).run(initial_weights, initialization=method, init_method_std=0.05, groups={})
    checked = 0
    for name, weight in weights.items():
        module = name.split(".")[-2]
        if weight.dim() != 2:
            continue
        if method == "megatron" or module == "word_embeddings":
            expected = 0.05 if method == "megatron" else 0.02
        else:
            expected = weight.shape[1] ** -0.5 / math.sqrt(3)  # uniform in +-a has a deviation of a / sqrt(3)
            bound = weight.shape[1] ** -0.5 * (RESIDUAL if module in SCALED[method] else 1)
            assert weight.abs().max() <= bound
        if module in SCALED[method]:
            expected *= RESIDUAL
        # The deviation of n normal numbers has a relative error of 1 / sqrt(2 n); five of them.
        assert weight.std().item() == pytest.approx(expected, rel=5 * (2 * weight.numel()) ** -0.5), name
        checked += 1
    assert checked == 2 + 2 * (5 + 4)  # embedding and output; in_proj, in_proj_ba, out_proj, qkv, proj and MLPs


def test_deltanet_has_no_decay():
    [weights] = pool(1).run(initial_weights, use_decay=False, groups={})
    assert not any(name.endswith(("A_log", "dt_bias")) for name in weights)
    assert torch.isfinite(torch.cat([weight.flatten() for weight in weights.values()])).all()
