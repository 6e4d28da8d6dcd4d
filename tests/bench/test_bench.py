"""The benchmarks' and the GPU suite's own logic, on a CPU at tiny sizes."""

import json
import subprocess
import sys

import pytest
import torch

from tests.bench import evidence, fla_360m, gpu, rivals, ssd, tune
from tests.bench.clock import Clock, Limits, Time, measure_limits
from tests.bench.shapes import (
    BACKWARD_KERNELS,
    FORWARD_KERNELS,
    RULE_GPU,
    Cost,
    RuleShape,
    kernel_costs,
    least_costs,
)

CLOCK = Clock(torch.device("cpu"), seconds=0.0)


def test_time_is_median_and_quartiles():
    assert Time.of([5.0, 1.0, 9.0, 2.0, 3.0]) == Time(median=3.0, quartiles=(2.0, 5.0), rounds=5)


def test_functions_take_turns():
    calls = []
    times = CLOCK.compare({name: lambda name=name: calls.append(name) for name in "ab"})
    assert set(times) == {"a", "b"} and all(value.rounds == 5 for value in times.values())
    assert "".join(calls) == "aaabbb" + "ab" * 5


def test_limits_are_the_slower_of_moving_and_multiplying():
    limits = Limits(gb_per_s=2000.0, tflop_per_s=500.0)
    assert limits.seconds(4e9, 1e12) == pytest.approx(2e-3)
    assert limits.seconds(1e9, 1e12) == pytest.approx(2e-3)
    measured = measure_limits(CLOCK)
    assert measured.gb_per_s > 0 and measured.tflop_per_s > 0


# Counted by hand for K = V = 128, C = 64, bfloat16, as many key heads: tensors of 256 bytes per token, S of 512, T of
# 128, and the gates.
BYTES = {
    "prepare": 2 * 256 + 128 + 12,
    "states": 3 * 256 + 128 + 512 + 8,
    "output": 4 * 256 + 512 + 4,
    "state_gradients": 6 * 256 + 3 * 128 + 512 + 8,
    "input_gradients": 9 * 256 + 2 * 128 + 1024 + 20,
}


def test_costs_of_kernels():
    costs = kernel_costs(16, 16, 128, 128)
    assert {name: cost.bytes for name, cost in costs.items()} == BYTES
    least = least_costs(16, 16, 128, 128)
    assert (least["forward"].bytes, least["backward"].bytes) == (1032, 1808)
    # All multiplications of the chunked form are in one of the kernels; in prepare also k k^T.
    forward = sum((costs[name] for name in FORWARD_KERNELS), Cost(bytes=0, flops=0))
    assert forward.flops == least["forward"].flops + 0
    assert sum(costs[name].flops for name in BACKWARD_KERNELS) == least["backward"].flops
    # Two value heads share a key head: half of q and k each.
    assert kernel_costs(8, 16, 128, 128)["output"].bytes == BYTES["output"] - 256


def test_costs_of_the_state_space_op():
    """By hand for one token of 2 heads, P 64, N 128, chunks of 64, bfloat16."""
    least = ssd.least_costs(1, 2, 64, 128)
    # x, y: 2 * 128 bytes each; B, C: 256 each; dt: 8. Gradients: dy, x, dx; B, C and theirs; dt and its own.
    assert (least["forward"].bytes, least["backward"].bytes) == (2 * 256 + 2 * 256 + 8, 3 * 256 + 4 * 256 + 16)
    # 8192 within a chunk per product of P, 16384 for one with a state or for C B^T.
    assert least["forward"].flops == 2 * (8192 + 2 * 16384) + 16384
    assert least["backward"].flops == 2 * (3 * 8192 + 5 * 16384) + 3 * 16384


def test_evidence_is_that_of_the_compile_report():
    """The README's tables follow from its compile report and the costs above; an H100's occupancy by hand."""
    readme = evidence.README.read_text()
    assert evidence.tables(readme) in readme, "run python -m tests.bench.evidence --write"
    # 248 registers of 256 threads: one block; 128: two; 16 KiB a block: thirteen; one warp: 32 blocks at most.
    assert evidence.occupancy(8, 248, 48) == (1, 1 / 8) and evidence.occupancy(8, 128, 48) == (2, 1 / 4)
    assert evidence.occupancy(4, 32, 16) == (13, 52 / 64) and evidence.occupancy(1, 24, 0) == (32, 1 / 2)


def test_shapes_on_the_gpu():
    assert {shape.V for shape in RULE_GPU.values()} >= {128, 384, 400, 512}
    for shape in RULE_GPU.values():
        bounds = gpu.cu_seqlens_of(shape, torch.device("cpu"))
        if shape.documents > 1:
            assert len(bounds) == shape.documents + 1 and bounds[-1] == shape.T and (bounds.diff() > 0).all()
            assert (bounds.diff() % 64 != 0).any()
        else:
            assert bounds is None


@pytest.mark.parametrize("documents", [1, 3])
def test_rule_is_compared_and_refusals_are_shown(monkeypatch, documents):
    shape = RuleShape(B=1, T=70, H=1, HV=2, K=8, V=8, documents=documents, l2norm=True)
    good = rivals.rule(rivals.OURS, "torch")

    def rule(name, backend):
        if name == "FlashQLA":
            return lambda q, k, v, g, beta, *rest: good(q, k, v, g, beta * 1.2, *rest)
        if name == "FlashInfer":
            raise rivals.Refusal("not installed (flashinfer)")
        if name == "fla":
            return lambda *args: 1 / 0
        return good

    monkeypatch.setattr(rivals, "rule", rule)
    entry = gpu.bench_rule(shape, CLOCK, Limits(gb_per_s=1.0, tflop_per_s=1.0), "torch")
    assert set(entry["implementations"]) == {"ours"}
    assert entry["refusals"]["FlashInfer"] == "not installed (flashinfer)"
    assert entry["refusals"]["fla"] == "refuses: ZeroDivisionError: division by zero"
    assert entry["refusals"]["FlashQLA"].startswith("gives other results than ours")
    times = entry["implementations"]["ours"]
    heads = 70 * 2
    assert times["forward"]["ns"] == pytest.approx(1e6 * times["forward"]["ms"] / heads, rel=1e-3)
    assert entry["forward"]["limit_ns"] == pytest.approx(least_costs(1, 2, 8, 8)["forward"].bytes, rel=1e-3)
    shown = gpu.table([dict(shape_name="small") | entry], "ns per token and value head")
    assert "| small | forward |" in shown and "FlashInfer: not installed (flashinfer)" in shown


def test_rivals_without_their_packages_refuse():
    for name in ("fla", "FlashQLA", "FlashInfer"):
        try:
            rivals.rule(name, "torch")
        except rivals.Refusal as refusal:
            assert str(refusal).startswith(("not installed (", "refuses: "))


def test_command_rehearses_and_saves(monkeypatch, capsys, tmp_path):
    from tests.bench import run

    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu", "rule", "operators", "mixer", "--rehearse", "torch", "--save"])
    gpu.main()
    shown = capsys.readouterr().out
    assert "| convolution | backward |" in shown and "| layer, T 130 | forward |" in shown
    assert "| state-space op | backward |" in shown
    [entry] = json.loads((tmp_path / "gpu_rule.json").read_text())
    assert entry["machine"]["versions"]["torch"] == torch.__version__ and entry["commit"]
    assert len(json.loads((tmp_path / "gpu_operators.json").read_text())) == 4


def test_candidates_are_valid_and_start_with_the_present_launch():
    from megatron_gdn.kernels.triton_support.configs import Config

    present = Config(num_warps=4, num_stages=2, block=(("BV", 32),))
    found = list(tune.candidates(present))
    assert found[0] == present and len(set(found)) == len(found) == 3 * 4 * 3
    assert {dict(c.block)["BV"] for c in found} == {16, 32, 64}
    # Rows must stay whole; a chunk of the convolution too.
    rows = list(tune.candidates(Config(num_warps=4, block=(("BLOCK_R", 8), ("BLOCK_D", 128)))))
    assert {dict(c.block)["BLOCK_D"] for c in rows} == {128}
    conv = list(tune.candidates(Config(num_warps=4, block=(("BLOCK_I", 16), ("RUN", 4), ("BLOCK_D", 64)))))
    assert {c["BLOCK_I"] * c["RUN"] for c in (dict(c.block) for c in conv)} == {64}
    assert tune.parse(tune.describe(present)) == present


def test_a_launch_must_be_clearly_faster():
    def times(**medians):
        return {name: Time(median=m, quartiles=(0.99 * m, 1.01 * m), rounds=9) for name, m in medians.items()}

    assert tune.faster(times(old=1.0, new=0.9), "old") == "new"
    assert tune.faster(times(old=1.0, new=0.98), "old") is None
    assert tune.faster(times(new=2.0), "old") == "new"  # the old one broke a bound
    wide = {"old": Time(median=1.0, quartiles=(0.8, 1.2), rounds=9), **times(new=0.9)}
    assert tune.faster(wide, "old") is None


def test_every_row_of_the_launch_table_can_be_tuned():
    from megatron_gdn.kernels.triton_support.configs import TABLE

    covered = {row for dtype in ("bfloat16", "float32") for row in tune.table_rows(dtype)}
    # Kernels of a few microseconds, not worth it: states of the convolution, and decoding.
    left = {row for row in TABLE if row not in covered}
    assert all(row.startswith(("causal_conv1d_", "recurrent", "decode")) for row in left), left


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tuner_checks_the_kernel_of_context_parallelism(monkeypatch, dtype):
    """On the interpreter, as the tuner does with each launch before it is timed."""
    from megatron_gdn.kernels.gated_delta_rule import stretch_triton

    shape = RuleShape(B=1, T=70, H=1, HV=2, K=16, V=20, dtype=dtype)
    row = next(row for row, runs in tune.table_rows(dtype).items() if runs == tune.MAPS)
    assert tune.sizes_of(row, tune.MAPS, shape) == (16, 20)
    tune.check(row, tune.MAPS, shape, torch.device("cpu"))
    M, S = tune.to_time(row, tune.MAPS, shape, torch.device("cpu"))()
    assert M.shape == (1, 2, 16, 16) and S.shape == (1, 2, 16, 20)
    right = stretch_triton.affine_maps
    monkeypatch.setattr(stretch_triton, "affine_maps", lambda *args, **options: (right(*args, **options)[0],) * 2)
    shape = RuleShape(B=1, T=70, H=1, HV=2, K=16, V=16, dtype=dtype)
    with pytest.raises(AssertionError, match="S: relative error"):
        tune.check(row, tune.MAPS, shape, torch.device("cpu"))

    runs = []

    def race(*args, **options):
        runs.append(None)
        return tuple(x * (1 + 1e-6 * len(runs)) for x in right(*args, **options))

    monkeypatch.setattr(stretch_triton, "affine_maps", race)
    with pytest.raises(AssertionError, match="M: two runs differ"):
        tune.check(row, tune.MAPS, shape, torch.device("cpu"))


def test_each_row_is_timed_with_its_own_pass():
    shape, device = RuleShape(B=1, T=20, H=1, HV=2, K=16, V=16, dtype="float32"), torch.device("cpu")
    _, reference, tensors = tune.operator_call("l2norm", device, torch.float32, shape)
    y = reference(*tensors)
    torch.testing.assert_close(tune.to_time("l2norm_forward", "l2norm", shape, device)(), y)
    [grad] = tune.to_time("l2norm_backward", "l2norm", shape, device)()
    torch.testing.assert_close(grad, torch.autograd.grad(y, tensors, torch.ones_like(y))[0])


def test_a_launch_that_fails_in_its_process_is_refused():
    """Here for want of a GPU."""
    [shape_name, *_], launch = RULE_GPU, dict(num_warps=4, num_stages=1, BLOCK_R=8, BLOCK_D=128)
    problem = tune.check_apart("l2norm_forward", "l2norm", launch, shape_name, "bfloat16")
    assert problem == "tuning needs a CUDA device and TRITON_INTERPRET=0."


def test_tuning_ranks_and_refuses(monkeypatch, capsys):
    """On the interpreter: a launch that gives wrong results is refused, the fastest right one is proposed."""
    from megatron_gdn.kernels.triton_support import configs

    shape = RuleShape(B=1, T=20, H=1, HV=2, K=16, V=16)
    present = configs.config("l2norm_forward", "sm_90", 0, 16)
    kept, slow = configs.TABLE["l2norm_forward"], set()

    def to_time(row, runs, shape, device):
        import time

        def run():
            launch = configs.config(row, "sm_90", 0, 16)
            time.sleep(2e-3 if launch == present else 1e-3 if launch.num_warps == 2 else 4e-3)
            slow.add(launch)

        return run

    def check(row, runs, shape, device):
        assert configs.config(row, "sm_90", 0, 16).num_warps != 8, "y: relative error 1.0e+00 > 1.0e-05"

    monkeypatch.setattr(tune, "to_time", to_time)
    monkeypatch.setattr(tune, "check", check)
    row = tune.tune("l2norm_forward", "l2norm", "small", shape, CLOCK, processes=1, most=9)
    shown = capsys.readouterr().out
    assert "num_warps=2" in row and "x the speed of" in row
    assert "refused: {'num_warps': 8" in shown and "<- present" in shown and len(slow) == 6
    assert configs.TABLE["l2norm_forward"] is kept


def test_folder_of_fla_is_imported_trained_exported_and_loaded_again():
    """As `python -m tests.bench.fla_360m` at full size."""
    found = fla_360m.measure("tiny")
    config = fla_360m.PUBLIC
    assert sum(torch.Size(shape).numel() for shape in fla_360m.fla_shapes(config).values()) == 357_781_928
    for name in ("imported", "exported"):  # two programs in float32
        assert found[name]["std"] > 0.1 and found[name]["difference"] < 1e-4
    assert len(found["losses"]) == 2
    assert found["changed_by_training"] == found["weights"] == 39
    assert found["largest_change"] < 4 * 4e-4  # two steps of the recipe's learning rate from the imported weights
    assert found["differ_when_loaded_again"] == []


@pytest.mark.timeout(300)
def test_gpu_suite_rehearses():
    """All of tests/gpu but the layer's on this CPU, so that a GPU hour is not lost to a typing error."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--ignore", "tests/gpu/test_layer.py", "-q", "-p"]
    done = subprocess.run([*command, "no:cacheprovider", "--rehearse", "torch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "largest errors" in done.stdout


def test_gpu_suite_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_operators.py", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "needs a CUDA device" in done.stdout and " passed" not in done.stdout
