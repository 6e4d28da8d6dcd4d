"""The attention layer inside Megatron's TransformerLayer against plain PyTorch, Megatron's own, and other layouts."""

import re

import pytest
import torch

from tests import attention_layer
from tests.attention_layer import ROTARY_BASE, SHAPE
from tests.ranks import RankError, pool
from tests.test_gated_delta_net import assert_close, assert_equal_results

# Largest error over the largest element: two orders of float32 sums of some hundred terms.
TOLERANCE = 1e-5
PARTIAL = dict(rotary_percent=0.67, rotary_base=500.0)  # 4 of 6 dimensions
EVERYTHING = dict(window=7, qk_norm=True, zero_centered_norm=True, output_gate=True, **PARTIAL)
OPTIONS = [
    dict(),
    dict(window=7),
    dict(window=1),
    dict(rope=False),
    PARTIAL,
    dict(rotary_base=100.0),
    dict(qk_norm=True),
    dict(qk_norm=True, zero_centered_norm=True),
    dict(output_gate=True),
    dict(softmax_scale=0.9),
    EVERYTHING,
]
names = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "default")


def rms_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def rotate(x, dims, base):
    """The first `dims` of `[s, b, heads, d]`: dimension i turns with i + dims / 2."""
    angle = torch.arange(len(x)).double()[:, None] * base ** (-torch.arange(0, dims, 2).double() / dims)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    a, b, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def plain_layer(
    weights,
    x,
    *,
    groups=4,
    window=None,
    rope=True,
    rotary_percent=1.0,
    rotary_base=ROTARY_BASE,
    qk_norm=False,
    zero_centered_norm=False,
    output_gate=False,
    softmax_scale=None,
):
    """x + attention(norm(x)), `[s, b, h]`, from global weights, with a T x T mask."""
    d, repeats = SHAPE["kv_channels"], SHAPE["num_attention_heads"] // groups
    h = rms_norm(x, weights["input_layernorm.weight"])
    rows = weights["linear_qkv.weight"].unflatten(0, (groups, -1))  # of each key head
    sizes = [repeats * d, repeats * d if output_gate else 0, d, d]
    q, z, k, v = ((h @ part.flatten(0, 1).T).unflatten(-1, (-1, d)) for part in rows.split(sizes, dim=1))
    if qk_norm:
        one = 1 if zero_centered_norm else 0
        q, k = rms_norm(q, one + weights["q_layernorm.weight"]), rms_norm(k, one + weights["k_layernorm.weight"])
    if rope:
        q, k = (rotate(t, int(d * rotary_percent), rotary_base) for t in (q, k))
    k, v = (t.repeat_interleave(repeats, dim=2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * (d**-0.5 if softmax_scale is None else softmax_scale)
    i, j = torch.arange(len(x))[:, None], torch.arange(len(x))
    hidden = (j > i) | (i - j >= (window or len(x)))
    o = torch.einsum("bhij,jbhd->ibhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
    if output_gate:
        o = o * z.sigmoid()
    return x + o.flatten(2) @ weights["linear_proj.weight"].T


def plain_results(ours, x, loss_weights, **options):
    """The same names as `ours`, in float64, from the weights that `ours` holds."""
    weights = {n: t.double().requires_grad_() for n, t in ours.items() if n.endswith("weight") and " " not in n}
    x = x.double().requires_grad_()
    y = plain_layer(weights, x, **options)
    (y * loss_weights.double()).sum().backward()
    reference = {"output": y.detach(), "grad input": x.grad}
    for name, weight in weights.items():
        reference |= {name: weight.detach(), f"grad {name}": weight.grad}
    return reference


@names
def test_layer_equals_plain_pytorch(options):
    [ours] = pool(1).run(attention_layer.results, groups={}, **options)
    assert_layer_is_plain(ours, options)


def assert_layer_is_plain(ours, options, **shape):
    reference = plain_results(ours, *attention_layer.inputs(), **shape, **options)
    if options.get("window") == 1:  # nothing to choose from: these gradients are 0
        rows = ours["grad linear_qkv.weight"].unflatten(0, (4, -1))[:, :-6]
        assert rows.abs().max() <= TOLERANCE * reference["grad linear_qkv.weight"].abs().max()
    assert_equal_results(ours, reference, TOLERANCE)


@pytest.mark.parametrize("groups", [8, 2, 1])
def test_any_number_of_key_heads(groups):
    overrides = dict(num_query_groups=groups)
    [ours] = pool(1).run(attention_layer.results, overrides=overrides, groups={}, **EVERYTHING)
    assert_layer_is_plain(ours, EVERYTHING, groups=groups)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("options", [dict(window=7), EVERYTHING], ids=["window", "everything"])
def test_tensor_parallel_equals_one_rank(options, sequence_parallel):
    [one] = pool(1).run(attention_layer.results, groups={}, **options)
    groups = dict(tensor_model_parallel_size=2)
    for result in pool(2).run(attention_layer.results, sequence_parallel, groups=groups, **options):
        assert_equal_results(result, one, TOLERANCE)


def test_fewer_key_heads_than_ranks():
    options, overrides = dict(window=7, qk_norm=True), dict(num_query_groups=1)
    [one] = pool(1).run(attention_layer.results, overrides=overrides, groups={}, **options)
    for result in pool(2).run(
        attention_layer.results, overrides=overrides, groups=dict(tensor_model_parallel_size=2), **options
    ):
        assert_equal_results(result, one, TOLERANCE)


def test_ghosts_in_a_model_that_draws_its_own_weights():
    """Six query heads on three key heads over two ranks, which hold four: the second is a ghost of the first rank."""
    options = dict(num_attention_heads=6, num_query_groups=3, output_gate=True)
    for result in pool(2).run(attention_layer.results, groups=dict(tensor_model_parallel_size=2), **options):
        for grad in ("", "grad "):
            rows = result[f"{grad}linear_qkv.weight"].unflatten(0, (4, -1))
            columns = result[f"{grad}linear_proj.weight"].unflatten(1, (4, -1))
            assert not rows[1].any() and not columns[:, 1].any()
            assert all(rows[i].any() and columns[:, i].any() for i in (0, 2, 3))
        # Heads of zeros change no result: the layer is the plain one with all that the ranks hold.
        reference = plain_results(result, *attention_layer.inputs(), output_gate=True)
        assert_equal_results(result, reference, TOLERANCE)


def packed_and_separate(options, lengths):
    """Outputs and gradients of documents in one row, one after the other, and told apart by nothing."""
    from megatron_gdn.attention import attention_spec

    x, weights = attention_layer.inputs(tokens=sum(lengths), batch=1)

    def run(x, weights, tokens, **arguments):
        layer = attention_layer.build_layer(attention_layer.layer_config(), attention_spec(**options))
        return attention_layer.run(layer, x, weights, rotary_pos_emb=attention_layer.rotary(tokens), **arguments)

    longest = max(lengths)
    together = [
        run(x, weights, longest, packed_seq_params=attention_layer.packed(*lengths, longest=given))
        for given in (None, longest)
    ]
    documents = zip(x.split(lengths), weights.split(lengths), lengths, strict=True)
    parts = [run(*document) for document in documents if document[-1]]
    alone = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if name in ("output", "grad input"):
            value = torch.cat(values)
        elif name.startswith("grad "):
            value = sum(values)
        alone[name] = value
    return together, alone, run(x, weights, sum(lengths))["output"]


@pytest.mark.parametrize("options", [dict(), EVERYTHING], ids=["default", "everything"])
def test_packed_equals_document_by_document(options):
    [(together, alone, unpacked)] = pool(1).run(packed_and_separate, options, (1, 13, 0, 20, 1), groups={})
    for result in together:
        assert_equal_results(result, alone, TOLERANCE)
    assert (unpacked - alone["output"]).abs().max() > 1e-2


def padded_documents():
    layer = attention_layer.build_attention(window=7, rope=False)
    x, _ = attention_layer.inputs(tokens=12, batch=1)
    documents = attention_layer.packed(5, 4)
    documents.cu_seqlens_q_padded = documents.cu_seqlens_kv_padded = torch.tensor([0, 6, 12], dtype=torch.int32)
    with torch.no_grad():
        ours = layer(x, packed_seq_params=documents)[0]
        return ours, torch.cat([layer(x[:6])[0], layer(x[6:])[0]])


def test_padding_behind_documents():
    [(ours, alone)] = pool(1).run(padded_documents, groups={})
    assert_close(ours, alone, TOLERANCE)


def beside_megatrons_layer(options, host_options):
    """Our layer and Megatron's own with its settings for all layers: results, keys and shapes on disk."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_gdn.attention import attention_spec
    from megatron_gdn.norms import RMSNorm

    norm = RMSNorm if options.get("qk_norm") else None
    host = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    found = []
    for spec, settings in ((attention_spec(**options), {}), (host, host_options)):
        layer = attention_layer.build_layer(attention_layer.layer_config(**settings), spec)
        state = layer.sharded_state_dict(prefix="decoder.layers.0.", metadata={"dp_cp_group": data_parallel_group()})
        keys = {t.key: (t.global_shape, t.global_offset, t.replica_id) for t in state.values() if hasattr(t, "key")}
        embedding = None if options.get("rope") is False else attention_layer.rotary()
        found.append((attention_layer.run(layer, *attention_layer.inputs(), rotary_pos_emb=embedding), keys))
    return found


def data_parallel_group():
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "options, host",
    [
        (dict(), dict()),
        (dict(window=7), dict(window_size=(6, 0))),
        (dict(output_gate=True, softmax_scale=0.9), dict(attention_output_gate=True, softmax_scale=0.9)),
        (dict(rope=False), dict(no_rope_freq=[1, 0])),
        (dict(qk_norm=True), dict(qk_layernorm=True)),
    ],
    ids=lambda options: ",".join(options),
)
def test_layer_equals_megatrons_own(options, host, tp):
    for ours, theirs in pool(tp).run(beside_megatrons_layer, options, host, groups=dict(tensor_model_parallel_size=tp)):
        assert ours[1] == theirs[1] and any(key.endswith("self_attention.linear_qkv.weight") for key in ours[1])
        if "qk_norm" in options and tp > 1:
            # The host sums these over the ranks in its step, and only where qk_layernorm is set for the whole model.
            for name in ("grad q_layernorm.weight", "grad k_layernorm.weight"):
                del ours[0][name], theirs[0][name]
        assert_equal_results(ours[0], theirs[0], TOLERANCE)


def recomputed():
    settings = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return [attention_layer.results(overrides=overrides, **EVERYTHING) for overrides in (settings, {})]


def test_recomputed_core():
    [(ours, saved)] = pool(1).run(recomputed, groups={})
    assert_equal_results(ours, saved, tolerance=0)


def gated_without_compiling():
    from unittest import mock

    from megatron.core.transformer.attention import Attention

    with mock.patch.object(Attention, "_apply_output_gate", side_effect=AssertionError("the host's compiled gate")):
        return attention_layer.results(output_gate=True)


def gate_of_a_bf16_layer():
    layer = attention_layer.build_attention(output_gate=True)
    x, gate = (t.bfloat16() for t in attention_layer.inputs())
    return layer._apply_output_gate(x, gate), x.double() * gate.double().sigmoid()


def test_output_gate_of_bfloat16_is_float32():
    [(found, expected)] = pool(1).run(gate_of_a_bf16_layer, groups={})
    # One rounding, of at most half of bfloat16's step.
    torch.testing.assert_close(found.double(), expected, rtol=1.01 * 2**-8, atol=1e-9)
    assert found.dtype == torch.bfloat16


def test_output_gate_compiles_nothing_on_a_cpu():
    [ours] = pool(1).run(gated_without_compiling, groups={})
    assert_layer_is_plain(ours, dict(output_gate=True))


def build(overrides, options):
    attention_layer.build_attention(attention_layer.layer_config(**overrides), **options)


@pytest.mark.parametrize(
    "overrides, options, message",
    [
        (
            dict(window_size=(6, 0)),
            dict(),
            "window_size ((6, 0)) must not be set for all layers: give this one window=",
        ),
        (dict(window_attn_skip_freq=2), dict(), "window_attn_skip_freq (2) must not be set for all layers"),
        (dict(no_rope_freq=2), dict(), "must not be set for all layers: give this one rope=..."),
        (dict(attention_output_gate=True), dict(), "attention_output_gate (True) must not be set for all layers"),
        (dict(qk_layernorm=True), dict(), "qk_layernorm (True) must not be set for all layers: give this one qk_norm="),
        (dict(qk_l2_norm=True), dict(), "qk_l2_norm (True) must not be set for all layers"),
        (
            dict(attention_dropout=0.1),
            dict(),
            "attention_dropout (0.1) must be 0.0 with attention backend 'auto': set",
        ),
        (dict(softmax_type="off-by-one"), dict(), "softmax_type (off-by-one) must be vanilla"),
        (dict(qk_clip=True), dict(), "qk_clip (True) must be False"),
        (dict(log_max_attention_logit=True), dict(), "log_max_attention_logit (True) must be False"),
        (dict(), dict(window=0), "window (0) must be a positive number of tokens, or None for all"),
        (
            dict(),
            dict(rotary_percent=0.5),
            "rotary_percent (0.5) of kv_channels (6) must be an even number of dimensions",
        ),
        (dict(), dict(rotary_percent=2.0), "from 2 to 6, not 12: dimensions turn in pairs."),
        (dict(), dict(rotary_percent=0.1), "from 2 to 6, not 0: dimensions turn in pairs."),
        (dict(), dict(zero_centered_norm=True), "zero_centered_norm (True) needs qk_norm"),
        (dict(), dict(provider="apex"), "provider (apex) must be 'local' or 'te'"),
        (dict(), dict(provider="te"), "transformer_engine is needed for provider 'te' and is not inst"),
        (dict(), dict(fuse_input_norm=True), "fuse_input_norm (True) needs provider 'te', not 'local': its norms are"),
        (dict(), dict(num_attention_heads=8, num_query_groups=3), "num_attention_heads (8) must be divisible by num_q"),
        (dict(), dict(backend="flash"), "backend (flash) needs CUDA, not cpu: use 'torch' or 'auto'"),
    ],
)
def test_wrong_settings(overrides, options, message):
    with pytest.raises(RankError, match=re.escape(message)):
        pool(1).run(build, overrides, options, groups={})


def call_layer(options, **arguments):
    layer = attention_layer.build_attention(**options)
    layer(attention_layer.inputs()[0], None, **arguments)


def with_half_an_embedding(**options):
    call_layer(options, rotary_pos_emb=attention_layer.rotary(percent=0.67))


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (call_layer, dict(options={}, inference_context={}), "inference_context (dict) must be None: hybrid models"),
        (call_layer, dict(options={}), "rotary_pos_emb (width None) must have this layer's 6 rotated dimensions"),
        (with_half_an_embedding, dict(), "rotary_pos_emb (width 4) must have this layer's 6 rotated dimensions: give"),
    ],
)
def test_layer_refuses(function, arguments, message):
    with pytest.raises(RankError, match=re.escape(message)):
        pool(1).run(function, groups={}, **arguments)


def test_a_layer_takes_the_models_embedding_of_its_share():
    """rotary_percent without a base: the model's embedding, of the same share."""
    [ours] = pool(1).run(with_the_models_share, groups={})
    reference = plain_results(ours, *attention_layer.inputs(), rotary_percent=0.67)
    assert_equal_results(ours, reference, TOLERANCE)


def with_the_models_share():
    from megatron_gdn.attention import attention_spec

    layer = attention_layer.build_layer(attention_layer.layer_config(), attention_spec(rotary_percent=0.67))
    embedding = attention_layer.rotary(percent=0.67)
    return attention_layer.run(layer, *attention_layer.inputs(), rotary_pos_emb=embedding)
