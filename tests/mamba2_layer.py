"""Functions that build and run a Mamba2 layer on the ranks of a pool, and put its pieces together again."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.gdn_layer import whole

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


def inputs(tokens: int = 72, batch: int = 2, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[s, b, h]` and the weights of a scalar loss over the output; more tokens than one chunk."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, batch, SHAPE["hidden_size"])
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def loss_and_gradients(
    sequence_parallel: bool = False, overrides: dict | None = None, **options
) -> dict[str, torch.Tensor]:
    """Loss, output and every gradient of one layer, put together over the ranks; `overrides` change its shape."""
    layer = build_layer(layer_config(sequence_parallel, **(overrides or {})), **options)
    x, weights = inputs()
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if sequence_parallel:
        x, weights = (t.chunk(tp)[rank].contiguous() for t in (x, weights))
    x.requires_grad_()
    y, bias = layer(x)
    assert bias is None
    loss = (y * weights).sum()
    loss.backward()
    assert all(param.tensor_model_parallel for param in layer.parameters())  # else the host's gradient norm is wrong
    result = {f"grad {name}": grad for name, grad in whole_parameters(layer, lambda param: param.grad).items()}
    result["output"] = whole(y.detach(), 0) if sequence_parallel else y.detach()
    result["grad input"] = whole(x.grad, 0) if sequence_parallel else x.grad
    total = loss.detach().clone()
    if sequence_parallel:
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    result["loss"] = total
    return result
