"""The Triton kernels of Mamba2's state-space op, interpreted, against the recurrence in float64, with all gradients."""

import mmap

import pytest
import torch
from torch import Tensor

from megatron_gdn.kernels import prepare_chunk_table, ssd
from megatron_gdn.kernels.ssd.reference import recurrent_ssd_ref
from tests.kernels.data import bounds, loss, rms_error
from tests.kernels.test_ssd import EXTREMES, call, cast, double, run, ssd_inputs, tokens

pytest.importorskip("triton")

# float32: sums of up to 130 tokens, rounded to 6e-8 each, in other orders than the reference.
FLOAT32 = 1e-5
# 16 bits: the field's bounds against the recurrence on the same inputs (fla's tests). Each product has one operand that
# is rounded, to 2^-9 in bfloat16, and states are rounded once more; dt and A get sums of products of both signs.
HALF = dict.fromkeys(("y", "final_state"), 0.005) | dict.fromkeys(("x", "B", "C", "D", "initial_state"), 0.008)
HALF |= dict.fromkeys(("dt", "A"), 0.02)


def triton_ssd(x: Tensor, **options):
    return ssd(x, **options, backend="triton")


def check(inputs: dict[str, Tensor], limits: dict[str, float] | None = None, smallest: float = 1e-12, **options):
    """Kernels against the reference; errors count relative to at least `smallest` of the largest result."""
    ours, expected = run(triton_ssd, inputs, **options), run(recurrent_ssd_ref, double(inputs), **options)
    if limits is None:
        limits = dict.fromkeys(HALF, FLOAT32) if inputs["x"].dtype == torch.float32 else HALF
    for found, exact in zip(ours, expected, strict=True):
        largest = max(value.square().mean().sqrt().item() for value in exact.values())
        for name, value in exact.items():
            error = rms_error(found[name], value, smallest=smallest * largest)
            assert error <= limits[name], f"{name}: relative error {error:.1e} > {limits[name]:.1e}"


# 1: one row of a chunk; 63, 64, 65: around a whole one; 130: three chunks, a short one last.
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths(T):
    check(cast(ssd_inputs(1, T, 2, 1, 16, 16), torch.float32))


# (heads, groups, N, P): three heads a group and no powers of two; a group for each head; more heads in a group than a
# program sums, with a rest; more columns than a block of every kernel; Mamba2's own sizes.
@pytest.mark.parametrize(
    "sizes", [(6, 2, 20, 36), (2, 2, 16, 8), (9, 1, 8, 8), (1, 1, 60, 100), (2, 1, 128, 64)], ids=str
)
def test_heads_groups_and_sizes(sizes):
    check(cast(ssd_inputs(1, 70, *sizes), torch.float32))


# Empty documents first, in between, in a row and last; one token; a whole chunk; a batch of them in one.
@pytest.mark.parametrize("lengths", [(0, 70, 0, 0, 1, 64, 0), (5, 3, 66)], ids=str)
def test_packed(lengths):
    inputs = cast(ssd_inputs(1, sum(lengths), 2, 1, 8, 12, num_states=len(lengths)), torch.float32)
    check(inputs, cu_seqlens=bounds(*lengths))


def test_a_table_serves_many_calls():
    lengths = (10, 0, 70)
    inputs = cast(ssd_inputs(1, 80, 2, 1, 8, 8, num_states=3), torch.float32)
    expected = run(triton_ssd, inputs, cu_seqlens=bounds(*lengths))
    table = prepare_chunk_table(bounds(*lengths).int())
    assert_same(run(triton_ssd, inputs, cu_seqlens=table), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_decays(name, dtype):
    inputs = ssd_inputs(1, 130, 2, 1, 16, 16)
    inputs |= {key: change(inputs[key]) for key, change in EXTREMES[name].items()}
    limits = None
    if dtype == torch.float32 and name.startswith("resets"):
        # Sums of -560 have neighbours 6e-5 apart, which is the relative error of a decay.
        limits = dict.fromkeys(HALF, 3e-5)
    check(cast(inputs, dtype), limits)


def test_resets_of_minus_1000_leave_slow_decays_as_they_are():
    """Every ninth step forgets all, exp(-960); sums of such numbers would round away the decays between."""
    inputs = cast(ssd_inputs(1, 66, 1, 1, 16, 16), torch.float32)
    resets = torch.arange(66)[:, None] % 9 == 4
    inputs |= dict(A=torch.full((1,), -16.0), dt=torch.where(resets, 60.0, inputs["dt"] / 1e3))
    # Each counts as exp(-55) at most: sums of -560, whose neighbours are 6e-5 apart.
    check(inputs, dict.fromkeys(HALF, 3e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    check(cast(ssd_inputs(1, 130, 2, 1, 64, 32), dtype))


def assert_same(ours: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    """Bit by bit."""
    for found, values in zip(ours, expected, strict=True):
        assert [name for name, value in values.items() if not torch.equal(found[name], value)] == []


def test_two_runs_give_the_same_bits():
    inputs = cast(ssd_inputs(1, 9, 9, 1, 16, 16), torch.bfloat16)
    assert_same(run(triton_ssd, inputs), run(triton_ssd, inputs))


def test_two_halves_with_the_carried_state_equal_the_whole():
    inputs = cast(ssd_inputs(1, 140, 1, 1, 8, 12), torch.float32)

    def halves(x, *, initial_state, output_final_state, **keywords):
        state, outputs = initial_state, []
        for part in (slice(0, 75), slice(75, None)):
            piece = tokens(dict(x=x, **keywords), part)
            y, state = call(triton_ssd, piece | dict(initial_state=state))
            outputs.append(y)
        return torch.cat(outputs, 1), state

    for found, expected in zip(run(halves, inputs), run(triton_ssd, inputs), strict=True):
        for name, value in expected.items():
            # Chunks at other places: the same sums in another order.
            assert rms_error(found[name], value) < 5e-6, name


def test_stages_give_what_a_fragment_leaves_of_a_state():
    """Context parallelism: the state after a fragment is its decay times the one before, plus what it writes."""
    from megatron_gdn.kernels.ssd.prepare import prepare
    from megatron_gdn.kernels.ssd.state import states

    lengths = (70, 0, 64)
    inputs = cast(ssd_inputs(1, 134, 4, 2, 8, 12, num_states=3), torch.float32)
    table = prepare_chunk_table(bounds(*lengths))
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    prepared = prepare(dt, A, B, C, table=table)
    _, written = states(x, dt, B, prepared, table=table, initial_state=None, output_final_state=True)
    last = prepared.G[:, :, -1]
    by_fragment = zip(table.first_chunk[:-1], table.first_chunk[1:], strict=True)
    decay = torch.stack([last[first:end].sum(0).exp2() for first, end in by_fragment])
    _, expected = call(recurrent_ssd_ref, double(inputs), cu_seqlens=bounds(*lengths))
    assert rms_error(decay[..., None, None] * inputs["initial_state"] + written, expected) < 2e-6


def test_views_of_one_projection_are_read_without_copies():
    """x, B, C as slices of the convolution's output, dt of a projection in Megatron's layout, the state transposed."""
    inputs = cast(ssd_inputs(2, 66, 2, 1, 12, 8), torch.bfloat16)
    fused = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], -1)
    x, B, C = (t.unflatten(-1, (-1, size)) for t, size in zip(fused.split([16, 12, 12], -1), (8, 12, 12), strict=True))
    views = dict(x=x, B=B, C=C)
    views["dt"] = inputs["dt"].transpose(0, 1).contiguous().transpose(0, 1)
    views["initial_state"] = inputs["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not any(t.is_contiguous() for t in views.values())
    leaves = {name: (inputs | views)[name].detach().requires_grad_() for name in inputs}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, final = call(triton_ssd, leaves)
    # Nothing but the inputs is kept, and these are the caller's: B and C once for all heads of a group.
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in leaves.values()}
    grads = torch.autograd.grad(loss(y, final), list(leaves.values()))
    found = dict(y=y.detach(), final_state=final.detach()), dict(zip(leaves, grads, strict=True))
    assert_same(found, run(triton_ssd, inputs))


def test_any_strides_of_inputs_and_of_the_gradient_of_y():
    """Heads before tokens, the last dimension not contiguous, and a gradient that is one expanded number."""
    inputs = cast(ssd_inputs(1, 70, 2, 1, 8, 8), torch.float32)

    def transposed(x, *, B, C, **keywords):
        B, C = (t.transpose(1, 3).contiguous().transpose(1, 3) for t in (B, C))
        y, final = triton_ssd(x.transpose(1, 2).contiguous().transpose(1, 2), B=B, C=C, **keywords)
        return y.transpose(1, 2), final

    def plain(x, **keywords):
        y, final = triton_ssd(x, **keywords)
        return y.transpose(1, 2), final

    assert_same(run(transposed, inputs), run(plain, inputs))
    x = inputs["x"].clone().requires_grad_()
    y, _ = call(triton_ssd, inputs | dict(x=x))
    (summed,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (ones,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(summed, ones)


def test_addresses_beyond_32_bits():
    """Tokens 2^24 elements apart, the last 2^31 elements from the first; memory that nobody touches is not there."""
    inputs = cast(ssd_inputs(1, 130, 2, 1, 4, 4), torch.float16)
    row = torch.frombuffer(mmap.mmap(-1, 2 * (2**24 * 129 + 16)), dtype=torch.float16)
    far = {}
    for name, start in (("x", 0), ("B", 8), ("C", 12)):
        far[name] = row.as_strided(inputs[name].shape, (0, 2**24, 4, 1), start)
        far[name].copy_(inputs[name])
    leaves = {name: t.detach().requires_grad_() for name, t in (inputs | far).items()}
    y, final = call(triton_ssd, leaves)
    grads = torch.autograd.grad(loss(y, final), list(leaves.values()))
    found = dict(y=y.detach(), final_state=final.detach()), dict(zip(leaves, grads, strict=True))
    assert_same(found, run(triton_ssd, inputs))


@pytest.mark.parametrize(
    "wanted", [("x",), ("dt", "initial_state"), ("A", "D"), ("B",), ("initial_state",)], ids=",".join
)
def test_gradients_of_some_inputs_only(wanted):
    """The same bits as when all are asked for."""
    inputs = cast(ssd_inputs(1, 20, 2, 1, 8, 8), torch.float32)
    _, expected = run(triton_ssd, inputs)
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in inputs.items()}
    loss(*call(triton_ssd, leaves)).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[name]), name


def test_only_one_output_is_used():
    inputs = cast(ssd_inputs(1, 66, 2, 1, 8, 8), torch.float32)
    for i in range(2):

        def one(function, given, i=i):
            leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
            out = call(function, leaves)
            return torch.autograd.grad(out[i].square().sum(), list(leaves.values()), materialize_grads=True)

        for name, found, exact in zip(
            inputs, one(triton_ssd, inputs), one(recurrent_ssd_ref, double(inputs)), strict=True
        ):
            # C and D have no part in the final state: exactly 0.
            assert rms_error(found, exact, smallest=1e-30) < FLOAT32, name


def test_defaults_are_no_state_and_no_skip():
    inputs = cast(ssd_inputs(1, 70, 2, 1, 9, 8), torch.float32)
    names = ("x", "dt", "A", "B", "C")
    zeros = {name: torch.zeros_like(inputs[name]) for name in ("D", "initial_state")}
    results = []
    for given in ({}, zeros):
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        y, final = triton_ssd(**leaves, **given)
        assert final is None
        results.append(
            (dict(y=y.detach()), dict(zip(names, torch.autograd.grad(loss(y), list(leaves.values())), strict=True)))
        )
    assert_same(*results)


@pytest.mark.parametrize("lengths", [None, (0, 0)], ids=["batch of two", "two documents"])
def test_no_tokens_pass_the_state_through(lengths):
    inputs = cast(ssd_inputs(1 if lengths else 2, 0, 2, 1, 8, 12, num_states=2), torch.bfloat16)
    outputs, grads = run(triton_ssd, inputs, **(dict(cu_seqlens=bounds(*lengths)) if lengths else {}))
    assert outputs["y"].shape == inputs["x"].shape and grads["B"].shape == inputs["B"].shape
    assert torch.equal(outputs["final_state"], inputs["initial_state"])
    assert outputs["final_state"].data_ptr() != inputs["initial_state"].data_ptr()
    assert grads["initial_state"].abs().sum() > 0 and not grads["A"].any() and not grads["D"].any()


def test_dtypes_of_results_and_autocast():
    inputs = cast(ssd_inputs(1, 66, 2, 1, 8, 8), torch.bfloat16)
    inputs |= {name: inputs[name].bfloat16() for name in ("dt", "A", "D", "initial_state")}
    outputs, grads = run(triton_ssd, inputs)
    assert outputs["y"].dtype == torch.bfloat16 and outputs["final_state"].dtype == torch.float32
    assert {name: t.dtype for name, t in grads.items()} == {name: t.dtype for name, t in inputs.items()}
    # The state keeps more than bfloat16 can hold.
    assert rms_error(outputs["final_state"].bfloat16(), outputs["final_state"]) > 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(triton_ssd, inputs), (outputs, grads))


def test_second_derivative_is_refused():
    inputs = {name: t.requires_grad_() for name, t in cast(ssd_inputs(1, 5, 1, 1, 4, 4), torch.float32).items()}
    y, _ = call(triton_ssd, inputs)
    (grad,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "sizes, dtype, message",
    [
        ((8, 8), torch.float64, r"x \(torch.float64\) must be float32, bfloat16 or float16 for backend triton: use"),
        ((300, 8), torch.float32, r"head sizes \(300, 0\) of ssd_prepare float32 must be at most \(256, 0\): use"),
        ((8, 600), torch.float32, r"head sizes \(8, 600\) of ssd_state float32 must be at most \(256, 512\): use"),
    ],
)
def test_what_the_kernels_do_not_take(sizes, dtype, message):
    inputs = {name: t.to(dtype) for name, t in ssd_inputs(1, 3, 1, 1, *sizes).items()}
    with pytest.raises(ValueError, match=message):
        call(triton_ssd, inputs)


@pytest.mark.parametrize("name", ["dt", "A", "D", "initial_state"])
def test_float64_is_refused_in_every_tensor(name):
    x, B = torch.randn(1, 3, 2, 12), torch.randn(1, 3, 1, 16)
    tensors = dict(dt=torch.rand(1, 3, 2), A=-torch.rand(2), D=torch.rand(2), initial_state=torch.rand(1, 2, 16, 12))
    tensors[name] = tensors[name].double()
    with pytest.raises(ValueError, match=rf"{name} \(torch.float64\) must be float32, bfloat16 or float16 for backend"):
        ssd(x, **tensors, B=B, C=B, backend="triton")
