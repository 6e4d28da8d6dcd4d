"""Recipes against Transformer Engine's own classes, alignment against shapes of real layers, wrong settings refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gdn.config import ConfigError, FP8Config, load_config
from megatron_gdn.fp8.alignment import check_alignment
from megatron_gdn.fp8.recipe import host_options, layer_uses_fp8, linear_recipe, row_multiple

RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]
RECIPE_FILES = Path(__file__).parents[2] / "examples" / "recipes"
# `make venv` puts the wheel without a compiled part here, beside the environment's packages: as one of them it would
# break every import of Megatron-Core that does not go through megatron_gdn.
TRANSFORMER_ENGINE = Path(sys.prefix) / "transformer-engine"

DESCRIBE = """
import json, warnings
warnings.simplefilter("ignore")
from transformer_engine.common import recipe as te
classes = dict(delayed=te.DelayedScaling, tensorwise=te.Float8CurrentScaling, blockwise=te.Float8BlockScaling,
               mxfp8=te.MXFP8BlockScaling)
answer = {}
for name, make in classes.items():
    for format in (None, "E4M3", "HYBRID"):
        made = make() if format is None else make(fp8_format=getattr(te.Format, format))
        parts = ("fwd_inp", "fwd_weight", "bwd_grad")
        answer[f"{name} {format}"] = dict(
            largest=[made.fp8_format.value.max_fwd, made.fp8_format.value.max_bwd],
            power_of_2=[getattr(getattr(made, f"fp8_quant_{p}", None), "power_2_scale", None) for p in parts],
            block_dims=[getattr(made, f"{p}_block_scaling_dim", None) for p in ("x", "w", "grad")],
            history=getattr(made, "amax_history_len", None),
            algorithm=getattr(made, "amax_compute_algo", None),
        )
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def transformer_engine():
    """What Transformer Engine's recipe classes say of themselves, from a process of its own."""
    if not TRANSFORMER_ENGINE.is_dir():
        pytest.skip("the wheel of Transformer Engine is not beside the environment: make venv puts it there")
    # The variable lets the wheel import without its compiled part.
    environment = os.environ | {"NVTE_PROJECT_BUILDING": "1", "PYTHONPATH": str(TRANSFORMER_ENGINE)}
    done = subprocess.run([sys.executable, "-c", DESCRIBE], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("format", [None, "e4m3", "hybrid"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_transformer_engine_s(transformer_engine, name, format):
    theirs = transformer_engine[f"{name} {format.upper() if format else None}"]
    ours = linear_recipe(FP8Config(recipe=name, backend="emulated", format=format))
    operands = (ours.input, ours.weight, ours.grad_output)
    assert [ours.input.largest, ours.grad_output.largest] == theirs["largest"]
    assert ours.weight.largest == ours.input.largest
    if name == "mxfp8":  # its classes do not state scales: 32 elements and e8m0 are the format's
        assert {(q.block, q.scale_rule) for q in operands} == {((1, 32), "e8m0")}
        return
    if name == "delayed":
        assert ours.history == theirs["history"] and theirs["algorithm"] == "max"
    else:
        assert [q.scale_rule == "power_of_2" for q in operands] == theirs["power_of_2"] and ours.history == 0
    dims = {None: None, (1, 128): 1, (128, 128): 2}
    assert [dims[q.block] for q in operands] == theirs["block_dims"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_host_takes_the_options(name):
    edges = 0 if name == "delayed" else 1
    config = FP8Config(recipe=name, first_layers_bf16=edges, last_layers_bf16=edges)
    options = host_options(config)
    host = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=2, **options)
    assert Fp8Recipe(host.fp8_recipe) == getattr(Fp8Recipe, name)
    assert host.fp8 == ("hybrid" if name in ("delayed", "tensorwise") else "e4m3")
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    for layer in range(4):
        assert layer_uses_fp8(config, layer, 4) != is_first_last_bf16_layer(host, layer)
    if name == "delayed":
        assert (host.fp8_amax_history_len, host.fp8_amax_compute_algo) == (1024, "max")


def test_no_options_for_the_host_where_it_does_not_compute():
    assert host_options(FP8Config()) == host_options(FP8Config(recipe="mxfp8", backend="emulated")) == {}
    assert not layer_uses_fp8(FP8Config(), 1, 4) and row_multiple(FP8Config()) == 1


@pytest.mark.parametrize(
    "options, text",
    [
        (
            dict(recipe="mxfp8", backend="scaled_mm"),
            r"recipe \(mxfp8\) must be delayed or tensorwise with backend scal",
        ),
        (dict(recipe="tensorwise", backend="emulated", param_gather=True), r"param_gather \(true\) needs backend te"),
        (dict(recipe="delayed"), r"first_layers_bf16 \(1\) and last_layers_bf16 \(1\) must be 0 with recipe delayed"),
        (dict(recipe="fp4"), "Input should be 'none', 'delayed', 'tensorwise', 'blockwise' or 'mxfp8'"),
    ],
)
def test_settings_that_cannot_work(options, text):
    with pytest.raises(ValueError, match=text):
        FP8Config(**options)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("recipe_file", ["gdn_0.4b", "gdn_1.3b", "h1_0.4b", "h1_1.3b"])
def test_the_paper_s_models_fit_every_recipe(recipe_file, name, tensor):
    overrides = [f"fp8.recipe={name}", "fp8.backend=emulated", f"parallel.tensor={tensor}"]
    check_alignment(load_config(RECIPE_FILES / f"{recipe_file}.yaml", overrides))


@pytest.mark.parametrize(
    "name, overrides, text",
    [
        (
            "tensorwise",
            ["model.hidden_size=1544", "model.kv_channels=128"],
            r"model.hidden_size \(1544\) must be a multiple of 16 .*: use 1552.",
        ),
        (
            "tensorwise",
            ["parallel.tensor=2", "model.ffn_hidden_size=6160"],
            r"an MLP on each of 2 ranks \(3080\) must be a multiple of 16 with .*: use model.ffn_hidden_size=6176",
        ),
        (
            "blockwise",
            ["training.sequence_length=2050"],
            r"tokens of a micro-batch, .* \(8200\) must be a multiple of 16",
        ),
        (
            "mxfp8",
            ["model.ffn_hidden_size=6160"],
            r"rows of an MLP on each of 1 ranks \(6160\) must be a multiple of 32",
        ),
        (
            "mxfp8",
            ["model.kv_channels=40", "parallel.tensor=2"],
            r"query rows of attention .* \(240\) .*: use heads of 64",
        ),
    ],
)
def test_widths_that_do_not_fit(name, overrides, text):
    config = load_config(RECIPE_FILES / "h1_0.4b.yaml", [f"fp8.recipe={name}", "fp8.backend=emulated", *overrides])
    with pytest.raises(ConfigError, match=text):
        check_alignment(config)


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["fp8.recipe=tensorwise"], r"fp8.backend \(te\) needs model.provider=te and has local"),
        (["fp8.recipe=mxfp8", "fp8.backend=emulated", "model.provider=te"], "needs model.provider=local and has te"),
        (
            ["fp8.recipe=delayed", "fp8.backend=emulated", "training.recompute=full"],
            r"fp8.recipe \(delayed\) must not go with training.recompute=full",
        ),
    ],
)
def test_settings_that_do_not_go_together(overrides, text):
    with pytest.raises(ConfigError, match=text):
        load_config(RECIPE_FILES / "h1_0.4b.yaml", overrides)
