"""The doctor names who serves which role, from what Megatron-Core bound beside broken, foreign and whole packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_optional import META_TRANSFORMER_ENGINE, WEB_APEX_THAT_IMPORTS, write_packages

FUSED = "class FusedAdam: pass\nclass FusedSGD: pass\n"
# As Apex built from its source is laid out, as far as Megatron-Core imports it.
WHOLE_APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "from apex.optimizers.fused_adam import FusedAdam, FusedSGD",
    "apex/optimizers/fused_adam.py": FUSED,
    "apex/multi_tensor_apply.py": "multi_tensor_applier = None",
    "amp_C.py": "def multi_tensor_l2norm(*a): pass\ndef multi_tensor_scale(*a): pass\n",
    "fused_weight_gradient_mlp_cuda.py": "",
}


def examine(folder: Path, *packages: dict[str, str]) -> dict[str, dict]:
    """The doctor's rows by role, in a process that has these packages first on its path."""
    paths = [str(write_packages(folder, *packages)), *sys.path]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_gdn.doctor", "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {row["role"]: row for row in json.loads(done.stdout)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU has")
def test_broken_and_foreign_packages_serve_nothing(tmp_path):
    (tmp_path / "none").mkdir()
    broken = examine(tmp_path / "broken", META_TRANSFORMER_ENGINE, WEB_APEX_THAT_IMPORTS)
    assert broken["linear"]["provider"] == "Megatron-Core"
    assert "does not import (RuntimeError: Found empty" in broken["linear"]["why"]
    assert broken["optimizer"]["provider"] == "megatron_gdn.parallel.cpu.AdamW"
    assert broken["clipping"]["provider"] == "megatron.core.utils"
    assert broken["gradient accumulation"]["provider"] == "Megatron-Core's hooks"
    assert "is not there; megatron_gdn/fp8/README.md" in broken["gradient accumulation"]["why"]
    assert broken["FP8"]["provider"] == "emulated" and broken["kernels"]["provider"] == "torch"
    assert broken["attention"]["provider"] == "torch" and broken["device"]["provider"] == "cpu, gloo"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU has")
def test_apex_serves_what_megatron_takes_from_it(tmp_path):
    whole = examine(tmp_path / "whole", WHOLE_APEX)
    assert whole["optimizer"]["provider"] == "apex.optimizers.fused_adam.FusedAdam"
    assert whole["clipping"]["provider"] == "amp_C"
    # The extension is there, and the device is a CPU.
    assert whole["gradient accumulation"]["provider"] == "Megatron-Core's hooks"
    assert "fused_weight_gradient_mlp_cuda imports, and runs on CUDA only" in whole["gradient accumulation"]["why"]
    assert whole["linear"]["provider"] == "Megatron-Core"  # Apex has no linear layers


@pytest.mark.parametrize("imports", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_weight_gradients_are_fused_where_the_extension_and_cuda_are(monkeypatch, imports, kind):
    from megatron.core.tensor_parallel import layers

    from megatron_gdn import doctor
    from megatron_gdn.providers import fuses_weight_gradients

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", imports)
    fused = imports and kind == "cuda"
    assert fuses_weight_gradients(torch.device(kind)) is fused
    provider = doctor._accumulation(torch.device(kind)).provider
    assert provider == ("fused_weight_gradient_mlp_cuda" if fused else "Megatron-Core's hooks")
