"""The optimizer of the engine megatron: Megatron-Core's AdamW, or Muon beside it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as host
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from megatron_gdn.config import Config, OptimizerConfig
from megatron_gdn.parallel import cpu
from megatron_gdn.training.muon import Layout, Muon, layouts, newton_schulz_flops
from megatron_gdn.training.owners import Load, deal_out


def build_optimizer(
    config: Config, model: torch.nn.Module, wrapped: DistributedDataParallel, dtype: torch.dtype
) -> host.MegatronOptimizer:
    """The optimizer of this rank's stage.

    Args:
        config: the run.
        model: the stage itself.
        wrapped: the stage under data parallelism, which holds the gradients.
        dtype: of the weights.
    """
    settings = config.optimizer
    host_settings = host.OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.slices_optimizer,
        overlap_param_gather=config.parallel.overlap and config.slices_optimizer,
    )
    if settings.name == "muon":
        return MuonBesideAdamW.build(config, host_settings, model)
    overrides = host.get_standard_config_overrides(host_settings)  # vectors have no weight decay
    if dtype is not torch.float32:
        # DistributedOptimizer puts the float32 parameters of a group first, but looks their states up in the original
        # order when it saves (megatron-core 0.16.1, distrib_optimizer.py): with both dtypes in one group it would store
        # wrong states. A_log and dt_bias therefore get a group of their own; its learning rate is the run's.
        is_float32 = ParamPredicate(name="float32", fn=lambda param: param.dtype is torch.float32)
        overrides[ParamKey(predicate=is_float32)] = ParamGroupOverride(max_lr=settings.lr)
    return host.get_megatron_optimizer(host_settings, [wrapped], config_overrides=overrides)


class MuonBesideAdamW(ChainedOptimizer):
    """Muon and AdamW as one optimizer of Megatron's: one gradient norm, one step, one place in a checkpoint.

    Every parameter has an owner among the data-parallel ranks, which alone keeps its float32 weight and states and
    updates it (megatron_gdn/training/owners.py). Checkpoints hold every state as its weight lies on disk, so any layout
    reads them, whoever owned what.

    Args:
        chained_optimizers: AdamW's and Muon's over this rank's own parameters, in Megatron's wrappers.
        params: the stage's parameters, those of the model itself, of both and of all owners.
        owners: data-parallel rank of each; None: every rank keeps and updates all of them.
        dp_group: ranks that hold the same weights.
    """

    def __init__(
        self,
        chained_optimizers: list[host.MegatronOptimizer],
        params: Sequence[torch.nn.Parameter],
        *,
        owners: Sequence[int] | None,
        dp_group: dist.ProcessGroup,
    ):
        super().__init__(chained_optimizers)
        self._params, self._owners, self._dp_group = params, owners, dp_group
        self._num_steps = 0
        if owners is not None:
            for optimizer in chained_optimizers:
                # Megatron sums squares over model-parallel ranks; here a gradient counts on its owner only.
                optimizer.grad_stats_parallel_group = dist.group.WORLD

    @classmethod
    def build(cls, config: Config, host_settings: host.OptimizerConfig, model: torch.nn.Module) -> "MuonBesideAdamW":
        """Deal out the parameters of a stage and wrap both optimizers; needs Megatron's process groups.

        Args:
            config: the run.
            host_settings: its optimizer for Megatron; says whether weights are bf16, under float32 master weights.
            model: the stage itself.
        """
        settings, options = config.optimizer, config.optimizer.muon
        tp_group = parallel_state.get_tensor_model_parallel_group()
        dp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        matrices = layouts(model, tp_group.size())
        owners = None
        if config.parallel.distributed_optimizer:
            owners = deal_out([load_of(param, matrices.get(name)) for name, param in named.items()], dp_group.size())
        own = [name for i, name in enumerate(named) if owners is None or owners[i] == dp_group.rank()]
        own_params = {id(named[name]) for name in own}

        def own_groups(names: Iterable[str]) -> list[dict[str, Any]]:
            # Every rank has all groups, whose learning rates follow the schedule, and where it owns nothing empty ones.
            groups = param_groups([(name, named[name]) for name in names], settings)
            return [group | {"params": [p for p in group["params"] if id(p) in own_params]} for group in groups]

        # Where Megatron has no fused AdamW, this one keeps its step count in the groups as those do.
        adamw = cpu.AdamW if host.USING_PYTORCH_OPTIMIZER else host.Adam
        betas = (settings.beta1, settings.beta2)
        groups = own_groups(name for name in named if name not in matrices)
        of_rest = adamw(groups, lr=settings.lr, betas=betas, eps=settings.epsilon)
        for param in (param for group in groups for param in group["params"]):
            # Before the first step, so that a checkpoint has them.
            moments = {name: torch.zeros_like(param, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
            of_rest.state[param] = moments
        lr = options.lr or settings.lr
        (group,) = own_groups(matrices)
        of_matrices = Muon(
            [group | {"max_lr": lr, "min_lr": settings.min_lr * lr / settings.lr}],
            [layout for name, layout in matrices.items() if name in own],
            lr=lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            coefficients=options.coefficients,
            num_steps=options.num_steps,
            scale=options.scale,
            dtype=torch.bfloat16 if host_settings.bf16 else torch.float32,
            tp_group=tp_group,
        )
        chained = []
        for optimizer in (of_rest, of_matrices):
            if host_settings.bf16:
                chained.append(Float16OptimizerWithFloat16Params(optimizer, host_settings, None, None))
            else:
                chained.append(FP32Optimizer(optimizer, host_settings, None))
            chained[-1].tp_group = tp_group
        return cls(chained, list(named.values()), owners=owners, dp_group=dp_group)

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update this rank's own parameters and get the others'; collective."""
        success = super().step_with_ready_grads()
        self._num_steps += 1
        if self._owners is not None and self._dp_group.size() > 1:
            pairs = zip(self._params, self._owners, strict=True)
            sent = [dist.broadcast(p.data, group=self._dp_group, group_src=owner, async_op=True) for p, owner in pairs]
            for work in sent:
                work.wait()
        return success

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """Master weights and states of own parameters, and the step count; arguments as of Megatron's optimizers.

        Megatron's own wrappers cannot store a bf16 model whose A_log and dt_bias are float32, and take the step count
        of other ranks from the groups of the first (megatron-core 0.16.1, optimizer.py), which here may own nothing.
        """
        states = sharded_states(model_sharded_state_dict, self._values())
        if self._owners is not None:
            for state in nested_values(states):
                # Of a weight, the copy on the first data-parallel rank is written; of a state there is one only.
                *model_parallel, _ = state.replica_id
                state.replica_id = (*model_parallel, 0)
        return {"param_state": states, "step": self._num_steps}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states that `sharded_state_dict` described."""
        for i, (_, values) in enumerate(self._values()):
            for name, value in values.items():
                value.copy_(state_dict["param_state"][i][name])
        self._num_steps = state_dict["step"]
        for group in self.chained_optimizers[0].param_groups:
            group["step"] = self._num_steps

    def _values(self) -> Iterable[tuple[torch.nn.Parameter, dict[str, Tensor]]]:
        """Own parameters with what is kept for each: its states and its float32 weight, which may be itself."""
        states: dict[Tensor, dict[str, Tensor]] = {}
        for optimizer in self.chained_optimizers:
            states |= optimizer.optimizer.state
        for param in self._params:
            main = getattr(param, "main_param", param)
            if main in states:
                yield param, {"param": main, **states[main]}


def load_of(param: torch.nn.Parameter, layout: Layout | None) -> Load:
    """What a parameter costs its owner: a master weight where it is not float32, and one or two states."""
    num_numbers = (param.dtype is not torch.float32) + (2 if layout is None else 1)
    flops = 0.0 if layout is None else newton_schulz_flops(layout, param.shape)
    return Load(num_bytes=4 * num_numbers * param.numel(), flops=flops)


def param_groups(named: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups as Megatron makes them: vectors have no weight decay, float32 parameters of a bf16 model are apart.

    Args:
        named: names and parameters.
        settings: section of the run's configuration.
    """
    groups: dict[tuple, list[torch.nn.Parameter]] = {}
    for name, param in named:
        decays = param.ndim > 1 and not name.endswith(".bias")
        groups.setdefault((not decays, str(param.dtype)), []).append(param)
    return [
        {
            "params": params,
            "weight_decay": 0.0 if vectors else settings.weight_decay,
            "wd_mult": 0.0 if vectors else 1.0,
            "lr_mult": 1.0,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
            "default_config": not vectors,
            "max_lr": settings.lr,
            "min_lr": settings.min_lr,
        }
        for (vectors, _), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def sharded_states(
    model: dict[str, Any], values: Iterable[tuple[torch.nn.Parameter, dict[str, Tensor]]]
) -> dict[int, dict[str, ShardedBase]]:
    """Sharded tensors of an optimizer's states, which lie on disk as their parameters do.

    Args:
        model: sharded state dict of the model.
        values: every parameter with its states by name.

    Returns:
        States by the parameter's place in `values`, under the keys of Megatron's distributed optimizer.
    """
    sharded, _ = extract_matching_values(model, lambda x: isinstance(x, ShardedBase))
    by_param = {id(x.data): x for x in nested_values(sharded)}
    return {
        i: {
            name: _like(by_param[id(param)], f"optimizer.state.{name}.{by_param[id(param)].key}", value)
            for name, value in states.items()
        }
        for i, (param, states) in enumerate(values)
    }


def _like(sharded: ShardedBase, key: str, data: Tensor) -> ShardedBase:
    """A tensor that lies on disk as a parameter does."""
    changes = dict(key=key, data=data)
    if not isinstance(sharded, ShardedTensorFactory):
        changes["dtype"] = data.dtype
    return replace(sharded, **changes)
