"""The Triton convolution, interpreted, against torch's in float64: options, packed batches, views, decoding, errors."""

import functools

import pytest
import torch

from megatron_gdn.kernels import causal_conv1d, causal_conv1d_triton, prepare_chunk_table
from megatron_gdn.kernels.causal_conv1d import causal_conv1d_ref, causal_conv1d_update, causal_conv1d_update_ref
from tests.kernels.data import bounds, loss, loss_weights, rms_error
from tests.kernels.test_causal_conv1d import assert_same, inputs, results, states

conv = functools.partial(causal_conv1d, backend="triton")
# float32 sums of at most a few hundred terms, each rounded to 6e-8: measured 2e-7.
TOLERANCE = 1e-6


def narrow(tensors, dtype):
    return {n: x.to(dtype) for n, x in tensors.items()}


def exact(tensors, **options):
    """Results of the reference on the same numbers in float64."""
    return results(causal_conv1d_ref, narrow(tensors, torch.float64), **options)


@pytest.mark.parametrize("activation", ["silu", None])
# W and T: those of the models over two chunks; others' widths; T below W - 1 keeps a part of the old state; T of a
# whole chunk; D: over a block of channels, and one channel.
@pytest.mark.parametrize(
    "W, T, D, bias", [(4, 67, 35, True), (2, 8, 5, False), (3, 1, 5, True), (4, 2, 1, False), (4, 64, 5, True)]
)
def test_equals_reference(W, T, D, bias, activation):
    tensors = narrow(inputs(2, T, D, W, bias=bias), torch.float32)
    ours = results(conv, tensors, activation=activation, output_final_state=True)
    assert_same(ours, exact(tensors, activation=activation), TOLERANCE)


@pytest.mark.parametrize("with_table", [False, True])
# Documents shorter than W - 1 see rows of their state, never of the document before; empty ones hand their state on.
@pytest.mark.parametrize("lengths", [(0, 5, 0, 0, 9, 0), (1, 1, 2, 3, 66, 1)])
def test_packed_equals_document_by_document(lengths, with_table):
    packed = bounds(*lengths)
    tensors = narrow(inputs(1, sum(lengths), 6, 4, num_states=len(lengths)), torch.float32)
    given = prepare_chunk_table(packed) if with_table else packed
    ours = results(conv, tensors, cu_seqlens=given, output_final_state=True)
    assert_same(ours, exact(tensors, cu_seqlens=packed), TOLERANCE)


def test_nothing_leaks_between_documents():
    tensors = narrow(inputs(1, 20, 3, 4), torch.float32)
    tensors["x"][:, :10] = float("nan")
    leaf = tensors["x"].clone().requires_grad_()
    y, _ = conv(leaf, tensors["weight"], cu_seqlens=bounds(10, 10))
    (dx,) = torch.autograd.grad(loss(y), leaf)
    assert not y[:, :10].isfinite().any()
    expected = exact(dict(x=tensors["x"][:, 10:], weight=tensors["weight"]))[0]
    assert rms_error(y[:, 10:], expected) <= TOLERANCE
    assert dx[:, 10:].isfinite().all() and not dx[:, :10].isfinite().all()


def test_programs_over_several_chunks(monkeypatch):
    """Sums over three chunks in one program, the last program with fewer; without this, small batches have one each."""
    monkeypatch.setattr(causal_conv1d_triton, "MIN_PROGRAMS", 1)
    monkeypatch.setattr(causal_conv1d_triton, "MAX_STEPS", 3)
    tensors = narrow(inputs(1, 140, 5, 4, num_states=3), torch.float32)
    packed = bounds(70, 6, 64)
    ours = results(conv, tensors, cu_seqlens=packed, output_final_state=True)
    assert_same(ours, exact(tensors, cu_seqlens=packed), TOLERANCE)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_summed_in_float32(dtype, activation):
    """The only error is rounding each result once; gradients through the final state join before that."""
    tensors = narrow(inputs(1, 66, 35, 4), dtype)
    reference = exact(tensors, activation=activation)
    y, final, grads = results(conv, tensors, activation=activation, output_final_state=True)
    for got, value in [(y, reference[0]), *((grads[n], reference[2][n]) for n in tensors)]:
        assert got.dtype == dtype
        # 35 rounded sums differ from the mean rounding by chance, and float32 adds 1e-6.
        assert rms_error(got, value) <= 1.02 * rms_error(value.to(dtype), value) + 1e-6
    assert torch.equal(final, tensors["x"][:, -3:])


def test_float32_state_of_a_bfloat16_batch_is_not_rounded():
    tensors = narrow(inputs(1, 2, 40, 4), torch.bfloat16)
    tensors["initial_state"] = inputs(1, 2, 40, 4)["initial_state"].float()
    reference = exact(tensors)
    y, _, grads = results(conv, tensors, output_final_state=True)
    assert rms_error(y, reference[0]) <= 1.02 * rms_error(reference[0].bfloat16(), reference[0]) + 1e-6
    assert grads["initial_state"].dtype == torch.float32
    # The final state is rounded to bfloat16; its gradient is not.
    assert rms_error(grads["initial_state"], reference[2]["initial_state"]) <= TOLERANCE


def test_slice_of_a_projection_is_read_in_place(monkeypatch):
    """Channels of a wider, transposed tensor, as in the layer: no copy, and nothing beside the slice is read."""
    tensors = narrow(inputs(2, 9, 6, 4), torch.float32)
    wide = torch.full((9, 2, 11), float("nan"))
    wide[..., 2:8] = tensors["x"].transpose(0, 1)
    leaf = wide.requires_grad_()
    view = leaf.transpose(0, 1)[..., 2:8]
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: self)
    y, _ = conv(view, tensors["weight"], tensors["bias"])
    (dwide,) = torch.autograd.grad(loss(y), leaf)
    monkeypatch.undo()
    plain = tensors["x"].double().requires_grad_()
    expected, _ = causal_conv1d_ref(plain, tensors["weight"].double(), tensors["bias"].double())
    assert rms_error(y, expected) <= TOLERANCE
    (dx,) = torch.autograd.grad(loss(expected), plain)
    assert rms_error(dwide.transpose(0, 1)[..., 2:8], dx) <= TOLERANCE


def test_gradient_without_strides():
    """That of a sum is one number, expanded."""
    tensors = narrow(inputs(2, 9, 6, 4), torch.float32)
    x, plain = tensors["x"].requires_grad_(), tensors["x"].detach().double().requires_grad_()
    (dx,) = torch.autograd.grad(conv(x, tensors["weight"])[0].sum(), x)
    (expected,) = torch.autograd.grad(causal_conv1d_ref(plain, tensors["weight"].double())[0].sum(), plain)
    assert rms_error(dx, expected) <= TOLERANCE


def test_channels_that_are_not_neighbours_are_copied():
    tensors = narrow(inputs(2, 9, 6, 4), torch.float32)
    view = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert view.stride(2) != 1
    y, _ = conv(view, tensors["weight"], tensors["bias"])
    assert torch.equal(y, conv(tensors["x"], tensors["weight"], tensors["bias"])[0])


def test_gradient_into_a_given_buffer():
    """dx goes into a slice of the gradient of the projection; nothing beside it is written."""
    tensors = narrow(inputs(2, 9, 6, 4), torch.float32)
    dy = loss_weights(tensors["x"])[0].float()
    arguments = (dy, None, tensors["x"], tensors["weight"], None, None, None, "silu")
    expected = causal_conv1d_triton.backward(*arguments)[0]
    wide = torch.full((9, 2, 11), float("nan"))
    target = wide.transpose(0, 1)[..., 2:8]
    dx = causal_conv1d_triton.backward(*arguments, dx=target)[0]
    assert dx is target and torch.equal(dx, expected)
    assert wide[..., :2].isnan().all() and wide[..., 8:].isnan().all()


def test_gradients_of_some_inputs_and_outputs_only():
    tensors = narrow(inputs(1, 9, 6, 4), torch.float32)
    _, _, expected = results(conv, tensors, output_final_state=True)
    for wanted in tensors:
        leaves = {n: x.clone().requires_grad_(n == wanted) for n, x in tensors.items()}
        y, final = conv(leaves["x"], leaves["weight"], leaves["bias"], **states(leaves), output_final_state=True)
        loss(y, final).backward()
        assert [n for n, leaf in leaves.items() if leaf.grad is not None] == [wanted]
        torch.testing.assert_close(leaves[wanted].grad, expected[wanted], rtol=0, atol=0)
    leaf = tensors["x"].clone().requires_grad_()
    _, final = conv(leaf, tensors["weight"], output_final_state=True)
    (dx,) = torch.autograd.grad(final.sum(), leaf)
    assert torch.equal(dx[0, :, 0], torch.tensor([0.0] * 6 + [1.0] * 3))


def test_twice_the_same_bits():
    tensors = narrow(inputs(1, 70, 6, 4, num_states=2), torch.bfloat16)
    first, second = (results(conv, tensors, cu_seqlens=bounds(3, 67), output_final_state=True) for _ in range(2))
    for a, b in zip([*first[:2], *first[2].values()], [*second[:2], *second[2].values()], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [None, (0, 0)])
def test_no_tokens(lengths):
    tensors = narrow(inputs(1, 0, 6, 4, num_states=2 if lengths else 1), torch.float32)
    options = dict(cu_seqlens=bounds(*lengths)) if lengths else {}
    y, final, grads = results(conv, tensors, output_final_state=True, **options)
    assert y.shape == tensors["x"].shape and torch.equal(final, tensors["initial_state"])
    torch.testing.assert_close(grads["initial_state"].double(), loss_weights(y, final)[1], rtol=0, atol=0)
    assert not grads["weight"].any() and not grads["bias"].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("W, bias, activation", [(4, True, "silu"), (2, False, None)])
def test_decoding_equals_the_sequence(W, bias, activation, backend):
    """Token by token with a state in place, inputs and state slices of wider tensors."""
    tensors = narrow(inputs(3, 6, 35, W, bias=bias), torch.float32)
    y, final, _ = exact(tensors, activation=activation)
    state = torch.full((3, W, 40), 7.0)
    view = state[:, 1:, :35]
    view.copy_(tensors["initial_state"])
    weights = tensors["weight"], tensors.get("bias")
    options = dict(activation=activation, backend=backend)
    steps = [causal_conv1d_update(tensors["x"][:, t], view, *weights, **options) for t in range(6)]
    assert rms_error(torch.stack(steps, 1), y) <= TOLERANCE
    assert torch.equal(view, final.float()) and (state[:, 0] == 7).all() and (state[..., 35:] == 7).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_decoding_in_bfloat16_rounds_once(backend):
    tensors = narrow(inputs(3, 1, 200, 4), torch.bfloat16)
    x, state = tensors["x"][:, 0], tensors["initial_state"].float()
    expected, after = causal_conv1d_update_ref(x.double(), state.double(), tensors["weight"], tensors["bias"])
    y = causal_conv1d_update(x, state, tensors["weight"], tensors["bias"], backend=backend)
    assert y.dtype == torch.bfloat16 and torch.equal(state.double(), after)
    assert rms_error(y, expected) <= 1.02 * rms_error(expected.bfloat16(), expected) + 1e-6


X, WEIGHT, STATE = torch.zeros(2, 6), torch.zeros(6, 4), torch.zeros(2, 3, 6)
UPDATE_ERRORS = {
    r"weight \(\[5, 4\]\) must be \[D, W\] with W >= 2 for x \[N, D\]": dict(weight=torch.zeros(5, 4)),
    r"bias \(\[5\]\) must be \[D\] = \[6\]": dict(bias=torch.zeros(5)),
    r"activation \(gelu\) must be 'silu' or None": dict(activation="gelu"),
    r"state \(\[2, 4, 6\]\) must be \[N, W - 1, D\] = \[2, 3, 6\]": dict(state=torch.zeros(2, 4, 6)),
    r"state \(strides \(18, 1, 3\)\) must have contiguous channels": dict(state=torch.zeros(2, 6, 3).transpose(1, 2)),
    r"state \(torch.int64\) must have a float dtype": dict(state=STATE.long()),
    r"state \(torch.float64\) must be float32, bfloat16 or float16 for backend triton": dict(state=STATE.double()),
    r"has no gradients and an input requires them: use torch.no_grad\(\)": dict(weight=WEIGHT.clone().requires_grad_()),
    r"width \(5\) must be 2, 3 or 4 for backend triton": dict(weight=torch.zeros(6, 5), state=torch.zeros(2, 4, 6)),
}


@pytest.mark.parametrize("message", UPDATE_ERRORS)
def test_errors_of_decoding(message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(**(dict(x=X, state=STATE, weight=WEIGHT, backend="triton") | UPDATE_ERRORS[message]))


@pytest.mark.parametrize("name", ["x", "state", "weight", "bias"])
def test_decoding_refuses_every_gradient(name):
    arguments = dict(x=X, state=STATE.clone(), weight=WEIGHT, bias=torch.zeros(6))
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(ValueError, match="has no gradients and an input requires them"):
        causal_conv1d_update(**arguments)


ERRORS = {
    r"x \(torch.float64\) must be float32, bfloat16 or float16 for backend triton: use": dict(x=X[None].double()),
    r"width \(5\) must be 2, 3 or 4 for backend triton: use backend 'torch'": dict(weight=torch.zeros(6, 5)),
    r"backend \(fla\) is offered for chunk_gated_delta_rule only: use 'torch' or 'triton'": dict(backend="fla"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(dict(x=X[None], weight=WEIGHT, backend="triton") | ERRORS[message]))
