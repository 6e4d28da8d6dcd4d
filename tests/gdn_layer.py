"""Functions that build and run a Gated DeltaNet layer on the ranks of a pool, and put its pieces together again."""

import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

SHAPE = dict(
    hidden_size=24,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=6,
    linear_value_head_dim=10,
    linear_conv_kernel_dim=4,
)


def l2norm_in_torch(x: torch.Tensor) -> torch.Tensor:
    """What Megatron takes from fla for its own layer."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def replace_in_megatrons_layer(replace=setattr, **names) -> None:
    """Replace names in the code of Megatron's own layer: one file up to 0.18, since 0.19 a package of several.

    HAVE_FLA=True lets it build without fla, and l2norm is then needed in fla's place.
    """
    import megatron.core.ssm.gated_delta_net as theirs

    files = [module for name, module in sys.modules.items() if name.startswith(f"{theirs.__name__}.")]
    for name, value in names.items():
        # Without fla, its functions may have no name at all yet.
        holders = [module for module in files if hasattr(module, name)] or [theirs]
        for module in holders:
            if not hasattr(module, name):
                setattr(module, name, None)
            replace(module, name, value)


def layer_config(sequence_parallel: bool = False, **overrides) -> TransformerConfig:
    """Odd head sizes, HV = 2 H, at the pool's tensor-parallel size."""
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
    from megatron_gdn.hybrid.layer_specs import gated_delta_net_spec

    groups = ProcessGroupCollection.use_mpu_process_groups()
    spec = gated_delta_net_spec(**options)
    layer = build_module(spec, config=config, layer_number=layer_number, pg_collection=groups)
    with torch.no_grad():  # a norm weight of ones would hide a missing factor
        layer.out_norm.weight.copy_(torch.linspace(0.5, 1.5, layer.value_head_dim))
    return layer


def whole(local: torch.Tensor, dim: int) -> torch.Tensor:
    """The tensor whose contiguous parts along `dim`, of any sizes, lie on the tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [None] * group.size()
    dist.all_gather_object(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim)


def whole_parameters(layer, value=lambda param: param.detach()) -> dict[str, torch.Tensor]:
    """Global tensors by their key on disk, from every rank's rows; written without the product's splitting code.

    A rank holds as many heads as the largest share, its own first; what follows them must be 0. `value` picks what to
    put together: the weight, or its gradient.
    """
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    config = layer.config
    H, group = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    k, v = config.linear_key_head_dim, config.linear_value_head_dim
    own, held = len(range(rank * H // tp, (rank + 1) * H // tp)), -(-H // tp)
    rows = {"query": k, "key": k, "value": group * v, "z": group * v, "beta": group, "alpha": group}  # of a key head
    fused = {
        "in_proj.weight": (layer.in_proj.weight, ["query", "key", "value", "z"]),
        "in_proj.weight/ba": (layer.in_proj_ba.weight, ["beta", "alpha"]),
        "conv1d.weight": (layer.conv1d.weight, ["query", "key", "value"]),
    }
    result = {}

    def add(name, part, size, dim=0):
        assert part.shape[dim] == held * size and not part.narrow(dim, own * size, (held - own) * size).any(), name
        result[name] = whole(part.narrow(dim, 0, own * size), dim)

    for name, (param, sections) in fused.items():
        start = 0
        for section in sections:
            part = value(param)[start : start + held * rows[section]]
            start += held * rows[section]
            if len(part):
                add(f"{name.split('/')[0]}.{section}", part, rows[section])
    for name in ("A_log", "dt_bias") if layer.use_decay else ():
        add(name, value(layer.get_parameter(name)), group)
    add("out_proj.weight", value(layer.out_proj.weight), group * v, dim=1)
    result["out_norm.weight"] = value(layer.out_norm.weight).clone()
    return result


def inputs(tokens: int = 72, batch: int = 2, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[s, b, h]` and the weights of a scalar loss over the output; more tokens than one chunk."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, batch, SHAPE["hidden_size"])
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def whole_results(layer, parameters, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Loss, output and every gradient of a mixer on `inputs()`, put together over the ranks.

    Args:
        layer: built on this rank.
        parameters: function that puts its parameters together, see `whole_parameters`.
        sequence_parallel: whether each rank gets its part of the tokens.
    """
    x, weights = inputs()
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if sequence_parallel:
        x, weights = (t.chunk(tp)[rank].contiguous() for t in (x, weights))
    x.requires_grad_()
    y, bias = layer(x)
    assert bias is None
    loss = (y * weights).sum()
    loss.backward()
    result = {f"grad {name}": grad for name, grad in parameters(layer, lambda param: param.grad).items()}
    result["output"] = whole(y.detach(), 0) if sequence_parallel else y.detach()
    result["grad input"] = whole(x.grad, 0) if sequence_parallel else x.grad
    total = loss.detach().clone()
    if sequence_parallel:
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    result["loss"] = total
    return result


def loss_and_gradients(
    sequence_parallel: bool = False, overrides: dict | None = None, **options
) -> dict[str, torch.Tensor]:
    """`whole_results` of one layer; `overrides` change its shape."""
    layer = build_layer(layer_config(sequence_parallel, **(overrides or {})), **options)
    return whole_results(layer, whole_parameters, sequence_parallel)
