"""Everything a run needs to continue: what goes into a checkpoint and comes back."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_gdn.config import Config, ConfigError, parse_config
from megatron_gdn.training.checkpoint import CheckpointError, CheckpointStore
from megatron_gdn.training.data import Vocabulary
from megatron_gdn.version import __version__

logger = logging.getLogger(__name__)

# Optimizer states are stored per parameter, so any other layout can read them.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

_ORDER_OF_DATA = ("train", "split", "documents", "text_field", "eod_token")
"""Fields that determine what a step trains on; the tokenizer counts by its hash, in the data's key."""


@dataclass(kw_only=True)
class TrainState:
    """The parts of a run that change from step to step.

    model: this rank's stage, unwrapped.
    optimizer, scheduler: Megatron's.
    vocabulary: of the data, for those who read the checkpoint without it.
    data_key: name of the contents of data.train, see `data_key`.
    gathered: makes parameters whole inside a block, see MegatronEngine.
    step: optimizer steps done.
    consumed_samples: samples of the training order that were used; also the position in the data.
    """

    model: GPTModel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    vocabulary: Vocabulary
    data_key: str
    gathered: Callable[..., AbstractContextManager] = nullcontext
    step: int = 0
    consumed_samples: int = 0

    def sharded(self, *, loading: bool, with_rng: bool = True) -> dict[str, Any]:
        """Megatron's sharded state dict, to save or as the template to load into."""
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        metadata = {**_SHARDING, **groups}
        model = self.model.sharded_state_dict(metadata=metadata)
        state = {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
            "scheduler": self.scheduler.state_dict(),
        }
        if with_rng:
            state["rng"] = _rng_object()
        return state

    def info(self, config: Config) -> dict[str, Any]:
        """What goes with a checkpoint as plain values: configuration, position, versions."""
        return {
            "version": __version__,
            "torch": str(torch.__version__),
            "megatron_core": str(megatron.core.__version__),
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "world_size": torch.distributed.get_world_size(),
            "vocabulary": asdict(self.vocabulary),
            "data_key": self.data_key,
            "config": asdict(config),
        }

    def save(self, store: CheckpointStore, config: Config) -> None:
        """Write a checkpoint; collective over all ranks."""
        with self.gathered():
            store.save(self.step, self.sharded(loading=False), info=self.info(config))

    def continue_from(self, info: dict[str, Any], config: Config, path: Path) -> Config:
        """Take the position of a checkpoint that this run can continue.

        Args:
            info: from `info` when it was written.
            config: the run.
            path: the checkpoint.

        Returns:
            The configuration that it was written with.

        Raises:
            ConfigError: it belongs to a run that this configuration cannot continue, or its data was replaced.
        """
        saved = parse_config(info["config"])
        check_continuation(saved, config)
        if info.get("data_key") != self.data_key:
            raise ConfigError(
                f"data.train ({', '.join(config.data.train)}) holds other data than when {path.name} was written, so a "
                "position in it means nothing: put the data back, or start a new run with checkpoint.initial_weights."
            )
        self.step, self.consumed_samples = info["step"], info["consumed_samples"]
        return saved

    @torch.no_grad()
    def load(self, store: CheckpointStore, config: Config) -> bool:
        """Continue from the newest valid checkpoint; collective over all ranks.

        Returns:
            False when there is none.

        Raises:
            ConfigError: the checkpoint belongs to a run that this configuration cannot continue.
            CheckpointError: there are checkpoints, and none is valid.
        """
        path = store.latest()
        if path is None:
            return False
        info = store.info(path)
        saved = self.continue_from(info, config, path)
        same_layout = info["world_size"] == torch.distributed.get_world_size() and saved.parallel == config.parallel
        if not same_layout:
            logger.info("the layout differs from the checkpoint's: the random generators start from the seed")
        with self.gathered(modify=True):
            loaded = store.load(path, self.sharded(loading=True, with_rng=same_layout))
            self.model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["scheduler"])
        if same_layout:
            _restore_rng(loaded["rng"])
        return True

    @torch.no_grad()
    def load_weights(self, store: CheckpointStore) -> None:
        """Take the weights of the newest checkpoint and nothing else; collective over all ranks.

        Raises:
            CheckpointError: no checkpoint, or none that is whole.
        """
        path = store.latest()
        if path is None:
            raise CheckpointError(f"checkpoint.initial_weights ({store.root}) holds no checkpoint.")
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        with self.gathered(modify=True):
            loaded = store.load(path, {"model": self.model.sharded_state_dict(metadata={**_SHARDING, **groups})})
            self.model.load_state_dict(loaded["model"])
        self.optimizer.reload_model_params()


def check_continuation(saved: Config, config: Config) -> None:
    """Refuse to continue a run whose weights, sample order or schedule would silently change.

    Args:
        saved: configuration in the checkpoint.
        config: configuration of this start. Layout, logging, checkpoints, device, validation and
            `exit_after_steps` may differ.

    Raises:
        ConfigError: every field that differs, with both values.
    """
    free = dict(
        micro_batch_size=1, recompute="none", validation_interval=None, validation_samples=0, exit_after_steps=None
    )
    sections = {
        "model": (replace(saved.model, kernel_backend="auto"), replace(config.model, kernel_backend="auto")),
        "optimizer": (saved.optimizer, config.optimizer),
        "training": (replace(saved.training, **free), replace(config.training, **free)),
        "run": ({"seed": saved.run.seed}, {"seed": config.run.seed}),
        "data": tuple({name: getattr(c.data, name) for name in _ORDER_OF_DATA} for c in (saved, config)),
    }
    differences = []
    for name, pair in sections.items():
        before, now = (side if isinstance(side, dict) else asdict(side) for side in pair)
        differences += [
            f"{name}.{key}: {before[key]!r} in the checkpoint, {now[key]!r} now"
            for key in now
            if before[key] != now[key]
        ]
    if differences:
        raise ConfigError(
            "the configuration differs from the checkpoint's:\n  "
            + "\n  ".join(differences)
            + "\nuse the checkpoint's values, or another run.output_dir for a new run."
        )


def _rng_object() -> ShardedObject:
    """States of all generators of this rank, one object per rank."""
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ShardedObject("rng", state, (size,), (rank,), replica_id=0)


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
