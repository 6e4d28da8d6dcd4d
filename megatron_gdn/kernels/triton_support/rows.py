"""Rows of tensors with any leading strides: kernels over the last dimension read views without copying them."""

import triton
import triton.language as tl
from torch import Tensor


class Rows:
    """Where the rows of tensors of one shape `[..., D]` lie.

    Leading dimensions that are neighbours in all tensors are one; at most three are left.

    Attributes:
        tensors: the tensors, with D contiguous; copied only where it is not, or where four dimensions are left.
        num_rows: number of rows.
        sizes: of the second and third leading dimension.
        strides: for each tensor, of the three leading dimensions.
    """

    def __init__(self, *tensors: Tensor):
        self.tensors = [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]
        dims = self._merge()
        if len(dims) > 3:
            self.tensors = [x.contiguous() for x in tensors]
            dims = self._merge()
        self.num_rows = 1
        for size, _ in dims:
            self.num_rows *= size
        dims += [(1, (0,) * len(tensors))] * (3 - len(dims))
        self.sizes = tuple(size for size, _ in dims[1:])
        self.strides = [tuple(strides[i] for _, strides in dims) for i in range(len(tensors))]

    def _merge(self) -> list[tuple[int, tuple[int, ...]]]:
        """(size, strides by tensor) of the leading dimensions, outermost first."""
        dims = []
        for d, size in enumerate(self.tensors[0].shape[:-1]):
            strides = tuple(x.stride(d) for x in self.tensors)
            if size == 1:
                continue
            if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], strides, strict=True)):
                dims[-1] = (dims[-1][0] * size, strides)
            else:
                dims.append((size, strides))
        return dims


@triton.jit
def row_offsets(row, size_1, size_2, stride_0, stride_1, stride_2):
    """int64 offsets of rows; with sizes of 1, as in contiguous memory, the divisions vanish."""
    i_2 = row % size_2
    rest = row // size_2
    i_1 = rest % size_1
    i_0 = rest // size_1
    return i_0.to(tl.int64) * stride_0 + i_1.to(tl.int64) * stride_1 + i_2.to(tl.int64) * stride_2


@triton.jit
def mask_of(m_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask `[rows, BLOCK_D]` (`[rows, 1]` where BLOCK_D is D) of rows that exist and of columns below D."""
    if D == BLOCK_D:
        return m_row[:, None]
    else:
        return m_row[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]


MAX_PROGRAMS = 1024
"""Programs of a kernel that sums over rows: about what 132 multiprocessors hold at once. Fixed, so that sums do not
depend on the device."""


def split_rows(num_rows: int, block: int) -> tuple[int, int]:
    """(programs, blocks of rows that each program takes one after the other)."""
    blocks = triton.cdiv(num_rows, block)
    steps = max(1, triton.cdiv(blocks, MAX_PROGRAMS))
    return triton.cdiv(blocks, steps), steps
