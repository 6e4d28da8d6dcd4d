"""FP8 quantisers: the number formats and scaling rules of Transformer Engine's recipes, in plain PyTorch.

A tensor x is stored as q = cast(x * scale) in e4m3 or e5m2, with one scale per tensor or per block, so that the largest
magnitude of each block meets the largest number of the format. The rules, with M that number and amax the largest
magnitude of a block:

    float32     scale = M / amax
    power_of_2  scale = 2 ** floor(log2(M / amax))            128-blocks (DeepSeek-V3, arXiv 2412.19437)
    e8m0        scale = 2 ** -ceil(log2(amax / M))            32-blocks, scale stored in 8 bits (OCP MX, rounded up
                                                              as Transformer Engine does, so that nothing saturates)

A block of zeros has the scale 1. Infinite values saturate at +-M and give their block the scale 1; NaN stays NaN and
does not touch its neighbours. Casts round to nearest, ties to even, and saturate.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["e4m3", "e5m2"]
ScaleRule = Literal["float32", "power_of_2", "e8m0"]
DTYPES: dict[Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """How one operand of a matrix product is stored.

    format: e4m3 (largest number 448) or e5m2 (57344).
    block: rows and columns that share a scale; None: the whole tensor.
    scale_rule: see the module.
    """

    format: Format
    block: tuple[int, int] | None = None
    scale_rule: ScaleRule = "float32"

    @property
    def largest(self) -> float:
        """Largest number of the format."""
        return torch.finfo(DTYPES[self.format]).max

    def amax(self, x: Tensor) -> Tensor:
        """Largest magnitude of each block of x `[R, C]`, NaN left out: `[block rows, block columns]` float32."""
        magnitude = x.detach().float().abs().nan_to_num(nan=0.0, posinf=torch.inf)
        if self.block is None:
            return magnitude.amax().reshape(1, 1)
        return _blocks(magnitude, self.block).amax((1, 3))

    def scale(self, amax: Tensor) -> Tensor:
        """Factors that bring blocks into the format's range.

        Args:
            amax: largest magnitudes, float32.
        """
        usable = (amax > 0) & amax.isfinite()
        safe = torch.where(usable, amax, 1.0)
        if self.scale_rule == "float32":
            scale = (self.largest / safe).clamp(max=_MAX_FLOAT32)
        elif self.scale_rule == "power_of_2":
            scale = torch.exp2(_floor_log2((self.largest / safe).clamp(max=_MAX_FLOAT32)))
        else:
            # ceil(log2(a)) = -floor(log2(1 / a)) without rounding 1 / a: step up where a is no power of two.
            mantissa, exponent = torch.frexp(safe / self.largest)
            scale = torch.exp2(-(exponent - (mantissa == 0.5).int()).clamp(-127, 127).float())
        return torch.where(usable, scale, 1.0)

    def __call__(self, x: Tensor, *, amax: Tensor | None = None) -> "Quantized":
        """Quantise.

        Args:
            x: `[R, C]`, any float dtype.
            amax: largest magnitudes to use in place of the tensor's own, as delayed scaling does.
        """
        scale = self.scale(self.amax(x) if amax is None else amax)
        scaled = x.detach().float() * _spread(scale, self.block, x.shape)
        data = scaled.clamp(-self.largest, self.largest).to(DTYPES[self.format])
        return Quantized(data=data, inverse_scale=scale.reciprocal(), block=self.block)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A tensor in FP8.

    data: `[R, C]` float8.
    inverse_scale: what its blocks are multiplied with to get the numbers back, float32.
    block: see `Quantizer`.
    """

    data: Tensor
    inverse_scale: Tensor
    block: tuple[int, int] | None

    def dequantize(self) -> Tensor:
        """The numbers that the FP8 tensor stands for, float32."""
        return self.data.float() * _spread(self.inverse_scale, self.block, self.data.shape)


def _blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """`[R, C]` to `[R / rows, rows, C / columns, columns]`, with zeros behind the last block."""
    rows, columns = block
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def _spread(scale: Tensor, block: tuple[int, int] | None, shape: torch.Size) -> Tensor:
    """A block's scale for each of its elements."""
    if block is None:
        return scale.reshape(1, 1)
    each = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return each[: shape[0], : shape[1]]


def _floor_log2(x: Tensor) -> Tensor:
    """floor(log2(x)) of positive float32, exact at powers of two."""
    return (torch.frexp(x).exponent - 1).float()
