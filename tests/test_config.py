"""Recipes, overrides, and the message of every wrong value."""

from pathlib import Path

import pytest
import yaml

from megatron_gdn.config import ConfigError, check_world, dump_config, load_config, parse_config

RECIPES = sorted((Path(__file__).parents[1] / "examples/recipes").glob("*.yaml"))
DEMO = Path(__file__).parents[1] / "examples/recipes/demo.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_dump_gives_it_again(path, tmp_path):
    config = load_config(path)
    dumped = tmp_path / "resolved.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config


def test_overrides_replace_the_recipes_values():
    config = load_config(DEMO, ["optimizer.lr=1e-3", "training.train_tokens=0.5M", "data.train=[0.7 a, 0.3 b]"])
    expected = yaml.safe_load(DEMO.read_text())
    expected["optimizer"]["lr"] = 0.001
    expected["training"]["train_tokens"] = 500_000
    expected["data"]["train"] = ["0.7 a", "0.3 b"]
    assert config == parse_config(expected)


@pytest.mark.parametrize("written, value", [("4096", 4096), ("1e9", 10**9), ("100B", 10**11), ("0.5M", 500_000)])
def test_counts(written, value):
    assert (
        load_config(DEMO, [f"training.train_tokens={written}", "optimizer.warmup_tokens=0"]).training.train_tokens
        == value
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimizer.lrr=1"], r"optimizer.lrr is not a known key: did you mean optimizer.lr\b"),
        (["optimiser.lr=1"], r"optimiser is not a known key: did you mean optimizer\b"),
        (["lr=1"], r"override \('lr=1'\) must be section.field=value"),
        (["optimizer.lr=[1"], r"override \('optimizer.lr=\[1'\) has a value that is not YAML"),
        (["optimizer.lr=.inf"], r"optimizer.lr \(inf\): input should be a finite number"),
        (["optimizer.muon.lr=.inf"], r"optimizer.muon.lr \(inf\): input should be a finite number"),
        (["data.train=a"], r"data.train \('a'\): must be a list: write \[a\]"),
        (["data.train=[0.5 a, b]"], r"data entries \['0.5 a', 'b'\] must all be a prefix, or all 'weight prefix'"),
        (["data.train=[x a]"], r"data entries \['x a'\] must all be a prefix"),
        (["data.train=[nan a]"], r"data entries \['nan a'\] must all be a prefix"),
        (["data.validation=[-1 a]"], r"data entries \['-1 a'\] must all be a prefix"),
        (["data.split='98'"], r"data.split \(98\) must be shares of train, validation and test"),
        (["data.split='0,1,1'"], r"data.split \(0,1,1\) must be shares .* and train above 0"),
        (["data.split='nan,1'"], r"data.split \(nan,1\) must be shares of train, validation and test"),
        (["fp8.backend=scaled_mm"], r"fp8: backend \(scaled_mm\) needs a recipe and has none: set fp8.recipe"),
        (["model.kernel_backend=fla"], r"model.kernel_backend \('fla'\): input should be 'auto', 'torch' or 'triton'"),
        (["optimizer.lr=-1"], r"optimizer.lr \(-1\): input should be greater than 0"),
        (["optimizer.min_lr=1"], r"min_lr \(1\) must not exceed lr \(0.004\)"),
        (["training.precision=fp8"], r"training.precision \('fp8'\): input should be 'fp32' or 'bf16'"),
        (["training.train_tokens=1.5"], r"training.train_tokens \(1.5\)"),
        (["training.train_tokens=100"], r"train_tokens \(100\) must hold one step of 4096 tokens"),
        (["model.pattern=GX"], r"pattern has 'X' at character 2"),
        (["model.linear_num_value_heads=3"], r"linear_num_value_heads \(3\) must be divisible by linear_num_key_heads"),
        (["parallel.tensor=5"], r"model.ffn_hidden_size \(384\) must be divisible by parallel.tensor \(5\): use 385"),
        (["model.vocab_multiple=1"], r"model.vocab_multiple \(1\) must be divisible by parallel.tensor \(2\)"),
        (["parallel.tensor=1"], r"sequence \(true\) needs tensor > 1"),
        (["training.sequence_length=255"], r"training.sequence_length \(255\) must be divisible by parallel.tensor"),
        (["parallel.pipeline=5"], r"model.pattern has 4 layers and parallel.pipeline \(5\) needs one per stage"),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=[3,2]"],
            r"parallel.pipeline_layers \(\[3, 2\]\) must be 2 numbers with the sum 4",
        ),
        (["model.pattern=S-"], r"num_attention_heads is required by the layers S of the pattern"),
        (["model.linear_num_key_heads=null"], r"linear_num_key_heads is required by the layers G of the pattern"),
        (["model.pattern=M-"], r"mamba_num_heads is required by the layers M"),
        (
            ["model.pattern=M-", "model.mamba_num_heads=4", "model.mamba_num_groups=3"],
            r"mamba_num_heads \(4\) must be divisible by mamba_num_groups \(3\)",
        ),
        (
            ["model.pattern=M-", "model.mamba_num_heads=6", "model.mamba_num_groups=3"],
            r"mamba_num_groups \(3\) must divide tensor_model_parallel_size \(2\) or be a multiple of it: use 2 groups",
        ),
        (
            ["model.pattern=M-", "model.mamba_num_heads=6", "model.mamba_state_dim=5"],
            r"mamba_state_dim \(5\) must be divisible by the 2 tensor-parallel ranks that share a group: use 4",
        ),
        (
            ["model.pattern=*-", "model.num_attention_heads=4", "model.num_query_groups=3"],
            r"num_attention_heads \(4\) must be divisible by num_query_groups \(3\)",
        ),
        (
            ["model.pattern=*-", "model.num_attention_heads=4", "model.full_attention.window=8"],
            r"full_attention.window \(8\) must be null: layers with a window are S",
        ),
        (
            ["model.pattern=S-", "model.num_attention_heads=4", "model.sliding_attention={rope: true}"],
            r"sliding_attention.window \(null\) must be a number of tokens",
        ),
        (["model.sliding_attention.window=0"], r"model.sliding_attention.window \('?0'?\): input should be greater"),
        (
            ["model.pattern=S-", "model.num_attention_heads=4", "model.attention_layers={2: {window: 4}}"],
            r"attention_layers has options of layer 2, which must be one of the attention layers of the pattern: 1",
        ),
        (["model.attention_layers={1: {window: 4}}"], r"attention layers of the pattern: there are none"),
        (
            ["model.pattern=S-", "model.num_attention_heads=4", "model.attention_layers={1: {windw: 4}}"],
            r"attention_layers.1.windw is not a known key: did you mean window\?",
        ),
        (
            ["model.pattern=S-", "model.num_attention_heads=4", "model.attention_layers={1: {window: 0}}"],
            r"attention_layers.1.window \(0\): input should be greater than 0",
        ),
        (
            ["model.pattern=*-", "model.num_attention_heads=4", "model.attention_layers={1: {window: 8}}"],
            r"full_attention.window \(8\) must be null: layers with a window are S",
        ),
        (
            ["model.pattern=*-", "model.num_attention_heads=4", "model.attention_layers.1.num_query_groups=3"],
            r"num_attention_heads \(4\) must be divisible by num_query_groups \(3\)",
        ),
        (
            ["model.pattern=*-", "model.num_attention_heads=4", "model.full_attention.rotary_percent=0.3"],
            r"rotary_percent \(0.3\) of attention heads of 32 must be an even number of dimensions, not 9",
        ),
        (["model.sliding_attention.windw=4"], r"model.sliding_attention.windw is not a known key: did you mean"),
        (
            ["training.train_tokens=16384"],
            r"optimizer.warmup_tokens \(32768\) must be below the tokens of the run \(16384",
        ),
        (["optimizer.lr.x=4"], r"names a part of lr, which has none"),
        (["data.validation=[]"], r"data.validation and data.split are empty"),
        (["model.pattern=*-", "model.num_attention_heads=6"], r"hidden_size \(128\) must be divisible by"),
        (["run.device=tpu", "optimizer.beta1=2"], r"(?s)run.device \('tpu'\).*optimizer.beta1 \(2\)"),
    ],
)
def test_wrong_values(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO, overrides)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"--config \(.*\) cannot be read: No such file"),
        ("run: {", r"is not YAML"),
        ("5", r"must hold sections"),
        ("run: {output_dir: x}", r"model is required"),
        ("run: {seed: 1, seed: 2}", r"(?s)is not YAML: key 'seed' is there twice: keep one of them.*line 1"),
        ("run: {}\nmodel: {}\nrun: {}", r"key 'run' is there twice"),
        ("run: \udcff", r"is not YAML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    "overrides, world_size, message",
    [
        ([], 1, r"parallel.tensor \(2\) x parallel.pipeline \(1\) = 2 must divide the number of processes \(1\)"),
        ([], 3, r"must divide the number of processes \(3\): start 2 or a multiple"),
        (["training.global_batch_size=24"], 4, r"\(24\) must be divisible by .* = 16: use 32"),
    ],
)
def test_layouts_that_do_not_fit_the_processes(overrides, world_size, message):
    with pytest.raises(ConfigError, match=message):
        check_world(load_config(DEMO, overrides), world_size)


def test_data_parallel_size():
    assert check_world(load_config(DEMO), 4) == 2


# Cases of parallel.context: overrides of h1_0.4b or another recipe, and the error.
CONTEXT_ERRORS = [
    (
        "h1_1.3b",
        ["parallel.context=8", "training.sequence_length=4097"],
        r"sequence length \(4097\) must be a positive multiple of the 8 fragments of 8 context-parallel ranks, layout "
        r"contiguous: use 4104 tokens, or fewer ranks",
    ),
    (
        "h1_1.3b",
        ["parallel.context=8", "parallel.context_layout=zigzag", "training.sequence_length=4104"],
        r"must be a positive multiple of the 16 fragments of 8 context-parallel ranks, layout zigzag: use 4112",
    ),
    (
        "gdn_1.3b",
        ["parallel.context=2048"],
        r"fragment length \(4096 tokens / 2048 fragments = 2\) must be at least the convolution's width - 1 \(3\)",
    ),
    (
        "h1_1.3b",
        ["parallel.context=2", "training.sequence_length=1024"],
        r"parallel.context \(2\) and training.sequence_length: window \(2048\) must not exceed the sequence \(1024",
    ),
    (
        "qwen3_next_style",
        ["parallel.context=4", "parallel.context_attention=a2a"],
        r"model.num_query_groups \(2\) must be divisible by parallel.tensor \(1\) x parallel.context \(4\) with "
        r"parallel.context_attention a2a: use all_gather",
    ),
    (
        "gdn_1.3b",
        ["parallel.tensor=4", "parallel.sequence=true", "parallel.context=2", "training.sequence_length=4100"],
        r"training.sequence_length \(4100\) must be divisible by parallel.tensor x parallel.context \(8\) with "
        r"parallel.sequence: use a multiple or turn parallel.sequence off",
    ),
]


@pytest.mark.parametrize("recipe, overrides, message", CONTEXT_ERRORS)
def test_sequences_that_cannot_be_cut(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Path(f"examples/recipes/{recipe}.yaml"), overrides)


def test_context_parallel_ranks_are_part_of_a_replica():
    config = load_config(Path("examples/recipes/h1_1.3b.yaml"), ["parallel.context=4", "parallel.tensor=2"])
    assert check_world(config, 16) == 2
    with pytest.raises(
        ConfigError,
        match=r"parallel.tensor \(2\) x parallel.context \(4\) x parallel.pipeline \(1\) = 8 must divide the number of "
        r"processes \(12\): start 8 or a multiple",
    ):
        check_world(config, 12)
