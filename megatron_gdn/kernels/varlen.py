"""Where the chunks of a batch lie: a table built once from the lengths of its sequences.

Chunks are numbered step by step: first the first chunk of every sequence, then the second chunk of every sequence that
has one, with the longest sequences in front. The chunks of a step are then neighbours, and so are their states: the
sequences that are still running are always the first ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_SIZE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Neighbouring chunks that are computed together: whole steps, or a part of one step.

    chunks: their numbers in the table.
    steps: their steps.
    positions: their places within a step; a late step may have fewer.
    parts: for each step, its chunks counted from the block's first, and their places within the step.
    """

    chunks: slice
    steps: slice
    positions: slice
    parts: list[tuple[slice, slice]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTable:
    """Chunks of sequences whose tokens lie one after the other; build it with `prepare_chunk_table`.

    lengths: tokens of each of the N sequences.
    bounds: `[N + 1]` int64, where each sequence starts and ends. None in a selection, whose sequences lie apart.
    order: `[N]` int64, sequences by falling number of chunks.
    num_active: number of sequences that have a chunk at each step.
    tokens: `[num_tokens]` int64, tokens in the order of the rows that hold them. None where all sequences have one
        length of whole chunks: their chunks are views.
    rows: `[num_tokens]` int64, the rows that hold these tokens, rising; chunk c has rows 64 c to 64 c + 63. None with
        tokens.
    first: number of tokens before each chunk and at the end, in the order of `tokens`.

    Triton kernels number the chunks sequence by sequence instead, so that a program runs through neighbours:

    first_chunk: `[N + 1]` int32, number of chunks before each sequence, and of all.
    chunk_bounds: `[num_chunks, 2]` int32, first token of each chunk and the one after its last.
    chunk_sequence: `[num_chunks]` int32, its sequence.
    """

    lengths: list[int]
    bounds: Tensor | None
    order: Tensor
    num_active: list[int]
    tokens: Tensor | None
    rows: Tensor | None
    first: list[int]
    first_chunk: Tensor
    chunk_bounds: Tensor
    chunk_sequence: Tensor

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_chunks(self) -> int:
        return sum(self.num_active)

    @property
    def whole(self) -> Block:
        """All chunks in one block, to read and write."""
        steps, positions = slice(0, len(self.num_active)), slice(0, len(self.lengths))
        return Block(chunks=slice(0, self.num_chunks), steps=steps, positions=positions, parts=[])

    def blocks(self, max_chunks: int) -> list[Block]:
        """All chunks in blocks of at most `max_chunks`."""
        blocks, start, step = [], 0, 0
        while step < len(self.num_active):
            widest = self.num_active[step]
            if widest > max_chunks:
                for low in range(0, widest, max_chunks):
                    high = min(low + max_chunks, widest)
                    blocks.append(
                        Block(
                            chunks=slice(start + low, start + high),
                            steps=slice(step, step + 1),
                            positions=slice(low, high),
                            parts=[(slice(0, high - low), slice(low, high))],
                        )
                    )
                start, step = start + widest, step + 1
                continue
            parts, size, first_step = [], 0, step
            while step < len(self.num_active) and size + self.num_active[step] <= max_chunks:
                active = self.num_active[step]
                parts.append((slice(size, size + active), slice(0, active)))
                size, step = size + active, step + 1
            blocks.append(
                Block(
                    chunks=slice(start, start + size),
                    steps=slice(first_step, step),
                    positions=slice(0, widest),
                    parts=parts,
                )
            )
            start += size
        return blocks

    def _as_chunks(self, x: Tensor, block: Block) -> Tensor:
        """The block's part of `[num_tokens, ...]` as a view `[steps, positions, 64, ...]`."""
        chunks = x.unflatten(0, (len(self.lengths), len(self.num_active), CHUNK_SIZE)).transpose(0, 1)
        return chunks[block.steps, block.positions]

    def _index(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """Tokens of the block, and their rows counted from its first; None where they fill all rows."""
        start, end = self.first[block.chunks.start], self.first[block.chunks.stop]
        full = end - start == (block.chunks.stop - block.chunks.start) * CHUNK_SIZE
        return self.tokens[start:end], None if full else self.rows[start:end] - block.chunks.start * CHUNK_SIZE

    def read(self, x: Tensor, block: Block) -> Tensor:
        """The block's chunks of `[num_tokens, ...]`: `[..., 64, ...]`, 0 in rows without a token; may be a view."""
        if self.tokens is None:
            return self._as_chunks(x, block)
        tokens, rows = self._index(block)
        found = x.index_select(0, tokens)
        if rows is None:
            return found.unflatten(0, (-1, CHUNK_SIZE))
        num_rows = (block.chunks.stop - block.chunks.start) * CHUNK_SIZE
        chunks = x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, found)
        return chunks.unflatten(0, (-1, CHUNK_SIZE))

    def write(self, x: Tensor, block: Block, chunks: Tensor) -> None:
        """Chunks `[M, 64, ...]` of the block into `[num_tokens, ...]`, the inverse of `read`; converts the dtype."""
        if self.tokens is None:
            target = self._as_chunks(x, block)
            target.copy_(chunks.unflatten(0, target.shape[:2]))
            return
        tokens, rows = self._index(block)
        found = chunks.to(x.dtype).flatten(0, 1)
        x.index_copy_(0, tokens, found if rows is None else found.index_select(0, rows))

    def select(self, sequences: list[int]) -> "ChunkTable":
        """The table of some sequences, in the given order; their tokens stay where they are in the batch."""
        if sequences == list(range(len(self.lengths))):
            return self
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        return _build(lengths[sequences], starts[sequences], self.order.device)

    def document_of_tokens(self) -> Tensor:
        """`[num_tokens]` int64, the sequence of each token."""
        numbers = torch.arange(len(self.lengths), device=self.bounds.device)
        return torch.repeat_interleave(numbers, self.bounds.diff(), output_size=self.num_tokens)


def prepare_chunk_table(cu_seqlens: Tensor, *, device: torch.device | str | None = None) -> ChunkTable:
    """The table of a packed batch, to build once and pass as `cu_seqlens` to every kernel of every layer.

    Args:
        cu_seqlens: `[N + 1]` integers, the bounds of N documents: 0 first, never falling, the number of tokens last.
            Reading it waits for its device.
        device: where the kernels run; None: that of cu_seqlens.

    Raises:
        ValueError: bounds that are not a vector of integers, do not start at 0, or fall.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens ({cu_seqlens.dtype}, {list(cu_seqlens.shape)}) must be a vector of int32 or int64: pass the "
            "N + 1 bounds of N documents."
        )
    bounds = cu_seqlens.detach().to("cpu", torch.int64)
    lengths = bounds.diff()
    if int(bounds[0]) != 0 or int(lengths.min()) < 0:
        shown = bounds.tolist()
        shown = shown if len(shown) < 9 else [*shown[:4], "...", *shown[-4:]]
        raise ValueError(f"cu_seqlens ({shown}) must start at 0 and never fall: pass the bounds of the documents.")
    return _build(lengths, bounds, cu_seqlens.device if device is None else torch.device(device))


def _build(lengths: Tensor, bounds: Tensor, device: torch.device) -> ChunkTable:
    """The table of sequences with the given lengths `[N]`, both int64 on the CPU.

    Args:
        bounds: where they start and the last one ends, `[N + 1]`; or only where they start, `[N]`, for a selection.
    """
    selection = len(bounds) == len(lengths)
    num_chunks = (lengths + CHUNK_SIZE - 1) // CHUNK_SIZE
    order = num_chunks.argsort(descending=True, stable=True)
    num_steps = int(num_chunks.max())
    ended = torch.searchsorted(num_chunks.sort().values, torch.arange(num_steps), right=True)
    num_active = len(lengths) - ended
    total = int(num_active.sum())
    first, tokens, rows = torch.arange(total + 1) * CHUNK_SIZE, None, None
    if selection or int(lengths.min()) != int(lengths.max()) or int(lengths[0]) % CHUNK_SIZE:
        step = torch.arange(num_steps).repeat_interleave(num_active)
        position = torch.arange(total) - (num_active.cumsum(0) - num_active)[step]
        sequence = order[position]
        size = (lengths[sequence] - step * CHUNK_SIZE).clamp(max=CHUNK_SIZE)
        first = torch.cat([size.new_zeros(1), size.cumsum(0)])
        offset = torch.arange(int(first[-1])) - first[:-1].repeat_interleave(size)
        tokens = (bounds[sequence] + step * CHUNK_SIZE).repeat_interleave(size) + offset
        rows = (torch.arange(total) * CHUNK_SIZE).repeat_interleave(size) + offset
    first_chunk = torch.cat([num_chunks.new_zeros(1), num_chunks.cumsum(0)])
    chunk_sequence = torch.arange(len(lengths)).repeat_interleave(num_chunks)
    start = bounds[chunk_sequence] + (torch.arange(total) - first_chunk[chunk_sequence]) * CHUNK_SIZE
    ends = (bounds[: len(lengths)] + lengths)[chunk_sequence]
    chunk_bounds = torch.stack([start, torch.minimum(start + CHUNK_SIZE, ends)], 1)
    by_sequence = dict(first_chunk=first_chunk, chunk_bounds=chunk_bounds, chunk_sequence=chunk_sequence)
    return ChunkTable(
        **{name: x.to(torch.int32).to(device, non_blocking=True) for name, x in by_sequence.items()},
        lengths=lengths.tolist(),
        bounds=None if selection else bounds.to(device, non_blocking=True),
        order=order.to(device, non_blocking=True),
        num_active=num_active.tolist(),
        tokens=tokens if tokens is None else tokens.to(device, non_blocking=True),
        rows=rows if rows is None else rows.to(device, non_blocking=True),
        first=first.tolist(),
    )


def table_of_batch(x: Tensor, cu_seqlens: Tensor | ChunkTable | None) -> ChunkTable:
    """The table of a batch `[B, T, ...]`.

    Args:
        x: for B, T and the device.
        cu_seqlens: bounds of documents packed in B = 1, or their table; None: B sequences of T tokens.

    Raises:
        ValueError: packed documents with B > 1, bounds that do not end at T, a table on another device.
    """
    batch, num_tokens = x.shape[:2]
    if cu_seqlens is None:
        lengths = torch.full((batch,), num_tokens)
        return _build(lengths, torch.arange(batch + 1) * num_tokens, x.device)
    if batch != 1:
        raise ValueError(f"batch ({batch}) must be 1 with cu_seqlens: pack all documents into one row.")
    table = cu_seqlens if isinstance(cu_seqlens, ChunkTable) else prepare_chunk_table(cu_seqlens, device=x.device)
    if table.num_tokens != num_tokens:
        raise ValueError(
            f"cu_seqlens (ends at {table.num_tokens}) must end at the number of tokens ({num_tokens}): "
            "pass the bounds of all documents, padding included."
        )
    if table.order.device != x.device:
        raise ValueError(
            f"cu_seqlens (a table on {table.order.device}) must be on the device of the inputs ({x.device}): "
            f"build it with prepare_chunk_table(..., device='{x.device}')."
        )
    return table
