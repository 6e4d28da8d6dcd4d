"""Processes and devices: torch.distributed, Megatron's groups, seeds."""

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_gdn.config import Config, ConfigError, check_world
from megatron_gdn.parallel import cpu

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher said: this process's place among all of them.

    rank, world_size: over all nodes.
    local_rank: on this node, the index of its GPU.
    """

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read torchrun's variables; without them the process is alone."""
        names = {"rank": ("RANK", "0"), "world_size": ("WORLD_SIZE", "1"), "local_rank": ("LOCAL_RANK", "0")}
        return cls(**{field: int(os.environ.get(*name)) for field, name in names.items()})


def ignore_host_warnings() -> None:
    """Silence warnings by which Megatron-Core and torch speak to their own developers; for entry scripts."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # The host reads main_grad through the function mode of megatron_gdn.parallel.cpu.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")


def choose_device(config: Config, launch: Launch) -> torch.device:
    """The device of this process, before any CUDA context exists.

    Raises:
        ConfigError: run.device is cuda and there is no GPU for this process; it is the CPU, and the model wants modules
            that compute on a GPU only.
    """
    wanted = config.run.device
    if wanted == "cpu":
        # Megatron-Core uses a GPU wherever it sees one, so a run on the CPU must not see any.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        _check_cpu(config)
        return torch.device("cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device (cuda) needs a GPU, and torch sees none: use run.device=cpu or auto.")
    if not torch.cuda.is_available():
        _check_cpu(config)
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {launch.local_rank} needs a GPU of its own, and torch sees {torch.cuda.device_count()}: "
            "start fewer processes per node or use run.device=cpu."
        )
    return torch.device("cuda", launch.local_rank)


def _check_cpu(config: Config) -> None:
    model = config.model
    if model.provider == "te":
        raise ConfigError(
            "model.provider (te) needs a GPU and the run is on the CPU: use model.provider=local, which reads the same "
            "checkpoints, or run.device=cuda."
        )
    if model.attention_backend not in ("auto", "torch"):
        raise ConfigError(
            f"model.attention_backend ({model.attention_backend}) needs a GPU and the run is on the CPU: use "
            "model.attention_backend=auto, or run.device=cuda."
        )


def init_distributed(config: Config, launch: Launch, device: torch.device) -> None:
    """Join the process group and build Megatron's model-parallel groups; seed every generator.

    Raises:
        ConfigError: the layout does not fit the number of processes (checked before any group exists).
    """
    check_world(config, launch.world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cpu.install()
    # Megatron-Core is imported after the CPU answers are in place.
    from megatron.core import parallel_state, tensor_parallel

    timeout = timedelta(seconds=config.run.timeout_s)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=rendezvous_store(launch, timeout_s=config.run.timeout_s),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        context_parallel_size=config.parallel.context,
    )
    torch.manual_seed(config.run.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)
    logger.info(
        "%d processes on %s (%s): tensor %d, context %d, pipeline %d, data %d, sequence parallelism %s",
        launch.world_size,
        device.type,
        dist.get_backend(),
        config.parallel.tensor,
        config.parallel.context,
        config.parallel.pipeline,
        parallel_state.get_data_parallel_world_size(),
        "on" if config.parallel.sequence else "off",
    )


def rendezvous_store(launch: Launch, *, timeout_s: float) -> dist.Store:
    """The store in which processes meet, with keys that no earlier start has left.

    Where torchrun's agent hosts it, it outlives a restart: without the prefix a restarted rank reads addresses of dead
    ones, and about half of the restarts fail or hang (torch 2.13, gloo). Where the first rank hosts it, it is new each
    time, and the count may differ between nodes: an agent that takes a lost one's place starts at 0.

    Args:
        launch: this process's place.
        timeout_s: seconds to wait for the others.
    """
    if launch.world_size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        launch.world_size,
        is_master=launch.rank == 0 and not hosted_by_agent,
        timeout=timedelta(seconds=timeout_s),
    )
    if not hosted_by_agent:
        return store
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def shutdown() -> None:
    """Leave the process group, if there is one, and Megatron's, so that another can be joined."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
