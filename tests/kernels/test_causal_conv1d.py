"""The short convolution against torch's own in float64, packed batches, carried state, precision, errors."""

import sys

import pytest
import torch

from megatron_gdn.kernels import causal_conv1d as conv
from megatron_gdn.kernels import prepare_chunk_table
from megatron_gdn.kernels.causal_conv1d import causal_conv1d_ref
from tests.kernels.data import bounds, loss, loss_weights, rms_error

# float64 sums of W terms: a few roundings of 1e-16.
TOLERANCE = 1e-12


def inputs(B, T, D, W, *, num_states=None, bias=True):
    rng = torch.Generator().manual_seed(1)
    shapes = dict(x=(B, T, D), weight=(D, W), bias=(D,), initial_state=(num_states or B, W - 1, D))
    made = {n: torch.randn(shape, generator=rng, dtype=torch.float64) for n, shape in shapes.items()}
    return made if bias else {n: x for n, x in made.items() if n != "bias"}


def results(function, tensors, **options):
    """(y, final state, gradients by name)."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
    y, final = function(*(leaves[n] for n in ("x", "weight", "bias") if n in leaves), **states(leaves), **options)
    grads = torch.autograd.grad(loss(y, final), list(leaves.values()))
    return y, final, dict(zip(leaves, grads, strict=True))


def states(tensors):
    return {n: tensors[n] for n in ("initial_state",) if n in tensors}


def assert_same(ours, reference, tolerance=TOLERANCE):
    for name, got, expected in (("y", ours[0], reference[0]), ("final_state", ours[1], reference[1])):
        assert rms_error(got, expected) <= tolerance, name
    for name, expected in reference[2].items():
        assert rms_error(ours[2][name], expected) <= tolerance, name


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [True, False])
# W of the models is 4; 2 and 3 are others' choices; a T below W - 1 keeps a part of the old state.
@pytest.mark.parametrize("W, T", [(4, 37), (2, 8), (3, 1), (4, 2), (4, 3)])
def test_equals_torch(W, T, bias, activation):
    tensors = inputs(2, T, 5, W, bias=bias)
    reference = results(causal_conv1d_ref, tensors, activation=activation)
    assert_same(results(conv, tensors, activation=activation, output_final_state=True), reference)


def test_reference_by_hand():
    """y_t = silu(w_0 x_{t-1} + w_1 x_t + b), one channel."""
    x, w, b, s = torch.tensor([[[1.0], [-2.0], [3.0]]]), torch.tensor([[0.5, -1.0]]), torch.tensor([0.1]), 4.0
    z = [0.5 * s - 1.0 * 1.0 + 0.1, 0.5 * 1.0 - 1.0 * -2.0 + 0.1, 0.5 * -2.0 - 1.0 * 3.0 + 0.1]
    y, final = causal_conv1d_ref(x, w, b, initial_state=torch.tensor([[[s]]]))
    torch.testing.assert_close(y.flatten(), torch.nn.functional.silu(torch.tensor(z)))
    assert final.item() == 3.0


@pytest.mark.parametrize("stretch", [1, 2**10, 2**30])
def test_length_of_stretches_does_not_change_the_result(monkeypatch, stretch):
    # The package's attribute of this name is the function.
    monkeypatch.setitem(sys.modules[conv.__module__]._STRETCH_ELEMENTS, "cpu", stretch)
    tensors = inputs(2, 70, 8, 4)
    assert_same(results(conv, tensors, output_final_state=True), results(causal_conv1d_ref, tensors))


@pytest.mark.parametrize("with_table", [False, True])
# Documents shorter than W - 1 see rows of their state, never of the document before.
@pytest.mark.parametrize("lengths", [(0, 5, 0, 0, 9, 0), (1, 1, 2, 3, 30, 1), (40,)])
def test_packed_equals_document_by_document(lengths, with_table):
    tensors = inputs(1, sum(lengths), 6, 4, num_states=len(lengths))
    packed = bounds(*lengths)
    reference = results(causal_conv1d_ref, tensors, cu_seqlens=packed)
    given = prepare_chunk_table(packed) if with_table else packed
    assert_same(results(conv, tensors, cu_seqlens=given, output_final_state=True), reference)


def test_nothing_leaks_between_documents():
    tensors = inputs(1, 20, 3, 4)
    tensors["x"][:, :10] = float("nan")
    y, _ = conv(tensors["x"], tensors["weight"], cu_seqlens=bounds(10, 10))
    assert not y[:, :10].isfinite().any()
    # Before the second document lie zeros.
    expected, _ = causal_conv1d_ref(tensors["x"][:, 10:], tensors["weight"])
    assert rms_error(y[:, 10:], expected) <= TOLERANCE


def test_two_halves_with_the_carried_state_equal_the_whole():
    tensors = inputs(2, 21, 4, 4)

    def halves(x, weight, bias, *, initial_state):
        first, state = conv(x[:, :2], weight, bias, initial_state=initial_state, output_final_state=True)
        second, state = conv(x[:, 2:], weight, bias, initial_state=state, output_final_state=True)
        return torch.cat([first, second], 1), state

    assert_same(results(halves, tensors), results(causal_conv1d_ref, tensors))


def test_no_state_is_zeros_and_views_work():
    tensors = inputs(2, 9, 6, 4)
    wide = torch.randn(2, 9, 10, dtype=torch.float64)
    view = wide[..., 2:8]
    y, final = conv(view, tensors["weight"], tensors["bias"])
    expected, _ = causal_conv1d_ref(view, tensors["weight"], tensors["bias"])
    assert final is None and rms_error(y, expected) <= TOLERANCE


def test_gradients_of_some_inputs_only():
    tensors = inputs(1, 9, 6, 4)
    _, _, expected = results(conv, tensors, output_final_state=True)
    for wanted in tensors:
        leaves = {n: x.clone().requires_grad_(n == wanted) for n, x in tensors.items()}
        y, final = conv(leaves["x"], leaves["weight"], leaves["bias"], **states(leaves), output_final_state=True)
        loss(y, final).backward()
        assert [n for n, leaf in leaves.items() if leaf.grad is not None] == [wanted]
        torch.testing.assert_close(leaves[wanted].grad, expected[wanted], rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_summed_in_float32(dtype, activation):
    """The only error is rounding each result once; dx and dw, sums over W and T, included."""
    tensors = {n: x.to(dtype) for n, x in inputs(1, 60, 40, 4).items()}
    exact = results(causal_conv1d_ref, {n: x.double() for n, x in tensors.items()}, activation=activation)
    y, final, grads = results(conv, tensors, activation=activation, output_final_state=True)
    for got, value in [(y, exact[0]), *((grads[n], exact[2][n]) for n in ("x", "weight", "bias"))]:
        assert got.dtype == dtype
        # The final state's gradient joins that of x after it is rounded: a second rounding of 3 rows of 60.
        assert rms_error(got, value) <= 1.1 * rms_error(value.to(dtype), value) + 1e-6
    assert torch.equal(final, tensors["x"][:, -3:])


@pytest.mark.parametrize("packed", [None, bounds(4, 5)])
def test_final_state_has_its_own_memory_and_no_more(packed):
    tensors = inputs(1, 9, 6, 4)
    _, final = conv(tensors["x"], tensors["weight"], output_final_state=True, cu_seqlens=packed)
    assert torch.equal(final[-1], tensors["x"][0, -3:])
    assert final.untyped_storage().data_ptr() != tensors["x"].untyped_storage().data_ptr()
    assert final.untyped_storage().nbytes() == final.numel() * final.element_size()


@pytest.mark.parametrize("lengths", [None, (0, 0)])
def test_no_tokens(lengths):
    tensors = inputs(1, 0, 6, 4, num_states=2 if lengths else 1)
    options = dict(cu_seqlens=bounds(*lengths)) if lengths else {}
    y, final, grads = results(conv, tensors, output_final_state=True, **options)
    assert y.shape == tensors["x"].shape and torch.equal(final, tensors["initial_state"])
    torch.testing.assert_close(grads["initial_state"], loss_weights(y, final)[1], rtol=0, atol=0)
    assert not grads["weight"].any()


ERRORS = {
    r"weight \(\[6, 1, 4\]\) must be \[D, W\] with W >= 2 for x .*: squeeze": dict(weight=torch.zeros(6, 1, 4)),
    r"weight \(\[6, 1\]\) must be \[D, W\] with W >= 2": dict(weight=torch.zeros(6, 1)),
    r"bias \(\[5\]\) must be \[D\] = \[6\]: one per channel": dict(bias=torch.zeros(5)),
    r"activation \(gelu\) must be 'silu' or None: apply": dict(activation="gelu"),
    r"initial_state \(\[1, 4, 6\]\) must be \[N, W - 1, D\] = \[1, 3, 6\]: the": dict(
        initial_state=torch.zeros(1, 4, 6)
    ),
    r"x \(torch.int64\) must have a float dtype": dict(x=torch.zeros(1, 9, 6, dtype=torch.int64)),
    r"cu_seqlens \(ends at 8\) must end at the number of tokens \(9\)": dict(cu_seqlens=torch.tensor([0, 8])),
    r"backend \(fla\) is offered for chunk_gated_delta_rule only: use 'torch' or 'triton'": dict(backend="fla"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        conv(**(dict(x=torch.zeros(1, 9, 6), weight=torch.zeros(6, 4)) | ERRORS[message]))
