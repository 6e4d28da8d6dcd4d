"""DeepSpeed's universal checkpoints: told to its converter, and read without executing what is in them.

    checkpoint.deepspeed=true                                       DeepSpeed's own checkpoint, of this layout
    python -m deepspeed.checkpoint.ds_to_universal \\
        --input_folder deepspeed/step_00000120 --output_folder universal
                                                                    every weight whole, fused sections in order
    checkpoint.initial_universal=universal                          at another tensor- or data-parallel size

    universal/mp_rank_00_model_states.pt                            schedule and progress are read from it
    universal/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt           a weight, its moments, updates done

A fused weight is a "parameter with sub-parameters" there: the widths of its sections, and of each on every rank
(universal checkpoint version 0.4, deepspeed 0.19.8, deepspeed/checkpoint/ds_to_universal.py). DeepSpeed's own loader
unpickles whatever a file holds; the one here reads tensors and plain values, and takes no file but these.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_gdn.attention import HybridSelfAttention
from megatron_gdn.config import ConfigError
from megatron_gdn.gated_delta_net import GatedDeltaNet
from megatron_gdn.mamba2 import Mamba2
from megatron_gdn.sections import Section, swiglu_sections
from megatron_gdn.training.checkpoint import CheckpointError
from megatron_gdn.training.restricted import UnsafeCheckpointError, named_global

PROGRESS_FILE = "mp_rank_00_model_states.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""States of AdamW that lie beside the weight, which is called fp32 there."""
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
    check_whole(model, tp_size)
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


def shape_of(param: torch.nn.Parameter) -> torch.Size:
    """Shape on this tensor-parallel rank; ZeRO 3 leaves the parameter itself empty."""
    return getattr(param, "ds_shape", param.shape)


def check_whole(model: torch.nn.Module, tp_size: int) -> None:
    """Refuse what the format has no place for: rows of ranks that are no rows of the whole weight.

    Args:
        model: on one of `tp_size` tensor-parallel ranks.
        tp_size: tensor-parallel size.

    Raises:
        ConfigError: the first module with such rows.
    """
    for name, module in model.named_modules():
        if isinstance(module, HybridSelfAttention):
            whole = not module.has_ghosts
        elif isinstance(module, GatedDeltaNet | Mamba2):
            sizes = {"in_proj": shape_of(module.in_proj.weight)[0], "out_proj": shape_of(module.out_proj.weight)[1]}
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


def read_progress(folder: Path) -> dict[str, Any]:
    """What `DeepSpeedEngine.save_deepspeed` stored beside weights and states: `schedule` and `info`.

    Args:
        folder: a universal checkpoint.

    Raises:
        CheckpointError: not a universal checkpoint, or not one of this project's.
        UnsafeCheckpointError: the file names anything but tensors and plain values.
    """
    path = folder / PROGRESS_FILE
    found = _read(path)
    names = ("schedule", "info")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in names):
        raise CheckpointError(f"{path} must hold schedule and info: write it with checkpoint.deepspeed=true.")
    return {name: found[name] for name in names}


def read_states(folder: Path, model: torch.nn.Module, tp_rank: int, tp_size: int) -> tuple[list[dict], float]:
    """This rank's rows of every trained weight and of its moments, and the number of updates.

    Tensors are mapped from their files and not in memory before they are used, but for fused weights that ranks share.

    Args:
        folder: a universal checkpoint.
        model: on one of the tensor-parallel ranks, passed by `check_whole`.
        tp_rank, tp_size: which, and of how many.

    Returns:
        For each parameter `param`, `exp_avg` and `exp_avg_sq`, in the order of the model's; the number of updates.

    Raises:
        CheckpointError: a file that is missing or damaged, or that does not fit the model.
        UnsafeCheckpointError: a file names anything but tensors and plain values.
    """
    fused = fused_sections(model)
    states, steps = [], {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        values = {}
        for key, state in zip(("param", *MOMENTS), ("fp32", *MOMENTS), strict=True):
            path = folder / "zero" / name / f"{state}.pt"
            values[key] = _rows(_read(path), path, param, fused.get(name), tp_rank, tp_size)
        path = folder / "zero" / name / "step.pt"
        steps[path] = _number(_read(path), path)
        states.append(values)
    first, *others = steps
    for path in others:
        if steps[path] != steps[first]:
            raise CheckpointError(
                f"{path} ({steps[path]:g} updates) must be {steps[first]:g} as in {first}: convert the checkpoint anew."
            )
    return states, steps[first]


def _read(path: Path) -> Any:
    """A file of torch.save, by torch's restricted unpickler."""
    from deepspeed.checkpoint.universal_checkpoint import SubparamShape  # a dataclass of plain values

    try:
        with torch.serialization.safe_globals([SubparamShape]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(f"{path} is refused: {named_global(error)}: do not load it.") from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}): name the output folder of deepspeed.checkpoint.ds_to_universal, and "
            "copy it whole."
        ) from error


def _rows(
    found: Any, path: Path, param: torch.nn.Parameter, sections: list[Section] | None, rank: int, size: int
) -> Tensor:
    """What a rank holds of a whole weight, or of a state of it."""
    whole = found.get("param") if isinstance(found, dict) else None
    if not isinstance(whole, Tensor):
        raise CheckpointError(f"{path} must hold a tensor 'param': convert the checkpoint anew.")
    cut = getattr(param, "partition_dim", 0) if getattr(param, "tensor_model_parallel", False) else None
    expected = [length * size if dim == cut else length for dim, length in enumerate(shape_of(param))]
    if list(whole.shape) != expected or whole.dtype != torch.float32:
        raise CheckpointError(
            f"{path} ({whole.dtype}, {list(whole.shape)}) must be torch.float32, {expected}: continue with the model "
            "that wrote it."
        )
    if sections is not None and (theirs := getattr(found.get("sub_param_shape"), "shape", None)) is not None:
        ours = tuple(section.num_rows for section in sections)
        if theirs[0] != ours:
            raise CheckpointError(
                f"{path} has sections of {theirs[0]} rows and the model of {ours}: continue with the model that wrote "
                "it."
            )
    if cut is None or size == 1:
        return whole
    if sections is None:
        return whole.chunk(size, dim=cut)[rank]
    parts = whole.split([section.num_rows for section in sections])
    return torch.cat([part[section.local_rows(rank, size)] for part, section in zip(parts, sections, strict=True)])


def _number(found: Any, path: Path) -> float:
    if not isinstance(found, int | float | Tensor) or (isinstance(found, Tensor) and found.numel() != 1):
        raise CheckpointError(f"{path} must hold a number of updates: convert the checkpoint anew.")
    return float(found)
