"""The scaling model against figures worked out by hand, and the committed table against the command."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_gdn.config import load_config
from megatron_gdn.scaling import Cluster, best_step, step_of

CLUSTER = Cluster()


def recipe(name: str, *overrides: str):
    return load_config(Path(f"examples/recipes/{name}.yaml"), list(overrides))


def test_a_step_by_hand():
    """HV = 32, K = V = 128 and R = 8, 8192 tokens each: 4.19 MB per state and its map, kernels.md's example."""
    layout = ["parallel.context=8", "parallel.context_layout=contiguous", "training.sequence_length=65536"]
    batch = ["training.global_batch_size=4", "training.recompute=none"]
    config = recipe("qwen3_next_style_7b", *layout, *batch, "model.pattern=(G-)x32")
    step = step_of(config, data_parallel=2, cluster=CLUSTER)
    states = 7 * 32 * 128 * (128 + 128) * 4
    assert states == pytest.approx(29.4e6, rel=2e-3)
    halo = 3 * (2 * 16 + 32) * 128 * 2
    per_layer = states + states / 2 + 2 * halo  # backward only gradients of states; rows both ways
    hops = 2 * 8 * 5e-3  # 7 steps of a gather and one for the rows, forward and backward
    assert step.context_ms == pytest.approx(2 * 32 * (per_layer / 360e6 + hops), rel=1e-6)
    assert step.state_passing_ms == pytest.approx(step.context_ms)
    # 32.9 KB for every token, 7/8 of them to others, forward and backward.
    exchange = 7 / 8 * 8192 * 2 * (2 * 16 * 128 + 32 * 128 * 3 + 2 * 32)
    assert exchange == pytest.approx(236e6, rel=2e-3)
    assert step.head_exchange_ms == pytest.approx(2 * 2 * 32 * (exchange / 360e6 + 2 * 5e-3), rel=1e-6)
    flops = step.cost.executed_flops_per_token * 4 * 65536 / 16
    assert step.compute_ms == pytest.approx(flops / (0.45 * 989e12) * 1e3)
    # Gradients in float32 and weights in bf16, 15/16 of them over the network, behind 0.8 of a micro-batch.
    data = step.cost.parameters * 6 * 15 / 16 / 40e6
    assert step.data_ms == pytest.approx(max(0.0, data - 0.8 * step.compute_ms / 2))


def test_the_fastest_layout_fits_and_less_memory_costs_speed():
    base = recipe("h1_1.3b")
    step = best_step(base, num_gpus=8, length=2**17, cluster=CLUSTER)
    assert step.num_gpus == 8 and step.memory_gib <= CLUSTER.memory_gib
    smaller = best_step(base, num_gpus=8, length=2**17, cluster=replace(CLUSTER, memory_gib=30.0))
    assert smaller.memory_gib <= 30 and smaller.tokens_per_s_per_gpu < step.tokens_per_s_per_gpu
    assert best_step(base, num_gpus=8, length=2**17, cluster=replace(CLUSTER, memory_gib=3.0)) is None


def test_slower_links_cost_speed():
    base = recipe("qwen3_next_style_7b")
    slow = replace(CLUSTER, network_gb_per_s=4.0, nvlink_gb_per_s=36.0)
    fast, slow = (best_step(base, num_gpus=64, length=2**20, cluster=c) for c in (CLUSTER, slow))
    assert slow.tokens_per_s_per_gpu < fast.tokens_per_s_per_gpu


def test_the_committed_table_is_what_the_command_prints():
    """Of one model; the other's takes as long again."""
    command = [sys.executable, "-m", "megatron_gdn.scaling", "--config", "examples/recipes/h1_1.3b.yaml"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assumptions, table = found.stdout.split("\n### ")
    committed = Path("megatron_gdn/parallel/scaling.md").read_text()
    assert assumptions.strip() in committed and f"### {table.strip()}" in committed


def test_errors():
    command = [sys.executable, "-m", "megatron_gdn.scaling", "--config", "examples/recipes/h1_1.3b.yaml"]
    found = subprocess.run([*command, "model.vocab_size=null"], capture_output=True, text=True, timeout=300)
    assert found.returncode == 2 and "model.vocab_size (null) must be a number: set it." in found.stderr
