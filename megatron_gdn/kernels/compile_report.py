"""What the assembler says of every Triton kernel that we ship, without a GPU.

    python -m megatron_gdn.kernels.compile_report           compile everything, print the table, fail over budget
    python -m megatron_gdn.kernels.compile_report --write   put the table into kernels/README.md
    python -m megatron_gdn.kernels.compile_report --quick   K = V = 128 on sm_90 only, for the tests

Budgets: no spilled byte on sm_90 in a kernel that is launched at K = V = 128; no more shared memory than a block may
have on any architecture; no transposed result of a dot (triton_support/guards.py, fla issue 640). The table records a
hash of the kernels' sources, so that a stale one is noticed.
"""

import argparse
import hashlib
import importlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

MODULES = (
    "gated_delta_rule.prepare",
    "gated_delta_rule.state",
    "gated_delta_rule.stretch_triton",
    "gated_delta_rule.output",
    "gated_delta_rule.backward_state",
    "gated_delta_rule.backward_inputs",
    "gated_delta_rule.recurrent",
    "gated_delta_rule.inputs_triton",
    "gated_delta_rule.gate_triton",
    "ssd.prepare",
    "ssd.state",
    "ssd.output",
    "ssd.backward_state",
    "ssd.backward_groups",
    "ssd.backward_heads",
    "causal_conv1d_triton",
    "causal_conv1d_states_triton",
    "gated_rms_norm_triton",
    "l2norm_triton",
)
"""Modules of this package that offer `compile_cases(arch)`."""

_ROOT = Path(__file__).parent
_README = _ROOT / "README.md"
_BEGIN, _END = "<!-- compile report -->\n", "<!-- end of compile report -->\n"


def source_hash() -> str:
    """Of everything that the table depends on, the version of Triton excepted."""
    paths = [_ROOT / (module.replace(".", "/") + ".py") for module in MODULES]
    shared = ("language.py", "tiles.py", "rows.py", "sequences.py", "configs.py", "offline.py")
    paths += [_ROOT / "triton_support" / name for name in shared]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def recorded_hash() -> str | None:
    """Hash of the sources that the table in kernels/README.md was made from."""
    table = _README.read_text().partition(_BEGIN)[2]
    return table.partition("sources ")[2].partition(",")[0] or None


def list_cases(*, quick: bool) -> list[tuple[str, str, int]]:
    """(module, architecture, number of the case), for `compile_one`."""
    from megatron_gdn.kernels.triton_support.configs import ARCHITECTURES

    return [
        (module, arch, i)
        for module in MODULES
        for arch in (("sm_90",) if quick else ARCHITECTURES)
        for i, case in enumerate(_cases(module, arch))
        if case.default or not quick
    ]


def compile_one(place: tuple[str, str, int]) -> dict:
    """Compile one case; a row of the table, with `problem` where it breaks a budget."""
    from megatron_gdn.kernels.triton_support.offline import SHARED_BYTES, compile_case

    module, arch, i = place
    case = _cases(module, arch)[i]
    row = {"name": case.name, "arch": arch, "config": case.config, "problem": None}
    try:
        report = compile_case(case, arch)
    except Exception as error:  # a kernel that does not compile is a row of the table
        return row | {"problem": f"does not compile: {type(error).__name__}: {error}"}
    if report.shared_bytes > SHARED_BYTES[arch]:
        row["problem"] = f"shared memory {report.shared_bytes} over {SHARED_BYTES[arch]} bytes"
    elif report.transposed_products:
        row["problem"] = f"transposes {report.transposed_products} results of dots, which Hopper's compilers get wrong"
    elif arch == "sm_90" and case.default and report.spilled_bytes:
        row["problem"] = f"spills {report.spilled_bytes} bytes"
    return row | {"report": report}


def compile_all(places: list[tuple[str, str, int]], *, workers: int) -> list[dict]:
    """Rows of the table, in order; each worker process compiles one case at a time."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, places))


def format_table(rows: list[dict]) -> str:
    """Rows as Markdown, the architectures of a kernel beside each other."""
    import triton

    lines = [
        f"Triton {triton.__version__}, sources {source_hash()}, made by `python -m megatron_gdn.kernels.compile_report "
        "--write`. Registers per thread, spilled bytes per thread, shared memory per block in KiB, tensor-core "
        "instructions (wgmma or tcgen05 + mma.sync) in the PTX.",
        "",
        "| kernel | arch | warps, stages, blocks | registers | spilled | shared | tensor core |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        config = row["config"]
        blocks = ", ".join(f"{name} {size}" for name, size in config.block)
        launch = f"{config.num_warps}, {config.num_stages}" + (f", {blocks}" if blocks else "")
        found = row.get("report")
        cells = f"{row['problem']} | | | "
        if found is not None:
            instructions = f"{found.wgmma} + {found.mma}"
            cells = f"{found.registers} | {found.spilled_bytes} | {found.shared_bytes / 1024:.1f} | {instructions}"
        lines.append(f"| {row['name']} | {row['arch']} | {launch} | {cells} |")
    return "\n".join(lines) + "\n"


def _cases(module: str, arch: str) -> list:
    return importlib.import_module(f"megatron_gdn.kernels.{module}").compile_cases(arch)


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 when a kernel breaks a budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
    parser.add_argument("--quick", action="store_true", help="only what is launched at K = V = 128, on sm_90")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    if arguments.write and arguments.quick:
        parser.error("--write needs every case: leave out --quick")
    rows = compile_all(list_cases(quick=arguments.quick), workers=arguments.workers)
    table = format_table(rows)
    print(table)
    if arguments.write:
        before, _, rest = _README.read_text().partition(_BEGIN)
        _README.write_text(before + _BEGIN + table + _END + rest.partition(_END)[2])
    problems = [f"{row['name']} on {row['arch']}: {row['problem']}" for row in rows if row["problem"]]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
