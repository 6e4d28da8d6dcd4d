"""DeepSpeed as the engine: ZeRO 0 to 3 and offloading, over the same model, data, schedule and checkpoints.

The model is Megatron's, with its tensor and sequence parallelism; DeepSpeed reduces gradients over data-parallel ranks,
shards states and updates. Checkpoints are those of the engine megatron, so either engine continues what the other
saved, at any layout.
"""

import itertools
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_gdn.config import Config, ConfigError
from megatron_gdn.optional import require
from megatron_gdn.training.checkpoint import together
from megatron_gdn.training.deepspeed_config import deepspeed_config
from megatron_gdn.training.engine import MegatronEngine, build_scheduler, build_stage
from megatron_gdn.training.optimizer import param_groups, sharded_states
from megatron_gdn.training.packing import Batch
from megatron_gdn.training.universal import MOMENTS, check_whole, read_progress, read_states, shape_of, universal_info

logger = logging.getLogger(__name__)
_STORED = ("is_expert_parallel", "default_config", "wd_mult", "lr_mult", "is_decoupled_lr", "max_lr", "min_lr")
_STORED += ("lr", "betas", "eps", "weight_decay")
"""Fields of a parameter group that Megatron stores and looks for."""


def import_deepspeed() -> ModuleType:
    """DeepSpeed, kept from compiling a kernel for its shared-memory collectives, which takes minutes and is not used.

    Raises:
        MissingPackageError: not installed, or it does not import.
    """
    deepspeed = require("deepspeed", extra="deepspeed", purpose="engine.name=deepspeed")
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists; torchrun sets it, a process on its own is the first
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


class _Groups:
    """Megatron's process groups under the names by which DeepSpeed asks; context-parallel ranks are data-parallel."""

    @staticmethod
    def get_model_parallel_group():
        return parallel_state.get_tensor_model_parallel_group()

    @staticmethod
    def get_model_parallel_rank() -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    @staticmethod
    def get_data_parallel_group():
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        return dist.get_process_group_ranks(_Groups.get_data_parallel_group())

    @staticmethod
    def get_data_parallel_rank() -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)


@dataclass(kw_only=True)
class DeepSpeedStates:
    """The optimizer as checkpoints and the schedule see it: states of whole parameters, keys of Megatron's optimizer.

    wrapped: DeepSpeed's engine.
    params: the stage's parameters that are trained.
    """

    wrapped: Any
    params: list[torch.nn.Parameter]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimizer, whose learning rate and decay the schedule sets."""
        return self.wrapped.optimizer.param_groups

    def sharded_state_dict(self, model: dict[str, Any], *, is_loading: bool, metadata: dict) -> dict[str, Any]:
        """Megatron's sharded state dict, "fully reshardable"; collective over data-parallel ranks.

        Args:
            model: sharded state dict of the model, made with whole parameters.
            is_loading: only shapes matter.
            metadata: ignored.
        """
        self._make_states()
        values = ((param, self._zeros(param) if is_loading else self._states(param)) for param in self.params)
        states = sharded_states(model, values)
        groups = [{name: group[name] for name in _STORED} | {"step": self._step} for group in self.param_groups]
        return {
            "optimizer": {"param_groups": groups},
            "param_state": states,
            "param_state_sharding_type": "fully_reshardable",
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take states that `sharded_state_dict` of this or of Megatron's optimizer described."""
        self._make_states()
        for i, param in enumerate(self.params):
            self._set(param, state["param_state"][i])
        step = max(group["step"] for group in state["optimizer"]["param_groups"])
        for states in self._base.state.values():
            if "step" in states:
                states["step"] = torch.full_like(torch.as_tensor(states["step"], dtype=torch.float32), float(step))

    def reload_model_params(self) -> None:
        """Take the model's weights as the new master weights."""
        from deepspeed.utils import safe_set_full_fp32_param

        with gathered(self.params):
            for param in self.params:
                safe_set_full_fp32_param(param, param.detach().float())

    @property
    def _base(self) -> torch.optim.Optimizer:
        optimizer = self.wrapped.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _make_states(self) -> None:
        """States of the optimizer where there are none yet, tied to their parameters."""
        optimizer = self.wrapped.optimizer
        flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
        if flat is None:
            flat = [param for group in self._base.param_groups for param in group["params"]]
        for param in flat:
            if not self._base.state.get(param):
                zeros = {name: torch.zeros_like(param) for name in MOMENTS}
                self._base.state[param] = {"step": torch.zeros(()), **zeros}
        if hasattr(optimizer, "_hp_optimizer_states_linked"):
            # ZeRO 1 and 2 tie parameters to their states once, after the first step of the first group, when the other
            # groups have none (deepspeed 0.19.8, stage_1_and_2.py).
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _step(self) -> int:
        steps = [int(states["step"]) for states in self._base.state.values() if "step" in states]
        return max(steps, default=0)

    @staticmethod
    def _zeros(param: torch.nn.Parameter) -> dict[str, Tensor]:
        return {name: torch.zeros_like(param, dtype=torch.float32) for name in ("param", *MOMENTS)}

    def _states(self, param: torch.nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not _is_sharded(param):
            states = self._base.state[param]
            return {"param": param.detach().float(), **{name: states[name] for name in MOMENTS}}
        values = {"param": safe_get_full_fp32_param(param)}
        values |= {name: safe_get_full_optimizer_state(param, name) for name in MOMENTS}
        return {name: value.reshape(shape_of(param)) for name, value in values.items()}

    def _set(self, param: torch.nn.Parameter, values: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if not _is_sharded(param):
            param.copy_(values["param"])
            states = self._base.state[param]
            states.setdefault("step", torch.zeros(()))
            states |= {name: values[name].clone() for name in MOMENTS}
            return
        safe_set_full_fp32_param(param, values["param"])
        for name in MOMENTS:
            safe_set_full_optimizer_state(param, values[name], name)


def _is_sharded(param: torch.nn.Parameter) -> bool:
    """Whether ZeRO keeps a master copy of the parameter."""
    return hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")


def gathered(params: list[torch.nn.Parameter], *, modify: bool = False) -> AbstractContextManager:
    """Whole parameters inside the block, where ZeRO 3 shards them.

    Args:
        params: of the model.
        modify: the block changes them, alike on every rank.
    """
    if not any(hasattr(param, "ds_id") for param in params):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(params, modifier_rank=0 if modify else None)


@dataclass(kw_only=True)
class DeepSpeedEngine(MegatronEngine):
    """A model with its optimizer and schedule, driven by DeepSpeed; fields as of MegatronEngine."""

    @classmethod
    def build(cls, config: Config, *, vocab_size: int, device: torch.device) -> "DeepSpeedEngine":
        """Build this rank's model; needs Megatron's process groups. Arguments as of MegatronEngine.

        Raises:
            ConfigError: `checkpoint.deepspeed` with a layout whose weights its format cannot hold.
        """
        _, model = build_stage(config, vocab_size=vocab_size, device=device)
        trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        params = [param for _, param in trained]
        if config.parallel.sequence:
            _sum_over_tokens(params)
        settings = config.optimizer
        options = dict(betas=(settings.beta1, settings.beta2), eps=settings.epsilon)
        optimizer = torch.optim.AdamW(param_groups(trained, settings), lr=settings.lr, **options)
        wrapped = _wrap(model, optimizer, deepspeed_config(config, _Groups.get_data_parallel_world_size()))
        states = DeepSpeedStates(wrapped=wrapped, params=params)
        engine = cls(
            config=config,
            model=model,
            wrapped=wrapped,
            optimizer=states,
            scheduler=build_scheduler(config, states),
            device=device,
        )
        if config.checkpoint.deepspeed:
            engine._universal_info()  # refused now, not at the end of the run
        return engine

    def forward_backward(
        self, batches: Iterator[Batch], num_microbatches: int, *, forward_only: bool = False
    ) -> Tensor:
        """Run the micro-batches of one step; arguments and result as of MegatronEngine."""
        taken = list(itertools.islice(batches, num_microbatches))
        scale = 0.0
        if not forward_only:
            # DeepSpeed averages over passes and ranks; the loss is a mean over tokens, which must be counted before.
            # Context-parallel ranks have the same samples here and cut their tokens out later.
            num_tokens = torch.stack([batch["loss_mask"].sum() for batch in taken]).sum().to(self.device)
            dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group())
            scale = num_microbatches * _Groups.get_data_parallel_world_size() / max(num_tokens.item(), 1.0)
        total = torch.zeros(2, device=self.device)
        for i, batch in enumerate(taken):
            losses, loss_function = self._forward_step(iter([batch]), self.wrapped)
            loss, _, stats = loss_function(losses)
            total += stats["loss"]
            if not forward_only:
                self.wrapped.backward(loss * scale)
                if i < num_microbatches - 1:
                    self.wrapped.step()  # no update before the last pass
        return total

    def update(self) -> float:
        """Clip, step the optimizer and the schedule.

        Returns:
            The global gradient norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; DeepSpeed has updated the weights by then.
        """
        grad_norm = None
        if self.config.engine.zero_stage == 0 and self.config.training.precision == "fp32":
            from deepspeed.runtime.utils import clip_grad_norm_

            # Without ZeRO it clips by a norm that it does not tell; this call clips nothing.
            grad_norm = clip_grad_norm_(self.optimizer.params, math.inf, mpu=_Groups())
        self.wrapped.step()
        grad_norm = float(self.wrapped.get_global_grad_norm() if grad_norm is None else grad_norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm is not finite ({grad_norm}) and the weights are lost: resume from the last "
                "checkpoint with a lower optimizer.lr, or look for bad data in this step."
            )
        self.scheduler.step(self.config.training.global_batch_size)
        return grad_norm

    def sync_parameters(self) -> None:
        """Nothing to gather: `gathered` does it where it is needed."""

    def gathered(self, *, modify: bool = False) -> AbstractContextManager:
        """Whole parameters inside the block, see the function of this name."""
        return gathered(self.optimizer.params, modify=modify)

    def save_deepspeed(self, folder: Path, info: dict[str, Any]) -> None:
        """Write DeepSpeed's own checkpoint, which `deepspeed.checkpoint.ds_to_universal` converts; collective.

        Args:
            folder: of this checkpoint; one that is there is replaced when the new one is whole.
            info: plain values to go with it.

        Raises:
            CheckpointError: on every rank, when any rank could not write.
            ConfigError: another zero_stage than 1 or 2; a layout whose weights the format cannot hold.
        """
        self.model.universal_checkpoint_info = self._universal_info()
        aside = folder.with_name(f".writing-{folder.name}")

        def write() -> None:
            states = {"schedule": self.scheduler.state_dict(), "info": info}
            self.wrapped.save_checkpoint(str(aside.parent), aside.name, client_state=states, save_latest=False)

        def complete() -> None:
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)

        together(f"prepare {aside}", lambda: shutil.rmtree(aside, ignore_errors=True), only_first=True)
        together(f"write {folder}", write)
        together(f"complete {folder}", complete, only_first=True)

    def load_universal(self, folder: Path) -> None:
        """Take weights, states of the optimizer and schedule of a universal checkpoint; collective.

        Args:
            folder: that the converter wrote.

        Raises:
            CheckpointError: on every rank, when any rank finds a file that is missing, damaged, unsafe, or that does
                not fit the model.
            ConfigError: a layout whose weights the format cannot hold.
        """
        rank, size = _Groups.get_model_parallel_rank(), _Groups.get_model_parallel_world_size()
        check_whole(self.model, size)
        found: dict[str, Any] = {}

        def read() -> None:
            found["states"], found["step"] = read_states(folder, self.model, rank, size)
            found["schedule"] = read_progress(folder)["schedule"]

        together(f"read {folder}", read)
        with self.gathered(modify=True), torch.no_grad():
            for param, values in zip(self.optimizer.params, found["states"], strict=True):
                param.copy_(values["param"])
        states = dict(enumerate(found["states"]))
        self.optimizer.load_state_dict(
            {"param_state": states, "optimizer": {"param_groups": [{"step": found["step"]}]}}
        )
        self.scheduler.load_state_dict(found["schedule"])

    def _universal_info(self) -> dict[str, Any]:
        stage = self.config.engine.zero_stage
        if stage not in (1, 2):
            raise ConfigError(
                f"engine.zero_stage ({stage}) must be 1 or 2 to write DeepSpeed's own checkpoint: use one of them, or "
                "the run's own checkpoints, which any stage reads."
            )
        return universal_info(self.model, _Groups.get_model_parallel_world_size())


def _wrap(model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]):
    """DeepSpeed's engine around a model; what `deepspeed.initialize` does, but for the class."""
    deepspeed = import_deepspeed()

    class Engine(deepspeed.DeepSpeedEngine):
        def module_state_dict(self, *args, **kwargs) -> dict[str, Any]:
            # Megatron's linear layers have an extra state that is None, which the converter takes for a weight.
            state = super().module_state_dict(*args, **kwargs)
            return {name: value for name, value in state.items() if value is not None}

        def _cast_module_mixed_precision(self, *args, **kwargs):
            # The model has its dtypes, and under bf16 its gates stay in float32.
            pass

    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return Engine(
        args=None,
        model=model,
        optimizer=optimizer,
        mpu=_Groups(),
        dist_init_required=False,
        config=settings,
        config_class=deepspeed.DeepSpeedConfig(settings, _Groups()),
    )


def _sum_over_tokens(params: list[torch.nn.Parameter]) -> None:
    """Under sequence parallelism each rank sees a part of the tokens: sum gradients of what all of them hold.

    Megatron does so after the backward pass, which is too late here: ZeRO reduces and frees gradients during it.
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def summed(grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=group)
        return grad

    for param in params:
        if getattr(param, "sequence_parallel", False):
            param.register_hook(summed)
