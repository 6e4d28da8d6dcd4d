"""Mamba2's state-space op in chunks against the recurrence in float64, its own properties, and its precision."""

import pytest
import torch
from torch import Tensor

from megatron_gdn.kernels import prepare_chunk_table, ssd
from megatron_gdn.kernels.ssd import chunk
from megatron_gdn.kernels.ssd.reference import recurrent_ssd_ref
from tests.kernels.data import assert_equal, bounds, loss, loss_weights, rms_error

# Two orders of summation in float64: a few 1e-15, times what is left of dt A's gradients after they cancel.
FLOAT64 = dict(forward=1e-10, backward=1e-9)
# float32 has a unit roundoff of 6e-8; a result is a sum of a few dozen rounded terms of its own size.
FLOAT32 = dict(forward=2e-6, backward=2e-6)

# batch, T, H, G, N, P
SHAPES = {
    "one token": (2, 1, 2, 1, 8, 8),
    "three tokens, three heads a group": (1, 3, 6, 2, 6, 10),
    "one short of a chunk": (2, 63, 2, 2, 16, 24),
    "one chunk, one group": (1, 64, 4, 1, 16, 8),
    "one more than a chunk": (1, 65, 2, 2, 16, 16),
    "no power of two": (1, 130, 4, 2, 60, 100),
    "whole chunks, three sequences": (3, 192, 4, 2, 12, 20),
}
DOCUMENTS = {
    "empty ones at the start, inside, in a row, at the end": (0, 5, 0, 0, 70, 0),
    "single tokens": (1, 1, 1, 130, 1),
    "at the bounds of chunks": (64, 128, 63, 65),
    "all whole chunks": (64, 64),
    "many short ones": tuple(range(1, 24)),
    "one": (100,),
}


def ssd_inputs(batch, T, H, G, N, P, *, num_states: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Signed float64 inputs with states that are not zero; dt A from almost 0 to about -10."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return dict(
        x=normal(batch, T, H, P),
        dt=torch.nn.functional.softplus(2 * normal(batch, T, H) - 2),
        A=-(normal(H).exp()),
        B=normal(batch, T, G, N),
        C=normal(batch, T, G, N),
        D=normal(H),
        initial_state=normal(batch if num_states is None else num_states, H, N, P),
    )


def call(function, inputs: dict[str, Tensor], **options):
    """y and the final state."""
    keywords = {name: t for name, t in inputs.items() if name != "x"}
    return function(inputs["x"], **keywords, output_final_state=True, **options)


def run(function, inputs: dict[str, Tensor], **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients by name, each in the dtype it comes in."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y, final = call(function, leaves, **options)
    grads = torch.autograd.grad(loss(y, final), list(leaves.values()), materialize_grads=True)
    return dict(y=y.detach(), final_state=final.detach()), dict(zip(leaves, grads, strict=True))


def tokens(inputs: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """The inputs of a stretch of time."""
    return {name: t[:, part] if name in ("x", "dt", "B", "C") else t for name, t in inputs.items()}


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """x, B, C in `dtype`, the rest in float32 as the layer has it."""
    return {name: t.to(dtype if name in ("x", "B", "C") else torch.float32) for name, t in inputs.items()}


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in inputs.items()}


def test_reference_is_attention_with_decays():
    """The dual form as written: y_i = sum_{j <= i} (C_i . B_j) exp(dt A summed from j + 1 to i) dt_j x_j, per head."""
    inputs = ssd_inputs(2, 5, 4, 2, 3, 6)
    inputs["initial_state"].zero_()
    y, final = call(recurrent_ssd_ref, inputs)
    for b in range(2):
        for h in range(4):
            g = inputs["dt"][b, :, h] * inputs["A"][h]
            u = inputs["dt"][b, :, h, None] * inputs["x"][b, :, h]
            B, C = inputs["B"][b, :, h // 2], inputs["C"][b, :, h // 2]
            for i in range(5):
                decays = [g[j + 1 : i + 1].sum().exp() for j in range(i + 1)]
                expected = sum(C[i] @ B[j] * decays[j] * u[j] for j in range(i + 1))
                expected = expected + inputs["D"][h] * inputs["x"][b, i, h]
                torch.testing.assert_close(y[b, i, h], expected, rtol=1e-12, atol=1e-12)
            state = sum(decays[j] * torch.outer(B[j], u[j]) for j in range(5))
            torch.testing.assert_close(final[b, h], state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_recurrence(shape):
    inputs = ssd_inputs(*shape)
    assert_equal(run(ssd, inputs), run(recurrent_ssd_ref, inputs), **FLOAT64)
    inputs = {name: t.float() for name, t in inputs.items()}
    assert_equal(run(ssd, inputs), run(recurrent_ssd_ref, double(inputs)), **FLOAT32)


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_equals_document_by_document(lengths):
    inputs = ssd_inputs(1, sum(lengths), 2, 1, 8, 12, num_states=len(lengths))
    together = run(ssd, inputs, cu_seqlens=bounds(*lengths))
    y_weight, state_weight = loss_weights(*together[0].values())
    summed = {name: torch.zeros_like(inputs[name]) for name in ("A", "D")}
    for n, (start, length) in enumerate(zip(bounds(*lengths).tolist(), lengths, strict=False)):
        part = slice(start, start + length)
        leaves = tokens(inputs, part) | dict(initial_state=inputs["initial_state"][n : n + 1])
        leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
        y, final = call(recurrent_ssd_ref, leaves)
        loss_of_piece = (y * y_weight[:, part]).sum() + (final * state_weight[n : n + 1]).sum()
        expected = torch.autograd.grad(loss_of_piece, list(leaves.values()), materialize_grads=True)
        expected = dict(zip(leaves, expected, strict=True))
        for name in summed:
            summed[name] += expected.pop(name)
        grads = tokens(together[1], part) | dict(initial_state=together[1]["initial_state"][n : n + 1])
        outputs = dict(y=together[0]["y"][:, part], final_state=together[0]["final_state"][n : n + 1])
        assert_equal((outputs, grads), (dict(y=y, final_state=final), expected), **FLOAT64)
    assert_equal(together, (together[0], summed), **FLOAT64)


@pytest.mark.parametrize("elements", [1, 2**15, 2**30], ids=["one chunk a block", "a few", "one block"])
@pytest.mark.parametrize("lengths", [None, (64, 0, 200, 1, 130, 300)], ids=["batch", "packed"])
def test_size_of_blocks_does_not_change_the_result(monkeypatch, elements, lengths):
    monkeypatch.setitem(chunk._BLOCK_ELEMENTS, "cpu", elements)
    inputs = ssd_inputs(1, 695, 2, 2, 8, 8, num_states=6) if lengths else ssd_inputs(5, 139, 2, 1, 8, 8)
    options = dict(cu_seqlens=bounds(*lengths)) if lengths else {}
    assert_equal(run(ssd, inputs, **options), run(recurrent_ssd_ref, inputs, **options), **FLOAT64)


@pytest.mark.parametrize("cut", [1, 64, 75])
def test_two_halves_with_the_carried_state_equal_the_whole(cut):
    inputs = ssd_inputs(2, 140, 4, 2, 8, 12)

    def halves(x, *, initial_state, output_final_state, **keywords):
        state, outputs = initial_state, []
        for part in (slice(0, cut), slice(cut, None)):
            piece = tokens(dict(x=x, **keywords), part)
            y, state = call(ssd, piece | dict(initial_state=state))
            outputs.append(y)
        return torch.cat(outputs, 1), state

    assert_equal(run(halves, inputs), run(ssd, inputs), **FLOAT64)


EXTREMES = {
    # The state is never forgotten: sums over the whole sequence.
    "no decay": dict(A=lambda A: A * 1e-9),
    "A of exactly 0": dict(A=torch.zeros_like),
    # exp(-cumsum) overflows, exp(cumsum) is 0.
    "decay of exp(-50)": dict(A=lambda A: A * 0 - 10, dt=lambda dt: dt * 0 + 5),
    # Sums reach -1e3 while neighbours differ by 1e-3.
    "resets between slow decay": dict(
        dt=lambda dt: torch.where(torch.arange(dt.shape[1])[:, None] % 9 == 4, 60.0, dt / 1e3)
    ),
    "dt 0 writes and forgets nothing": dict(dt=torch.zeros_like),
    "as Mamba2 starts": dict(
        A=lambda A: -torch.linspace(1, 16, len(A), dtype=A.dtype), dt=lambda dt: 1e-3 + 0.1 * dt / dt.amax()
    ),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_decays(name):
    inputs = ssd_inputs(1, 150, 4, 2, 16, 12)
    inputs |= {key: change(inputs[key]) for key, change in EXTREMES[name].items()}
    assert_equal(run(ssd, inputs), run(recurrent_ssd_ref, inputs), **FLOAT64)
    inputs = {key: t.float() for key, t in inputs.items()}
    assert_equal(run(ssd, inputs), run(recurrent_ssd_ref, double(inputs)), **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_multiplied_in_float32(dtype):
    """On the same 16-bit inputs the only error is rounding each result once on its way out."""
    inputs = cast(ssd_inputs(1, 130, 4, 2, 24, 20), dtype)
    exact = run(recurrent_ssd_ref, double(inputs))
    for got, expected in zip(run(ssd, inputs), exact, strict=True):
        for name, value in expected.items():
            once = rms_error(value.to(got[name].dtype), value)
            assert rms_error(got[name], value) <= once * 1.02 + FLOAT32["backward"], name


def test_dtypes_of_results():
    inputs = cast(ssd_inputs(1, 70, 2, 1, 8, 8), torch.bfloat16)
    inputs["dt"] = inputs["dt"].bfloat16()
    inputs["initial_state"] = inputs["initial_state"].bfloat16()
    outputs, grads = run(ssd, inputs)
    assert outputs["y"].dtype == torch.bfloat16 and outputs["final_state"].dtype == torch.float32
    assert {name: t.dtype for name, t in grads.items()} == {name: t.dtype for name, t in inputs.items()}
    # The state keeps more than bfloat16 can hold.
    assert rms_error(outputs["final_state"].bfloat16(), outputs["final_state"]) > 1e-4


def test_autocast_does_not_lower_the_precision():
    inputs = {name: t.float() for name, t in ssd_inputs(1, 70, 2, 1, 16, 16).items()}
    reference = run(ssd, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(ssd, inputs)
    assert_equal(ours, reference, forward=0.0, backward=0.0)


def test_strided_views():
    """x, B, C as slices of the convolution's output, dt of a projection in Megatron's layout, the state transposed."""
    inputs = ssd_inputs(2, 130, 4, 2, 12, 8)
    expected = run(recurrent_ssd_ref, inputs)

    def with_views(x, *, dt, B, C, initial_state, **keywords):
        fused = torch.cat([t.flatten(2) for t in (x, B, C)], -1)
        x, B, C = fused.split([32, 24, 24], -1)
        dt = dt.transpose(0, 1).contiguous().transpose(0, 1)
        initial_state = initial_state.transpose(2, 3).contiguous().transpose(2, 3)
        x, B, C = x.unflatten(-1, (4, 8)), B.unflatten(-1, (2, 12)), C.unflatten(-1, (2, 12))
        views = dict(x=x, dt=dt, B=B, C=C, initial_state=initial_state)
        assert not any(t.is_contiguous() for t in views.values())
        before = {name: t.detach().clone() for name, t in views.items()}
        y, final = ssd(**views, **keywords)
        assert all(torch.equal(views[name], before[name]) for name in views)
        assert final.is_contiguous()
        return y.transpose(1, 2), final  # the gradient of y has strides too

    def transposed(*args, **keywords):
        y, final = recurrent_ssd_ref(*args, **keywords)
        return y.transpose(1, 2), final

    expected = run(transposed, inputs)
    assert_equal(run(with_views, inputs), expected, **FLOAT64)


@pytest.mark.parametrize("wanted", [("x",), ("dt", "initial_state"), ("A",), ("B", "D"), ("C",)], ids=",".join)
def test_gradients_of_some_inputs_only(wanted):
    inputs = ssd_inputs(1, 70, 4, 2, 8, 8)
    _, expected = run(ssd, inputs)
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in inputs.items()}
    loss(*call(ssd, leaves)).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=0, atol=0)


def test_only_the_final_state_is_used():
    inputs = ssd_inputs(1, 70, 4, 2, 8, 8)

    def state_only(function):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        _, final = call(function, leaves)
        return torch.autograd.grad(final.sin().sum(), list(leaves.values()), materialize_grads=True)

    for name, got, expected in zip(inputs, state_only(ssd), state_only(recurrent_ssd_ref), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_defaults_are_no_state_and_no_skip():
    inputs = ssd_inputs(2, 70, 2, 1, 9, 8)
    names = ("x", "dt", "A", "B", "C")
    zeros = {name: torch.zeros_like(inputs[name]) for name in ("D", "initial_state")}
    results = []
    for function, given in ((ssd, {}), (recurrent_ssd_ref, zeros)):
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        y, final = function(**leaves, **given)
        assert final is None
        grads = torch.autograd.grad(loss(y), list(leaves.values()))
        results.append((dict(y=y.detach()), dict(zip(names, grads, strict=True))))
    assert_equal(*results, **FLOAT64)


def test_without_gradients_states_are_not_kept(monkeypatch):
    """The whole forward pass allocates less by the states of all chunks."""
    monkeypatch.setitem(chunk._BLOCK_ELEMENTS, "cpu", 1)
    inputs = {name: t.requires_grad_() for name, t in ssd_inputs(1, 640, 1, 1, 64, 64).items()}
    allocated = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), torch.profiler.profile(profile_memory=True) as profile:
            call(ssd, inputs)
        allocated.append(max(event.cpu_memory_usage for event in profile.events()))
    states = 10 * 64 * 64 * 8  # bytes of ten chunks' states
    assert allocated[0] - allocated[1] >= states


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept():
    inputs = ssd_inputs(1, 640, 2, 1, 16, 16)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    expected, _ = run(ssd, inputs)
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, final = call(ssd, leaves)
    assert not y.requires_grad and kept == []
    torch.testing.assert_close(y, expected["y"], rtol=0, atol=0)
    torch.testing.assert_close(final, expected["final_state"], rtol=0, atol=0)


def test_results_share_no_memory_with_inputs_or_each_other():
    inputs = ssd_inputs(1, 64, 1, 1, 64, 64)  # shapes at which a copy could be left out
    before = {name: t.clone() for name, t in inputs.items()}
    y, final = call(ssd, inputs)
    storages = [t.untyped_storage().data_ptr() for t in (*inputs.values(), y, final)]
    assert len(set(storages)) == len(storages)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@pytest.mark.parametrize("lengths", [None, (0,), (0, 0)], ids=["batch of two", "one document", "two documents"])
def test_no_tokens_pass_the_state_through(lengths):
    inputs = ssd_inputs(1 if lengths else 2, 0, 2, 1, 8, 12, num_states=len(lengths) if lengths else None)
    outputs, grads = run(ssd, inputs, **(dict(cu_seqlens=bounds(*lengths)) if lengths else {}))
    assert outputs["y"].shape == inputs["x"].shape
    torch.testing.assert_close(outputs["final_state"], inputs["initial_state"], rtol=0, atol=0)
    assert outputs["final_state"].data_ptr() != inputs["initial_state"].data_ptr()
    torch.testing.assert_close(grads["initial_state"], loss_weights(*outputs.values())[1], rtol=0, atol=0)
    assert not grads["A"].any() and not grads["D"].any()


def test_two_runs_are_equal_bit_by_bit():
    inputs = {name: t.float() for name, t in ssd_inputs(1, 300, 4, 2, 16, 16).items()}
    first, second = (run(ssd, inputs) for _ in range(2))
    assert_equal(first, second, forward=0.0, backward=0.0)


def test_a_table_serves_many_calls():
    lengths = (10, 0, 70, 64)
    inputs = ssd_inputs(1, 144, 2, 1, 8, 8, num_states=4)
    table = prepare_chunk_table(bounds(*lengths).int())
    reference = run(recurrent_ssd_ref, inputs, cu_seqlens=bounds(*lengths))
    for _ in range(2):
        assert_equal(run(ssd, inputs, cu_seqlens=table), reference, **FLOAT64)


def test_equals_transformers():
    """The function of transformers' own Mamba2, in float32, its state as `[P, N]`."""
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    inputs = {name: t.float() for name, t in ssd_inputs(2, 130, 4, 2, 12, 10).items()}

    def theirs(x, *, dt, A, B, C, D, initial_state, output_final_state):
        states = initial_state.transpose(2, 3)
        y, final = modeling.mamba2_chunk_scan(
            x, dt, A, B, C, chunk_size=32, D=D, initial_states=states, return_final_states=output_final_state
        )
        return y, final.transpose(2, 3)

    # Theirs takes differences of float32 sums, which costs its gradients of dt and A a digit: measured 7e-7 and 6e-6.
    ours, reference = run(ssd, inputs), run(theirs, inputs)
    assert_equal(ours, reference, forward=2e-6, backward=2e-5)


def test_second_derivative_is_refused():
    inputs = {name: t.requires_grad_() for name, t in ssd_inputs(1, 5, 2, 1, 4, 4).items()}
    y, _ = call(ssd, inputs)
    (grad,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


ERRORS = {
    r"B \(\[1, 6, 16\]\) and C \(\[1, 6, 2, 8\]\) must both be \[batch, T, G, N\]: give": dict(
        B=lambda B: B.flatten(2)
    ),
    r"x \(\[1, 5, 4, 12\]\) must be \[batch, T, H, P\] with batch and T of B .*: the": dict(x=lambda x: x[:, 1:]),
    r"x's heads \(3\) must be a multiple of B's groups \(2\): every group": dict(x=lambda x: x[:, :, 1:]),
    r"must not be empty but in T: drop the call": dict(x=lambda x: x[..., :0]),
    r"dt \(\[1, 6, 2\]\) must be \[batch, T, H\] = \[1, 6, 4\]: one step": dict(dt=lambda dt: dt[..., :2]),
    r"A \(\[4, 1\]\) must be \[H\] = \[4\]: one number per head": dict(A=lambda A: A[:, None]),
    r"D \(\[3\]\) must be \[H\] = \[4\]: one number per head": dict(D=lambda D: D[1:]),
    r"C \(torch.int64\) must have a float dtype: convert": dict(C=lambda C: C.long()),
    r"x \(torch.float64\), B \(torch.float32\) and C \(torch.float64\) must have one dtype": dict(
        B=lambda B: B.float()
    ),
    r"A \(meta\) must be on the device of x \(cpu\): move": dict(A=lambda A: A.to("meta")),
    r"initial_state \(\[4, 8, 12\]\) must be \[M, H, N, P\] = \[1, 4, 8, 12\]: one": dict(initial_state=lambda S: S[0]),
    r"must be \[M, H, N, P\] = \[2, 4, 8, 12\]: one": dict(cu_seqlens=torch.tensor([0, 3, 6])),
    r"cu_seqlens \(ends at 5\) must end at the number of tokens \(6\): pass": dict(cu_seqlens=torch.tensor([0, 5])),
    r"backend \(cuda\) must be one of": dict(backend="cuda"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    inputs = ssd_inputs(1, 6, 4, 2, 8, 12)
    changes = ERRORS[message]
    with pytest.raises(ValueError, match=message):
        ssd(**inputs | {name: change(inputs[name]) if callable(change) else change for name, change in changes.items()})
