"""Another release of Megatron-Core drives the same run: the same curve, and each continues what the other saved.

`make venv` puts the wheel beside the packages, in its own folder, so that both are at hand in one environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import yaml

from megatron_gdn.training.metrics import read_metrics
from tests.training import runs

ROOT = Path(__file__).parents[2]
OTHER = Path(sys.prefix) / "megatron-core-0.19"
MODEL = runs.SETTINGS["model"] | dict(
    pattern="M-G-S-*-",
    mamba_num_heads=2,
    mamba_head_dim=8,
    mamba_state_dim=8,
    full_attention=dict(output_gate=True),
    sliding_attention=dict(window=10, qk_norm=True),
)
STEPS, MIDDLE = 6, 3
TRAINING = runs.SETTINGS["training"] | {"train_tokens": STEPS * runs.SEQUENCE * runs.BATCH}

pytestmark = [
    pytest.mark.skipif(not OTHER.is_dir(), reason=f"no {OTHER}: make venv installs it where there is a wheel"),
    pytest.mark.skipif(megatron.core.__version__.startswith("0.19"), reason="this is the other release"),
]


def train(values: dict, *, other: bool, resume: bool = False) -> None:
    """One process of examples/pretrain.py on this or on the other release."""
    recipe = Path(values["run"]["output_dir"] + ".yaml")
    recipe.write_text(yaml.safe_dump(values))
    path = os.pathsep.join([str(OTHER)] * other + [str(ROOT)])
    command = [sys.executable, ROOT / "examples/pretrain.py", "--config", recipe, *["--resume"] * resume]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]


def curve(output_dir: Path) -> list[tuple[float, float]]:
    rows = read_metrics(output_dir / "metrics.jsonl")
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows if row["step"] > 0]


def release(output_dir: Path, step: int) -> str:
    """Of Megatron-Core, as the checkpoint names it."""
    return json.loads((output_dir / f"checkpoints/step_{step:08d}/info.json").read_text())["megatron_core"]


def test_runs_continue_under_another_megatron_core(tmp_path):
    prefix = runs.write_dataset(tmp_path)

    def settings(name: str, **training) -> dict:
        changes = dict(model=MODEL, training=TRAINING | training)
        return runs.settings(prefix, tmp_path / name, checkpoint=dict(interval=MIDDLE), **changes)

    train(settings("here"), other=False)
    here = curve(tmp_path / "here")
    assert len(here) == STEPS
    for name, first in (("from here", False), ("from there", True)):
        train(settings(name, exit_after_steps=MIDDLE), other=first)
        train(settings(name), other=not first, resume=True)
        # The same operations in the same order on one machine: the curves are equal to the last bit.
        assert curve(tmp_path / name) == here
        assert (release(tmp_path / name, MIDDLE) == megatron.core.__version__) != first
        assert (release(tmp_path / name, STEPS) == megatron.core.__version__) == first
