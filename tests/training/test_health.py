"""Samples of the layers' health against direct computation, with one rank and with two."""

import math

import pytest
import torch

from megatron_gdn.training.health import last_logits
from megatron_gdn.training.metrics import read_metrics
from tests import gdn_layer
from tests.ranks import pool
from tests.training import runs


def sample_of_a_layer(tensor_parallel):
    from megatron_gdn.training.health import HealthMonitor

    layer = gdn_layer.build_layer(gdn_layer.layer_config(), layer_number=3)
    monitor = HealthMonitor(torch.nn.Sequential(layer))
    seen = []
    x, _ = gdn_layer.inputs()
    layer(x)
    assert monitor.take() == {}  # nothing without start
    monitor.start()
    watched = layer.observer
    layer.observer = lambda tensors: (seen.append(tensors), watched(tensors))
    layer(x)
    layer(x * 100)  # the second micro-batch is not sampled
    found = monitor.take()
    assert layer.observer is None and len(seen) == 1
    return found, {name: value.detach() for name, value in seen[0].items()}


def test_sample_equals_direct_computation():
    [(found, tensors)] = pool(1).run(sample_of_a_layer, 1, groups={})
    prefix = "health/layer_03/"
    assert {name.removeprefix(prefix).split("_")[0] for name in found} == {"alpha", "beta", "state", "gate"}
    assert 0 < tensors["alpha"].min() and tensors["alpha"].max() <= 1 and tensors["beta"].max() < 1
    for name in ("alpha", "beta", "gate"):
        values = tensors[name].flatten().sort().values
        assert len(values) < 2**14  # all of them are used
        assert found[f"{prefix}{name}_mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        for label, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            nearest = values[round(share * (len(values) - 1))].item()
            slack = (values[-1] - values[0]).item() * 20 / len(values)
            assert found[f"{prefix}{name}_{label}"] == pytest.approx(nearest, abs=slack)
    rms = tensors["state"].double().square().mean().sqrt().item()
    assert found[f"{prefix}state_rms"] == pytest.approx(rms, rel=1e-5)


def test_means_are_over_all_heads():
    [(one, _)] = pool(1).run(sample_of_a_layer, 1, groups={})
    two = [found for found, _ in pool(2).run(sample_of_a_layer, 2, groups=dict(tensor_model_parallel_size=2))]
    assert two[0] == two[1]
    for name in one:
        if name.endswith("_mean"):
            assert two[0][name] == pytest.approx(one[name], rel=1e-5), name


def test_last_logits():
    """Entropy and logits of equal keys are known: a query that sees n of them has entropy log n."""
    query, key = torch.ones(20, 2, 4, 8), torch.ones(20, 2, 2, 8)
    logits = last_logits(query, key, scale=0.5, window=6)
    assert logits.shape == (2, 4, 16, 20) and logits.max() == 4.0
    seen = torch.isfinite(logits).sum(-1)
    assert seen[0, 0].tolist() == [min(i + 1, 6) for i in range(4, 20)]
    from megatron_gdn.training.health import _summarize

    found = dict(_summarize("logits", logits))
    expected = sum(math.log(min(i + 1, 6)) for i in range(4, 20)) / 16
    assert found["attention_entropy"].item() == pytest.approx(expected, rel=1e-5)
    assert found["attention_max_logit"].item() == 4.0


def test_training_writes_samples_and_stays_the_same(tmp_path):
    prefix, losses = runs.write_dataset(tmp_path), []
    for interval, steps in ((4, {4, 8}), (None, set())):
        runs.run(runs.settings(prefix, tmp_path / str(interval), logging={"health_interval": interval}))
        rows = read_metrics(tmp_path / str(interval) / "metrics.jsonl")
        assert {row["step"] for row in rows if "health/layer_01/alpha_mean" in row} == steps
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert losses[0] == losses[1]
