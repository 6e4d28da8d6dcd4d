"""Where the sequences of a table of chunks lie, for kernels that go through one chunk after chunk."""

import triton
import triton.language as tl


@triton.jit
def locate_sequence(i_n, first_chunk, chunk_bounds, num_tokens):
    """First chunk and number of chunks of a sequence, row of the batch it lies in, its first token there, its length.

    A sequence lies in one row, so that only its first token and its end are looked up. Row and token are int64.
    """
    first, last = tl.load(first_chunk + i_n), tl.load(first_chunk + i_n + 1)
    start = tl.load(chunk_bounds + 2 * first, mask=first < last, other=0)
    end = tl.load(chunk_bounds + 2 * last - 1, mask=first < last, other=0)
    return first, last - first, (start // num_tokens).to(tl.int64), (start % num_tokens).to(tl.int64), end - start
