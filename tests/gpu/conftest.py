"""The GPU suite's settings; `--rehearse` runs it small on a CPU, to test the suite itself."""

import os

import pytest

# Repeatable cuBLAS for the torch reference; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from tests.gpu.stage import MEASURED, Stage


def pytest_addoption(parser):
    parser.addoption(
        "--rehearse",
        choices=["torch", "triton"],
        help="run the GPU suite on the CPU at tiny sizes with this backend (triton: in the interpreter)",
    )


@pytest.fixture(scope="session")
def stage(request) -> Stage:
    rehearsed = request.config.getoption("--rehearse")
    if rehearsed:
        return Stage(device=torch.device("cpu"), backend=rehearsed, rehearsal=True)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if os.environ.get("TRITON_INTERPRET") != "0":
        pytest.fail("Triton is interpreted, kernels would not run on the GPU: set TRITON_INTERPRET=0, or run make gpu.")
    return Stage(device=torch.device("cuda"), backend="triton", rehearsal=False)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(request):
    """What a kernel does not write shows up as NaN; memory of one test is free before the next."""
    if request.node.get_closest_marker("plain_memory"):
        yield
    else:
        # warn_only: some of torch's own CUDA functions have no deterministic form.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
        torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_configure(config):
    config.addinivalue_line("markers", "plain_memory: torch.empty is left as it is, for tensors of many GiB")
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation")


def pytest_terminal_summary(terminalreporter):
    """The largest error of each kind beside its bound: what the kernels reach, for kernels/README.md."""
    if not MEASURED:
        return
    terminalreporter.section("largest errors")
    for kind, (error, bound, where) in sorted(MEASURED.items()):
        terminalreporter.write_line(f"{kind:32} {error:.1e} of {bound:.1e}   {where}")
