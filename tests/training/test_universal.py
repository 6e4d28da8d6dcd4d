"""DeepSpeed's universal checkpoints: its own converter and loader move a run to other layouts, fused sections too."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import pool
from tests.training.test_deepspeed import assert_same_training, groups
from tests.training.test_engine import SAMPLES, VOCABULARY, run_config, run_steps, stored_weights, train_steps

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="extra deepspeed")
H2 = dict(mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=2)


def deepspeed(stage: int, parallel: dict | None = None, pattern: str = "M-G-*-", **model):
    engine = dict(name="deepspeed", zero_stage=stage)
    return run_config(pattern, parallel=parallel, engine=engine, **(H2 | model))


def build(config):
    from megatron_gdn.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))


def first_steps(config, folder: str) -> dict:
    """Two steps and a checkpoint of DeepSpeed's behind them."""
    engine = build(config)
    losses, norms = run_steps(engine, range(2))
    engine.save_deepspeed(Path(folder), "two")
    return dict(losses=losses, norms=norms)


def last_steps(config, folder: str) -> dict:
    """Two steps more from the universal checkpoint."""
    engine = build(config)
    engine.load_universal(Path(folder), "universal")
    assert engine.scheduler.num_steps == 2 * SAMPLES  # where the schedule is; the rate hardly moves in two steps
    losses, norms = run_steps(engine, range(2, 4))
    return dict(losses=losses, norms=norms, weights=stored_weights(engine.model))


def convert(folder: Path) -> None:
    """As a user converts."""
    paths = ["--input_folder", str(folder / "two"), "--output_folder", str(folder / "universal")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *paths, *workers]
    done = subprocess.run(command, env=os.environ | {"LOCAL_RANK": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "first, second",
    [((1, dict(tensor=2, sequence=True)), (1, {})), ((1, {}), (2, dict(tensor=2)))],
    ids=["zero 1, tp 2 to 1", "zero 1, dp 2, to zero 2, tp 2"],
)
def test_a_universal_checkpoint_goes_to_another_layout(tmp_path, first, second):
    configs = [deepspeed(stage, parallel) for stage, parallel in (first, second)]
    whole = pool(2).run(train_steps, configs[0], 4, groups=groups(first[1]))[0]
    before = pool(2).run(first_steps, configs[0], str(tmp_path), groups=groups(first[1]))[0]
    convert(tmp_path)
    size = second[1].get("tensor", 1)
    for after in pool(size).run(last_steps, configs[1], str(tmp_path), groups=groups(second[1])):
        found = {name: before[name] + after[name] for name in ("losses", "norms")}
        assert_same_training(found | {"weights": after["weights"]}, whole)


def refusals(config, folder: str) -> list[str]:
    """What saving and loading say."""
    from megatron_gdn.config import ConfigError

    engine, found = build(config), []
    for call in (engine.save_deepspeed, engine.load_universal):
        with pytest.raises(ConfigError) as error:
            call(Path(folder), "two")
        found.append(str(error.value))
    return found


@pytest.mark.parametrize(
    "stage, model, message",
    [
        (3, {}, "engine.zero_stage (3) must be 1 or 2 for DeepSpeed's universal checkpoints"),
        (
            1,
            dict(pattern="G-", linear_num_key_heads=3, linear_num_value_heads=3),
            "decoder.layers.0.self_attention holds ghost heads or filled-up rows at parallel.tensor=2",
        ),
        (
            1,
            dict(pattern="*-", num_attention_heads=6, num_query_groups=3, kv_channels=8),
            "decoder.layers.0.self_attention holds ghost heads",
        ),
    ],
    ids=["zero 3", "heads of Gated DeltaNet", "heads of attention"],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, stage, model, message):
    config = deepspeed(stage, dict(tensor=2), **model)
    for found in pool(2).run(refusals, config, str(tmp_path), groups=groups(dict(tensor=2))):
        assert len(found) == 2 and all(text.startswith(message) for text in found)
    assert not list(tmp_path.iterdir())
