"""Files of lit_gpt: weights that come back, biases that no layer has, recipes of another model, published sizes."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from megatron_gdn.config import load_config
from tests.tools import checkpoints
from tests.tools.test_formats import assert_equal, unpadded, weights
from tools.convert import lit_gpt_to_megatron
from tools.convert.architecture import Architecture, expected_shapes
from tools.convert.lit_gpt import TABLE as LIT_GPT


@pytest.fixture
def lit_gpt(tmp_path):
    """A file, a recipe, and the weights that they hold; written from the names that formats are known by."""
    model = dict(
        pattern="G-S-",
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        num_query_groups=None,
        sliding_attention=dict(window=20),
        tie_embeddings=True,
        vocab_multiple=2,
    )
    described = checkpoints.architecture(model)
    ours = unpadded(checkpoints.random_weights(described))
    state = {}
    for link in LIT_GPT.links(described):
        state |= dict(zip(link.theirs, link.to_theirs(*(ours[key] for key in link.ours)), strict=True))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.b_proj.bias"] = torch.zeros(2)
    state["transformer.h.0.attn.D"] = torch.ones(2)
    recipe = tmp_path / "recipe.yaml"
    values = asdict(load_config(Path("examples/recipes/h1_0.4b.yaml")))
    values["model"] = asdict(described.model)
    recipe.write_text(yaml.safe_dump(values))

    def save(state=state, **more):
        torch.save({"model": state, "hparams": {"lr": 1e-3}, "iter_num": 5} | more, tmp_path / "iter-model-ckpt.pth")
        return ["--file", str(tmp_path / "iter-model-ckpt.pth"), "--recipe", str(recipe)]

    return save, state, ours


def test_lit_gpt_file(lit_gpt, tmp_path, capsys):
    save, state, ours = lit_gpt
    assert lit_gpt_to_megatron.main([*save(), "--output", str(tmp_path / "ours")]) == 0
    assert "left out: transformer.h.0.attn.D (the layer does not read it)" in capsys.readouterr().out
    assert_equal(ours, weights(tmp_path / "ours"))
    assert state["transformer.h.1.attn.attn.weight"].shape == (96, 32)  # three times four heads of eight


def test_bias_of_beta_is_refused_unless_zero(lit_gpt, tmp_path, capsys):
    save, state, ours = lit_gpt
    state["transformer.h.0.attn.b_proj.bias"] += 0.25
    command = [*save(), "--output", str(tmp_path / "ours")]
    assert lit_gpt_to_megatron.main(command) == 1
    assert "b_proj.bias is not zero (up to 0.25), and no layer here has" in capsys.readouterr().err
    assert lit_gpt_to_megatron.main([*command, "--drop", "*.b_proj.bias"]) == 0
    assert_equal(ours, weights(tmp_path / "ours"))


def test_recipe_of_another_model_is_refused(lit_gpt, tmp_path, capsys):
    save, *_ = lit_gpt
    command = [*save(), "--output", str(tmp_path / "ours")]
    for name, reason in (("h2_0.4b", "no Mamba2 layers"), ("qwen3_next_style", "sliding windows only")):
        command[3] = f"examples/recipes/{name}.yaml"
        assert lit_gpt_to_megatron.main(command) == 1
        assert reason in capsys.readouterr().err
    command[3] = "examples/recipes/h1_0.4b.yaml"
    assert lit_gpt_to_megatron.main(command) == 1
    assert "the checkpoint lacks transformer.h.1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gdn_0.4b", "gdn_1.3b", "h1_0.4b", "h1_1.3b"])
def test_recipes_have_the_parameters_of_lit_gpts_models(name):
    """Published counts, less the bias of beta and D, which lit_gpt has in each Gated DeltaNet layer beside them."""
    counts = {"gdn_0.4b": 516_838_028, "h1_0.4b": 530_765_016, "gdn_1.3b": 1_309_295_776, "h1_1.3b": 1_316_608_452}
    model = load_config(Path(f"examples/recipes/{name}.yaml")).model
    described = Architecture(model=model)
    shapes = expected_shapes(described).values()
    found = sum(torch.Size([size or 32000 for size in shape]).numel() for shape in shapes)
    # Per layer: a bias and a D of 9 heads.
    assert counts[name] - found in (9 * described.symbols.count("G"), 18 * described.symbols.count("G"))
