"""What can be said of speed without a GPU: the rule's kernels beside fla's, at K = V = 128 in bfloat16.

    python -m tests.bench.evidence            print the tables
    python -m tests.bench.evidence --write    put them into kernels/README.md

Registers, spills and shared memory are those of the compile report in the same README; bytes and FLOPs those of
tests/bench/shapes.py; times are predictions, the least that this traffic and arithmetic take. Nothing is measured.
"""

import argparse
import re
from pathlib import Path

import megatron_gdn.kernels
from tests.bench.clock import Limits
from tests.bench.shapes import BACKWARD_KERNELS, FORWARD_KERNELS, kernel_costs, least_costs

README = Path(megatron_gdn.kernels.__file__).parent / "README.md"
BEGIN, END = "<!-- evidence -->\n", "<!-- end of evidence -->\n"

# An H100's copies and large bfloat16 products, as others measured them.
H100 = Limits(gb_per_s=3000.0, tflop_per_s=798.0)
HEADS = (16, 32)

# Rows of the compile report: stage, kernel.
KERNELS = {
    "prepare": ("prepare K 128 bf16, norms given", "prepare K 128 bf16"),
    "states": ("state 128/128 bf16",),
    "output": ("output 128/128 bf16",),
    "state_gradients": ("scores 128 128 bf16", "state_gradients 128 128 bf16"),
    "input_gradients": ("input_gradients 128 128 bf16 group 2", "input_gradients 128 128 bf16 group 1"),
}

# fla-core 0.6.0, compiled offline for sm_90 with Triton 3.9.0 at the launches of its autotuner that suit Hopper:
# (kernel, warps, registers, spilled bytes, shared memory in KiB or None where it was not recorded).
FLA = (
    ("kkt_solve", 4, 253, 0, 10),
    ("recompute_w_u", 4, 120, 0, 32),
    ("fwd_h, BV 32", 4, 106, 0, 117),
    ("fwd_h, BV 64", 4, 182, 0, 137),
    ("fwd_o", 8, 143, 0, 64),
    ("bwd_dv_local", 4, 150, 0, None),
    ("bwd_dhu, BV 32", 4, 213, 0, 157),
    ("bwd_dhu, BV 64", 4, 255, 72, 185),
    ("bwd_dqkwg", 4, 255, 880, 96),
    ("prepare_wy_repr_bwd", 4, 244, 0, None),
)
# Per token and value head with as many key heads, without the L2 norm, counted from its kernels' loads and stores.
FLA_TOTALS = {"forward": (4736, 174e3), "backward": (12032, 508e3)}


def occupancy(warps: int, registers: int, shared_kib: float | None) -> tuple[int, float]:
    """(blocks of a kernel on a multiprocessor of sm_90, share of its 64 warps).

    65536 registers, given to warps by 256; 228 KiB of shared memory, 1 KiB of it taken by each block; 32 blocks.
    """
    of_warp = -(-registers * 32 // 256) * 256
    blocks = min(32, 64 // warps, 65536 // (of_warp * warps))
    if shared_kib is not None:
        blocks = min(blocks, int(228 / (shared_kib + 1)))
    return blocks, blocks * warps / 64


def compiled(readme: str) -> dict[str, tuple[int, int, int, float]]:
    """(warps, registers, spilled bytes, shared KiB) by kernel on sm_90, from the compile report."""
    rows = re.findall(r"^\| (.+?) \| sm_90 \| (\d+),.*? \| (\d+) \| (\d+) \| ([\d.]+) \|", readme, re.MULTILINE)
    return {name: (int(warps), int(regs), int(spilled), float(kib)) for name, warps, regs, spilled, kib in rows}


def tables(readme: str) -> str:
    """Both tables, from the compile report of the README."""
    found, costs = compiled(readme), kernel_costs(*HEADS, 128, 128)
    lines = [
        "Made by `python -m tests.bench.evidence --write`, nothing in it is measured. Bytes and FLOPs per token and "
        f"value head, {HEADS[0]} key and {HEADS[1]} value heads of K = V = 128, bfloat16; the least time for them at "
        f"{H100.gb_per_s / 1e3} TB/s and {H100.tflop_per_s:g} TFLOP/s, an H100. Blocks and warps: what a "
        "multiprocessor of sm_90 holds at once.",
        "",
        "| kernel | bytes | kFLOP | least ns | registers | spilled | shared KiB | blocks | of 64 warps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, names in KERNELS.items():
        cost = costs[stage]
        time = 1e9 * H100.seconds(cost.bytes, cost.flops)
        for i, name in enumerate(names):
            work = f"{cost.bytes:.0f} | {cost.flops / 1e3:.0f} | {time:.2f}" if i == 0 else " | | "
            lines.append(f"| {name} | {work} | {_resources(*found[name])} |")
    for name, warps, registers, spilled, kib in FLA:
        lines.append(f"| fla: {name} | | | | {_resources(warps, registers, spilled, kib)} |")
    lines += [
        "",
        "Whole passes, one value head per key head as in fla's count. fla's launches: 5 and a memset forward, 10 "
        "backward (7 and 12 with the L2 norm, 15 with grouped heads); ours 3 and 4. The goals for an H100 are 0.65 ns "
        "forward and 2.4 ns backward, three times and twice fla.",
        "",
        "| | bytes | kFLOP | least ns, kernel by kernel | least ns of any implementation |",
        "|---|---|---|---|---|",
    ]
    alone = kernel_costs(16, 16, 128, 128)
    for direction, kernels in (("forward", FORWARD_KERNELS), ("backward", BACKWARD_KERNELS)):
        ours = [alone[kernel] for kernel in kernels]
        limit, predicted = least_costs(16, 16, 128, 128)[direction], sum(H100.seconds(c.bytes, c.flops) for c in ours)
        num_bytes, flops = sum(c.bytes for c in ours), sum(c.flops for c in ours)
        least = f"{1e9 * H100.seconds(limit.bytes, limit.flops):.2f}"
        lines.append(f"| ours, {direction} | {num_bytes:.0f} | {flops / 1e3:.0f} | {1e9 * predicted:.2f} | {least} |")
        num_bytes, flops = FLA_TOTALS[direction]
        # Only its totals are known: every kernel of it is bound by memory.
        predicted = H100.seconds(num_bytes, flops)
        lines.append(f"| fla, {direction} | {num_bytes} | {flops / 1e3:.0f} | {1e9 * predicted:.2f} | {least} |")
    return "\n".join(lines) + "\n"


def _resources(warps: int, registers: int, spilled: int, kib: float | None) -> str:
    blocks, share = occupancy(warps, registers, kib)
    at_most = "" if kib is not None else "at most "
    return f"{registers} | {spilled} | {'' if kib is None else kib} | {at_most}{blocks} | {at_most}{64 * share:.0f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into kernels/README.md")
    arguments, text = parser.parse_args(argv), README.read_text()
    found = tables(text)
    print(found)
    if arguments.write:
        before, _, rest = text.partition(BEGIN)
        README.write_text(before + BEGIN + found + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
