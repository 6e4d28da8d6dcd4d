"""Check the nodes of a job before it trains: configuration, software, devices, network and the shared folder.

    torchrun --nproc-per-node 8 examples/slurm/preflight.py --config RECIPE [section.field=value ...]
    PREFLIGHT=1 sbatch examples/slurm/pretrain.sbatch --config RECIPE [section.field=value ...]

It takes the steps of examples/pretrain.py up to the process groups, so what fails here would fail there. Ends with 0
when all is well, with 2 and a line per problem when it is not.
"""

import argparse
import os
import platform
import shutil
import socket
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

from megatron_gdn.config import Config, ConfigError, load_config
from megatron_gdn.cost import model_cost
from megatron_gdn.training.setup import Launch, choose_device, ignore_host_warnings, init_distributed, shutdown

REDUCED_BYTES = {"cuda": 2**28, "cpu": 2**20}
# What must be the same on every process, or results differ between ranks.
SAME = ("python", "torch", "megatron_core", "device")


def facts(device, output_dir: Path) -> dict[str, str | float]:
    """What this process runs on."""
    import megatron.core
    import torch

    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "free_gib": shutil.disk_usage(output_dir).free / 2**30,
    }


def reduce_speed(device) -> float:
    """GB/s that one process sends in an all-reduce over all of them, after checking its sum.

    Raises:
        RuntimeError: the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()
    values = torch.empty(REDUCED_BYTES[device.type] // 4, device=device)
    for _ in range(2):  # the first one sets the connections up
        values.fill_(dist.get_rank() + 1.0)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        total = values.double().mean().item()  # waits for the device
        seconds = time.perf_counter() - start
    if total != world * (world + 1) / 2:
        raise RuntimeError(f"an all-reduce of 1 to {world} gave {total}: look at the network of these nodes")
    return 2 * (world - 1) / world * values.nbytes / seconds / 1e9


def sees_first_rank(output_dir: Path) -> bool:
    """Whether a file that the first process writes in the folder is there for this one."""
    import torch.distributed as dist

    name = [f".preflight-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0)
    path = output_dir / name[0]
    if dist.get_rank() == 0:
        path.touch()
    dist.barrier()
    found = path.exists()
    dist.barrier()
    if dist.get_rank() == 0:
        path.unlink()
    return found


def check(config: Config, launch: Launch) -> int:
    """Run the checks on this process; the first one prints."""
    device = choose_device(config, launch)
    output_dir = Path(config.run.output_dir)
    try:  # before the groups, in which the others would wait for a process that failed
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".preflight-probe-{launch.rank}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run.output_dir ({output_dir}) cannot be written: {error.strerror}.") from error
    start = time.perf_counter()
    init_distributed(config, launch, device)
    import torch.distributed as dist

    try:
        seconds = time.perf_counter() - start
        mine = facts(device, output_dir) | {"sees": sees_first_rank(output_dir), "gb_per_s": reduce_speed(device)}
        everyone = [None] * launch.world_size
        dist.all_gather_object(everyone, mine)
    finally:
        shutdown()
    problems = find_problems(everyone, output_dir, checkpoint_bytes(config))
    if launch.rank == 0:
        for host, count in Counter(one["host"] for one in everyone).items():
            ranks = [rank for rank, one in enumerate(everyone) if one["host"] == host]
            one = everyone[ranks[0]]
            print(f"{host}: {count} processes, ranks {ranks[0]} to {ranks[-1]}, {one['device']}, torch {one['torch']}")
        print(
            f"groups in {seconds:.1f} s; all-reduce {min(one['gb_per_s'] for one in everyone):.2f} GB/s per process; "
            f"{everyone[0]['free_gib']:.1f} GiB free in {output_dir}"
        )
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        print("preflight failed" if problems else "preflight passed")
    return 2 if problems else 0


def checkpoint_bytes(config: Config) -> float:
    """Bytes of the checkpoints that the run keeps; 0 when the size of the vocabulary is not in the recipe."""
    if config.model.vocab_size is None:
        return 0.0
    # Weights, and Adam's master weights and moments in float32.
    per_parameter = 14 if config.training.precision == "bf16" else 12
    parameters = model_cost(config, vocab_size=config.model.vocab_size).parameters
    return parameters * per_parameter * ((config.checkpoint.keep or 1) + 1)


def find_problems(everyone: list[dict], output_dir: Path, needed_bytes: float) -> list[str]:
    """One line per thing that would break the run.

    Args:
        everyone: `facts` of all ranks with `sees`.
        output_dir: folder of the run.
        needed_bytes: that its checkpoints take.
    """
    problems = []
    for name in SAME:
        values = {one[name]: one["host"] for one in everyone}
        if len(values) > 1:
            listed = ", ".join(f"{value} on {host}" for value, host in values.items())
            problems.append(f"{name} differs ({listed}): use the same environment and node type everywhere.")
    blind = sorted({one["host"] for one in everyone if not one["sees"]})
    if blind:
        problems.append(f"run.output_dir ({output_dir}) is not shared with {', '.join(blind)}: use a shared folder.")
    if everyone[0]["free_gib"] * 2**30 < needed_bytes:
        problems.append(
            f"run.output_dir ({output_dir}) has {everyone[0]['free_gib']:.1f} GiB free and the checkpoints take "
            f"{needed_bytes / 2**30:.1f}: make room or lower checkpoint.keep."
        )
    return problems


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe, YAML")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that replace its own")
    arguments = parser.parse_args()
    ignore_host_warnings()
    try:
        return check(load_config(arguments.config, arguments.overrides), Launch.from_environment())
    except (ConfigError, RuntimeError) as error:
        print(f"error: rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
