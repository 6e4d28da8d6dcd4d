"""Widths and tokens that FP8 products can have, checked on the shapes of a rank before anything starts."""

import math

from megatron_gdn.config import Config, ConfigError, ModelConfig
from megatron_gdn.fp8.recipe import row_multiple
from megatron_gdn.hybrid.pattern import parse_pattern
from megatron_gdn.sections import local_sizes, mamba2_sections


def check_alignment(config: Config) -> None:
    """Refuse a layout whose FP8 products have widths that the hardware cannot take.

    The rule is of a rank's own shapes: 16 bytes for per-tensor and 128-block scales, 32 elements for mxfp8. Gated
    DeltaNet layers fill their rows up (`row_multiple` of the layer), everything else must fit.

    Args:
        config: the run.

    Raises:
        ConfigError: every width that does not fit, with its rule and the nearest values that do.
    """
    multiple = row_multiple(config.fp8)
    lines = [
        f"{name} ({size}) must be a multiple of {multiple} with fp8.recipe={config.fp8.recipe}: {remedy}."
        for name, size, remedy in _widths(config)
        if size % multiple
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def _widths(config: Config) -> list[tuple[str, int, str]]:
    """Name, size on a rank, and remedy, of every width that layers do not fill up themselves."""
    model, training, tp = config.model, config.training, config.parallel.tensor
    multiple = row_multiple(config.fp8)
    tokens = training.micro_batch_size * training.sequence_length
    widths = [
        (
            "tokens of a micro-batch, training.micro_batch_size x training.sequence_length",
            tokens,
            "change one of them",
        ),
        ("model.hidden_size", model.hidden_size, f"use {_up(model.hidden_size, multiple)}"),
        (
            f"model.ffn_hidden_size / parallel.tensor, rows of an MLP on each of {tp} ranks",
            model.ffn_hidden_size // tp,
            f"use model.ffn_hidden_size={_up(model.ffn_hidden_size, multiple * tp)}",
        ),
    ]
    if model.symbols & {"S", "*"}:
        size = model.attention_head_dim
        remedy = f"use heads of {_up(size, multiple)} (model.kv_channels), or fewer tensor-parallel ranks"
        layers = enumerate(parse_pattern(model.pattern), start=1)
        for num_groups in sorted({_num_query_groups(model, i) for i, layer in layers if layer.symbol in ("S", "*")}):
            local = math.ceil(num_groups / tp)  # with ghost heads, see megatron_gdn/sections.py
            queries = local * model.num_attention_heads // num_groups * size
            widths += [
                (f"query rows of attention on each of {tp} ranks", queries, remedy),
                (f"key and value rows of attention on each of {tp} ranks", 2 * local * size, remedy),
            ]
    if "M" in model.symbols:
        sections = mamba2_sections(
            num_heads=model.mamba_num_heads,
            head_dim=model.mamba_head_dim,
            num_groups=model.mamba_num_groups,
            state_dim=model.mamba_state_dim,
        )
        remedy = "change model.mamba_head_dim or model.mamba_state_dim, or use fewer tensor-parallel ranks"
        for name, rows in (("in_proj", "rows"), ("out_proj", "columns")):
            size = sum(local_sizes(sections[name], tp))
            widths.append((f"{rows} of Mamba2's {name} on each of {tp} ranks", size, remedy))
    return widths


def _num_query_groups(model: ModelConfig, number: int) -> int:
    return model.attention_options(number).num_query_groups


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
