"""The optimizer of the engine megatron: Megatron-Core's AdamW, or Muon beside it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
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
from megatron_gdn.training.muon import Muon, layouts


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
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap and config.parallel.distributed_optimizer,
    )
    if settings.name == "muon":
        return MuonBesideAdamW.build(settings, host_settings, model)
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

    Checkpoints hold every state as its weight lies on disk, so any layout reads them.

    Args:
        chained_optimizers: AdamW's and Muon's, in Megatron's wrappers.
        params: the stage's parameters, those of the model itself, of both.
    """

    def __init__(self, chained_optimizers: list[host.MegatronOptimizer], params: list[torch.nn.Parameter]):
        super().__init__(chained_optimizers)
        self._params = params

    @classmethod
    def build(
        cls, settings: OptimizerConfig, host_settings: host.OptimizerConfig, model: torch.nn.Module
    ) -> "MuonBesideAdamW":
        """Deal out the parameters of a stage and wrap both optimizers; needs Megatron's process groups.

        Args:
            settings: section of the run's configuration.
            host_settings: the same for Megatron; says whether weights are bf16, under float32 master weights.
            model: the stage itself.
        """
        tp_group = parallel_state.get_tensor_model_parallel_group()
        named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        matrices = layouts(model, tp_group.size())
        rest = [(name, param) for name, param in named.items() if name not in matrices]
        # Where Megatron has no fused AdamW, this one keeps its step count in the groups as those do.
        adamw = cpu.AdamW if host.USING_PYTORCH_OPTIMIZER else host.Adam
        betas = (settings.beta1, settings.beta2)
        of_rest = adamw(param_groups(rest, settings), lr=settings.lr, betas=betas, eps=settings.epsilon)
        for _, param in rest:  # before the first step, so that a checkpoint has them
            moments = {name: torch.zeros_like(param, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
            of_rest.state[param] = moments
        options, lr = settings.muon, settings.muon.lr or settings.lr
        (group,) = param_groups([(name, named[name]) for name in matrices], settings)
        of_matrices = Muon(
            [group | {"max_lr": lr, "min_lr": settings.min_lr * lr / settings.lr}],
            list(matrices.values()),
            lr=lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            coefficients=options.coefficients,
            num_steps=options.num_steps,
            scale=options.scale,
            dtype=torch.bfloat16 if host_settings.bf16 else torch.float32,
            tp_group=tp_group,
            dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        chained = []
        for optimizer in (of_rest, of_matrices):
            if host_settings.bf16:
                chained.append(Float16OptimizerWithFloat16Params(optimizer, host_settings, None, None))
            else:
                chained.append(FP32Optimizer(optimizer, host_settings, None))
            chained[-1].tp_group = tp_group
        return cls(chained, list(named.values()))

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """Master weights and states of every parameter, and the step count; arguments as of Megatron's optimizers.

        Megatron's own wrappers cannot store a bf16 model whose A_log and dt_bias are float32, and take the step count
        of other ranks from the groups of the first (megatron-core 0.16.1, optimizer.py).
        """
        states = sharded_states(model_sharded_state_dict, self._values())
        return {"param_state": states, "step": max(group.get("step", 0) for group in self.param_groups)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states that `sharded_state_dict` described."""
        for i, (_, values) in enumerate(self._values()):
            for name, value in values.items():
                value.copy_(state_dict["param_state"][i][name])
        for group in self.chained_optimizers[0].param_groups:
            group["step"] = state_dict["step"]

    def _values(self) -> Iterable[tuple[torch.nn.Parameter, dict[str, Tensor]]]:
        """Every parameter with what is kept for it: its states and its float32 weight, which may be itself."""
        states: dict[Tensor, dict[str, Tensor]] = {}
        for optimizer in self.chained_optimizers:
            states |= optimizer.optimizer.state
        for param in self._params:
            main = getattr(param, "main_param", param)
            yield param, {"param": main, **states[main]}


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
