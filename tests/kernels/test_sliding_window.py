"""Windowed attention against full masked attention in float64, its memory and work, packages by fakes, errors."""

import logging
import sys
import types

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_gdn.kernels import prepare_chunk_table, sliding_window
from megatron_gdn.kernels.sliding_window import sliding_window_attention, sliding_window_attention_ref
from megatron_gdn.optional import MissingPackageError
from tests.kernels.data import bounds, loss, rms_error

# float64 sums of at most 75 terms, whose roundings of 1e-16 the gradients add up once more.
FORWARD, BACKWARD = 1e-12, 1e-10
# float32: roundings of 6e-8 in dots of K = 8 and sums of 75 terms, a few times the square root of that.
FLOAT32 = 2e-6


def inputs(B, T, H, G, K, V, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = dict(q=(B, T, H, K), k=(B, T, G, K), v=(B, T, G, V))
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}


def results(function, tensors, **options):
    """o and the gradients by name."""
    leaves = {n: x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for n, x in tensors.items()}
    o = function(**leaves, **options)
    return dict(o=o.detach()) | dict(zip(leaves, torch.autograd.grad(loss(o), list(leaves.values())), strict=True))


def assert_same(ours, reference, forward=FORWARD, backward=BACKWARD):
    for name, expected in reference.items():
        # W = 1 has a softmax over one score: gradients of q and k are 0.
        assert rms_error(ours[name], expected, smallest=1e-3) <= (forward if name == "o" else backward), name


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 rows, so that short inputs have many."""
    monkeypatch.setattr(sliding_window, "_BLOCK_ROWS", (8, 8))


# B, T, H, G, K, V, window
SHAPES = [
    (2, 75, 4, 4, 8, 8, 20),  # several blocks and a tail
    (1, 75, 6, 2, 8, 5, 20),  # grouped heads, V < K
    (1, 33, 4, 1, 3, 6, 9),  # one key head, V > K; the window is one more than a block
    (1, 33, 2, 2, 8, 8, 8),  # the window is a block
    (1, 33, 2, 2, 8, 8, 7),
    (1, 33, 2, 1, 8, 8, 1),  # the token alone
    (1, 33, 2, 1, 8, 8, 2),
    (2, 33, 4, 2, 8, 8, 32),  # only the last row hides a key
    (2, 33, 4, 2, 8, 8, 33),  # the window is T
    (2, 33, 4, 2, 8, 8, 1000),
    (2, 33, 4, 2, 8, 8, None),
    (1, 8, 2, 1, 8, 8, 3),  # one whole block
    (1, 1, 2, 1, 8, 8, 3),  # one token
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_masked_attention(small_blocks, shape):
    *sizes, window = shape
    tensors = inputs(*sizes)
    assert_same(
        results(sliding_window_attention, tensors, window=window, scale=0.7),
        results(sliding_window_attention_ref, tensors, window=window, scale=0.7),
    )


def test_reference_equals_torch():
    """torch's own attention with an explicit mask, and by default scaled by K ** -0.5."""
    tensors = inputs(2, 12, 4, 2, 8, 5)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    heads_first = (x.transpose(1, 2) for x in tensors.values())
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=(j <= i) & (j > i - 3), enable_gqa=True)
    assert rms_error(sliding_window_attention_ref(**tensors, window=3), expected.transpose(1, 2)) <= FORWARD
    assert rms_error(sliding_window_attention(**tensors, window=3), expected.transpose(1, 2)) <= FORWARD


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("window", [1, 5, 12, None])
# Empty documents at the ends and in the middle, single tokens, documents shorter and longer than window and block.
@pytest.mark.parametrize("lengths", [(0, 5, 0, 0, 1, 1, 30, 0), (8, 8, 8), (1,) * 11, (40,)])
def test_packed_equals_document_by_document(small_blocks, lengths, window, with_table):
    tensors = inputs(1, sum(lengths), 4, 2, 8, 6)
    packed = bounds(*lengths)

    def alone(q, k, v, window):
        parts = [x.split(lengths, dim=1) for x in (q, k, v)]
        return torch.cat([sliding_window_attention_ref(*part, window=window) for part in zip(*parts, strict=True)], 1)

    given = prepare_chunk_table(packed) if with_table else packed
    ours = results(sliding_window_attention, tensors, window=window, cu_seqlens=given)
    assert_same(ours, results(alone, tensors, window=window))


@pytest.mark.parametrize("queries", [1, 17, 30])
@pytest.mark.parametrize("window, lengths", [(None, None), (7, None), (7, (2, 21, 10)), (None, (20, 1, 12))])
def test_fewer_queries_than_keys_are_those_of_the_last_tokens(small_blocks, queries, window, lengths):
    tensors = inputs(1, 33, 4, 2, 8, 6)
    options = dict(window=window, **_packed(lengths))

    def last_rows(q, k, v):
        whole = torch.cat([q.new_zeros(1, 33 - q.shape[1], *q.shape[2:]), q], 1)
        return sliding_window_attention_ref(whole, k, v, **options)[:, 33 - q.shape[1] :]

    tensors["q"] = tensors["q"][:, 33 - queries :]
    reference = results(last_rows, tensors)
    for function in (sliding_window_attention, sliding_window_attention_ref):
        assert_same(results(function, tensors, **options), reference)


def test_nothing_leaks_from_other_documents_and_later_tokens(small_blocks):
    tensors = inputs(1, 30, 2, 1, 8, 8)
    changed = {name: x.clone() for name, x in tensors.items()}
    for x in changed.values():
        x[:, :13] *= 50
        x[:, 25:] += 3
    for options in (dict(cu_seqlens=bounds(13, 17)), dict(window=2)):
        ours, others = (sliding_window_attention(**x, **options) for x in (tensors, changed))
        assert torch.equal(ours[:, 14:25], others[:, 14:25])
        assert not torch.equal(ours[:, :13], others[:, :13])


@pytest.mark.parametrize("window", [20, None])
def test_float32(small_blocks, window):
    tensors = inputs(2, 75, 4, 2, 8, 8)
    single = {name: x.float() for name, x in tensors.items()}
    reference = results(sliding_window_attention_ref, {name: x.double() for name, x in single.items()}, window=window)
    assert_same(results(sliding_window_attention, single, window=window), reference, FLOAT32, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(small_blocks, dtype):
    half = {name: x.to(dtype) for name, x in inputs(2, 75, 4, 2, 8, 8).items()}
    single = results(sliding_window_attention, {name: x.float() for name, x in half.items()}, window=20)
    for name, x in results(sliding_window_attention, half, window=20).items():
        assert x.dtype == dtype and torch.equal(x, single[name].to(dtype)), name


def test_any_strides_and_gradients_of_some_inputs_only(small_blocks):
    tensors = inputs(2, 33, 4, 2, 8, 8)
    reference = results(sliding_window_attention_ref, tensors, window=9)
    views = {n: x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2) for n, x in tensors.items()}
    wide = torch.cat([tensors["v"], tensors["v"]], -1)[..., :8]
    assert_same(results(sliding_window_attention, views, window=9), reference)
    assert rms_error(sliding_window_attention(views["q"], views["k"], wide, window=9), reference["o"]) <= FORWARD
    for wanted in tensors:
        leaves = {n: x.clone().requires_grad_(n == wanted) for n, x in tensors.items()}
        loss(sliding_window_attention(**leaves, window=9)).backward()
        assert [n for n, x in leaves.items() if x.grad is not None] == [wanted]
        assert rms_error(leaves[wanted].grad, reference[wanted]) <= BACKWARD


def test_no_tokens():
    empty = {name: x.requires_grad_() for name, x in inputs(1, 0, 2, 1, 8, 4).items()}
    o = sliding_window_attention(**empty, window=3)
    o.sum().backward()
    assert o.shape == (1, 0, 2, 4) and empty["k"].grad.shape == (1, 0, 1, 8)


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor with memory of its own that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def costs(function, T, window, **options):
    """Elements of the largest tensor, elements saved for the backward pass, and multiplications of both passes."""
    tensors = {name: x.float().requires_grad_() for name, x in inputs(1, T, 2, 1, 8, 8).items()}
    saved = []
    largest, flops = _LargestTensor(), FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with largest, flops, hooks:
        function(**tensors, window=window, **options).sum().backward()
    return largest.elements, sum(saved), flops.get_total_flops()


@pytest.mark.parametrize("packed", [False, True])
def test_memory_and_work_are_linear(packed):
    def options(T):
        return dict(cu_seqlens=torch.linspace(0, T, 4).long()) if packed else {}

    few, more, many = (costs(sliding_window_attention, T, 64, **options(T)) for T in (512, 1024, 2048))
    assert few[0] == many[0]  # the scores of a block
    assert many[1] == 4 * few[1] == 2048 * (2 * 8 + 8 + 8 + 1)  # q, k, v, first
    # Twice the tokens for twice the work, after the first tokens of a document, which see less.
    assert many[2] - more[2] == pytest.approx(2 * (more[2] - few[2]), rel=0.1 if packed else 0)
    # Without a window the work is quadratic, and no tensor is: the scores of the smallest block, 32 rows.
    for T in (4096, 8192):
        full = {name: x.float() for name, x in inputs(1, T, 8, 1, 4, 4).items()}
        with _LargestTensor() as largest:
            sliding_window_attention(**full)
        assert largest.elements <= 32 * 8 * T
    assert costs(sliding_window_attention_ref, 512, 64)[0] == 2 * 512**2  # what the measure sees elsewhere


# ---- packages ----


@pytest.mark.parametrize("queries", [400, 200])
@pytest.mark.parametrize("window, lengths", [(None, None), (300, None), (50, (0, 130, 1, 200, 0, 69))])
def test_flex_equals_masked_attention(monkeypatch, window, lengths, queries):
    """torch's eager flex_attention reads the mask's rule; the table of blocks is compared with the dense mask."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(sliding_window, "_compiled_flex", lambda: flex_attention)
    T = 400
    tensors = inputs(1, T, 4, 2, 16, 16)
    tensors["q"] = tensors["q"][:, T - queries :]
    ours = sliding_window._flex(**tensors, window=window, scale=0.25, lengths=lengths)  # on a CPU forward only
    assert rms_error(ours, sliding_window_attention_ref(**tensors, window=window, **_packed(lengths))) <= FORWARD
    blocks = sliding_window.flex_block_mask(tuple(lengths or [T]), queries, window, torch.device("cpu"))
    eye = dict(q=torch.ones(1, queries, 1, 1), k=torch.ones(1, T, 1, 1), v=torch.eye(T)[None, :, None])
    seen = sliding_window_attention_ref(**eye, window=window, **_packed(lengths))[0, :, 0] > 0
    rows_of_blocks = -(-queries // 128)
    dense = F.pad(seen, (0, 112, 0, rows_of_blocks * 128 - queries)).unflatten(1, (4, 128)).unflatten(0, (-1, 128))
    assert torch.equal(blocks.to_dense()[0, 0].bool(), dense.any(3).any(1))
    count, order = blocks.full_kv_num_blocks[0, 0], blocks.full_kv_indices[0, 0]
    for row in range(rows_of_blocks):
        for column in order[row, : count[row]].tolist():
            rows = slice(row * 128, min(row * 128 + 128, queries))
            assert seen[rows, column * 128 : column * 128 + 128].all()
        assert count[row] == sum(bool(dense[row, :, column].all()) for column in range(4)) or row == rows_of_blocks - 1


def _packed(lengths):
    return {} if lengths is None else dict(cu_seqlens=bounds(*lengths))


@pytest.mark.parametrize("queries", [37, 15])
@pytest.mark.parametrize("window, lengths", [(None, None), (7, None), (7, (3, 0, 30, 4))])
def test_flash_gets_its_own_window_and_bounds(monkeypatch, window, lengths, queries):
    """A fake of the package with its documented meanings: window_size counts tokens before, -1 is all."""

    def of_window(size):
        assert size[1] in (0, -1)
        return None if size[0] == -1 else size[0] + 1

    def dense(q, k, v, *, softmax_scale, causal, window_size):
        assert causal
        return sliding_window_attention_ref(q, k, v, window=of_window(window_size), scale=softmax_scale)

    def varlen(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, softmax_scale, causal, window_size):
        assert causal and longest_k == 30 and bounds_q.dtype == bounds_k.dtype == torch.int32
        assert longest_q == bounds_q.diff().max() and bounds_q[-1] == len(q) and bounds_k[-1] == len(k)
        options = dict(window=of_window(window_size), scale=softmax_scale)
        parts = (x.split(edges.diff().tolist()) for x, edges in ((q, bounds_q), (k, bounds_k), (v, bounds_k)))
        documents = [[x[None] for x in part] for part in zip(*parts, strict=True)]
        return torch.cat([sliding_window_attention_ref(*part, **options)[0] for part in documents])

    fake = types.SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    tensors = inputs(1, 37, 4, 2, 8, 8)
    tensors["q"] = tensors["q"][:, -queries:]
    expected = sliding_window_attention_ref(**tensors, window=window, scale=0.25, **_packed(lengths))
    ours = sliding_window._flash(*tensors.values(), window=window, scale=0.25, lengths=lengths)
    assert rms_error(ours, expected) <= FORWARD


def resolve(requested="auto", device="cuda", dtype=torch.bfloat16, head_dims=(64, 64), **options):
    return sliding_window.resolve_attention_backend(requested, device, dtype=dtype, head_dims=head_dims, **options)


def test_auto_by_device_and_packages(monkeypatch, caplog):
    installed = {"transformer_engine", "flash_attn"}
    monkeypatch.setattr(sliding_window, "_installed", lambda name: name in installed)
    monkeypatch.setattr(sliding_window, "require", lambda *_, **__: None)
    monkeypatch.setattr(sliding_window, "require_flash", lambda *_: None)
    sliding_window._log_choice.cache_clear()
    with caplog.at_level(logging.INFO):
        assert resolve(device="cpu") == "torch"
        assert resolve() == resolve() == "te"
        assert resolve(te=False) == "flash"
        installed.remove("transformer_engine")
        assert resolve() == "flash"
        assert resolve(dtype=torch.float32) == resolve(head_dims=(64, 128)) == resolve(head_dims=(512, 512)) == "flex"
        installed.clear()
        assert resolve() == "flex"
        assert resolve("torch") == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend torch on cpu (requested: auto)",
        "attention backend te on cuda (requested: auto)",
        "attention backend flash on cuda (requested: auto)",
        "attention backend flex on cuda (requested: auto)",
        "attention backend torch on cuda (requested: torch)",
    ]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(
        MissingPackageError, match=r"flash_attn is needed for attention backend 'flash' and does not im"
    ):
        resolve("flash")
    with pytest.raises(
        MissingPackageError, match=r"transformer_engine is needed for attention backend 'te' and is not"
    ):
        resolve("te")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(requested="sdpa"), r"backend \(sdpa\) must be one of auto, te, flash, flex, torch: 'auto' suits"),
        (dict(requested="flex", device="cpu"), r"backend \(flex\) needs CUDA, not cpu: use 'torch' or 'auto'"),
        (dict(requested="te", device="cpu"), r"backend \(te\) needs CUDA, not cpu"),
        (dict(requested="te", te=False), r"backend \(te\) is a module, not a function"),
        (
            dict(requested="flash", dtype=torch.float32),
            r"backend \(flash\) takes float16 and bfloat16, not torch.float32",
        ),
        (dict(requested="flash", head_dims=(64, 32)), r"takes one head size up to 256 for q, k and v, not \(64, 32\)"),
        (dict(requested="flash", head_dims=(512, 512)), r"takes one head size up to 256"),
    ],
)
def test_wrong_backends(monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace())
    with pytest.raises(ValueError, match=message):
        resolve(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=(1, 9, 8)), r"q, k, v \(.*\) must be \[B, tokens, heads, size\] with one B"),
        (dict(k=(1, 8, 2, 8)), r"must be \[B, tokens, heads, size\] with one B, and as many v as k"),
        (dict(v=(2, 9, 2, 8)), r"must be \[B, tokens, heads, size\]"),
        (dict(k=(1, 8, 2, 8), v=(1, 8, 2, 8)), r"q \(9 tokens\) must not have more tokens than k \(8\)"),
        (dict(q=(1, 9, 3, 8)), r"heads of q, k, v \(3, 2, 2\) must be a multiple of those of k"),
        (dict(v=(1, 9, 4, 8)), r"heads of q, k, v \(4, 2, 4\)"),
        (dict(k=(1, 9, 2, 6)), r"k \(head size 6\) must have the head size of q \(8\)"),
        (dict(k=torch.float32), r"q, k, v \(torch.float64, torch.float32, torch.float64\) must have one dtype"),
        (dict(v=torch.int64), r"v \(torch.int64\) must have a float dtype"),
        (dict(window=0), r"window \(0\) must be a positive number of tokens, or None for all"),
        (dict(window=2.0), r"window \(2.0\) must be a positive"),
        (dict(window=True), r"window \(True\) must be a positive"),
        (dict(backend="te"), r"backend \(te\) is a module"),
        (dict(cu_seqlens=bounds(4, 4)), r"cu_seqlens \(ends at 8\) must end at the number of tokens \(9\)"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = inputs(1, 9, 4, 2, 8, 8)
    for name, value in change.items():
        if isinstance(value, tuple):
            value = torch.zeros(value, dtype=torch.float64)
        arguments[name] = arguments[name].to(value) if isinstance(value, torch.dtype) else value
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(**arguments)
