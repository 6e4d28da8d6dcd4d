"""Conversions hold one group of tensors, seen from outside their process, and --dry-run says how much that is."""

import re
import sys

import pytest

from tests.bench.convert import write_synthetic
from tests.bench.process import timed

LAYERS = dict(layers=6, heads=16)
# 620 MB in bfloat16, in one file of safetensors; the largest tensors have 42 MB, and the largest group 50.
BIG = LAYERS | dict(hidden_size=1024, ffn_hidden_size=10240, key_dim=128, value_dim=256, vocab=20000)
TINY = LAYERS | dict(hidden_size=64, ffn_hidden_size=96, key_dim=4, value_dim=8, vocab=500)
LARGEST_BYTES = 2 * (2 * 10240) * 1024
ALLOWED_BYTES = 250 * 2**20


def convert(root, *more) -> dict[str, tuple[int, str]]:
    """Largest resident size and output of both directions; qwen3_next fuses and splits the largest tensors."""
    python, ours, folder = [sys.executable, "-m"], str(root / "ours"), str(root / "hf")
    commands = {
        "export": ["tools.convert.megatron_to_hf", "--checkpoint", ours, "--output", folder, "--format", "qwen3_next"],
        "import": ["tools.convert.hf_to_megatron", "--hf", folder, "--output", str(root / "again")],
    }
    if more:
        commands["export"].append("--overwrite")
        commands["import"].append("--overwrite")
    return {name: timed([*python, *command, *more])[1:] for name, command in commands.items()}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Of a tiny model, which is that of Python and its libraries, and of a big one; and what --dry-run said."""
    root = tmp_path_factory.mktemp("memory")
    for name, shape in (("tiny", TINY), ("big", BIG)):
        write_synthetic(root / name / "ours", shape)
    tiny, big = convert(root / "tiny"), convert(root / "big")
    return tiny, big, convert(root / "big", "--dry-run")


@pytest.mark.parametrize("direction", ["export", "import"])
def test_peak_is_that_of_the_largest_tensor(sizes, direction):
    tiny, big, _ = sizes
    assert float(re.search(r"tensors, (\S+) MB", big[direction][1])[1]) > 600  # twice what is allowed
    assert big[direction][0] - tiny[direction][0] < LARGEST_BYTES + ALLOWED_BYTES


@pytest.mark.parametrize("direction", ["export", "import"])
def test_dry_run_predicts_the_peak(sizes, direction):
    """It is an upper bound, and no more than the buffers that it allows for above what happens."""
    tiny, big, dry = sizes
    measured = (big[direction][0] - tiny[direction][0]) / 1e6
    predicted = float(re.search(r"at most about (\d+) MB of memory beyond Python's", dry[direction][1])[1])
    assert measured < predicted < measured + 150
    assert dry[direction][0] - tiny[direction][0] < 30e6  # reads no tensor
