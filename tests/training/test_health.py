"""Samples of the layers' health against direct computation, with one rank and with two."""

import math

import pytest
import torch

from megatron_gdn.attention import last_logits
from megatron_gdn.training.metrics import read_metrics
from tests import attention_layer, gdn_layer
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


def test_a_sample_meets_every_head():
    """More values than are kept: 9 heads, where every ninth value would be the same head's."""
    from megatron_gdn.training.health import _MAX_VALUES, _summarize

    value = torch.arange(9.0).repeat(_MAX_VALUES).unflatten(0, (1, -1, 9))
    found = {name: number.item() for name, number in _summarize("alpha", value)}
    assert found["alpha_mean"] == pytest.approx(4.0, rel=1e-3)
    assert (found["alpha_p05"], found["alpha_p50"], found["alpha_p95"]) == (0.0, 4.0, 8.0)


def sample_of_a_hybrid(overrides):
    """Of a Mamba2, a Gated DeltaNet and an attention layer with three heads; and with documents packed."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_gdn.hybrid.model import build_model, transformer_config
    from megatron_gdn.training.health import HealthMonitor
    from tests.training.test_engine import run_config

    config = run_config("MG-S", **overrides)
    size = torch.distributed.get_world_size()
    config.parallel.tensor = size
    host = transformer_config(config.model, config.parallel)
    model = build_model(host, config.model, vocab_size=256, max_sequence_length=40, seed=5)
    monitor, found = HealthMonitor(model), []
    text = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(2))
    bounds = torch.tensor([0, 23, 40, 40], dtype=torch.int32)  # the last document is empty
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=23)
    for tokens, documents in ((text, packed), (text[:, 23:], None), (text[:, 23:], None)):
        monitor.start()
        with torch.no_grad():
            model(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape), None, packed_seq_params=documents)
        found.append(monitor.take())
    return found


THREE_HEADS = dict(
    linear_num_key_heads=3,
    linear_num_value_heads=3,
    num_attention_heads=3,
    num_query_groups=3,
    kv_channels=8,
    mamba_num_heads=3,
    mamba_head_dim=8,
    mamba_state_dim=8,
    sliding_attention=dict(window=9),
    kernel_backend="torch",
)


def test_ghosts_and_other_documents_are_left_out():
    [(packed, alone, again)] = pool(1).run(sample_of_a_hybrid, THREE_HEADS, groups={})
    assert alone == again
    names = {name.split("/")[-1] for name in alone}
    assert {"alpha_mean", "beta_p50", "gate_p95", "state_rms", "attention_entropy", "attention_max_logit"} <= names
    attention = "health/layer_03/attention_"
    for name in ("entropy", "max_logit"):  # of the last document
        assert packed[attention + name] == pytest.approx(alone[attention + name], rel=1e-4)
    # Two heads and one, and a ghost beside the one.
    groups = dict(tensor_model_parallel_size=2)
    for _, found, _ in pool(2).run(sample_of_a_hybrid, THREE_HEADS, groups=groups):
        assert found.keys() == alone.keys()
        for name in found:
            if name.endswith(("_mean", "entropy", "max_logit")):
                assert found[name] == pytest.approx(alone[name], rel=1e-4), name


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


def logits_of_an_observer():
    """Of an attention layer with a window and a scale, documents behind which there is padding; and by hand."""
    from megatron_gdn.documents import PackedDocuments
    from megatron_gdn.parallel.fragments import prepare_fragments
    from megatron_gdn.parallel.host import FragmentParams

    layer = attention_layer.build_attention(window=7, rope=False, softmax_scale=0.9)
    x, _ = attention_layer.inputs(tokens=40, batch=1)
    bounds = torch.tensor([0, 11, 40], dtype=torch.int32)
    padded = attention_layer.packed(10, 25)
    padded.cu_seqlens_q_padded = padded.cu_seqlens_kv_padded = bounds
    carriers = [
        padded,
        PackedDocuments.of(bounds, device=x.device),
        FragmentParams.of(prepare_fragments(40, cu_seqlens=bounds)),
    ]
    found = []
    for documents in carriers:
        layer.observer = lambda seen: found.append(seen["logits"])
        with torch.no_grad():
            layer(x, packed_seq_params=documents)
    with torch.no_grad():
        query, key, _ = layer.get_query_key_value_tensors(x)
    query, key = query[11:, 0].double(), key[11:, 0].double().repeat_interleave(2, dim=1)
    expected = 0.9 * torch.einsum("ihd,jhd->hij", query, key)
    i, j = torch.arange(29)[:, None], torch.arange(29)
    return found, expected.masked_fill((j > i) | (i - j >= 7), -math.inf)[None, :, -16:]


def test_observed_logits_are_those_of_the_last_document():
    [(found, expected)] = pool(1).run(logits_of_an_observer, groups={})
    for logits in found:
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_training_writes_samples_and_stays_the_same(tmp_path):
    prefix, losses = runs.write_dataset(tmp_path), []
    for interval, steps in ((4, {4, 8}), (None, set())):
        runs.run(runs.settings(prefix, tmp_path / str(interval), logging={"health_interval": interval}))
        rows = read_metrics(tmp_path / str(interval) / "metrics.jsonl")
        assert {row["step"] for row in rows if "health/layer_01/alpha_mean" in row} == steps
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
        # A process with torch and Megatron in it has at least 0.1 GiB, and this one far below 8.
        assert all(0.1 < row["perf/memory_gib"] < 8 for row in rows if "perf/memory_gib" in row)
        assert sum("perf/memory_gib" in row and row["perf/tflops_per_gpu"] > 0 for row in rows) == 10
    assert losses[0] == losses[1]
