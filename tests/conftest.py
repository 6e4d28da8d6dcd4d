"""Settings for all tests: no torch.compile, Triton interpreted, pools of ranks closed at the end."""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Before anything imports Triton. The GPU suite sets it to 0 (make gpu).
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import pytest

from tests import ranks


@pytest.fixture(scope="session", autouse=True)
def _close_pools():
    yield
    ranks.close_pools()
