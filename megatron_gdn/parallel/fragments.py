"""Who owns which tokens of a sequence under context parallelism, and where documents start: one object per batch.

A sequence of T tokens is cut into fragments of one length, numbered in its order. Rank r of R owns

    contiguous   R fragments     fragment r
    zigzag       2 R fragments   fragments r and 2 R - 1 - r (Megatron's: under a causal mask all ranks have equal work)

and holds them one after the other: a local batch is `[b, T / R, ...]`. Packed documents lie in one row, b = 1, and end
anywhere; a *piece* is the part of a document that lies in one fragment. Kernels treat pieces as their sequences, and
those at the start of a fragment take over from the rank that owns the fragment before.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gdn.kernels.varlen import ChunkTable, prepare_chunk_table

LAYOUTS = {"contiguous": 1, "zigzag": 2}
"""Layouts, and the fragments of a rank."""


def check_fragments(
    num_tokens: int, *, layout: str, size: int, conv_width: int | None = None, window: int | None = None
) -> None:
    """Raise ValueError for a sequence that cannot be divided this way; needs no process group.

    Args:
        num_tokens: of the whole sequence.
        layout: "contiguous" or "zigzag".
        size: context-parallel ranks.
        conv_width: of a short convolution, tokens; a fragment holds the conv_width - 1 that the next one needs.
        window: of sliding-window attention, tokens.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout ({layout}) must be 'contiguous' or 'zigzag': Megatron's batches are zigzag.")
    count = _num_fragments(layout, size)
    if num_tokens < 1 or num_tokens % count:
        raise ValueError(
            f"sequence length ({num_tokens}) must be a positive multiple of the {count} fragments of {size} "
            f"context-parallel ranks, layout {layout}: use {max(1, -(-num_tokens // count)) * count} tokens, or fewer "
            "ranks."
        )
    length = num_tokens // count
    if size == 1:
        return
    if conv_width is not None and length < conv_width - 1:
        raise ValueError(
            f"fragment length ({num_tokens} tokens / {count} fragments = {length}) must be at least the convolution's "
            f"width - 1 ({conv_width - 1}): use {count * (conv_width - 1)} tokens or more, or fewer ranks."
        )
    if window is not None and window > num_tokens:
        raise ValueError(
            f"window ({window}) must not exceed the sequence ({num_tokens} tokens) under context parallelism: "
            "use full attention, a smaller window or a longer sequence."
        )


def _num_fragments(layout: str, size: int) -> int:
    """Of all ranks; one rank does not cut its sequence."""
    return 1 if size == 1 else LAYOUTS[layout] * size


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fragments:
    """The fragments of one batch as a rank sees them; build it with `prepare_fragments`.

    num_tokens: T of the whole sequence.
    layout: "contiguous" or "zigzag"; with one rank contiguous.
    rank, size: in the context-parallel group.
    group: that group; None with one rank.
    bounds: where documents start, and T at the end; no document is empty. [0, T] without packing.
    packed: whether cu_seqlens were given; the batch then is one row.
    document_starts: for each fragment, the first token of the document that its first token belongs to.
    table: chunks of this rank's pieces, fragment after fragment; None without packing, where each row of each fragment
        is a sequence (`fold`).
    first_piece, last_piece: for each owned fragment, its outer pieces, numbered as in the table; None without packing.
    positions: `[T / R]` int64, place of each local token in its document, for rotary embeddings.
    """

    num_tokens: int
    layout: str
    rank: int
    size: int
    group: dist.ProcessGroup | None
    bounds: list[int]
    packed: bool
    document_starts: list[int]
    table: ChunkTable | None
    first_piece: list[int] | None
    last_piece: list[int] | None
    positions: Tensor

    @property
    def num_fragments(self) -> int:
        """Of all ranks."""
        return _num_fragments(self.layout, self.size)

    @property
    def length(self) -> int:
        """Tokens of a fragment."""
        return self.num_tokens // self.num_fragments

    @property
    def num_local_tokens(self) -> int:
        """T / R."""
        return self.num_tokens // self.size

    @property
    def owned(self) -> list[int]:
        """Numbers of this rank's fragments, in the order in which it holds them."""
        return self.owned_by(self.rank)

    @property
    def device(self) -> torch.device:
        """Of the table and the positions."""
        return self.positions.device

    def owned_by(self, rank: int) -> list[int]:
        """Numbers of a rank's fragments, in the order in which it holds them."""
        return [rank, 2 * self.size - 1 - rank][: LAYOUTS[self.layout]]

    def place_of(self, fragment: int) -> tuple[int, int]:
        """The rank that owns a fragment, and its place among that rank's."""
        return (fragment, 0) if fragment < self.size else (2 * self.size - 1 - fragment, 1)

    @property
    def gathered_order(self) -> list[int]:
        """For each fragment in the sequence's order, its place in a gathered `[R, fragments of a rank]`, counted."""
        per_rank = LAYOUTS[self.layout]
        return [rank * per_rank + place for rank, place in map(self.place_of, range(self.num_fragments))]

    def range_of(self, fragment: int) -> tuple[int, int]:
        """Global first token of a fragment and the one after its last."""
        return fragment * self.length, (fragment + 1) * self.length

    @property
    def token_ranges(self) -> list[tuple[int, int]]:
        """Global ranges of this rank's tokens, in the order in which it holds them."""
        return [self.range_of(fragment) for fragment in self.owned]

    def starts_document(self, fragment: int) -> bool:
        """Whether a fragment's first token is the first of a document: nothing then comes from the fragment before."""
        return self.document_starts[fragment] == fragment * self.length

    def passes_on(self, fragment: int) -> bool:
        """Whether a document runs on from a fragment into the next one."""
        return fragment + 1 < self.num_fragments and not self.starts_document(fragment + 1)

    def is_reset(self, fragment: int) -> bool:
        """Whether a document starts in a fragment, at its first token or later: its last state is then its own."""
        start, end = self.range_of(fragment)
        return any(start <= bound < end for bound in self.bounds[:-1])

    @property
    def crossed(self) -> bool:
        """Whether any document lies in two fragments, so that ranks have something to exchange."""
        return any(self.passes_on(fragment) for fragment in range(self.num_fragments))

    def piece_lengths(self, place: int) -> list[int] | None:
        """Tokens of the pieces of the owned fragment at a place; None without packing."""
        if not self.packed:
            return None
        return self.table.lengths[self.first_piece[place] : self.last_piece[place] + 1]

    def local(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a global tensor (tokens, labels, loss masks, activations).

        Args:
            x: T tokens in dimension `dim`.

        Returns:
            T / R tokens there, new memory unless the layout is contiguous.

        Raises:
            ValueError: another number of tokens.
        """
        if x.shape[dim] != self.num_tokens:
            raise ValueError(
                f"tokens in dimension {dim} ({x.shape[dim]}) must be those of the whole sequence ({self.num_tokens}): "
                "cut the batch once, and build the fragments for its length."
            )
        parts = [x.narrow(dim, start, end - start) for start, end in self.token_ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: list[Tensor], dim: int = 1) -> Tensor:
        """The global tensor from every rank's local one, in the order of the ranks; the inverse of `local`."""
        cut = [piece for part in parts for piece in part.split(self.length, dim)]
        return torch.cat([cut[place] for place in self.gathered_order], dim)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The global tensor on every rank of the group, for logs and tests; not differentiable.

        Args:
            x: this rank's T / R tokens in dimension `dim`.
        """
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return self.join(parts, dim)

    def reorder(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """All T tokens, in dimension 0, from the order of the ranks into that of the sequence, or back."""
        order = self.gathered_order
        if order == sorted(order):
            return x
        if inverse:
            order = [fragment for rank in range(self.size) for fragment in self.owned_by(rank)]
        parts = x.split(self.length)
        return torch.cat([parts[place] for place in order])

    def fold(self, x: Tensor) -> Tensor:
        """A local batch as the kernels take it: `[1, T / R, ...]` when packed, else `[b fragments, length, ...]`."""
        return x if self.packed else x.unflatten(1, (-1, self.length)).flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        return x if self.packed else x.unflatten(0, (-1, LAYOUTS[self.layout])).flatten(1, 2)

    def check(self, x: Tensor, name: str, dim: int = 1) -> None:
        """Raise ValueError unless a tensor `[b, s, ...]` is a local batch of these fragments."""
        if x.shape[dim] != self.num_local_tokens:
            raise ValueError(
                f"{name} ({x.shape[dim]} tokens) must hold this rank's {self.num_local_tokens} of {self.num_tokens} "
                f"tokens, {self.size} context-parallel ranks: cut the batch with Fragments.local."
            )
        if self.packed and x.shape[1 - dim] != 1:
            raise ValueError(f"batch ({x.shape[1 - dim]}) must be 1 with packed documents: put them into one row.")


def prepare_fragments(
    num_tokens: int,
    *,
    layout: str = "contiguous",
    group: dist.ProcessGroup | None = None,
    rank: int | None = None,
    size: int | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Fragments:
    """The fragments of a batch, to build once and hand to every layer.

    Args:
        num_tokens: T of the whole sequence.
        layout: "contiguous" or "zigzag".
        group: context-parallel process group; None: one rank, or rank and size tell which (nothing can be exchanged).
        rank, size: of the group; None: as the group says.
        cu_seqlens: `[N + 1]` int32 or int64, global bounds of the documents packed in one row, empty ones allowed;
            reading them waits for their device. None: each row of the batch is one document.
        device: where the kernels run; None: that of cu_seqlens, or the CPU.

    Raises:
        ValueError: see `check_fragments`; bounds that do not start at 0, fall, or do not end at num_tokens.
    """
    if group is not None:
        rank, size = group.rank(), group.size()
    rank, size = rank or 0, size or 1
    check_fragments(num_tokens, layout=layout, size=size)
    layout = "contiguous" if size == 1 else layout
    if device is None:
        device = "cpu" if cu_seqlens is None else cu_seqlens.device
    bounds = [0, num_tokens]
    if cu_seqlens is not None:
        documents = prepare_chunk_table(cu_seqlens, device="cpu")
        if documents.num_tokens != num_tokens:
            raise ValueError(
                f"cu_seqlens (ends at {documents.num_tokens}) must end at the whole sequence ({num_tokens} tokens): "
                "pass global bounds, of the documents of all ranks, padding included."
            )
        bounds = torch.unique_consecutive(documents.bounds).tolist()
    count = LAYOUTS[layout] * size
    length = num_tokens // count
    starts = torch.tensor(bounds[:-1])
    fragment_starts = torch.arange(count) * length
    document_starts = starts[torch.searchsorted(starts, fragment_starts, right=True) - 1]
    owned = [rank, 2 * size - 1 - rank][: LAYOUTS[layout]]
    tokens = torch.cat([torch.arange(f * length, (f + 1) * length) for f in owned])
    positions = tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1]
    table = first_piece = last_piece = None
    if cu_seqlens is not None:
        lengths, first_piece, last_piece = [], [], []
        for f in owned:
            start, end = f * length, (f + 1) * length
            cuts = [start, *(bound for bound in bounds if start < bound < end), end]
            first_piece.append(len(lengths))
            lengths += [high - low for low, high in zip(cuts, cuts[1:], strict=False)]
            last_piece.append(len(lengths) - 1)
        table = prepare_chunk_table(torch.tensor([0, *lengths]).cumsum(0), device=device)
    return Fragments(
        num_tokens=num_tokens,
        layout=layout,
        rank=rank,
        size=size,
        group=group if size > 1 else None,
        bounds=bounds,
        packed=cu_seqlens is not None,
        document_starts=document_starts.tolist(),
        table=table,
        first_piece=first_piece,
        last_piece=last_piece,
        positions=positions.to(device, non_blocking=True),
    )
