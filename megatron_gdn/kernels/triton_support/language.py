"""Dots, roundings and stores that mean the same in Triton's interpreter and on a GPU.

The interpreter keeps bfloat16 as its bit pattern: arithmetic on it is wrong without an error, and a cast from float32
truncates. So kernels never compute with 16-bit values: what is loaded is widened at once with `.to(tl.float32)` or goes
straight into `dot`, and what is stored goes through `store`.

On Hopper, Triton 3.4 to 3.7.0 miscompiles a dot whose operand is the transpose of another dot's result (fla issue 640).
Kernels here transpose only what they load; a transposed product is computed as one, (A B)^T = B^T A^T.
"""

import triton
import triton.language as tl


@triton.jit
def _probe():
    pass


INTERPRETED = not isinstance(_probe, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when Triton was imported."""

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """float32 values rounded to the nearest of DTYPE, ties to even; still float32."""
    wide = x.to(tl.float32)
    if DTYPE == tl.bfloat16:
        bits = wide.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        return wide.to(tl.float16).to(tl.float32)
    else:
        return wide


@triton.jit
def dot(a, b, DTYPE: tl.constexpr):
    """a b with both rounded to DTYPE, accumulated in float32; float32 itself is three times tf32 on tensor cores."""
    if _INTERPRETED:
        return tl.dot(round_to(a, DTYPE), round_to(b, DTYPE), input_precision="ieee")
    elif DTYPE == tl.float32:
        return dot_float32(a.to(tl.float32), b.to(tl.float32), "tf32x3")
    else:
        return tl.dot(a.to(DTYPE), b.to(DTYPE))


@triton.jit
def dot_float32(a, b, PRECISION: tl.constexpr):
    """a b of float32 operands, PRECISION on tensor cores."""
    if _INTERPRETED:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def store(pointers, x, mask=None):
    """Store float32 values in the dtype of the memory, rounded to nearest."""
    DTYPE: tl.constexpr = pointers.dtype.scalar.element_ty
    if _INTERPRETED:
        tl.store(pointers, round_to(x, DTYPE).to(DTYPE), mask=mask)
    else:
        tl.store(pointers, x.to(DTYPE), mask=mask)
