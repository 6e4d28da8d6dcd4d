"""The quantisers against tables of all numbers of a format; their rules for zeros, NaN, infinity and overflow."""

import pytest
import torch

from megatron_gdn.fp8.quantize import DTYPES, Quantizer

E4M3, E5M2 = Quantizer(format="e4m3"), Quantizer(format="e5m2")
BLOCKS = Quantizer(format="e4m3", block=(1, 128), scale_rule="power_of_2")
SQUARES = Quantizer(format="e4m3", block=(128, 128), scale_rule="power_of_2")
MX = Quantizer(format="e4m3", block=(1, 32), scale_rule="e8m0")
ALL = [E4M3, E5M2, BLOCKS, SQUARES, MX]


def numbers(format: str) -> torch.Tensor:
    """All finite numbers of a format, rising, in float64."""
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[format]).double()
    return codes[codes.isfinite()].unique()


def nearest(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The number of `grid` nearest to each of x; of two as near, the one with an even place in the positive half."""
    above = torch.searchsorted(grid, x).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    zero = int((grid == 0).nonzero())
    even_low = (above - 1 - zero) % 2 == 0
    take_low = (x - low < high - x) | ((x - low == high - x) & even_low)
    return torch.where(take_low, low, high)


def matrix(rows: int = 130, columns: int = 200, seed: int = 0) -> torch.Tensor:
    """Values over many powers of two, signed; sizes that no block divides."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 6, (rows, columns), generator=generator)
    return torch.randn(rows, columns, generator=generator) * torch.exp2(exponents.float())


def each_block(quantizer: Quantizer, shape):
    """Slices of the blocks of a matrix."""
    rows, columns = quantizer.block or shape
    for i in range(0, shape[0], rows):
        for j in range(0, shape[1], columns):
            yield slice(i, i + rows), slice(j, j + columns)


@pytest.mark.parametrize("quantizer", ALL)
def test_every_number_becomes_the_nearest_of_its_block(quantizer):
    x = matrix()
    quantized = quantizer(x)
    result = quantized.dequantize()
    grid, largest = numbers(quantizer.format), numbers(quantizer.format).max()
    for i, j in each_block(quantizer, x.shape):
        block = x[i, j].double()
        ideal = largest / block.abs().max()
        if quantizer.scale_rule == "float32":
            scale = ideal.float().double()
        else:
            # The largest power of two that brings the block into the range.
            scale = 2.0 ** torch.floor(torch.log2(ideal))
            assert block.abs().max() * scale <= largest < block.abs().max() * scale * 2
        # The product with the scale is rounded to float32 before it is rounded to FP8.
        expected = nearest((x[i, j] * scale.float()).double(), grid) / scale
        # Three roundings to float32: of the scale, of 1 / scale, and of its product with the number.
        torch.testing.assert_close(result[i, j].double(), expected, rtol=3 * 2**-24, atol=0)


@pytest.mark.parametrize("quantizer", ALL)
@pytest.mark.parametrize("amax", [1.0, 447.9, 448.0, 448.1, 2.0**-20, 3.5e-38, 3.0e38])
def test_the_largest_value_of_a_block_stays_in_range_and_is_used_well(quantizer, amax):
    x = torch.tensor([[amax, -amax / 3]])
    data = quantizer(x).data.double().abs().max()
    largest = numbers(quantizer.format).max()
    assert data <= largest
    smallest_scale_wins = quantizer.scale_rule == "float32"
    # Where 1 / amax leaves float32's range the scale is smaller than it could be.
    if 2.0**-100 < amax:
        assert data >= (largest if smallest_scale_wins else largest / 2) * (1 - 2**-4)


@pytest.mark.parametrize("quantizer", ALL)
def test_relative_error_is_that_of_the_mantissa(quantizer):
    x = matrix(seed=1)
    quantized = quantizer(x)
    scaled = quantized.data.double().abs()
    normal = scaled > torch.finfo(DTYPES[quantizer.format]).smallest_normal
    error = (quantized.dequantize().double() - x.double()).abs() / x.double().abs()
    half_unit = {"e4m3": 2**-4, "e5m2": 2**-3}[quantizer.format]  # 3 and 2 bits of mantissa
    worst = half_unit / (1 + half_unit)  # just above a power of two
    assert normal.double().mean() > 0.2  # values span many powers of two, most of them small
    assert 0.9 * worst < error[normal].max() <= worst * (1 + 1e-5)


@pytest.mark.parametrize("quantizer", ALL)
def test_blocks_of_zeros_nan_and_infinity(quantizer):
    x = matrix(4, 256)
    assert torch.equal(quantizer(torch.zeros(4, 256)).dequantize(), torch.zeros(4, 256))
    with_nan, with_zero = x.clone(), x.clone()
    with_nan[1, 5], with_zero[1, 5] = torch.nan, 0.0
    found = quantizer(with_nan).dequantize()
    assert found[1, 5].isnan() and torch.equal(found.nan_to_num(nan=0.0), quantizer(with_zero).dequantize())
    with_inf = torch.full((1, 128), 3.0)
    with_inf[0, 7] = -torch.inf
    result = quantizer(with_inf)
    assert result.inverse_scale.max() == 1 and result.dequantize()[0, 7] == -numbers(quantizer.format).max()
    assert (result.dequantize()[0, :7] == 3).all()


def test_a_scale_of_an_earlier_step_saturates():
    result = E4M3(torch.tensor([[1.0, 3.0, -5.0]]), amax=torch.tensor([[2.0]]))
    assert torch.equal(result.dequantize(), torch.tensor([[1.0, 2.0, -2.0]]))


def test_scales_of_microscaling_fit_8_bits():
    x = torch.cat([matrix(seed=2), torch.full((1, 200), 1e-38), torch.full((1, 200), 1e38)])
    inverse = MX(x).inverse_scale
    assert torch.equal(inverse.to(torch.float8_e8m0fnu).float(), inverse)
    assert not torch.equal(E4M3(x).inverse_scale.to(torch.float8_e8m0fnu).float(), E4M3(x).inverse_scale)
