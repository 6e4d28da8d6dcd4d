"""L2 norm, gated RMSNorm and the gate against plain torch in float64; precision; errors."""

import pytest
import torch

from megatron_gdn.kernels import gated_delta_gate, l2norm, rms_norm_gated
from megatron_gdn.kernels.gated_delta_rule.gate import gated_delta_gate_ref
from megatron_gdn.kernels.gated_rms_norm import rms_norm_gated_ref
from megatron_gdn.kernels.l2norm import l2norm_ref
from tests.kernels.data import loss, rms_error

# Chains of about ten float64 operations and sums of at most 100 terms.
TOLERANCE = 1e-12


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(function, *tensors, **options):
    """Output, then gradients of all tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = function(*leaves, **options)
    return [y, *torch.autograd.grad(loss(y), leaves)]


def assert_same(ours, reference, tolerance=TOLERANCE):
    for i, (got, expected) in enumerate(zip(ours, reference, strict=True)):
        assert rms_error(got, expected) <= tolerance, f"result {i}"


def assert_rounded_once(ours, exact):
    """Results on 16-bit inputs differ from the exact ones by one rounding, and 1e-6 for the float32 arithmetic."""
    for i, (got, value) in enumerate(zip(ours, exact, strict=True)):
        assert rms_error(got, value) <= 1.02 * rms_error(value.to(got.dtype), value) + 1e-6, f"result {i}"


# Shapes: the smallest with a direction, no power of two, a head; sizes: rows where eps is everything, and nothing.
@pytest.mark.parametrize("shape", [(3, 2), (2, 5, 100), (1, 7, 2, 128)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_l2norm(shape, size):
    x = normal(*shape) * size
    assert_same(results(l2norm, x), results(l2norm_ref, x))
    torch.testing.assert_close(l2norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 5, 3, 100)])
def test_rms_norm_gated(shape, gated, activation):
    tensors = [normal(*shape), normal(shape[-1], seed=1), normal(*shape, seed=2) * 3][: 3 if gated else 2]
    options = dict(activation=activation)
    ours = results(rms_norm_gated, *tensors, **options)
    assert_same(ours, results(rms_norm_gated_ref, *tensors, **options))
    # Norm before gate, by hand.
    x, weight = tensors[:2]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    if gated:
        z = tensors[2]
        expected = expected * (z.sigmoid() * (z if activation == "silu" else 1))
    torch.testing.assert_close(ours[0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(4,), (2, 9, 4)])
def test_gate(shape):
    tensors = normal(*shape) * 3, normal(4, seed=1), normal(4, seed=2)
    ours = results(gated_delta_gate, *tensors)
    assert_same(ours, results(gated_delta_gate_ref, *tensors))
    alpha, A_log, dt_bias = tensors
    torch.testing.assert_close(ours[0], -A_log.exp() * (1 + (alpha + dt_bias).exp()).log(), rtol=1e-12, atol=0)
    assert (ours[0] < 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    x, z, weight = normal(40, 64, dtype=dtype), normal(40, 64, dtype=dtype, seed=1), normal(64, dtype=dtype, seed=2)
    assert_rounded_once(results(l2norm, x), results(l2norm_ref, x.double()))
    exact = results(rms_norm_gated_ref, x.double(), weight.double(), z.double())
    ours = results(rms_norm_gated, x, weight, z)
    assert_rounded_once(ours, exact)
    assert {y.dtype for y in ours} == {dtype}


def test_gate_is_float32_from_bfloat16():
    alpha, A_log, dt_bias = normal(50, 4, dtype=torch.bfloat16), normal(4).float(), normal(4, seed=1).float()
    ours = results(gated_delta_gate, alpha, A_log, dt_bias)
    exact = results(gated_delta_gate_ref, alpha.double(), A_log.double(), dt_bias.double())
    assert [y.dtype for y in ours] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    # A bfloat16 result, or bfloat16 anywhere inside, would be off by 1e-3.
    assert_rounded_once(ours, exact)


def test_gate_survives_large_projections():
    """softplus(100) is 100, not log(exp(100)) = inf in float32."""
    alpha = torch.tensor([[100.0, -100.0]], requires_grad=True)
    g = gated_delta_gate(alpha, torch.zeros(2), torch.zeros(2))
    g.sum().backward()
    assert g[0, 0] == -100 and g[0, 1].abs() < 1e-40
    assert alpha.grad[0, 0] == -1 and alpha.grad[0, 1].abs() < 1e-40


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_of_some_inputs_only_and_strided_views(wanted):
    x, weight, z = normal(5, 12)[:, ::2], normal(12, seed=1)[::2], normal(12, 5, seed=2)[:6].T
    expected = results(rms_norm_gated, x, weight, z)[1 + wanted]
    leaves = [t.detach().clone() for t in (x, weight, z)]
    leaves[wanted].requires_grad_()
    arguments = [x, weight, z]
    arguments[wanted] = leaves[wanted]
    loss(rms_norm_gated(*arguments)).backward()
    torch.testing.assert_close(leaves[wanted].grad, expected, rtol=0, atol=0)


ERRORS = {
    r"weight \(\[5\]\) must have the last dimension of x \(\[2, 6\]\): one per channel": lambda x: rms_norm_gated(
        x, torch.ones(5)
    ),
    r"z \(\[6\]\) must have the shape of x \(\[2, 6\]\): one gate": lambda x: rms_norm_gated(
        x, torch.ones(6), torch.ones(6)
    ),
    r"activation \(relu\) must be 'silu' or 'sigmoid': pick": lambda x: rms_norm_gated(
        x, torch.ones(6), activation="relu"
    ),
    r"weight \(meta\) must be on the device of x \(cpu\): move": lambda x: rms_norm_gated(
        x, torch.ones(6, device="meta")
    ),
    r"x \(torch.int64\) must have a float dtype: convert": lambda x: l2norm(x.long()),
    r"A_log \(\[5\]\) must have the last dimension of alpha \(\[2, 6\]\): one per head": lambda x: gated_delta_gate(
        x, torch.ones(5), torch.ones(6)
    ),
    r"dt_bias \(torch.bfloat16\) must be float32: convert it, a 16-bit dt_bias": lambda x: gated_delta_gate(
        x, torch.ones(6), torch.ones(6).bfloat16()
    ),
    r"backend \(fast\) must be one of auto, torch, triton, fla: 'auto' suits the device": lambda x: l2norm(
        x, backend="fast"
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message](torch.ones(2, 6))
