"""Backends go by name, are logged once, and importing the kernels needs torch only; wrong compilers are refused."""

import logging
import subprocess
import sys

import pytest
import torch

from megatron_gdn.kernels import backend
from megatron_gdn.kernels.backend import check_triton_dtypes, resolve_backend
from megatron_gdn.kernels.triton_support import guards
from megatron_gdn.kernels.triton_support.guards import Miscompile, check_compiler, check_version, parse_version

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    for cached in (backend._log_choice, backend._check_triton):
        cached.cache_clear()
    yield
    for cached in (backend._log_choice, backend._check_triton):
        cached.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """A process in which Triton compiles, on a GPU of Hopper."""
    from megatron_gdn.kernels.triton_support import language

    monkeypatch.setattr(language, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO):
        assert [resolve_backend(name, CPU) for name in ("auto", "auto", "torch")] == ["torch"] * 3
        assert [resolve_backend("triton", CPU) for _ in range(2)] == ["triton"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "kernel backend torch on cpu (requested: auto)",
        "kernel backend torch on cpu (requested: torch)",
        "kernel backend triton on cpu (requested: triton)",
    ]


def test_auto_is_triton_on_a_gpu(compiled):
    assert resolve_backend("auto", CUDA) == "triton"
    assert resolve_backend("torch", CUDA) == "torch"


def test_triton_needs_a_gpu_or_its_interpreter(compiled):
    with pytest.raises(
        ValueError,
        match=r"backend \(triton\) does not run on cpu: move the tensors to a GPU, use backend 'torch', or set "
        "TRITON_INTERPRET=1 before Triton is imported",
    ):
        resolve_backend("triton", CPU)
    assert resolve_backend("auto", CPU) == "torch"


def test_gpus_that_are_too_old_are_refused(monkeypatch, compiled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        ValueError, match=r"device \(cuda:0\) has capability 7.5 and the kernels need 8.0: use backend 'torch'"
    ):
        resolve_backend("auto", CUDA)


@pytest.mark.parametrize("requested", ["triton", "auto"])
def test_missing_triton_is_an_error_and_not_a_slower_run(monkeypatch, requested):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend \(triton\) needs the package triton, .*: pip install triton, or"):
        resolve_backend(requested, CUDA)
    assert resolve_backend("auto", CPU) == "torch"


def test_fla_is_for_the_rule_only(monkeypatch):
    with pytest.raises(
        ValueError, match=r"backend \(fla\) is offered for chunk_gated_delta_rule only: use 'torch' or 'triton'"
    ):
        resolve_backend("fla", CPU)
    offered = ("torch", "triton", "fla")
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend \(fla\) needs the package fla-core, .*: pip install fla-core, or"):
        resolve_backend("fla", CPU, offered)
    monkeypatch.setattr(backend, "find_spec", lambda name: name)
    assert resolve_backend("fla", CPU, offered) == "fla"


def test_backends_that_an_operation_does_not_offer():
    with pytest.raises(ValueError, match=r"backend \(triton\) is not offered here: use 'torch'"):
        resolve_backend("auto", CUDA, ("torch",))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend \(cuda\) must be one of auto, torch, triton, fla: 'auto' suits"):
        resolve_backend("cuda", CPU)


def test_dtypes_of_triton():
    check_triton_dtypes(x=torch.zeros(1), y=None, z=torch.zeros(1).half(), w=torch.zeros(1).bfloat16())
    with pytest.raises(ValueError, match=r"z \(torch.float64\) must be float32, bfloat16 or float16 for backend"):
        check_triton_dtypes(x=torch.zeros(1), z=torch.zeros(1).double())


@pytest.mark.parametrize(
    "version, numbers",
    [("3.7.1", (3, 7, 1)), ("3.10", (3, 10, 0)), ("3.8.0+git1a2b", (3, 8, 0)), ("4", (4, 0, 0))],
)
def test_versions(version, numbers):
    assert parse_version(version) == numbers


def test_unreadable_version():
    with pytest.raises(RuntimeError, match=r"Triton's version \(main\) cannot be read: install a release"):
        check_version("main")


def test_old_triton_is_refused(monkeypatch, compiled):
    import triton

    check_version("3.3.0")
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    with pytest.raises(RuntimeError, match=r"Triton \(3.2.0\) must be 3.3.0 or newer for backend triton: upgrade"):
        resolve_backend("triton", CUDA)


FAULT = dict(architectures=("sm_90",), pattern="a dot", issue="x#1", reason="it has one", verdict="wrong")
FIXED = (Miscompile(first=(3, 4, 0), fixed=(3, 7, 1), **FAULT),)
OPEN = (Miscompile(first=(3, 4, 0), fixed=None, **FAULT),)


@pytest.mark.parametrize("version, hit", [("3.3.9", False), ("3.4.0", True), ("3.7.0", True), ("3.7.1", False)])
def test_known_faults_hit_a_range_of_versions(version, hit):
    if not hit:
        assert check_compiler("sm_90", version, FIXED) == []
        return
    with pytest.raises(
        RuntimeError,
        match=rf"Triton \({version}\) on sm_90 compiles a dot to wrong code \(x#1\): install Triton 3.7.1 or newer, or",
    ):
        check_compiler("sm_90", version, FIXED)
    check_compiler("sm_80", version, FIXED)
    check_compiler("sm_90", version, (Miscompile(first=(3, 4, 0), fixed=None, **(FAULT | dict(verdict="avoided"))),))


def test_a_fault_without_a_fix():
    with pytest.raises(RuntimeError, match=r"\(x#1\): install another Triton, or use backend 'torch'"):
        check_compiler("sm_90", "3.9.0", OPEN)


def test_a_known_fault_stops_the_backend(monkeypatch, compiled):
    monkeypatch.setattr(guards.check_compiler, "__defaults__", (OPEN,))
    with pytest.raises(RuntimeError, match=r"on sm_90 compiles a dot to wrong code"):
        resolve_backend("auto", CUDA)
    assert resolve_backend("torch", CUDA) == "torch"


def test_other_faults_are_said_once(monkeypatch, compiled, caplog):
    import triton

    caplog.set_level(logging.INFO, logger="megatron_gdn.kernels.backend")
    for version, expected in (
        ("3.5.0", ["#640); avoided", "#984); tried on first use"]),
        ("3.9.0", ["#984); tried on first use", "#10486); tried on first use"]),
        ("3.3.0", []),
    ):
        backend._check_triton.cache_clear()
        caplog.clear()
        monkeypatch.setattr(triton, "__version__", version)
        assert [resolve_backend("triton", CUDA) for _ in range(2)] == ["triton"] * 2
        said = [record.getMessage() for record in caplog.records if "miscompiles" in record.getMessage()]
        assert len(said) == len(expected) and all(part in text for part, text in zip(expected, said, strict=True))


def test_each_known_fault_has_a_verdict():
    assert {"640", "984"} <= {fault.issue.rpartition("#")[2] for fault in guards.KNOWN}
    assert all(fault.verdict in ("wrong", "avoided", "unproven") and len(fault.reason) > 20 for fault in guards.KNOWN)


def test_import_needs_torch_only():
    code = (
        "import sys, megatron_gdn.kernels; print([m for m in ('megatron.core', 'triton', 'fla') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_torch_backend_does_not_import_triton():
    code = (
        "import sys, torch; from megatron_gdn.kernels import l2norm, rms_norm_gated, gated_delta_gate, causal_conv1d;"
        "x = torch.ones(1, 2, 3); l2norm(x); rms_norm_gated(x, x[0, 0]); gated_delta_gate(x, x[0, 0], x[0, 0]);"
        "causal_conv1d(x, torch.ones(3, 4)); print('triton' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "False"
