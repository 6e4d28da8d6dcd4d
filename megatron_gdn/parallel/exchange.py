"""What context-parallel ranks send each other: rows before a fragment, all rows, heads, states.

Activations are `[s, b, ...]`, Megatron's order, so that rows lie together. Each exchange is one collective, so no rank
waits for a partner in a pattern of its own: rows of neighbours travel in an all-to-all whose other parts are empty,
which NCCL sends point to point. Where nothing crosses a fragment's edge the ranks know it from the documents alone, and
nothing is sent.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.parallel.fragments import Fragments


class _Pending:
    """A collective under way, with the memory that it reads and writes."""

    def start(self, received: Tensor, sent: Tensor, received_rows: list[int], sent_rows: list[int], group) -> None:
        """An all-to-all of rows."""
        self.received, self.sent = received, sent
        self.work = dist.all_to_all_single(received, sent, received_rows, sent_rows, group=group, async_op=True)

    def finish(self) -> Tensor:
        """Wait; on CUDA the current stream waits, not the host."""
        self.work.wait()
        self.sent = self.work = None
        return self.received


class RowPlan:
    """Which rows before its fragments a rank takes from whom.

    Args:
        fragments: of the batch.
        reach: rows before its first token that a fragment reads; fewer where its document starts later.
    """

    def __init__(self, fragments: Fragments, reach: int):
        self.fragments, self.length, self.most = fragments, fragments.length, reach
        owned, others = fragments.owned, range(fragments.size)
        sent = [{} for _ in others]
        for f in owned:
            last = f + -(-reach // self.length)
            for reader in range(f + 1, min(last + 1, fragments.num_fragments)):
                rank, _ = fragments.place_of(reader)
                count = dict(self.sources(reader)).get(f, 0)
                if rank != fragments.rank and count:
                    sent[rank][f] = max(sent[rank].get(f, 0), count)
        received = [{} for _ in others]
        for reader in owned:
            for f, count in self.sources(reader):
                if f not in owned:
                    rank, _ = fragments.place_of(f)
                    received[rank][f] = max(received[rank].get(f, 0), count)
        # Both sides in the order in which the owner holds its fragments.
        self.sent = [[(f, rows[f]) for f in owned if f in rows] for rows in sent]
        """For each rank, (own fragment, number of its last rows) that it gets."""
        self.received = [[(f, rows[f]) for f in fragments.owned_by(r) if f in rows] for r, rows in enumerate(received)]
        """For each rank, (its fragment, number of its last rows) that it sends."""

    def sources(self, fragment: int) -> list[tuple[int, int]]:
        """(fragment, number of its last rows) that lie within reach of a fragment, in the sequence's order."""
        length = self.length
        reach = min(self.most, fragment * length - self.fragments.document_starts[fragment])
        first = fragment - -(-reach // length)
        return [(f, min(length, reach - (fragment - 1 - f) * length)) for f in range(first, fragment)]

    @staticmethod
    def counts(parts: list[list[tuple[int, int]]]) -> list[int]:
        """Rows of each rank."""
        return [sum(count for _, count in part) for part in parts]


class _StartRows(torch.autograd.Function):
    """Rows `[s, b, ...]` to the rows received; the gradient of what was sent comes back and is added."""

    @staticmethod
    def forward(ctx, x, plan: RowPlan, forward: _Pending, backward: _Pending):
        ctx.plan, ctx.backward_pending, ctx.shape = plan, backward, x.shape
        owned, length = plan.fragments.owned, plan.length
        ctx.slices = []
        for part in plan.sent:
            for fragment, count in part:
                end = (owned.index(fragment) + 1) * length
                ctx.slices.append(slice(end - count, end))
        sent_rows, received_rows = plan.counts(plan.sent), plan.counts(plan.received)
        sent = torch.cat([x[rows] for rows in ctx.slices]) if ctx.slices else x.new_empty(0, *x.shape[1:])
        received = x.new_empty(sum(received_rows), *x.shape[1:])
        forward.start(received, sent, received_rows, sent_rows, plan.fragments.group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        returned, dx = ctx.backward_pending.finish(), None
        if ctx.slices:
            dx = returned.new_zeros(ctx.shape)
            # A row may go to several ranks; the order of the sums is fixed.
            sizes = [rows.stop - rows.start for rows in ctx.slices]
            for rows, part in zip(ctx.slices, returned.split(sizes), strict=True):
                dx[rows] += part
        return dx, None, None, None


class _WaitRows(torch.autograd.Function):
    """The rows once they are there; backward starts their gradients on the way back."""

    @staticmethod
    def forward(ctx, received, plan: RowPlan, forward: _Pending, backward: _Pending):
        ctx.plan, ctx.backward_pending = plan, backward
        return forward.finish().view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx, dreceived):
        plan, dreceived = ctx.plan, dreceived.contiguous()
        sent_rows, received_rows = plan.counts(plan.sent), plan.counts(plan.received)
        returned = dreceived.new_empty(sum(sent_rows), *dreceived.shape[1:])
        ctx.backward_pending.start(returned, dreceived, sent_rows, received_rows, plan.fragments.group)
        return dreceived, None, None, None


class PendingRows:
    """Rows before each fragment, under way from `start_rows`."""

    def __init__(self, x: Tensor, plan: RowPlan):
        self.x, self.plan = x, plan
        self.pending = _Pending(), _Pending()
        self.received = _StartRows.apply(x, plan, *self.pending)

    def wait(self) -> list[Tensor]:
        """For each owned fragment the rows before it, `[up to reach, b, ...]`, oldest first; differentiable."""
        plan, owned = self.plan, self.plan.fragments.owned
        received = _WaitRows.apply(self.received, plan, *self.pending)
        found, start = {}, 0
        for part in plan.received:
            for fragment, count in part:
                found[fragment] = received[start : start + count]
                start += count
        for place, fragment in enumerate(owned):
            found[fragment] = self.x[place * plan.length : (place + 1) * plan.length]
        rows = []
        for fragment in owned:
            # Also where nothing is received: every rank's backward pass takes part in the exchange.
            rows.append(torch.cat([received[:0], *(found[f][-count:] for f, count in plan.sources(fragment))]))
        return rows


def start_rows(x: Tensor, fragments: Fragments, reach: int) -> PendingRows:
    """Start to fetch the rows before each fragment, as far as `reach` and the start of its document.

    Gradients travel back likewise: started where the rows were waited for, awaited where they were asked for, so that
    what is computed in between hides them in both directions.

    Args:
        x: `[s, b, ...]`, this rank's rows.
        fragments: of the batch; `crossed`, else there is nothing to fetch.
        reach: rows.
    """
    return PendingRows(x, RowPlan(fragments, reach))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fragments: Fragments):
        ctx.fragments = fragments
        whole = x.new_empty(fragments.num_tokens, *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous(), group=fragments.group)
        return fragments.reorder(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx, dwhole):
        fragments = ctx.fragments
        dx = dwhole.new_empty(fragments.num_local_tokens, *dwhole.shape[1:])
        dist.reduce_scatter_tensor(dx, fragments.reorder(dwhole, inverse=True).contiguous(), group=fragments.group)
        return dx, None


def gather_rows(x: Tensor, fragments: Fragments) -> Tensor:
    """All rows in the sequence's order, `[T, b, ...]`; the gradients of all ranks are summed in their dtype.

    Args:
        x: `[s, b, ...]`, this rank's rows.
        fragments: of the batch.
    """
    return _GatherRows.apply(x, fragments)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        found = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(found, x.contiguous(), group=group)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, dfound):
        return _AllToAll.apply(dfound, ctx.group), None


def tokens_to_heads(x: Tensor, fragments: Fragments) -> Tensor:
    """From all heads of this rank's tokens to this rank's heads of all tokens; differentiable.

    Args:
        x: `[s, b, R, n]`, what belongs to the heads of each rank.
        fragments: of the batch.

    Returns:
        `[T, b, n]`, in the sequence's order.
    """
    return fragments.reorder(_AllToAll.apply(x.movedim(2, 0), fragments.group).flatten(0, 1))


def heads_to_tokens(x: Tensor, fragments: Fragments) -> Tensor:
    """The inverse of `tokens_to_heads`: `[T, b, n]` to `[s, b, R, n]`."""
    by_rank = fragments.reorder(x, inverse=True).unflatten(0, (fragments.size, -1))
    return _AllToAll.apply(by_rank, fragments.group).movedim(0, 2)


def start_gather(x: Tensor, fragments: Fragments):
    """Start to gather what each rank has per fragment; not differentiable.

    Args:
        x: `[fragments of a rank, ...]`.

    Returns:
        A function that waits and returns `[fragments of all ranks, ...]` in the sequence's order.
    """
    x = x.contiguous()
    found = x.new_empty(fragments.num_fragments, *x.shape[1:])
    work = dist.all_gather_into_tensor(found, x, group=fragments.group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        order = fragments.gathered_order
        return found if order == sorted(order) else torch.stack([found[place] for place in order])

    return wait


def shift(x: Tensor, fragments: Fragments, by: int) -> tuple[Tensor, list[int]]:
    """What fragments `by` places earlier have; not differentiable.

    Args:
        x: `[fragments of a rank, ...]`.
        fragments: of the batch.
        by: places, negative for later fragments.

    Returns:
        A tensor like x, and the places in it that hold something: the others' source lies outside of the sequence.
    """
    inside = range(fragments.num_fragments)
    owned = fragments.owned
    # Both sides sort by the other's rank, then by the source's place.
    sends = sorted((fragments.place_of(f + by)[0], place) for place, f in enumerate(owned) if f + by in inside)
    receives = sorted((*fragments.place_of(f - by), place) for place, f in enumerate(owned) if f - by in inside)
    sent_rows, received_rows = [0] * fragments.size, [0] * fragments.size
    for rank, _ in sends:
        sent_rows[rank] += 1
    for rank, *_ in receives:
        received_rows[rank] += 1
    received = x.new_empty(len(receives), *x.shape[1:])
    sent = torch.stack([x[place] for _, place in sends]) if sends else x[:0]
    dist.all_to_all_single(received, sent, received_rows, sent_rows, group=fragments.group)
    found, places = torch.zeros_like(x), [place for *_, place in receives]
    for place, row in zip(places, received, strict=True):
        found[place] = row
    return found, places
