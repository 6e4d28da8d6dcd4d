"""Which data-parallel rank keeps and updates which parameter, where optimizer states are dealt out by whole parameters.

Muon needs whole matrices, so its states cannot be cut at the equal slices of Megatron's distributed optimizer. Each
parameter goes to one rank instead, as in Megatron-Core's LayerWiseDistributedOptimizer (core 0.16, experimental): that
rank alone has the float32 weight and the states, and updates it; the others get the result.

Bytes that n ranks send per parameter and step, with ring algorithms and bf16 weights, over (n - 1) / n:

    gradients                                 updated weights    together
    all-reduce of float32           8         2                  10           here
    reduce to the owners, or
    to slices, float32              4         2                   6           Megatron's distributed optimizer

Gradients are all-reduced by Megatron's DDP, in buckets behind the backward pass. Its reduce-scatter cuts every bucket
into n equal slices, which are no whole parameters; sums sent to owners one by one would save 4 of the 10, but after the
backward pass, where nothing hides them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a parameter costs the rank that owns it.

    num_bytes: of its float32 weight, where that is no parameter of the model, and its states.
    flops: of its update; 0 for AdamW's.
    """

    num_bytes: float
    flops: float = 0.0


def deal_out(loads: Sequence[Load], num_ranks: int) -> list[int]:
    """Owners of parameters: the heaviest first, each to the rank whose larger share, of bytes or FLOPs, stays least.

    Args:
        loads: of the parameters.
        num_ranks: to deal them out to.

    Returns:
        The rank of each parameter; the same on every rank.
    """
    totals = [sum(load.num_bytes for load in loads), sum(load.flops for load in loads)]
    shares = [(load.num_bytes / max(totals[0], 1), load.flops / max(totals[1], 1)) for load in loads]
    owners = [0] * len(loads)
    held = [(0.0, 0.0)] * num_ranks
    for i in sorted(range(len(loads)), key=lambda i: -max(shares[i])):
        sums = [tuple(have + more for have, more in zip(rank, shares[i], strict=True)) for rank in held]
        owners[i] = min(range(num_ranks), key=lambda rank: (max(sums[rank]), sum(sums[rank])))
        held[owners[i]] = sums[owners[i]]
    return owners
