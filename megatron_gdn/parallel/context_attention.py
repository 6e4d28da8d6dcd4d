"""Softmax attention under context parallelism, exactly that of one rank.

with a window     keys and values of the window before each fragment, over as many ranks as it spans
all_gather        keys and values of all ranks
a2a               heads for tokens: each rank computes a part of the heads for the whole sequence
"""

import torch
from torch import Tensor

from megatron_gdn.kernels.sliding_window import attention_of_lengths
from megatron_gdn.parallel.exchange import gather_rows, heads_to_tokens, start_rows, tokens_to_heads
from megatron_gdn.parallel.fragments import Fragments, check_fragments

COMM_TYPES = ("all_gather", "a2a")


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    fragments: Fragments,
    window: int | None,
    scale: float | None = None,
    cp_comm_type: str = "all_gather",
    backend: str = "auto",
) -> Tensor:
    """`sliding_window_attention` of this rank's tokens to their window over all ranks, or to all tokens before.

    With a window each fragment gets the keys and values of the window - 1 tokens before it. Without one, "all_gather"
    gives every rank all keys and values; "a2a" gives it all tokens of a part of the heads, which costs less memory and
    is balanced in both layouts, but both kinds of heads must be divisible by the ranks.

    Args:
        q: `[s, b, H, K]`, this rank's; Megatron's order, as rows are exchanged.
        k, v: `[s, b, G, K]`, `[s, b, G, V]`.
        fragments: of the batch.
        window: tokens; None: all tokens of the document.
        scale, backend: see `sliding_window_attention`.
        cp_comm_type: "all_gather" or "a2a", without a window.

    Returns:
        `[s, b, H, V]`.

    Raises:
        ValueError: a window longer than the sequence, heads that the ranks do not divide, another cp_comm_type.
    """
    fragments.check(q, "query", dim=0)
    check_fragments(fragments.num_tokens, layout=fragments.layout, size=fragments.size, window=window)
    check_exchange(cp_comm_type, window)
    how = dict(window=window, scale=scale, backend=backend)
    if window is None and cp_comm_type == "a2a" and fragments.size > 1:
        return _attention_by_heads(q, k, v, fragments, how)
    key_values, length = torch.cat([k, v], -1), fragments.length
    if window is None:
        whole = gather_rows(key_values, fragments) if fragments.crossed else None
    else:
        before = start_rows(key_values, fragments, window - 1).wait() if fragments.crossed else None
    outputs = []
    for place, f in enumerate(fragments.owned):
        own = slice(place * length, (place + 1) * length)
        if not fragments.crossed:
            seen = key_values[own]
        elif window is None:
            seen = whole[fragments.document_starts[f] : (f + 1) * length]
        else:
            seen = torch.cat([before[place], key_values[own]])
        lengths = fragments.piece_lengths(place)
        if lengths is not None:
            lengths[0] += len(seen) - length  # what comes before is of the first document
        k_seen, v_seen = seen.transpose(0, 1).split([k.shape[-1], v.shape[-1]], -1)
        outputs.append(attention_of_lengths(q[own].transpose(0, 1), k_seen, v_seen, lengths=lengths, **how))
    return torch.cat(outputs, 1).transpose(0, 1)


def check_exchange(cp_comm_type: str, window: int | None) -> None:
    """Raise ValueError for a cp_comm_type that attention without a window does not have.

    Args:
        cp_comm_type: "all_gather" or "a2a".
        window: of the layer; a layer with one exchanges that, whatever the others do.
    """
    if window is None and cp_comm_type not in COMM_TYPES:
        raise ValueError(
            f"cp_comm_type ({cp_comm_type}) must be 'all_gather' or 'a2a' without a window: keys and values of all "
            "ranks, or heads for tokens."
        )


def _attention_by_heads(q: Tensor, k: Tensor, v: Tensor, fragments: Fragments, how: dict) -> Tensor:
    ranks, heads, groups = fragments.size, q.shape[2], k.shape[2]
    for name, number in (("num_attention_heads", heads), ("num_query_groups", groups)):
        if number % ranks:
            raise ValueError(
                f"{name} ({number} on this tensor-parallel rank) must be divisible by context_parallel_size ({ranks}) "
                "with cp_comm_type 'a2a': use 'all_gather'."
            )
    by_rank = [x.unflatten(2, (ranks, -1)).flatten(3) for x in (q, k, v)]  # [s, b, R, heads of a rank * size]
    whole = tokens_to_heads(torch.cat(by_rank, -1), fragments).transpose(0, 1)  # [b, T, ...]
    parts = whole.split([x.shape[-1] for x in by_rank], -1)
    parts = [x.unflatten(-1, (-1, like.shape[-1])) for x, like in zip(parts, (q, k, v), strict=True)]
    lengths = torch.tensor(fragments.bounds).diff().tolist() if fragments.packed else None
    o = attention_of_lengths(*parts, lengths=lengths, **how).flatten(2).transpose(0, 1)  # [T, b, heads of a rank * V]
    return heads_to_tokens(o, fragments).unflatten(-1, (heads // ranks, -1)).flatten(2, 3)
