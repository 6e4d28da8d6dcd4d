"""Triton kernels compile for GPUs that are not here, within their budgets; the committed table is that of today."""

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
    assert "| sm_80 |" in found.stdout and "| sm_90 |" in found.stdout and "| sm_100 |" in found.stdout


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
    monkeypatch.setattr(offline, "compile_case", lambda case, arch: 1 / 0)
    assert "does not compile: ZeroDivisionError" in compile_report.compile_one(("x", "sm_90", 0))["problem"]


def test_interpreted_processes_are_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "megatron_gdn.kernels.compile_report"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 2 and "TRITON_INTERPRET is set" in found.stderr
