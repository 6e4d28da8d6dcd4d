"""The gates in Triton, interpreted, against plain torch in float64: range, sizes, views, precision, errors."""

import functools

import pytest
import torch

from megatron_gdn.kernels.gated_delta_rule import gate, gate_triton
from megatron_gdn.kernels.gated_delta_rule.gate import gated_delta_gate_ref, gates_ref
from megatron_gdn.kernels.triton_support import rows
from tests.kernels.data import loss, loss_weights, rms_error
from tests.kernels.test_norms_and_gate import assert_rounded_once, assert_same, normal

gates = functools.partial(gate.gates, backend="triton")
gated_delta_gate = functools.partial(gate.gated_delta_gate, backend="triton")
# float32 chains of about ten operations and sums of at most 100 terms, each rounded to 6e-8: measured 2e-7.
TOLERANCE = 1e-6


def tensors(*shape, dtype=torch.float32):
    """alpha, b, A_log, dt_bias."""
    alpha, b = normal(*shape, dtype=dtype) * 3, normal(*shape, dtype=dtype, seed=3)
    return [alpha, b, normal(shape[-1], seed=1).float(), normal(shape[-1], seed=2).float()]


def results(function, *inputs, **options):
    """g, beta, then gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    return [*outputs, *torch.autograd.grad(loss(*outputs), leaves)]


def exact(inputs, **options):
    return results(gates_ref, *(x.double() for x in inputs), **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("allow_neg_eigval", [False, True])
# Heads: one, of no power of two, a usual rank's, the largest block; rows: one, over a block.
@pytest.mark.parametrize("shape", [(1,), (2, 9, 6), (1, 70, 32), (3, 130)])
def test_equals_reference(shape, allow_neg_eigval, backend):
    inputs, options = tensors(*shape), dict(allow_neg_eigval=allow_neg_eigval)
    assert_same(results(gates, *inputs, **options, backend=backend), exact(inputs, **options), TOLERANCE)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_by_hand(backend):
    """Softplus(0) = ln 2, sigmoid(0) = 1/2; the rate is exp(A_log)."""
    zero = torch.zeros(1)
    g, beta = gates(zero, zero, torch.tensor([3.0]).log(), zero, backend=backend)
    torch.testing.assert_close(g, -3 * torch.tensor([2.0]).log())
    assert beta == 0.5 and gates(zero, zero, zero, zero, allow_neg_eigval=True, backend=backend)[1] == 1


def test_decay_alone():
    alpha, _, A_log, dt_bias = tensors(2, 9, 6)
    leaves = [x.clone().requires_grad_() for x in (alpha, A_log, dt_bias)]
    plain = [x.double().requires_grad_() for x in leaves]
    ours, expected = gated_delta_gate(*leaves), gated_delta_gate_ref(*(x.double() for x in plain))
    ours = [ours, *torch.autograd.grad(loss(ours), leaves)]
    assert_same(ours, [expected, *torch.autograd.grad(loss(expected), plain)], TOLERANCE)


# exp(100) in the sigmoid of -100; infinity there is right, 1 / infinity is 0.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_every_element_over_the_whole_range():
    """Softplus from 1e-35 to 100 and the sigmoids, element by element: a mean over elements would hide small ones."""
    x = torch.linspace(-80, 100, 721)[:, None]
    zero = torch.zeros(1)
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    g, beta = gates(*leaves, zero, zero)
    dalpha, db = torch.autograd.grad(g.sum() + beta.sum(), leaves)
    wide = x.double()
    expected_g, expected_beta = gates_ref(wide, wide, zero.double(), zero.double())
    slope = wide.sigmoid() * (-wide).sigmoid()
    # float32 arithmetic of about ten operations; the denormal numbers of sigmoid(-100) round to 1e-45.
    for got, expected in ((g, expected_g), (beta, expected_beta), (dalpha, -wide.sigmoid()), (db, slope)):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_from_16_bits(dtype):
    inputs = tensors(50, 6, dtype=dtype)
    ours = results(gates, *inputs)
    assert [y.dtype for y in ours] == [torch.float32, torch.float32, dtype, dtype, torch.float32, torch.float32]
    # A 16-bit result, or 16 bits anywhere inside, would be off by 1e-4 or more.
    assert_rounded_once(ours, exact(inputs))


def test_slices_of_a_projection():
    """beta and alpha side by side and batch behind time, as in the layer."""
    wide = normal(9, 2, 15, dtype=torch.float32)
    A_log, dt_bias = normal(6, seed=1).float(), normal(6, seed=2).float()

    def of_projection(function):
        def run(wide, A_log, dt_bias):
            ba = wide.transpose(0, 1)
            return function(ba[..., 7:13], ba[..., 1:7], A_log, dt_bias)

        return run

    ours = results(of_projection(gates), wide, A_log, dt_bias)
    expected = results(of_projection(gates_ref), wide.double(), A_log.double(), dt_bias.double())
    assert_same(ours, expected, TOLERANCE)


def test_gradients_into_given_buffers():
    alpha, b, A_log, dt_bias = tensors(5, 6)
    dg, dbeta = (x.float() for x in loss_weights(alpha, b))
    arguments = (dg, dbeta, alpha, b, A_log, dt_bias, 1.0)
    expected = gate_triton.backward(*arguments)
    wide = torch.full((5, 15), float("nan"))
    ours = gate_triton.backward(*arguments, dalpha=wide[:, 7:13], db=wide[:, 1:7])
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    assert torch.equal(wide[:, 1:13], torch.cat([expected[1], expected[0]], 1)) and wide.isnan().sum() == 15


def test_sums_over_several_blocks_of_tokens(monkeypatch):
    """Two programs of two blocks of 64 tokens, the last one not full."""
    monkeypatch.setattr(rows, "MAX_PROGRAMS", 2)
    inputs = tensors(240, 6)
    assert_same(results(gates, *inputs), exact(inputs), TOLERANCE)


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_of_some_inputs_only(wanted):
    inputs = tensors(5, 6)
    expected = results(gates, *inputs)[2 + wanted]
    inputs[wanted].requires_grad_()
    loss(*gates(*inputs)).backward()
    assert torch.equal(inputs[wanted].grad, expected)


def test_gradient_of_one_output_only():
    inputs = tensors(5, 6)
    plain = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    for i in range(2):
        ours = torch.autograd.grad(loss(gates(*inputs)[i]), inputs, allow_unused=True, materialize_grads=True)
        expected = torch.autograd.grad(loss(gates_ref(*plain)[i]), plain, allow_unused=True, materialize_grads=True)
        for got, value in zip(ours, expected, strict=True):
            assert rms_error(got, value) <= TOLERANCE if value.any() else not got.any()


def test_twice_the_same_bits():
    inputs = tensors(70, 6, dtype=torch.bfloat16)
    first, second = (results(gates, *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens():
    inputs = tensors(2, 0, 6)
    found = results(gates, *inputs)
    assert found[0].shape == found[1].shape == (2, 0, 6) and not found[4].any() and not found[5].any()


ERRORS = {
    r"b \(\[2, 5\]\) must have the shape of alpha \(\[2, 6\]\): one per head": dict(b=torch.ones(2, 5)),
    r"A_log \(\[5\]\) must have the last dimension of alpha \(\[2, 6\]\): one per head": dict(A_log=torch.ones(5)),
    r"dt_bias \(torch.bfloat16\) must be float32: convert it": dict(dt_bias=torch.ones(6).bfloat16()),
    r"b \(torch.int64\) must have a float dtype: convert": dict(b=torch.ones(2, 6, dtype=torch.int64)),
    r"A_log \(torch.float64\) must be float32, bfloat16 or float16 for backend triton": dict(
        A_log=torch.ones(6).double()
    ),
    r"backend \(fla\) is offered for chunk_gated_delta_rule only": dict(backend="fla"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    x = torch.ones(2, 6)
    with pytest.raises(ValueError, match=message):
        gate.gates(**(dict(alpha=x, b=x, A_log=x[0], dt_bias=x[0], backend="triton") | ERRORS[message]))


def test_errors_of_the_decay_alone():
    x = torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"alpha \(torch.float64\) must be float32, bfloat16 or float16"):
        gated_delta_gate(x.double(), x[0], x[0])
    with pytest.raises(ValueError, match=r"head sizes \(0, 513\) of gates_forward must be at most \(0, 512\)"):
        gated_delta_gate(torch.ones(2, 513), torch.ones(513), torch.ones(513))
