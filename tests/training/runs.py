"""Whole training runs in processes of their own, forked from a server that has imported everything once."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.runs_preload"])

VOCABULARY = 60
SEQUENCE, BATCH = 32, 4

SETTINGS = {
    "model": {
        "pattern": "G-*-",
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "linear_num_key_heads": 3,  # two tensor-parallel ranks do not divide them
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 8,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "vocab_multiple": 64,
        "init_method_std": 0.1,
    },
    "optimizer": {"lr": 1e-2, "warmup_tokens": 3 * SEQUENCE * BATCH, "epsilon": 1e-4},
    "training": {
        "sequence_length": SEQUENCE,
        "micro_batch_size": 2,
        "global_batch_size": BATCH,
        "train_tokens": 10 * SEQUENCE * BATCH,
        "precision": "fp32",
        "validation_interval": 5,
        "validation_samples": 4,
    },
    "checkpoint": {"interval": 2},
}


def write_dataset(folder: Path, seed: int = 0) -> Path:
    """A small indexed dataset of random documents; returns its prefix."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = folder / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(VOCABULARY))
    rng = np.random.default_rng(seed)
    for _ in range(200):
        # A skewed distribution, so that there is something to learn.
        tokens = np.minimum(rng.geometric(0.1, rng.integers(5, 40)), VOCABULARY - 1)
        builder.add_document(torch.from_numpy(np.append(tokens, 0)), [len(tokens) + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


def settings(prefix: Path, output_dir: Path, **sections) -> dict:
    """Nested configuration of a tiny run; keyword arguments add to its sections."""
    base = {
        **SETTINGS,
        "run": {"output_dir": str(output_dir), "device": "cpu", "timeout_s": 60},
        "data": {"train": [str(prefix)], "split": "80,20,0", "num_workers": 0},
    }
    return {name: base.get(name, {}) | sections.get(name, {}) for name in base.keys() | sections.keys()}


def let_signals_through() -> None:
    """For a new process: a server that preprocessing started in the same test session forks with SIGINT blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _train(values: dict, resume: bool, environment: dict, log: Path) -> None:
    let_signals_through()
    os.environ.update(environment, OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
    torch.set_num_threads(1)
    stream = open(log, "a")  # noqa: SIM115 - lives as long as the process
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    from megatron_gdn.config import parse_config
    from megatron_gdn.training.loop import pretrain

    try:
        pretrain(parse_config(values), resume=resume)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def start(values: dict, *, resume: bool = False, world_size: int = 1, environment: dict | None = None) -> list:
    """Start one run; its output goes to `<output_dir>.log`. `environment` adds variables."""
    log = Path(values["run"]["output_dir"] + ".log")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        process = CONTEXT.Process(target=_train, args=(values, resume, variables | (environment or {}), log))
        process.start()
        processes.append(process)
    return processes


def run(values: dict, *, resume: bool = False, world_size: int = 1, timeout_s: float = 120.0) -> str:
    """Run to the end; returns the log. Raises AssertionError when a process fails."""
    processes = start(values, resume=resume, world_size=world_size)
    for process in processes:
        process.join(timeout_s)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    log = Path(values["run"]["output_dir"] + ".log").read_text()
    assert codes == [0] * world_size, f"exit codes {codes}\n{log[-5000:]}"
    return log
