"""Benchmarks, run from the root of the repository:

    python -m tests.bench.run gated_delta_rule_cpu --threads 2 --repeats 11 --save

Implementations take turns in one process; times are medians of wall time, peaks of memory come from a fresh process per
implementation. With --save an entry is appended to tests/bench/results/<benchmark>.json, also when it disappoints.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from tests.bench.shapes import GATED_DELTA_RULE_CPU, RuleShape

RESULTS = Path(__file__).parent / "results"
IMPLEMENTATIONS = ("ours", "transformers", "megatron-core")


def implementation(name: str, shape: RuleShape):
    """A function of q, k, v, g, beta, or None where the implementation cannot run the shape."""
    if name == "ours":
        from megatron_gdn.kernels import chunk_gated_delta_rule, prepare_chunk_table

        table = None
        if shape.documents > 1:
            table = prepare_chunk_table(torch.linspace(0, shape.T, shape.documents + 1).long())
        options = dict(use_qk_l2norm_in_kernel=shape.l2norm, cu_seqlens=table)
        return lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g=g, beta=beta, **options)[0]
    if shape.documents > 1:
        return None
    if name == "transformers":
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as rule

        return lambda q, k, v, g, beta: rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=shape.l2norm)[0]
    if shape.l2norm:  # Megatron-Core's norm is fla's, which is not installed
        return None
    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule as rule

    def repeated(q, k, v, g, beta):
        q, k = (x.repeat_interleave(shape.HV // shape.H, dim=2) if shape.HV > shape.H else x for x in (q, k))
        return rule(q, k, v, g=g, beta=beta)[0]

    return repeated


def inputs(shape: RuleShape) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v, g, beta as leaves, and the gradient of the output."""
    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    q, k = (torch.randn(shape.B, shape.T, shape.H, shape.K) for _ in range(2))
    if not shape.l2norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    v, do = (torch.randn(shape.B, shape.T, shape.HV, shape.V) for _ in range(2))
    g = torch.nn.functional.logsigmoid(torch.randn(shape.B, shape.T, shape.HV))
    beta = torch.rand(shape.B, shape.T, shape.HV)
    leaves = [q.to(dtype), k.to(dtype), v.to(dtype), g, beta]
    return [x.requires_grad_() for x in leaves], do.to(dtype)


def forward_backward(function, leaves, do) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    start = time.perf_counter()
    o = function(*leaves)
    middle = time.perf_counter()
    torch.autograd.grad(o, leaves, do)
    return middle - start, time.perf_counter() - middle


def peak_memory_mb(name: str, shape_name: str, threads: int) -> float:
    """MB (10^6 bytes) that forward and backward need beyond the inputs, their results included, in this process."""
    torch.set_num_threads(threads)
    shape = GATED_DELTA_RULE_CPU[shape_name]
    function = implementation(name, shape)
    small = RuleShape(**(shape.describe() | dict(T=64)))
    forward_backward(implementation(name, RuleShape(**(small.describe() | dict(documents=1)))), *inputs(small))
    leaves, do = inputs(shape)
    # 5 resets the highest resident size (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kb("VmRSS")
    forward_backward(function, leaves, do)
    return (_status_kb("VmHWM") - before) * 1024 / 1e6


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _peak_in_fresh_process(name: str, shape_name: str, threads: int) -> float:
    command = [sys.executable, "-m", "tests.bench.run", "peak_memory", "--of", name, "--shape", shape_name]
    found = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


def gated_delta_rule_cpu(shape_name: str, threads: int, repeats: int) -> dict:
    """One entry of results: times and peaks of every implementation that can run the shape, and ratios to ours."""
    torch.set_num_threads(threads)
    shape = GATED_DELTA_RULE_CPU[shape_name]
    functions = {name: implementation(name, shape) for name in IMPLEMENTATIONS}
    functions = {name: function for name, function in functions.items() if function is not None}
    leaves, do = inputs(shape)
    times = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            measured = forward_backward(function, leaves, do)
            if repeat >= 2:  # two rounds to warm up
                times[name].append(measured)
    entry = dict(shape_name=shape_name, shape=shape.describe(), flops=shape.flops(), bytes=shape.bytes(), ms={}, MB={})
    for name, measured in times.items():
        totals = sorted(1e3 * sum(pair) for pair in measured)
        entry["ms"][name] = dict(
            median=round(statistics.median(totals), 1),
            forward=round(1e3 * statistics.median(pair[0] for pair in measured), 1),
            backward=round(1e3 * statistics.median(pair[1] for pair in measured), 1),
            min=round(totals[0], 1),
            quartiles=[round(totals[len(totals) // 4], 1), round(totals[3 * len(totals) // 4], 1)],
        )
        entry["MB"][name] = round(_peak_in_fresh_process(name, shape_name, threads), 1)
    for name in functions:
        if name != "ours":
            entry.setdefault("time_ratio", {})[name] = round(
                entry["ms"][name]["median"] / entry["ms"]["ours"]["median"], 2
            )
            entry.setdefault("memory_ratio", {})[name] = round(entry["MB"][name] / entry["MB"]["ours"], 2)
    entry["gflop_per_s"] = round(entry["flops"] / entry["ms"]["ours"]["median"] / 1e6, 1)
    return entry


def machine(threads: int) -> dict:
    """What a reader needs to judge the numbers, without names of hosts or paths."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("transformers", "megatron.core"):
        try:
            versions[package] = __import__(package, fromlist=["__version__"]).__version__
        except ImportError:
            versions[package] = None
    return dict(
        cpu=model or platform.machine(),
        cores=os.cpu_count(),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=threads,
        load_average_1min=round(os.getloadavg()[0], 2),
        versions=versions,
    )


def commit() -> str:
    """Of the working tree; "-dirty" with uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def append(benchmark: str, entries: list[dict]) -> None:
    """To the results of a benchmark; what is there stays."""
    path = RESULTS / f"{benchmark}.json"
    held = json.loads(path.read_text()) if path.exists() else []
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(held + entries, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", choices=["gated_delta_rule_cpu", "peak_memory"])
    parser.add_argument("--shape", action="append", choices=list(GATED_DELTA_RULE_CPU), help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--save", action="store_true", help="append to tests/bench/results/")
    parser.add_argument("--of", choices=IMPLEMENTATIONS, default="ours", help="for peak_memory")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    shapes = arguments.shape or list(GATED_DELTA_RULE_CPU)
    if arguments.benchmark == "peak_memory":
        print(peak_memory_mb(arguments.of, shapes[0], arguments.threads))
        return
    entries = []
    for shape_name in shapes:
        entry = gated_delta_rule_cpu(shape_name, arguments.threads, arguments.repeats)
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        entries.append(dict(date=date, commit=commit(), machine=machine(arguments.threads)) | entry)
        shown = {key: entry.get(key) for key in ("time_ratio", "memory_ratio", "MB", "gflop_per_s")}
        medians = {name: value["median"] for name, value in entry["ms"].items()}
        print(f"{shape_name}: ms {medians} {shown}", flush=True)
    if arguments.save:
        append(arguments.benchmark, entries)


if __name__ == "__main__":
    main()
