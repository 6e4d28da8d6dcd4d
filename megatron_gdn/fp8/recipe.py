"""FP8 recipes: which quantiser each operand of a linear layer's three products gets.

    y  = x w^T        dx = dy w        dw = dy^T x

    recipe      scales                            x, w    dy               Transformer Engine's class
    delayed     per tensor, of earlier passes     e4m3    e5m2 | e4m3      DelayedScaling
    tensorwise  per tensor, of the tensor itself  e4m3    e5m2 | e4m3      Float8CurrentScaling
    blockwise   1x128, weights 128x128            e4m3    e4m3 | e5m2      Float8BlockScaling
    mxfp8       1x32                              e4m3    e4m3 | e5m2      MXFP8BlockScaling

The format of dy is e5m2 with format "hybrid" and e4m3 with "e4m3". Blocks lie along the dimension that a product sums
over, so x, dy and, under mxfp8, w are quantised twice from their high-precision values, once for each direction.
"""

from dataclasses import dataclass
from typing import Any

from megatron_gdn.config import FP8Config
from megatron_gdn.fp8.quantize import Quantizer


@dataclass(frozen=True, kw_only=True)
class LinearRecipe:
    """Quantisers of a linear layer's operands, each for a matrix whose columns a product sums over.

    input, weight, grad_output: of x, w and dy.
    history: forward passes whose largest magnitude sets a tensor's scale (delayed scaling); 0: the tensor's own.
    """

    input: Quantizer
    weight: Quantizer
    grad_output: Quantizer
    history: int = 0


def linear_recipe(config: FP8Config) -> LinearRecipe:
    """Quantisers of a recipe.

    Args:
        config: section of the run's configuration, with a recipe.
    """
    grad_format = "e5m2" if config.format == "hybrid" else "e4m3"
    if config.recipe == "blockwise":
        weight, other = dict(block=(128, 128)), dict(block=(1, 128))
        common = dict(scale_rule="power_of_2")
    elif config.recipe == "mxfp8":
        weight = other = dict(block=(1, 32))
        common = dict(scale_rule="e8m0")
    else:
        weight, other, common = {}, {}, {}
    return LinearRecipe(
        input=Quantizer(format="e4m3", **other, **common),
        weight=Quantizer(format="e4m3", **weight, **common),
        grad_output=Quantizer(format=grad_format, **other, **common),
        history=config.amax_history if config.recipe == "delayed" else 0,
    )


def host_options(config: FP8Config) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig under which its FP8 context runs Transformer Engine's modules.

    Args:
        config: section of the run's configuration; empty unless its backend is Transformer Engine.
    """
    if config.recipe == "none" or config.backend != "te":
        return {}
    first_or_last = config.first_layers_bf16 + config.last_layers_bf16 > 0
    options = dict(
        fp8=config.format,
        fp8_recipe=config.recipe,
        fp8_param=config.param_gather,
        first_last_layers_bf16=first_or_last,
        num_layers_at_start_in_bf16=config.first_layers_bf16,
        num_layers_at_end_in_bf16=config.last_layers_bf16,
    )
    if config.recipe == "delayed":
        options |= dict(fp8_amax_history_len=config.amax_history, fp8_amax_compute_algo="max")
    return options


def layer_uses_fp8(config: FP8Config, layer: int, num_layers: int) -> bool:
    """Whether a layer's large linear layers run in FP8.

    Args:
        config: section of the run's configuration.
        layer: global index, from 0.
        num_layers: of the whole model.
    """
    inside = config.first_layers_bf16 <= layer < num_layers - config.last_layers_bf16
    return config.recipe != "none" and inside


def row_multiple(config: FP8Config) -> int:
    """What widths and tokens of an FP8 product must be multiples of: 32 for mxfp8, 16 else, 1 without FP8."""
    return {"none": 1, "mxfp8": 32}.get(config.recipe, 16)
