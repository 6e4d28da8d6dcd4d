"""The chunked gated delta rule against the recurrence in float64, its own properties, and its precision."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_gdn.kernels import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, prepare_chunk_table
from megatron_gdn.kernels.gated_delta_rule import chunk
from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from tests.kernels.data import NAMES, assert_equal, bounds, loss, loss_weights, rms_error, rule_inputs, run

# Two orders of summation in float64 differ by 1e-15; the chunk's solve amplifies that by less than its size, 64.
FLOAT64 = dict(forward=1e-10, backward=1e-9)
# float32 has a unit roundoff of 6e-8; a result is a sum of a few dozen rounded terms of its own size.
FLOAT32 = dict(forward=2e-6, backward=2e-6)

SHAPES = {
    "one token": (2, 1, 1, 1, 8, 8),
    "three tokens, HV = 3 H": (1, 3, 1, 3, 6, 10),
    "one short of a chunk": (2, 63, 2, 2, 16, 24),
    "one chunk, HV = 2 H": (1, 64, 2, 4, 16, 8),
    "one more than a chunk": (1, 65, 1, 2, 16, 16),
    "no power of two": (1, 130, 2, 4, 60, 100),
    "whole chunks, three sequences": (3, 192, 1, 2, 12, 20),
}
DOCUMENTS = {
    "empty ones at the start, inside, in a row, at the end": (0, 5, 0, 0, 70, 0),
    "single tokens": (1, 1, 1, 130, 1),
    "at the bounds of chunks": (64, 128, 63, 65),
    "all of one length, no whole chunk": (20, 20, 20),
    "all whole chunks": (64, 64),
    "many short ones": tuple(range(1, 24)),
    "one": (100,),
}


def per_document(inputs: dict, lengths: tuple[int, ...]) -> list[dict]:
    """The documents of a packed batch as batches of their own."""
    pieces = []
    for n, (start, length) in enumerate(zip(bounds(*lengths)[:-1].tolist(), lengths, strict=True)):
        piece = {name: x[:, start : start + length] for name, x in inputs.items() if name != "initial_state"}
        pieces.append(piece | dict(initial_state=inputs["initial_state"][n : n + 1]))
    return pieces


def cast(inputs: dict, dtype: torch.dtype, names=("q", "k", "v")) -> dict:
    """q, k, v in `dtype`, the rest in float32 as the layer has it."""
    return {name: x.to(dtype if name in names else torch.float32) for name, x in inputs.items()}


def test_reference_is_the_papers_formula():
    """Equation 10 as written, S [V, K], for each head by itself."""
    inputs = rule_inputs(2, 5, 2, 4, 3, 6)
    o, final = recurrent_gated_delta_rule_ref(
        inputs["q"], inputs["k"], inputs["v"], **{n: inputs[n] for n in NAMES[3:]}, scale=0.3, output_final_state=True
    )
    for b in range(2):
        for h in range(4):
            S = inputs["initial_state"][b, h].T
            for t in range(5):
                q, k, v = inputs["q"][b, t, h // 2], inputs["k"][b, t, h // 2], inputs["v"][b, t, h]
                alpha, beta = inputs["g"][b, t, h].exp(), inputs["beta"][b, t, h]
                S = S @ (alpha * (torch.eye(3, dtype=S.dtype) - beta * torch.outer(k, k))) + beta * torch.outer(v, k)
                torch.testing.assert_close(o[b, t, h], 0.3 * S @ q, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(final[b, h], S.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64_equals_recurrence(shape, l2norm):
    inputs, options = rule_inputs(*shape), dict(use_qk_l2norm_in_kernel=l2norm)
    reference = run(recurrent_gated_delta_rule_ref, inputs, **options)
    assert_equal(run(chunk_gated_delta_rule, inputs, **options), reference, **FLOAT64)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_equals_recurrence(shape):
    inputs = {name: x.float() for name, x in rule_inputs(*shape).items()}
    reference = run(recurrent_gated_delta_rule_ref, {name: x.double() for name, x in inputs.items()})
    assert_equal(run(chunk_gated_delta_rule, inputs), reference, **FLOAT32)


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_equals_document_by_document(lengths, function):
    inputs = rule_inputs(1, sum(lengths), 1, 2, 8, 12, num_states=len(lengths))
    together = run(function, inputs, cu_seqlens=bounds(*lengths))
    o_weight, state_weight = loss_weights(*together[0].values())
    for n, (start, piece) in enumerate(zip(bounds(*lengths), per_document(inputs, lengths), strict=False)):
        stop = start + lengths[n]
        leaves = {name: x.detach().clone().requires_grad_() for name, x in piece.items()}
        o, final = recurrent_gated_delta_rule_ref(
            leaves["q"], leaves["k"], leaves["v"], **{m: leaves[m] for m in NAMES[3:]}, output_final_state=True
        )
        loss_of_piece = (o * o_weight[:, start:stop]).sum() + (final * state_weight[n : n + 1]).sum()
        expected = torch.autograd.grad(loss_of_piece, list(leaves.values()), materialize_grads=True)
        tokens = {m: x[:, start:stop] for m, x in together[1].items() if m != "initial_state"}
        grads = tokens | dict(initial_state=together[1]["initial_state"][n : n + 1])
        outputs = dict(o=together[0]["o"][:, start:stop], final_state=together[0]["final_state"][n : n + 1])
        reference = (dict(o=o, final_state=final), dict(zip(leaves, expected, strict=True)))
        assert_equal((outputs, grads), reference, **FLOAT64)


@pytest.mark.parametrize("elements", [1, 2**10, 2**30], ids=["one chunk a block", "a few", "one block"])
@pytest.mark.parametrize("lengths", [None, (64, 0, 200, 1, 130, 300)], ids=["batch", "packed"])
def test_size_of_blocks_does_not_change_the_result(monkeypatch, elements, lengths):
    monkeypatch.setitem(chunk._BLOCK_ELEMENTS, "cpu", elements)
    inputs = rule_inputs(1, 695, 1, 1, 8, 8, num_states=6) if lengths else rule_inputs(5, 139, 1, 1, 8, 8)
    options = dict(cu_seqlens=bounds(*lengths)) if lengths else {}
    reference = run(recurrent_gated_delta_rule_ref, inputs, **options)
    assert_equal(run(chunk_gated_delta_rule, inputs, **options), reference, **FLOAT64)


@pytest.mark.parametrize("cut", [1, 64, 75])
def test_two_halves_with_the_carried_state_equal_the_whole(cut):
    inputs = rule_inputs(2, 140, 1, 2, 8, 12)

    def halves(q, k, v, *, initial_state, output_final_state, **gates):
        state, outputs = initial_state, []
        for part in (slice(0, cut), slice(cut, None)):
            tokens = (x[:, part] for x in (q, k, v))
            gates_of_part = {name: x[:, part] for name, x in gates.items()}
            o, state = chunk_gated_delta_rule(*tokens, **gates_of_part, initial_state=state, output_final_state=True)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    assert_equal(run(halves, inputs), run(chunk_gated_delta_rule, inputs), **FLOAT64)


EXTREMES = {
    # The state is never forgotten: sums over the whole sequence.
    "no decay": dict(g=lambda g: g * 1e-6),
    # exp(-cumsum) overflows, exp(cumsum) is 0.
    "decay of exp(-50)": dict(g=lambda g: torch.full_like(g, -50.0)),
    # Sums of g reach -1e3 while neighbours differ by 1e-3.
    "resets between slow decay": dict(
        g=lambda g: torch.where(torch.arange(g.shape[1])[:, None] % 9 == 4, -60.0, g / 1e3)
    ),
    "beta 0": dict(beta=torch.zeros_like),
    "beta 1": dict(beta=torch.ones_like),
    # Negative eigenvalues: the largest norm the solve can meet.
    "beta 2, no decay": dict(beta=lambda b: torch.full_like(b, 2.0), g=torch.zeros_like),
    "beta from 0 to 2": dict(beta=lambda b: b * 2),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_gates(name):
    inputs = rule_inputs(1, 150, 1, 2, 16, 12)
    inputs |= {key: change(inputs[key]) for key, change in EXTREMES[name].items()}
    reference = run(recurrent_gated_delta_rule_ref, inputs)
    assert_equal(run(chunk_gated_delta_rule, inputs), reference, **FLOAT64)
    inputs = {key: x.float() for key, x in inputs.items()}
    reference = run(recurrent_gated_delta_rule_ref, {key: x.double() for key, x in inputs.items()})
    # Without decay and with beta 2 errors of early tokens stay to the end: 150 steps instead of a few.
    tolerance = dict(forward=2e-5, backward=2e-5) if name.startswith("beta 2") else FLOAT32
    assert_equal(run(chunk_gated_delta_rule, inputs), reference, **tolerance)


def test_identical_keys():
    inputs = rule_inputs(1, 130, 1, 1, 16, 16)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 130, -1, -1).clone()
    assert_equal(run(chunk_gated_delta_rule, inputs), run(recurrent_gated_delta_rule_ref, inputs), **FLOAT64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_multiplied_in_float32(dtype):
    """On the same 16-bit inputs the only error is rounding each result once on its way out."""
    inputs = cast(rule_inputs(1, 130, 2, 4, 24, 20), dtype)
    options = dict(use_qk_l2norm_in_kernel=True)
    exact = run(recurrent_gated_delta_rule_ref, {name: x.double() for name, x in inputs.items()}, **options)
    ours = run(chunk_gated_delta_rule, inputs, **options)
    for got, expected in zip(ours, exact, strict=True):
        for name, value in expected.items():
            once = rms_error(value.to(got[name].dtype), value)
            assert rms_error(got[name], value) <= once * 1.02 + FLOAT32["backward"], name


def test_16_bit_inputs_without_norm_are_scaled_in_float32():
    inputs = cast(rule_inputs(1, 70, 1, 1, 24, 20), torch.bfloat16)
    exact, _ = run(recurrent_gated_delta_rule_ref, {name: x.double() for name, x in inputs.items()})
    ours, _ = run(chunk_gated_delta_rule, inputs)
    once = rms_error(exact["o"].to(torch.bfloat16), exact["o"])
    assert rms_error(ours["o"], exact["o"]) <= once * 1.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_of_16_bit_is_that_of_its_inputs(dtype):
    """Against the unrounded inputs, the error is at most twice what rounding them costs the exact recurrence."""
    exact_inputs = rule_inputs(1, 130, 2, 4, 24, 20)
    inputs = cast(exact_inputs, dtype)
    exact = run(recurrent_gated_delta_rule_ref, exact_inputs)
    rounded = run(recurrent_gated_delta_rule_ref, {name: x.double() for name, x in inputs.items()})
    ours = run(chunk_gated_delta_rule, inputs)
    for got, expected, cost in zip(ours, exact, rounded, strict=True):
        for name, value in expected.items():
            assert rms_error(got[name], value) <= 2 * rms_error(cost[name], value) + torch.finfo(dtype).eps / 4, name


def test_dtypes_of_results():
    inputs = cast(rule_inputs(1, 70, 1, 2, 8, 8), torch.bfloat16)
    inputs["beta"] = inputs["beta"].bfloat16()
    inputs["initial_state"] = inputs["initial_state"].bfloat16()
    outputs, grads = run(chunk_gated_delta_rule, inputs)
    assert outputs["o"].dtype == torch.bfloat16 and outputs["final_state"].dtype == torch.float32
    assert {name: x.dtype for name, x in grads.items()} == {name: x.dtype for name, x in inputs.items()}
    # The state keeps more than bfloat16 can hold.
    assert rms_error(outputs["final_state"].bfloat16(), outputs["final_state"]) > 1e-4


def test_autocast_does_not_lower_the_precision():
    inputs = {name: x.float() for name, x in rule_inputs(1, 70, 1, 1, 16, 16).items()}
    reference = run(chunk_gated_delta_rule, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(chunk_gated_delta_rule, inputs)
    assert_equal(ours, reference, forward=0.0, backward=0.0)


def test_strided_views_of_one_tensor():
    """q, k, v as slices of the convolution's output, g and beta of one projection, the state transposed."""
    inputs = rule_inputs(2, 130, 2, 4, 12, 8)
    fused = torch.cat([inputs[name].flatten(2) for name in "qkv"], -1)
    q, k, v = fused.split([24, 24, 32], -1)
    views = dict(q=q.unflatten(-1, (2, 12)), k=k.unflatten(-1, (2, 12)), v=v.unflatten(-1, (4, 8)))
    views["g"], views["beta"] = torch.stack([inputs["g"], inputs["beta"]], -1).unbind(-1)
    views["initial_state"] = inputs["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not any(x.is_contiguous() for x in views.values())
    before = {name: x.clone() for name, x in views.items()}
    o, final = chunk_gated_delta_rule(
        *(views[n] for n in "qkv"), **{n: views[n] for n in NAMES[3:]}, output_final_state=True
    )
    expected, _ = run(recurrent_gated_delta_rule_ref, inputs)
    assert rms_error(o, expected["o"]) < 1e-10 and rms_error(final, expected["final_state"]) < 1e-10
    assert all(torch.equal(views[name], before[name]) for name in views)


def test_gradient_of_the_output_may_have_any_strides():
    inputs = rule_inputs(1, 70, 1, 2, 8, 8)
    ours = run(lambda *a, **kw: (lambda o, s: (o.transpose(1, 2), s))(*chunk_gated_delta_rule(*a, **kw)), inputs)
    reference = run(
        lambda *a, **kw: (lambda o, s: (o.transpose(1, 2), s))(*recurrent_gated_delta_rule_ref(*a, **kw)), inputs
    )
    assert_equal(ours, reference, **FLOAT64)


@pytest.mark.parametrize("wanted", [("v",), ("g", "initial_state"), ("q", "beta"), ("k",)], ids=",".join)
def test_gradients_of_some_inputs_only(wanted):
    inputs = rule_inputs(1, 70, 1, 2, 8, 8)
    _, expected = run(chunk_gated_delta_rule, inputs)
    leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    o, final = chunk_gated_delta_rule(
        *(leaves[n] for n in "qkv"), **{n: leaves[n] for n in NAMES[3:]}, output_final_state=True
    )
    loss(o, final).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=0, atol=0)


def test_only_the_final_state_is_used():
    inputs = rule_inputs(1, 70, 1, 2, 8, 8)

    def state_only(function):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        _, final = function(*(leaves[n] for n in "qkv"), **{n: leaves[n] for n in NAMES[3:]}, output_final_state=True)
        return torch.autograd.grad(final.sin().sum(), [leaves[n] for n in NAMES], materialize_grads=True)

    for name, got, expected in zip(
        NAMES, state_only(chunk_gated_delta_rule), state_only(recurrent_gated_delta_rule_ref), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_defaults_are_no_state_and_scale_of_the_head_size(function):
    inputs = rule_inputs(2, 70, 1, 2, 9, 8)
    inputs["initial_state"].zero_()
    expected, _ = run(recurrent_gated_delta_rule_ref, inputs, scale=1 / 3)
    o, final = function(*(inputs[n] for n in "qkv"), g=inputs["g"], beta=inputs["beta"])
    assert final is None and rms_error(o, expected["o"]) < 1e-10


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept():
    inputs = rule_inputs(1, 640, 1, 1, 16, 16)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    expected, _ = run(chunk_gated_delta_rule, inputs)
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o, final = chunk_gated_delta_rule(
            *(leaves[n] for n in "qkv"), **{n: leaves[n] for n in NAMES[3:]}, output_final_state=True
        )
    assert not o.requires_grad and kept == []
    torch.testing.assert_close(o, expected["o"], rtol=0, atol=0)
    torch.testing.assert_close(final, expected["final_state"], rtol=0, atol=0)


def test_results_share_no_memory_with_inputs_or_each_other():
    inputs = rule_inputs(1, 64, 1, 1, 64, 64)  # shapes at which a copy could be left out
    o, final = chunk_gated_delta_rule(
        *(inputs[n] for n in "qkv"), **{n: inputs[n] for n in NAMES[3:]}, output_final_state=True
    )
    storages = [x.untyped_storage().data_ptr() for x in (*inputs.values(), o, final)]
    assert len(set(storages)) == len(storages)
    empty = {n: x[:, :0] for n, x in inputs.items() if n != "initial_state"}
    state = inputs["initial_state"]
    _, final = chunk_gated_delta_rule(
        *(empty[n] for n in "qkv"), g=empty["g"], beta=empty["beta"], initial_state=state, output_final_state=True
    )
    assert final.data_ptr() != state.data_ptr() and torch.equal(final, state)


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
@pytest.mark.parametrize("lengths", [None, (0,), (0, 0)], ids=["batch of two", "one document", "two documents"])
def test_no_tokens_pass_the_state_through(function, lengths):
    inputs = rule_inputs(1 if lengths else 2, 0, 1, 2, 8, 12, num_states=len(lengths) if lengths else None)
    outputs, grads = run(function, inputs, **(dict(cu_seqlens=bounds(*lengths)) if lengths else {}))
    assert outputs["o"].shape == inputs["v"].shape
    torch.testing.assert_close(outputs["final_state"], inputs["initial_state"], rtol=0, atol=0)
    assert grads["q"].shape == inputs["q"].shape
    torch.testing.assert_close(grads["initial_state"], loss_weights(*outputs.values())[1], rtol=0, atol=0)


def test_two_runs_are_equal_bit_by_bit():
    inputs = {name: x.float() for name, x in rule_inputs(1, 300, 1, 2, 16, 16).items()}
    first, second = (run(chunk_gated_delta_rule, inputs) for _ in range(2))
    assert_equal(first, second, forward=0.0, backward=0.0)


def test_a_table_serves_many_calls():
    lengths = (10, 0, 70, 64)
    inputs = rule_inputs(1, 144, 1, 2, 8, 8, num_states=4)
    table = prepare_chunk_table(bounds(*lengths).int())
    reference = run(recurrent_gated_delta_rule_ref, inputs, cu_seqlens=bounds(*lengths))
    for function in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, chunk_gated_delta_rule):
        assert_equal(run(function, inputs, cu_seqlens=table), reference, **FLOAT64)


def test_second_derivative_is_refused():
    inputs = {name: x.requires_grad_() for name, x in rule_inputs(1, 5, 1, 1, 4, 4).items()}
    o, _ = chunk_gated_delta_rule(*(inputs[n] for n in "qkv"), g=inputs["g"], beta=inputs["beta"])
    (grad,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def broken(**changes):
    """Arguments of a call in which something is wrong."""
    inputs = rule_inputs(1, 6, 2, 4, 8, 12)
    arguments = inputs | {n: change(inputs[n]) if callable(change) else change for n, change in changes.items()}
    return [arguments.pop(n) for n in "qkv"], arguments


ERRORS = {
    r"q \(\[1, 6, 16\]\) and k \(\[1, 6, 2, 8\]\) must both be \[B, T, H, K\]: give": dict(q=lambda x: x.flatten(2)),
    r"v \(\[1, 5, 4, 12\]\) must be \[B, T, HV, V\] with B and T of q .*: the layout": dict(v=lambda x: x[:, 1:]),
    r"v's heads \(3\) must be a multiple of q's heads \(2\): every key head": dict(v=lambda x: x[:, :, 1:]),
    r"must not be empty but in T: drop the call": dict(v=lambda x: x[..., :0]),
    r"g \(\[1, 6, 2\]\) must be \[B, T, HV\] = \[1, 6, 4\]: one per value head": dict(g=lambda x: x[..., :2]),
    r"beta \(\[1, 6, 4, 1\]\) must be \[B, T, HV\]": dict(beta=lambda x: x[..., None]),
    r"k \(torch.int64\) must have a float dtype: convert": dict(k=lambda x: x.long()),
    r"q \(torch.float64\), k \(torch.float32\) and v \(torch.float64\) must have one dtype": dict(
        k=lambda x: x.float()
    ),
    r"g \(meta\) must be on the device of v \(cpu\): move": dict(g=lambda x: x.to("meta")),
    r"initial_state \(\[4, 8, 12\]\) must be \[N, HV, K, V\] = \[1, 4, 8, 12\]: one": dict(
        initial_state=lambda x: x[0]
    ),
    r"must be \[N, HV, K, V\] = \[2, 4, 8, 12\]: one": dict(cu_seqlens=torch.tensor([0, 3, 6])),
    r"cu_seqlens \(ends at 5\) must end at the number of tokens \(6\): pass": dict(cu_seqlens=torch.tensor([0, 5])),
    r"q \(torch.float64\) must be float32, bfloat16 or float16 for backend triton: use": dict(backend="triton"),
}


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
@pytest.mark.parametrize("message", ERRORS)
def test_errors(message, function):
    positional, keywords = broken(**ERRORS[message])
    with pytest.raises(ValueError, match=message):
        function(*positional, **keywords)


def test_fla_is_given_documents_and_options(monkeypatch):
    """In place of the package a function with its arguments; to it the bounds are int64."""

    def theirs(q, k, v, *, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens):
        assert cu_seqlens.dtype == torch.int64
        options = dict(scale=scale, initial_state=initial_state, output_final_state=output_final_state)
        options |= dict(use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens)
        return recurrent_gated_delta_rule_ref(q, k, v, g=g, beta=beta, **options)

    monkeypatch.setattr("megatron_gdn.kernels.backend.find_spec", lambda name: name)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", SimpleNamespace(chunk_gated_delta_rule=theirs))
    inputs, lengths = rule_inputs(1, 9, 1, 2, 8, 12, num_states=3), (4, 0, 5)
    for options in (dict(scale=0.3), dict(use_qk_l2norm_in_kernel=True)):
        found = run(chunk_gated_delta_rule, inputs, cu_seqlens=bounds(*lengths).int(), backend="fla", **options)
        expected = run(recurrent_gated_delta_rule_ref, inputs, cu_seqlens=bounds(*lengths), **options)
        assert_equal(found, expected, forward=0.0, backward=0.0)


def test_options_that_a_backend_does_not_have_are_refused():
    inputs = rule_inputs(1, 5, 1, 1, 4, 4)
    tokens, gates = [inputs[name] for name in "qkv"], dict(g=inputs["g"], beta=inputs["beta"])
    with pytest.raises(ValueError, match=r"recompute_states \(True\) must be None with backend torch, which keeps"):
        chunk_gated_delta_rule(*tokens, **gates, recompute_states=True)
    with pytest.raises(ValueError, match=r"update_state \(True\) must be False with backend torch"):
        fused_recurrent_gated_delta_rule(*tokens, **gates, update_state=True)
    with pytest.raises(ValueError, match=r"backend \(fla\) (needs the package|is offered)"):
        fused_recurrent_gated_delta_rule(*tokens, **gates, backend="fla")
