"""Causal softmax attention within a window of tokens and within documents; no T x T mask or score matrix.

    first_i = max(i - window + 1, start of i's document)        row i sees first_i <= j <= i
    p_ij = softmax_j(scale q_i . k_j)        o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i        dp_ij = do_i . v_j        ds_ij = p_ij (dp_ij - sum_l p_il dp_il)
    dq_i = scale sum_j ds_ij k_j        dk_j = scale sum_i ds_ij q_i

There may be more keys than queries: the queries are then those of the last tokens, and i runs over their places.

`first` never falls, so a block of rows sees one stretch of keys, [first of its first row, its last row], and documents
need nothing else: they are stretches where `first` waits. The backward pass computes p again, block by block; what is
saved are q, k, v and `first`. The scores of a block are its rows times its keys, linear in T even without a window.
"""

import functools
import importlib
import logging
import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.backend import accumulate_dtype, check_floats
from megatron_gdn.kernels.varlen import ChunkTable, table_of_batch
from megatron_gdn.optional import MissingPackageError, require

logger = logging.getLogger(__name__)

# "te" is a module of Transformer Engine and no function: megatron_gdn.core_attention builds it.
BACKENDS = ("te", "flash", "flex", "torch")
# Scores that a block may have, 4 MiB in float32, within the rows below.
_BLOCK_SCORES = 2**20
_BLOCK_ROWS = (32, 128)
_FLEX_BLOCK = 128
_FLASH_MAX_HEAD_DIM = 256


def sliding_window_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Full scores with a T x T mask in plain torch; arguments as `sliding_window_attention`."""
    S, repeats, dtype = k.shape[1], q.shape[2] // k.shape[2], accumulate_dtype(q.dtype)
    k, v = (x.to(dtype).repeat_interleave(repeats, dim=2) for x in (k, v))
    i, j = torch.arange(S)[:, None], torch.arange(S)[None, :]
    visible = j <= i
    if window is not None:
        visible &= i - j < window
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, torch.arange(S), right=True)
        visible &= document[:, None] == document[None, :]
    visible = visible[S - q.shape[1] :]
    scores = torch.einsum("bihd,bjhd->bhij", q.to(dtype), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = scores.masked_fill(~visible.to(q.device), -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v).to(q.dtype)


def first_visible(lengths: list[int], window: int | None) -> Tensor:
    """`[sum of lengths]` int64 on the CPU: the first token that each token of the packed documents sees."""
    sizes = torch.tensor(lengths)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    if window is not None:
        first = torch.maximum(first, torch.arange(len(first)) - (window - 1))
    return first


@functools.lru_cache
def scored_pairs(length: int, window: int | None, heads: int) -> int:
    """Scores that the torch backend computes per head, those that it hides included.

    Args:
        length: tokens of the sequence.
        window: as of `sliding_window_attention`.
        heads: query heads times sequences of a call.
    """
    blocks = _blocks(first_visible([length], window), length, heads)
    return sum((b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start) for b in blocks)


class _Block(NamedTuple):
    """Neighbouring query rows and the keys that they see; every row sees the keys before `inner` or hides some.

    keys: up to that of the last row.
    inner: the first key that the last row sees: before it, some rows see a key and others do not.
    """

    rows: slice
    keys: slice
    inner: int


def _blocks(first: Tensor, num_keys: int, heads: int) -> Iterator[_Block]:
    """All rows in blocks of so many that their scores, over `heads`, fit the budget or the block is smallest."""
    T = len(first)
    if T == 0:
        return
    before = num_keys - T
    widest = int((torch.arange(T) + before - first).max()) + 1
    smallest, size = _BLOCK_ROWS
    while size > smallest and heads * size * (size + widest) > _BLOCK_SCORES:
        size //= 2
    for start, low in zip(range(0, T, size), first[::size].tolist(), strict=True):
        stop = min(start + size, T)
        yield _Block(slice(start, stop), slice(low, stop + before), int(first[stop - 1]))


def _query_rows(x: Tensor, rows: slice, groups: int) -> Tensor:
    """The block's rows of `[B, T, H, D]` as `[B G, H/G rows, D]`, in the dtype of the arithmetic."""
    block = x[:, rows].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    return block.to(accumulate_dtype(x.dtype)).reshape(x.shape[0] * groups, -1, x.shape[-1])


def _key_rows(x: Tensor, keys: slice) -> Tensor:
    """The block's keys of `[B, T, G, D]` as `[B G, keys, D]`, in the dtype of the arithmetic."""
    return x[:, keys].transpose(1, 2).to(accumulate_dtype(x.dtype)).reshape(-1, keys.stop - keys.start, x.shape[-1])


def _write_query_rows(out: Tensor, rows: slice, groups: int, block: Tensor) -> None:
    """The inverse of `_query_rows`; converts the dtype."""
    target = out[:, rows].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [B, G, H/G, rows, D], a view
    target.copy_(block.view(target.shape))


def _probabilities(q: Tensor, k: Tensor, first: Tensor, block: _Block) -> Tensor:
    """Softmax over the visible keys, `[B G, H/G rows, keys]`, of scaled `_query_rows` and `_key_rows`."""
    scores = torch.bmm(q, k.transpose(1, 2))
    rows, low, num_rows = block.rows, block.keys.start, block.rows.stop - block.rows.start
    per_head = scores.unflatten(1, (-1, num_rows))  # [B G, H/G, rows, keys], a view
    i = torch.arange(num_rows, device=q.device)
    per_head[..., -num_rows:].masked_fill_(i > i[:, None], -math.inf)
    if block.inner > low:
        before = torch.arange(low, block.inner, device=q.device) < first[rows, None]
        per_head[..., : block.inner - low].masked_fill_(before, -math.inf)
    return scores.softmax(-1)


class _BandedAttention(torch.autograd.Function):
    """Saves its inputs only."""

    @staticmethod
    def forward(ctx, q, k, v, first, scale):
        groups, bounds = k.shape[2], first.to(q.device)
        o = q.new_empty(*q.shape[:3], v.shape[-1])
        for block in _blocks(first, k.shape[1], q.shape[0] * q.shape[2]):
            b_q = _query_rows(q, block.rows, groups) * scale
            p = _probabilities(b_q, _key_rows(k, block.keys), bounds, block)
            _write_query_rows(o, block.rows, groups, torch.bmm(p, _key_rows(v, block.keys)))
        ctx.save_for_backward(q, k, v, first)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, first = ctx.saved_tensors
        groups, bounds, dtype = k.shape[2], first.to(q.device), accumulate_dtype(q.dtype)
        dq = torch.empty_like(q)
        # Blocks overlap in their keys, so these are sums: [B G, T, D].
        dk, dv = (x.new_zeros(x.shape[0] * groups, x.shape[1], x.shape[3], dtype=dtype) for x in (k, v))
        for block in _blocks(first, k.shape[1], q.shape[0] * q.shape[2]):
            b_q, b_do = (_query_rows(x, block.rows, groups) for x in (q, do))
            b_q = b_q * ctx.scale
            b_k, b_v = (_key_rows(x, block.keys) for x in (k, v))
            p = _probabilities(b_q, b_k, bounds, block)
            dv[:, block.keys].baddbmm_(p.transpose(1, 2), b_do)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(b_do, b_v.transpose(1, 2)), p, -1, dtype)
            dk[:, block.keys].baddbmm_(ds.transpose(1, 2), b_q)
            _write_query_rows(dq, block.rows, groups, torch.bmm(ds, b_k).mul_(ctx.scale))
        dk, dv = (x.unflatten(0, (-1, groups)).transpose(1, 2).to(q.dtype) for x in (dk, dv))
        return dq, dk, dv, None, None


def _flash(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, lengths: list[int] | None) -> Tensor:
    """The flash_attn package; its window counts the tokens before."""
    flash_attn = require_flash("backend 'flash'")
    options = dict(softmax_scale=scale, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0))
    if lengths is None:
        return flash_attn.flash_attn_func(q, k, v, **options)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    of_queries = (bounds - (k.shape[1] - q.shape[1])).clamp(min=0)
    longest = int(of_queries.diff().max()), max(lengths)
    of_queries, of_keys = (x.to(q.device, torch.int32, non_blocking=True) for x in (of_queries, bounds))
    return flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], of_queries, of_keys, *longest, **options)[None]


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# The mask depends on shape, window and documents alone; a run with packed batches sees new documents at every step.
@functools.lru_cache(maxsize=8)
def flex_block_mask(lengths: tuple[int, ...], num_queries: int, window: int | None, device: torch.device):
    """torch's BlockMask of packed documents, made from `first_visible` without a mask of all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    first, size = first_visible(list(lengths), window), _FLEX_BLOCK
    S, T = len(first), num_queries
    before, first = S - T, first[S - T :]
    last_row = torch.arange(size - 1, T + size - 1, size).clamp(max=T - 1)[:, None]
    first_row, key_block = torch.arange(0, T, size)[:, None], torch.arange(-(-S // size))[None, :]
    visible = (key_block <= (last_row + before) // size) & (key_block >= first[first_row] // size)
    whole = (key_block * size + size - 1 <= first_row + before) & (key_block * size >= first[last_row])
    tables = []
    for blocks in (visible & ~whole, whole):
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        tables += [blocks.sum(-1), order]
    tables = [x.to(device, torch.int32)[None, None] for x in tables]
    bounds = first.to(device)

    def mask(batch, head, i, j):
        return (j <= i + before) & (j >= bounds[i])

    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=size, mask_mod=mask, seq_lengths=(T, S))


def _flex(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, lengths: list[int] | None) -> Tensor:
    """torch.nn.attention.flex_attention, compiled."""
    mask = flex_block_mask(tuple(lengths or [k.shape[1]]), q.shape[1], window, q.device)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    o = _compiled_flex()(*heads_first, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return o.transpose(1, 2)


def _banded(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, lengths: list[int] | None) -> Tensor:
    first = first_visible(lengths or [k.shape[1]], window)[k.shape[1] - q.shape[1] :]
    return _BandedAttention.apply(q, k, v, first, scale)


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # hidden by megatron_gdn.optional, which has logged why
        return False


def require_flash(purpose: str):
    """The flash_attn package, or MissingPackageError with the remedy."""
    try:
        return importlib.import_module("flash_attn")
    except ImportError as error:
        remedy = "run pip install flash-attn --no-build-isolation, or use 'flex'"
        problem = f"flash_attn is needed for {purpose} and does not import ({error}): {remedy}."
        raise MissingPackageError(problem, name="flash_attn") from error


def _flash_problem(dtype: torch.dtype, head_dims: tuple[int, int]) -> str | None:
    """Why flash_attn cannot run these inputs."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"backend (flash) takes float16 and bfloat16, not {dtype}: use 'flex', or train in bfloat16."
    if head_dims[0] != head_dims[1] or max(head_dims) > _FLASH_MAX_HEAD_DIM:
        return (
            f"backend (flash) takes one head size up to {_FLASH_MAX_HEAD_DIM} for q, k and v, not {head_dims}: "
            "use 'flex'."
        )
    return None


@functools.cache
def _log_choice(backend: str, requested: str, device_type: str) -> None:
    logger.info("attention backend %s on %s (requested: %s)", backend, device_type, requested)


def resolve_attention_backend(
    requested: str, device_type: str, *, dtype: torch.dtype, head_dims: tuple[int, int], te: bool = True
) -> str:
    """The backend that `requested` means; the first choice of each kind is logged.

    Args:
        requested: one of BACKENDS, or "auto": torch on a CPU; on CUDA te where Transformer Engine is installed, else
            flash where flash_attn is installed and takes the inputs, else flex.
        device_type: "cuda" or "cpu".
        dtype: of q, k and v.
        head_dims: K and V.
        te: whether the caller can build Transformer Engine's module.

    Raises:
        ValueError: an unknown backend, one that does not run on the device, inputs that flash_attn does not take.
        MissingPackageError: the package of a backend asked for by name is missing or does not import.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend ({requested}) must be one of {', '.join(('auto', *BACKENDS))}: 'auto' suits the device."
        )
    backend = requested
    if requested == "auto":
        backend = "torch"
        if device_type == "cuda":
            takes_flash = _installed("flash_attn") and _flash_problem(dtype, head_dims) is None
            backend = "te" if te and _installed("transformer_engine") else "flash" if takes_flash else "flex"
    if backend == "te" and not te:
        raise ValueError(
            "backend (te) is a module, not a function: use megatron_gdn.core_attention, or 'flash' or 'flex'."
        )
    if backend != "torch" and device_type != "cuda":
        raise ValueError(f"backend ({requested}) needs CUDA, not {device_type}: use 'torch' or 'auto'.")
    if backend == "te":
        require("transformer_engine", extra="te", purpose="attention backend 'te'")
    if backend == "flash":
        require_flash("attention backend 'flash'")
        if problem := _flash_problem(dtype, head_dims):
            raise ValueError(problem)
    _log_choice(backend, requested, device_type)
    return backend


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | ChunkTable | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention of each token to the last `window` tokens of its document, itself included.

    Args:
        q: `[B, T, H, K]`, any float dtype and strides; the torch backend computes in float32, float64 in float64.
        k: `[B, S, G, K]`, S >= T: the queries are those of the last T tokens. H must be a multiple of G, and query
            heads h H/G to (h + 1) H/G - 1 read key head h.
        v: `[B, S, G, V]`.
        window: tokens; None: all tokens of the document. fla counts alike; Megatron's window_size is (window - 1, 0).
        scale: multiplies q . k; None: K ** -0.5.
        cu_seqlens: bounds of the documents packed in B = 1, or their table, over the S keys; None: B sequences. Reading
            bounds waits for their device.
        backend: "auto", "torch", "flash" or "flex", see `resolve_attention_backend`.

    Returns:
        `[B, T, H, V]` in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; a window below 1; a backend that cannot run this.
        MissingPackageError: the backend's package is missing.
    """
    _check(q, k, v, window)
    lengths = None if cu_seqlens is None else table_of_batch(k, cu_seqlens).lengths
    return attention_of_lengths(q, k, v, window=window, scale=scale, lengths=lengths, backend=backend)


def attention_of_lengths(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None, lengths: list[int] | None, backend: str
) -> Tensor:
    """`sliding_window_attention` of checked inputs, with lengths of the packed documents instead of their bounds."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    head_dims = (q.shape[-1], v.shape[-1])
    chosen = resolve_attention_backend(backend, q.device.type, dtype=q.dtype, head_dims=head_dims, te=False)
    function = {"torch": _banded, "flash": _flash, "flex": _flex}[chosen]
    return function(q, k, v, window=window, scale=scale, lengths=lengths)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    shapes = {name: list(x.shape) for name, x in (("q", q), ("k", k), ("v", v))}
    if any(len(shape) != 4 for shape in shapes.values()) or k.shape[:2] != v.shape[:2] or len(q) != len(k):
        raise ValueError(f"q, k, v ({shapes}) must be [B, tokens, heads, size] with one B, and as many v as k.")
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"q ({q.shape[1]} tokens) must not have more tokens than k ({k.shape[1]}): a token attends to itself."
        )
    if k.shape[2] != v.shape[2] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"heads of q, k, v ({q.shape[2]}, {k.shape[2]}, {v.shape[2]}) must be a multiple of those of k, and k and "
            "v must have as many: each key head serves as many query heads."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k (head size {k.shape[-1]}) must have the head size of q ({q.shape[-1]}).")
    check_floats(q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v ({q.dtype}, {k.dtype}, {v.dtype}) must have one dtype: convert them.")
    check_window(window)


def check_window(window: int | None) -> None:
    """Raise ValueError unless it is a positive number of tokens or None."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window ({window}) must be a positive number of tokens, or None for all: 1 is the token itself."
        )
