"""DeepSpeed's universal checkpoints: how a model's weights lie on tensor-parallel ranks, told to its converter.

    engine.save_deepspeed(folder, tag)                              DeepSpeed's own checkpoint, of this layout
    python -m deepspeed.checkpoint.ds_to_universal \\
        --input_folder folder/tag --output_folder folder/universal  every weight whole, fused sections in order
    engine.load_universal(folder, "universal")                      at another tensor- or data-parallel size

A fused weight is a "parameter with sub-parameters" there: the widths of its sections, and of each on every rank
(universal checkpoint version 0.4, deepspeed 0.19.8, deepspeed/checkpoint/ds_to_universal.py).
"""

import re
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from megatron_gdn.attention import HybridSelfAttention
from megatron_gdn.config import ConfigError
from megatron_gdn.gated_delta_net import GatedDeltaNet
from megatron_gdn.mamba2 import Mamba2
from megatron_gdn.sections import Section, swiglu_sections

_VERSION = 0.4
"""Of the format that this module writes."""


def universal_info(model: torch.nn.Module, tp_size: int) -> dict[str, Any]:
    """What DeepSpeed stores as `universal_checkpoint_info`: a pattern for every parameter that is not cut by rows.

    Args:
        model: the model, on one of `tp_size` tensor-parallel ranks.
        tp_size: tensor-parallel size.

    Raises:
        ConfigError: tensor-parallel ranks hold ghost heads, which have no place in a whole weight.
    """
    _check_whole(model, tp_size)
    fused = fused_sections(model)
    replicated, by_columns, sub_params, widths = [], [], [], {}
    for name, param in model.named_parameters():
        pattern = f"^{re.escape(name)}$"
        if not getattr(param, "tensor_model_parallel", False):
            replicated.append(pattern)
        elif param.partition_dim == 1:
            by_columns.append(pattern)
        elif name in fused:
            rows = tuple(section.num_rows for section in fused[name])
            sub_params.append({"patterns": [pattern], "shape": (rows, *param.shape[1:]), "partition_dim": 0})
            widths[pattern] = [[count // tp_size] * tp_size for count in rows]
    return {
        "universal_checkpoint_version": _VERSION,
        "tp_replicated_parameter_patterns": replicated,
        "parameter_with_row_parallelism_patterns": by_columns,
        "parameter_with_sub_params": sub_params,
        "sub_param_shard_widths": widths,
    }


def fused_sections(model: torch.nn.Module) -> dict[str, list[Section]]:
    """Sections of every parameter that stacks several, by its name."""
    found: dict[str, list[Section]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MLP):
            found[f"{name}.linear_fc1.weight"] = swiglu_sections(module.config.ffn_hidden_size)
        elif isinstance(module, GatedDeltaNet | Mamba2):
            for parameter, _ in module.named_parameters():
                sections = module.sections.get(parameter.removesuffix(".weight").removesuffix(".bias"), [])
                if len(sections) > 1:
                    found[f"{name}.{parameter}"] = sections
    return found


def _check_whole(model: torch.nn.Module, tp_size: int) -> None:
    """Refuse what the format has no place for: rows of ranks that are no rows of the whole weight."""
    for name, module in model.named_modules():
        if isinstance(module, HybridSelfAttention):
            whole = not module.has_ghosts
        elif isinstance(module, GatedDeltaNet | Mamba2):
            sizes = {"in_proj": module.in_proj.weight.shape[0], "out_proj": module.out_proj.weight.shape[1]}
            whole = all(
                size * tp_size == sum(section.num_rows for section in module.sections[part])
                for part, size in sizes.items()
            )
        else:
            continue
        if not whole:
            raise ConfigError(
                f"{name} holds ghost heads or filled-up rows at parallel.tensor={tp_size}, and DeepSpeed's universal "
                "checkpoints have no place for them: use a parallel.tensor that divides its heads, or the run's own "
                "checkpoints, which any layout reads."
            )
