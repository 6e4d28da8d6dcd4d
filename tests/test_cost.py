"""Costs against models as they are built, FLOPs and bytes as they are counted, and published numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_gdn.config import load_config
from megatron_gdn.cost import model_cost, peak_flops
from megatron_gdn.layer_cost import mean_context
from tests.ranks import pool
from tests.training.test_engine import VOCABULARY, run_config

RECIPES = sorted(Path("examples/recipes").glob("*.yaml"))


def recipe(name: str, *overrides: str):
    return load_config(Path(f"examples/recipes/{name}.yaml"), list(overrides))


# Parameters without and with the embedding in millions, GFLOP per token. Counted from the released configurations by
# others; they have 9 biases of beta and 9 unused D more in each Gated DeltaNet layer.
PUBLISHED = {
    "gdn_0.4b": (467.7, 516.8, 3.18),
    "h1_0.4b": (481.6, 530.8, 3.40),
    "gdn_1.3b": (1232.5, 1309.3, 8.13),
    "h1_1.3b": (1242.9, 1316.6, 8.42),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_models(name):
    cost = model_cost(recipe(name), vocab_size=32000)
    without, whole, gflops = PUBLISHED[name]
    assert cost.parameters_without_embeddings / 1e6 == pytest.approx(without, abs=0.06)
    assert cost.parameters / 1e6 == pytest.approx(whole, abs=0.06)
    assert cost.flops_per_token / 1e9 == pytest.approx(gflops, abs=0.006)


def test_a_public_checkpoints_number_of_parameters():
    assert model_cost(recipe("fla_360m"), vocab_size=32000).parameters == 357_781_928


def parameters_on_meta(config, vocab_size) -> int:
    """Parameters of this rank's model, without memory for them."""
    from megatron_gdn.hybrid.model import build_model, padded_vocab_size, transformer_config

    host = transformer_config(config.model, config.parallel)
    with torch.device("meta"):
        model = build_model(
            host,
            config.model,
            vocab_size=padded_vocab_size(vocab_size, config.model.vocab_multiple),
            max_sequence_length=config.training.sequence_length,
            seed=None,
        )
    assert all(param.is_meta for param in model.parameters())
    return sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_model(path):
    config = load_config(path, ["parallel.tensor=1", "parallel.sequence=false", "parallel.context=1"])
    [built] = pool(1).run(parameters_on_meta, config, 32000, groups={})
    assert model_cost(config, vocab_size=32000).parameters == built


@pytest.mark.parametrize("name", ["gdn_0.4b", "fla_360m", "h2_0.4b", "qwen3_next_style"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_parameters_of_a_tensor_parallel_rank(name, tensor):
    """9 heads and 4 heads, with and without ghosts; 12 heads; 2 key heads that 4 ranks share."""
    config = recipe(name, f"parallel.tensor={tensor}")
    built = pool(tensor).run(parameters_on_meta, config, 32000, groups=dict(tensor_model_parallel_size=tensor))
    assert {sum(x.rank_parameters for x in model_cost(config, vocab_size=32000).layers)} == set(built)


def counted_flops(config) -> int:
    """FLOPs of all matrix products of a step of one micro-batch."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_gdn.training.engine import MegatronEngine

    def of_baddbmm(input_shape, a_shape, b_shape, **_):  # in place, which torch's table does not have
        batch, m, k = a_shape
        return 2 * batch * m * k * b_shape[-1]

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    shape = (config.training.micro_batch_size, config.training.sequence_length)
    text = torch.randint(VOCABULARY, shape)
    batch = dict(
        tokens=text, labels=text, loss_mask=torch.ones(shape), position_ids=torch.arange(shape[1]).expand(shape)
    )
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: of_baddbmm}) as counter:
        engine.forward_backward(iter([batch]), 1)
    return counter.get_total_flops()


FLOP_CASES = {
    "Gated DeltaNet": dict(pattern="G-G"),
    "one value head per key head, no gate": dict(pattern="G-", linear_num_key_heads=4, use_output_gate=False),
    "DeltaNet": dict(pattern="G", use_decay=False),
    "Mamba2": dict(pattern="M-", mamba_num_heads=4, mamba_head_dim=16, mamba_state_dim=32),
    "Mamba2 with groups": dict(pattern="M", mamba_num_heads=4, mamba_state_dim=16, mamba_num_groups=2),
    "sliding-window attention": dict(pattern="S-", sliding_attention=dict(window=20), kv_channels=24),
    "full attention": dict(pattern="*-", full_attention=dict(qk_norm=True, output_gate=True)),
    "H2": dict(pattern="M-G-S-", mamba_num_heads=4, mamba_head_dim=16, sliding_attention=dict(window=20)),
    "long heads": dict(pattern="G", linear_key_head_dim=48, linear_value_head_dim=96),
}


@pytest.mark.parametrize("case", FLOP_CASES)
def test_executed_flops_are_those_counted(case):
    config = run_config(training=dict(sequence_length=128, global_batch_size=2), **FLOP_CASES[case])  # whole chunks
    [counted] = pool(1).run(counted_flops, config, groups={})
    expected = model_cost(config, vocab_size=VOCABULARY).executed_flops_per_token * config.training.tokens_per_step
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("case", ["Gated DeltaNet", "Mamba2 with groups", "long heads"])
def test_executed_flops_of_a_context_parallel_rank_are_those_counted(case):
    """A rank in the middle makes a map forward and a gradient backward; the first no gradient, the last no map."""
    training = dict(sequence_length=512, global_batch_size=2)
    config = run_config(parallel=dict(context=4), training=training, **FLOP_CASES[case])
    counted = pool(4).run(counted_flops, config, groups=dict(context_parallel_size=4))
    cost = model_cost(config, vocab_size=VOCABULARY)
    expected = cost.executed_flops_per_token * config.training.tokens_per_step / 4
    model, folds = config.model, 0
    if "G" in model.symbols:
        # One product of a map and a state for each fragment and sequence, which the cost model leaves out.
        heads, K, V = model.linear_num_value_heads, model.linear_key_head_dim, model.linear_value_head_dim
        folds = 2 * model.pattern.count("G") * 2 * heads * K * K * V
        added = sum(layer.context_flops for layer in cost.layers) * config.training.tokens_per_step / 4
        assert counted[1] - counted[0] + counted[1] - counted[3] == pytest.approx(added + folds, rel=0.01)
    assert counted[1] == counted[2] == pytest.approx(expected + 4 * folds, rel=0.01)


def test_mean_context():
    for length, window in ((1, None), (10, None), (10, 3), (10, 50), (4096, 2048)):
        seen = [min(i + 1, window or length) for i in range(length)]
        assert mean_context(length, window) == pytest.approx(sum(seen) / length, rel=1e-12)


def test_peak_flops():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA GB200") == 2500e12 and peak_flops("NVIDIA B200") == 2250e12
    assert peak_flops("Quadro") is None


def test_mfu_is_model_flops_over_the_peak(monkeypatch):
    """The paper's 53,000 tokens/s of H1 on one H100."""
    from megatron_gdn.training.loop import Trainer

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    trainer = object.__new__(Trainer)
    trainer.device = torch.device("cuda")
    trainer.flops_per_token = model_cost(recipe("h1_1.3b"), vocab_size=32000).flops_per_token
    found = trainer._device_metrics(53_000.0)
    assert found["perf/tflops_per_gpu"] == pytest.approx(53_000 * PUBLISHED["h1_1.3b"][2] / 1e3, rel=1e-3)
    assert found["perf/mfu"] == pytest.approx(found["perf/tflops_per_gpu"] / 989, rel=1e-9)
    assert found["perf/memory_gib"] == 3.0


def dry_run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "examples/pretrain.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_dry_run_prints_the_costs():
    config = ["--config", "examples/recipes/gdn_1.3b.yaml"]
    found = dry_run(*config, "--dry-run", "--json", "--processes", "16", "parallel.tensor=2")
    report = json.loads(found.stdout)
    expected = model_cost(recipe("gdn_1.3b", "parallel.tensor=2"), vocab_size=32000, data_parallel=8)
    assert report["parameters"] == expected.parameters and report["layout"]["data"] == 8
    assert report["memory_bytes_per_rank"]["weights"] == expected.memory_bytes(0)["weights"]
    text = dry_run(*config, "--dry-run").stdout
    assert "1,309,295,488" in text and "sequence_length: 4096" in text
    among_settings = dry_run(*config, "parallel.tensor=2", "--dry-run", "--json", "--processes", "16", "run.seed=3")
    assert among_settings.stdout == found.stdout
    failed = dry_run(*config, "--json")
    assert failed.returncode == 2 and "--json and --processes need --dry-run" in failed.stderr
    failed = dry_run(*config, "--dry-run", "--processes", "0")
    assert failed.returncode == 2 and "--processes (0) must be at least 1" in failed.stderr


def test_dry_run_takes_the_vocabulary_that_training_would_take(tmp_path):
    config = ["--config", "examples/recipes/gdn_1.3b.yaml", "--dry-run", "--json", "model.vocab_size=null"]
    failed = dry_run(*config)
    assert failed.returncode == 2 and "model.vocab_size (null) must be a number where data.train" in failed.stderr
    for broken in ("{", "[]", "{}"):
        (tmp_path / "text.json").write_text(broken)
        failed = dry_run(*config, f"data.train=[{tmp_path}/text]")
        assert failed.returncode == 2 and "must be a number where data.train tells none: set it" in failed.stderr
    (tmp_path / "text.json").write_text('{"vocab_size": 777}')
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(777)}))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = model_cost(recipe("gdn_1.3b"), vocab_size=777).parameters
    for train in (f"{tmp_path}/text", "x.tar"):
        found = dry_run(*config, f"data.train=[{train}]", f"data.tokenizer={tmp_path}", "data.split=null")
        assert json.loads(found.stdout)["parameters"] == expected
