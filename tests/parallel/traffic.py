"""Bytes that a rank really sends, counted by wrapping torch.distributed's collectives."""

import functools
from collections import Counter
from contextlib import contextmanager

import torch.distributed as dist


def _all_gather(found, x, *, group=None, **_):
    return (dist.get_world_size(group) - 1) * x.nbytes


def _reduce_scatter(found, x, *, group=None, **_):
    return x.nbytes - found.nbytes


def _all_to_all(found, x, received=None, sent=None, *, group=None, **_):
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    sent = sent or [len(x) // ranks] * ranks
    return sum(rows for rank, rows in enumerate(sent) if rank != own) * (x[0].nbytes if len(x) else 0)


def _all_reduce(x, *, group=None, **_):
    ranks = dist.get_world_size(group)
    return 2 * (ranks - 1) * x.nbytes // ranks


_SENT = {
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all,
    "all_reduce": _all_reduce,
}


@contextmanager
def counted_traffic():
    """Yields a Counter that grows by the bytes that each kind of collective sends to other ranks."""
    sent, originals = Counter(), {name: getattr(dist, name) for name in _SENT}

    def counting(name):
        @functools.wraps(originals[name])
        def call(*args, **kwargs):
            sent[name] += _SENT[name](*args, **kwargs)
            return originals[name](*args, **kwargs)

        return call

    for name in _SENT:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
