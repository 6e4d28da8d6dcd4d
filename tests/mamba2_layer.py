"""Functions that build and run a Mamba2 layer on the ranks of a pool, and put its pieces together again."""

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.gdn_layer import whole, whole_results

SHAPE = dict(
    hidden_size=24,
    mamba_num_heads=8,
    mamba_head_dim=6,
    mamba_num_groups=2,
    mamba_state_dim=12,
    linear_conv_kernel_dim=4,
)


def layer_config(sequence_parallel: bool = False, **overrides) -> TransformerConfig:
    """Odd head sizes, two groups of four heads, at the pool's tensor-parallel size."""
    return TransformerConfig(
        num_layers=2,
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        use_cpu_initialization=True,
        init_method_std=0.3,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        **(SHAPE | overrides),
    )


def build_layer(config: TransformerConfig, layer_number: int = 1, **options):
    """The layer through its ModuleSpec, as Megatron's TransformerLayer builds it."""
    from megatron_gdn.mamba2 import Mamba2, Mamba2Submodules
    from megatron_gdn.sections import take_local

    linears = Mamba2Submodules(
        in_proj=ColumnParallelLinear, in_proj_dt=ColumnParallelLinear, out_proj=RowParallelLinear
    )
    spec = ModuleSpec(module=Mamba2, params=options, submodules=linears)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = build_module(spec, config=config, layer_number=layer_number, pg_collection=groups)
    with torch.no_grad():  # weights of ones would hide a missing factor
        for name, param in (("norm", layer.norm.weight), ("D", layer.D)):
            (section,) = layer.sections[name]
            master = torch.linspace(0.5, 1.5, section.num_rows)
            param.copy_(take_local([master], [section], layer.tp_rank, layer.tp_size))
    return layer


def whole_parameters(layer, value=lambda param: param.detach()) -> dict[str, torch.Tensor]:
    """Global tensors by their key on disk, from every rank's rows; written without the product's splitting code.

    A rank holds as many heads as the largest share, its own first; what follows them must be 0. Rows of B and C are
    divided evenly. `value` picks what to put together: the weight, or its gradient.
    """
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    config = layer.config
    H, P, states = config.mamba_num_heads, config.mamba_head_dim, config.mamba_num_groups * config.mamba_state_dim
    own, held = len(range(rank * H // tp, (rank + 1) * H // tp)), -(-H // tp)
    heads, states = (held * P, own * P), (states // tp, states // tp)
    result = {}

    def add(name, param, parts, dim=0):
        start, local = 0, value(param)
        for part, (num_held, num_own) in parts.items():
            rows = local.narrow(dim, start, num_held)
            assert not rows.narrow(dim, num_own, num_held - num_own).any(), f"{name} has a ghost that is not 0"
            result[f"{name}.{part}".rstrip(".")] = whole(rows.narrow(dim, 0, num_own), dim)
            start += num_held
        assert start == local.shape[dim], name

    add("in_proj.weight", layer.in_proj.weight, dict(z=heads, x=heads, B=states, C=states))
    add("in_proj.weight", layer.in_proj_dt.weight, dict(dt=(held, own)))
    for name in ("conv1d.weight", "conv1d.bias"):
        add(name, layer.get_parameter(name), dict(x=heads, B=states, C=states))
    for name in ("A_log", "dt_bias", "D"):
        add(name, layer.get_parameter(name), {"": (held, own)})
    add("norm.weight", layer.norm.weight, {"": heads})
    add("out_proj.weight", layer.out_proj.weight, {"": heads}, dim=1)
    return result


def loss_and_gradients(
    sequence_parallel: bool = False, overrides: dict | None = None, **options
) -> dict[str, torch.Tensor]:
    """`whole_results` of one layer; `overrides` change its shape."""
    layer = build_layer(layer_config(sequence_parallel, **(overrides or {})), **options)
    assert all(param.tensor_model_parallel for param in layer.parameters())  # else the host's gradient norm is wrong
    return whole_results(layer, whole_parameters, sequence_parallel)
