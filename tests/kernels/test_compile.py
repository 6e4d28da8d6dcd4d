"""Triton kernels compile for GPUs that are not here, within their budgets; the committed table is that of today."""

import ast
import os
import subprocess
import sys

import pytest

from megatron_gdn.kernels import compile_report


def run_report(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: this one interprets Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "megatron_gdn.kernels.compile_report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.timeout(600)
def test_kernels_compile_within_their_budgets():
    found = run_report("--quick")
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("| sm_90 |") >= 20


def test_the_committed_table_keeps_the_budgets():
    """Every kernel on all three architectures, each within its shared memory: the whole, which takes too long here."""
    limits = {"sm_80": 163, "sm_90": 227, "sm_100": 227}
    table = compile_report._README.read_text().partition(compile_report._BEGIN)[2].partition(compile_report._END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| sm_" in line]
    kernels = {arch: sorted(row[0] for row in rows if row[1] == arch) for arch in limits}
    assert kernels["sm_80"] == kernels["sm_90"] == kernels["sm_100"] and len(rows) > 200
    # A row of a kernel that breaks its budget has the problem in the place of the numbers.
    assert [row for row in rows if not (row[3].isdigit() and float(row[5]) <= limits[row[1]])] == []


def test_the_committed_table_is_of_these_sources():
    remedy = "run python -m megatron_gdn.kernels.compile_report --write"
    assert compile_report.recorded_hash() == compile_report.source_hash(), remedy


def test_budgets_are_enforced(monkeypatch):
    """A case that spills, one that takes too much shared memory and one that does not compile are problems."""
    from megatron_gdn.kernels.triton_support import offline
    from megatron_gdn.kernels.triton_support.configs import Config

    case = offline.Case(name="x", kernel=None, signature={}, config=Config(num_warps=4))
    monkeypatch.setattr(compile_report, "_cases", lambda module, arch: [case])
    fine = dict(registers=9, spilled_bytes=0, shared_bytes=0, wgmma=0, mma=0)

    def problem(arch="sm_90", **changed):
        monkeypatch.setattr(offline, "compile_case", lambda case, arch: offline.Report(**(fine | changed)))
        return compile_report.compile_one(("x", arch, 0))["problem"]

    assert problem() is None and problem("sm_80", spilled_bytes=8) is None
    assert problem(spilled_bytes=8) == "spills 8 bytes"
    assert "shared memory 200000 over 166912" in problem("sm_80", shared_bytes=200_000)
    assert problem(transposed_products=1).startswith("transposes 1 results of dots")
    monkeypatch.setattr(offline, "compile_case", lambda case, arch: 1 / 0)
    assert "does not compile: ZeroDivisionError" in compile_report.compile_one(("x", "sm_90", 0))["problem"]


def test_jitted_functions_have_no_defaults_but_none():
    """Triton 3.6 and older take the default of a constexpr for a plain value: no kernel that relied on one compiled."""
    found = 0
    for path in compile_report._ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found += 1
                defaults = [ast.unparse(default) for default in node.args.defaults + node.args.kw_defaults]
                assert set(defaults) <= {"None"}, f"{path.name}: {node.name}"
    assert found > 40


def test_interpreted_processes_are_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "megatron_gdn.kernels.compile_report"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 2 and "TRITON_INTERPRET is set" in found.stderr


IR = """
    %b_x = tt.load %p_x : tensor<64x64x!tt.ptr<bf16>>
    %zero = arith.constant dense<0.0> : tensor<64x64xf32>
    %sums:2 = scf.for %i = %c0 to %c2 step %c1 iter_args(%b_a = %zero, %n = %c0) -> (tensor<64x64xf32>, i32) : i32 {
      %b_t = tt.trans %b_x {order = array<i32: 1, 0>} : tensor<64x64xbf16> -> tensor<64x64xbf16>
      %b_p = tt.dot %b_x, %b_t, %b_a, inputPrecision = tf32 : tensor<64x64xbf16> -> tensor<64x64xf32>
      %next = arith.addi %n, %c1 : i32
      scf.yield %b_p, %next : tensor<64x64xf32>, i32
    } loc(#loc1)
    %half = arith.truncf %sums#0 : tensor<64x64xf32> to tensor<64x64xbf16>
"""


def test_transposed_products_are_found():
    """Of what a loop of dots has summed up; not of what was loaded, stored and loaded again, or counted beside it."""
    from megatron_gdn.kernels.triton_support.offline import count_transposed_products

    def transposed(value: str) -> str:
        return f"    %t = tt.trans {value} {{order = array<i32: 1, 0>}} : tensor<64x64xbf16> loc(#loc2)\n"

    assert count_transposed_products(IR) == 0
    assert count_transposed_products(IR + transposed("%half")) == 1
    assert count_transposed_products(IR + transposed("%sums#1")) == 0
    again = "    tt.store %p_x, %half : tensor<64x64x!tt.ptr<bf16>>\n    %b_y = tt.load %p_x : tensor<64x64xbf16>\n"
    assert count_transposed_products(IR + again + transposed("%b_y")) == 0
    branch = """    %r = scf.if %c -> (tensor<64x64xbf16>) {
      scf.yield %b_x : tensor<64x64xbf16>
    } else {
      scf.yield %half : tensor<64x64xbf16>
    }
"""
    assert count_transposed_products(IR + branch + transposed("%r")) == 1
    # Before Triton 3.5 values have numbers, and regions side by side the same ones.
    loads = "".join(
        f"""    %sum{i} = scf.for %i = %c0 to %c2 step %c1 iter_args(%a = %zero) -> (tensor<64x64xf32>) : i32 {{
      %7 = {value}
      scf.yield %7 : tensor<64x64xf32>
    }} loc(#loc1)
"""
        for i, value in enumerate(("tt.load %p_x", "tt.trans %a {order}", "arith.addf %b_p, %b_p"))
    )
    assert count_transposed_products(IR + loads) == 0
    assert count_transposed_products(IR + loads + transposed("%sum1")) == 0
    summed = """    %r = "tt.reduce"(%sums#0) <{axis = 1 : i32}> ({
    ^bb0(%arg0: f32, %arg1: f32):
      tt.reduce.return %arg0 : f32
    }) : (tensor<64x64xf32>) -> tensor<64xf32>
"""
    assert count_transposed_products(IR + summed + transposed("%r")) == 1
