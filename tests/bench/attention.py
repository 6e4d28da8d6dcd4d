"""Windowed attention on a CPU against full masked attention, run from the root of the repository:

    python -m tests.bench.attention --threads 2 --save

Heads 4, size 64, float32, window 512, forward and backward. "masked" is full attention with a T x T mask as Megatron's
local path computes it, "torch" is torch's scaled_dot_product_attention with such a mask; both stop where their scores
would take more than SCORES_MB. "causal" is ours without a window. Times are medians of wall time, taken in turns;
peaks of memory come from a fresh process each. With --save an entry is appended to results/attention_cpu.json.
"""

import argparse
import datetime
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from megatron_gdn.kernels.sliding_window import sliding_window_attention, sliding_window_attention_ref
from tests.bench.run import _status_kb, append, commit, forward_backward, machine

HEADS, HEAD_DIM, WINDOW = 4, 64, 512
TOKENS = (1024, 2048, 4096, 8192, 16384)
SCORES_MB = 300  # of one tensor of scores; full attention and its gradient hold several


def masked(q, k, v):
    return sliding_window_attention_ref(q, k, v, window=WINDOW)


def torch_masked(q, k, v):
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=(j <= i) & (i - j < WINDOW)).transpose(1, 2)


def windowed(q, k, v):
    return sliding_window_attention(q, k, v, window=WINDOW, backend="torch")


def causal(q, k, v):
    return sliding_window_attention(q, k, v, backend="torch")


IMPLEMENTATIONS = {"ours": windowed, "causal": causal, "masked": masked, "torch": torch_masked}


def fits(name: str, T: int) -> bool:
    scores_mb = HEADS * T * T * 4 / 1e6
    return name == "ours" or scores_mb <= (4 * SCORES_MB if name == "causal" else SCORES_MB)


def inputs(T: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v as leaves, and the gradient of the output."""
    torch.manual_seed(0)
    *leaves, do = (torch.randn(1, T, HEADS, HEAD_DIM) for _ in range(4))
    return [x.requires_grad_() for x in leaves], do


def visible_pairs(T: int) -> int:
    """Pairs of a query and a key in its window."""
    return sum(min(i + 1, WINDOW) for i in range(T))


def peak_memory_mb(name: str, T: int) -> float:
    """MB (10^6 bytes) that forward and backward need beyond the inputs, their results included, in this process."""
    forward_backward(IMPLEMENTATIONS[name], *inputs(64))
    leaves, do = inputs(T)
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size (proc(5))
    before = _status_kb("VmRSS")
    forward_backward(IMPLEMENTATIONS[name], leaves, do)
    return (_status_kb("VmHWM") - before) * 1024 / 1e6


def in_fresh_process(name: str, T: int, threads: int) -> float:
    command = [sys.executable, "-m", "tests.bench.attention", "--peak", name, str(T), "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure(T: int, threads: int, repeats: int) -> dict:
    """One entry: times and peaks of every implementation that fits."""
    names = [name for name in IMPLEMENTATIONS if fits(name, T)]
    leaves, do = inputs(T)
    times = {name: [] for name in names}
    for repeat in range(repeats + 1):  # one round to warm up
        for name in names:
            measured = forward_backward(IMPLEMENTATIONS[name], leaves, do)
            if repeat:
                times[name].append(measured)
    # 2 products forward, 5 backward, of which one is computed again; 2 operations for each pair and channel.
    flops = visible_pairs(T) * HEADS * HEAD_DIM * 14.0
    shape = dict(B=1, T=T, heads=HEADS, head_dim=HEAD_DIM, window=WINDOW, dtype="float32")
    entry = dict(shape=shape, flops=flops, ms={}, MB={})
    for name, measured in times.items():
        totals = sorted(1e3 * sum(pair) for pair in measured)
        entry["ms"][name] = dict(
            median=round(statistics.median(totals), 1),
            forward=round(1e3 * statistics.median(pair[0] for pair in measured), 1),
            backward=round(1e3 * statistics.median(pair[1] for pair in measured), 1),
            min=round(totals[0], 1),
            max=round(totals[-1], 1),
        )
        entry["MB"][name] = round(in_fresh_process(name, T, threads), 1)
    entry["gflop_per_s"] = round(entry["flops"] / entry["ms"]["ours"]["median"] / 1e6, 1)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="append to tests/bench/results/")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "T"), help="print the peak of memory in MB and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_memory_mb(arguments.peak[0], int(arguments.peak[1])))
        return
    entries = []
    for T in TOKENS:
        entry = measure(T, arguments.threads, arguments.repeats)
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        entries.append(dict(date=date, commit=commit(), machine=machine(arguments.threads)) | entry)
        medians = {name: value["median"] for name, value in entry["ms"].items()}
        print(f"T {T}: ms {medians} MB {entry['MB']} {entry['gflop_per_s']} GFLOP/s", flush=True)
    if arguments.save:
        append("attention_cpu", entries)


if __name__ == "__main__":
    main()
