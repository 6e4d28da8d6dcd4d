"""Tiles of matrices in memory, masked only where some of their rows or columns may not exist."""

import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.triton_support.language import store


def with_unit_stride(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is not contiguous; the kernels take the other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def load_tile(base, o_row, o_col, stride, num_rows, NUM_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows o_row, columns o_col of a matrix with `stride` between rows; ROWS, COLS: whether some may lie outside."""
    p_tile = base + o_row[:, None] * stride + o_col[None, :]
    if ROWS and COLS:
        return tl.load(p_tile, mask=(o_row < num_rows)[:, None] & (o_col < NUM_COLS)[None, :], other=0.0)
    elif ROWS:
        return tl.load(p_tile, mask=(o_row < num_rows)[:, None], other=0.0)
    elif COLS:
        return tl.load(p_tile, mask=(o_col < NUM_COLS)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def store_tile(base, x, o_row, o_col, stride, num_rows, NUM_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where `load_tile` reads, x in the dtype of the memory."""
    p_tile = base + o_row[:, None] * stride + o_col[None, :]
    if ROWS and COLS:
        store(p_tile, x, mask=(o_row < num_rows)[:, None] & (o_col < NUM_COLS)[None, :])
    elif ROWS:
        store(p_tile, x, mask=(o_row < num_rows)[:, None])
    elif COLS:
        store(p_tile, x, mask=(o_col < NUM_COLS)[None, :])
    else:
        store(p_tile, x)
