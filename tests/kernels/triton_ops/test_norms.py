"""The Triton norms, interpreted, against plain torch in float64: sizes, views, precision, determinism, errors."""

import functools

import pytest
import torch

from megatron_gdn.kernels import gated_rms_norm, gated_rms_norm_triton
from megatron_gdn.kernels import l2norm as any_l2norm
from megatron_gdn.kernels.gated_rms_norm import rms_norm_gated_ref
from megatron_gdn.kernels.l2norm import l2norm_ref
from megatron_gdn.kernels.triton_support import rows
from tests.kernels.data import loss, loss_weights, rms_error
from tests.kernels.test_norms_and_gate import assert_rounded_once, assert_same, normal, results

l2norm = functools.partial(any_l2norm, backend="triton")
rms_norm_gated = functools.partial(gated_rms_norm.rms_norm_gated, backend="triton")
# float32 sums of at most 512 terms, each rounded to 6e-8, and two of them in a row: measured 1.1e-7.
TOLERANCE = 1e-6


def exact(function, *tensors, **options):
    """Results of a reference on the same numbers in float64."""
    return results(function, *(x.double() for x in tensors), **options)


# Shapes: one row; fewer columns than a block, of no power of two, a head, the largest; sizes: rows where eps is
# everything, and nothing.
@pytest.mark.parametrize("shape", [(2,), (3, 2, 60), (1, 7, 2, 128), (5, 200), (3, 512)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_l2norm(shape, size):
    x = normal(*shape, dtype=torch.float32) * size
    assert_same(results(l2norm, x), exact(l2norm_ref, x), TOLERANCE)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 64), (2, 5, 3, 100), (3, 384)])
def test_rms_norm_gated(shape, gated, activation):
    tensors = [normal(*shape), normal(shape[-1], seed=1), normal(*shape, seed=2) * 3][: 3 if gated else 2]
    tensors = [x.float() for x in tensors]
    reference = exact(rms_norm_gated_ref, *tensors, activation=activation)
    assert_same(results(rms_norm_gated, *tensors, activation=activation), reference, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    x, z, weight = normal(40, 64, dtype=dtype), normal(40, 64, dtype=dtype, seed=1), normal(64, dtype=dtype, seed=2)
    assert_rounded_once(results(l2norm, x), exact(l2norm_ref, x))
    ours = results(rms_norm_gated, x, weight, z)
    assert_rounded_once(ours, exact(rms_norm_gated_ref, x, weight, z))
    assert {y.dtype for y in ours} == {dtype}


def test_dtypes_may_differ():
    x, weight, z = normal(5, 64).bfloat16(), normal(64, seed=1).float(), normal(5, 64, seed=2).half()
    ours = results(rms_norm_gated, x, weight, z)
    assert [y.dtype for y in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]
    assert_rounded_once(ours, exact(rms_norm_gated_ref, x, weight, z))


# Views of 9 x 2 x 3 rows of 6: heads of a slice; batch and time exchanged beside it; four dimensions that no stride
# joins, which are copied; columns that are not neighbours, which are copied.
VIEWS = {
    "slice": lambda x: x[..., 2:20].unflatten(-1, (3, 6)),
    "transposed slice": lambda x: x[..., 2:20].unflatten(-1, (3, 6)).transpose(0, 1),
    "four dimensions": lambda x: x[..., 2:20].unflatten(-1, (3, 6)).unflatten(0, (3, 3)).transpose(0, 2),
    "columns": lambda x: x[..., 2:20].unflatten(-1, (6, 3)).transpose(2, 3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    wide = normal(9, 2, 25, dtype=torch.float32)
    x, weight = VIEWS[view](normal(9, 2, 25, dtype=torch.float32, seed=3)).contiguous(), normal(6, seed=1).float()

    def gated(function):
        return lambda wide: function(x.to(wide.dtype), weight.to(wide.dtype), VIEWS[view](wide))

    assert_same(results(gated(rms_norm_gated), wide), exact(gated(rms_norm_gated_ref), wide), TOLERANCE)
    for function, reference in ((l2norm, l2norm_ref), (lambda x: rms_norm_gated(x, weight.to(x.dtype)), None)):
        if reference is None:

            def reference(x):
                return rms_norm_gated_ref(x, weight.to(x.dtype))

        ours = results(lambda wide, f=function: f(VIEWS[view](wide)), wide)
        assert_same(ours, exact(lambda wide, f=reference: f(VIEWS[view](wide)), wide), TOLERANCE)


@pytest.mark.parametrize("view, copied", [("slice", False), ("transposed slice", False), ("four dimensions", True)])
def test_rows_are_copied_only_where_they_must_be(view, copied):
    x = VIEWS[view](normal(9, 2, 25))
    found = rows.Rows(x, torch.empty(x.shape))
    assert (found.tensors[0] is not x) == copied and found.num_rows == 54
    # Neighbouring dimensions are one, so that no index is divided without need.
    assert rows.Rows(normal(2, 3, 4, 5)).sizes == (1, 1) and rows.Rows(x[:, :1]).num_rows == x[:, :1].numel() // 6


def test_gradient_without_strides_and_into_a_given_buffer():
    x, weight, z = normal(3, 4, 6).float(), normal(6, seed=1).float(), normal(3, 4, 6, seed=2).float()
    _, r = gated_rms_norm_triton.forward(x, weight, z, 1e-5, "silu")
    dy = torch.ones(()).expand(3, 4, 6)
    expected = gated_rms_norm_triton.backward(dy.contiguous(), x, weight, z, r, "silu")
    wide = torch.full((3, 4, 10), float("nan"))
    ours = gated_rms_norm_triton.backward(dy, x, weight, z, r, "silu", dz=wide[..., 2:8])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(wide[..., 2:8], expected[2]) and wide[..., :2].isnan().all() and wide[..., 8:].isnan().all()


def test_sums_over_several_blocks_of_rows(monkeypatch):
    """Two programs of three blocks, the last with fewer rows; without this, few rows have a program per block."""
    monkeypatch.setattr(rows, "MAX_PROGRAMS", 2)
    tensors = [x.float() for x in (normal(83, 60), normal(60, seed=1), normal(83, 60, seed=2))]
    assert rows.split_rows(83, 16) == (2, 3)
    assert_same(results(rms_norm_gated, *tensors), exact(rms_norm_gated_ref, *tensors), TOLERANCE)


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_of_some_inputs_only(wanted):
    tensors = [normal(5, 12).float(), normal(12, seed=1).float(), normal(5, 12, seed=2).float()]
    expected = results(rms_norm_gated, *tensors)[1 + wanted]
    tensors[wanted].requires_grad_()
    loss(rms_norm_gated(*tensors)).backward()
    assert torch.equal(tensors[wanted].grad, expected)


def test_twice_the_same_bits():
    tensors = [normal(70, 64).bfloat16(), normal(64, seed=1).bfloat16(), normal(70, 64, seed=2).bfloat16()]
    for function, used in ((l2norm, tensors[:1]), (rms_norm_gated, tensors)):
        first, second = (results(function, *used) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows():
    x, weight = torch.zeros(0, 3, 8), torch.ones(8)
    assert results(l2norm, x)[1].shape == x.shape
    y, dx, dweight, dz = results(rms_norm_gated, x, weight, x)
    assert y.shape == dx.shape == dz.shape == x.shape and torch.equal(dweight, torch.zeros(8))


def test_eps_counts():
    x = torch.full((1, 4), 1e-3)
    assert rms_error(l2norm(x, eps=1.0), l2norm_ref(x.double(), eps=1.0)) <= TOLERANCE
    ours = rms_norm_gated(x, torch.ones(4), eps=0.5)
    assert rms_error(ours, rms_norm_gated_ref(x.double(), torch.ones(4), eps=0.5)) <= TOLERANCE
    assert loss_weights(ours)[0].any()


ERRORS = {
    r"x \(torch.float64\) must be float32, bfloat16 or float16 for backend triton: use": lambda x: l2norm(x.double()),
    r"weight \(torch.float64\) must be float32, bfloat16 or float16": lambda x: rms_norm_gated(x, x[0].double()),
    r"head sizes \(0, 600\) of l2norm_forward must be at most \(0, 512\)": lambda x: l2norm(torch.ones(2, 600)),
    r"head sizes \(0, 600\) of gated_rms_norm_forward must be at most": lambda x: rms_norm_gated(
        torch.ones(2, 600), torch.ones(600)
    ),
    r"backend \(fla\) is offered for chunk_gated_delta_rule only": lambda x: any_l2norm(x, backend="fla"),
    r"backend \(fla\) is offered for chunk_gated_delta_rule only: use": lambda x: gated_rms_norm.rms_norm_gated(
        x, x[0], backend="fla"
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message](torch.ones(2, 6))
