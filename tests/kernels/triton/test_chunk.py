"""The chunked rule in Triton, forward and backward, against the recurrence in float64 on the same inputs."""

import pytest
import torch

from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from megatron_gdn.kernels.gated_delta_rule.triton_chunk import TritonChunkGatedDeltaRule, TritonSetting
from megatron_gdn.kernels.varlen import table_of_batch
from tests.kernels.data import NAMES, bounds, loss, rms_error, rule_inputs, run

# Relative RMS errors. float32: sums of 150 terms with a unit roundoff of 6e-8. 16 bits: the bounds that the field uses,
# a few roundings of 2^-9 (bfloat16), of which gates see the difference of large sums.
FLOAT32 = dict.fromkeys(("o", "final_state", *NAMES), 1e-5)
SIXTEEN_BITS = dict(o=5e-3, final_state=5e-3, q=8e-3, k=8e-3, v=8e-3, initial_state=8e-3, g=2e-2, beta=2e-2)
BOUNDS = {torch.float32: FLOAT32, torch.float16: SIXTEEN_BITS, torch.bfloat16: SIXTEEN_BITS}


def rule(
    q,
    k,
    v,
    *,
    g,
    beta,
    initial_state=None,
    output_final_state=True,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    **options,
):
    """The autograd function behind the arguments of `chunk_gated_delta_rule`."""
    setting = TritonSetting(
        table=table_of_batch(v, cu_seqlens),
        scale=options.pop("scale", k.shape[-1] ** -0.5),
        l2norm_eps=1e-6 if use_qk_l2norm_in_kernel else None,
        **options,
    )
    o, final_state = TritonChunkGatedDeltaRule.apply(q, k, v, g, beta, initial_state, setting)
    return o, final_state if output_final_state else None


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    """q, k, v in `dtype`, the rest in float32 as the layer has it."""
    return {name: x.to(dtype if name in ("q", "k", "v") else torch.float32) for name, x in inputs.items()}


def check(inputs: dict, limits: dict[str, float] | None = None, floor: float = 1e-6, **options):
    """Outputs and gradients; errors are relative to the result, or to `floor` times the largest if that is more."""
    ours = run(rule, inputs, **options)
    exact_options = {n: x for n, x in options.items() if n in ("scale", "use_qk_l2norm_in_kernel", "cu_seqlens")}
    exact = run(recurrent_gated_delta_rule_ref, {n: x.double() for n, x in inputs.items()}, **exact_options)
    limits, errors = limits or BOUNDS[inputs["q"].dtype], {}
    for found, expected in zip(ours, exact, strict=True):
        smallest = floor * max(x.square().mean().sqrt().item() for x in expected.values() if x.numel())
        errors |= {n: rms_error(found[n], x, smallest=smallest) for n, x in expected.items()}
    too_large = {name: f"{error:.1e}" for name, error in errors.items() if not error <= limits[name]}
    assert not too_large, f"{too_large} of { ({name: f'{error:.1e}' for name, error in errors.items()}) }"


SHAPES = {
    "one token": (2, 1, 1, 1, 16, 16),
    "one short of a chunk": (1, 63, 1, 1, 16, 32),
    "one chunk, HV = 2 H": (1, 64, 1, 2, 32, 16),
    "one more than a chunk, HV = 3 H": (1, 65, 1, 3, 16, 16),
    "no power of two": (1, 130, 1, 2, 60, 100),
    "two sequences, heads and key heads": (2, 70, 2, 4, 16, 20),
}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_recurrence(name, dtype):
    # The norm in the kernel for each second shape; test_norm_in_the_kernel has both for one.
    options = dict(use_qk_l2norm_in_kernel=list(SHAPES).index(name) % 2 == 1)
    check(cast(rule_inputs(*SHAPES[name]), dtype), **options)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("l2norm", [False, True])
def test_norm_in_the_kernel(dtype, l2norm):
    inputs = rule_inputs(1, 70, 1, 2, 24, 16, seed=1)
    # Rows of any length, one of them 0 as after padding.
    inputs["k"] = inputs["k"] * (10 if l2norm else 1)
    inputs["q"][:, 5] = 0
    check(cast(inputs, dtype), use_qk_l2norm_in_kernel=l2norm, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(0, 5, 0, 0, 70, 0), (64, 1, 1, 63)], ids=str)
def test_packed_documents(lengths, dtype):
    inputs = cast(rule_inputs(1, sum(lengths), 1, 2, 16, 20, num_states=len(lengths)), dtype)
    check(inputs, cu_seqlens=bounds(*lengths), use_qk_l2norm_in_kernel=True)


# Without decay all errors stay to the end, and like keys make those of a chunk's solve add up.
NO_DECAY = {name: 3 * bound for name, bound in SIXTEEN_BITS.items()}
EXTREMES = {
    "decay of -1000": (dict(g=lambda g: torch.full_like(g, -1e3)), None),
    "resets between slow decay": (
        dict(g=lambda g: torch.where(torch.arange(g.shape[1])[:, None] % 9 == 4, -1e3, g / 1e3)),
        NO_DECAY,
    ),
    "no decay, keys on one side": (dict(g=torch.zeros_like, k=lambda k: (k.abs() + 0.1) / 1.5), NO_DECAY),
    "identical keys": (dict(k=lambda k: k[:, :1].expand_as(k).clone()), NO_DECAY),
    "beta 0": (dict(beta=torch.zeros_like), None),
    "beta 1": (dict(beta=torch.ones_like), None),
    "beta from 0 to 2": (dict(beta=lambda b: 2 * b), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name, dtype):
    changes, limits = EXTREMES[name]
    inputs = rule_inputs(1, 130, 1, 1, 16, 16)
    inputs |= {key: change(inputs[key]) for key, change in changes.items()}
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    # float32 as tight as ever, but for G between resets: sums of -560 have neighbours 6e-5 apart.
    float32 = dict.fromkeys(FLOAT32, 3e-5) if name.startswith("resets") else None
    # The gate's gradient is exp(-1000) of the others: a difference of sums as large as those, down to their rounding.
    floor = 0.1 if name == "decay of -1000" else 1e-6
    check(cast(inputs, dtype), limits if dtype == torch.bfloat16 else float32, floor, negative_eigenvalues="2" in name)


def test_eigenvalue_of_minus_one():
    """beta 2 and one key: each step turns the state over, new values are ten times the state, and nothing is forgotten.

    Rounding the new values, 64 of alternating sign per chunk, leaves 64^1/2 * 10 * 2^-9 / 3 = 5 % of the state in
    bfloat16, in the worst case for each of three chunks; in float32 2^15 times less, and sums of 64 terms.
    """
    inputs = rule_inputs(1, 130, 1, 1, 16, 16)
    inputs |= dict(k=inputs["k"][:, :1].expand(-1, 130, -1, -1).clone(), g=torch.zeros_like(inputs["g"]))
    inputs["beta"].fill_(2)
    for dtype, limit in ((torch.float32, 4e-5), (torch.bfloat16, 0.15)):
        limits = dict.fromkeys(FLOAT32, limit)
        check(cast(inputs, dtype), limits, use_qk_l2norm_in_kernel=True, negative_eigenvalues=True)


def test_two_halves_with_the_carried_state_equal_the_whole():
    inputs = cast(rule_inputs(2, 140, 1, 1, 16, 16), torch.float32)

    def halves(q, k, v, *, initial_state, output_final_state, **gates):
        state, outputs = initial_state, []
        for part in (slice(0, 75), slice(75, None)):
            tokens, of_part = (x[:, part] for x in (q, k, v)), {n: x[:, part] for n, x in gates.items()}
            o, state = rule(*tokens, **of_part, initial_state=state)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    for found, expected in zip(run(halves, inputs), run(rule, inputs), strict=True):
        for name, value in expected.items():
            # Chunks at other places: the same sums in another order.
            assert rms_error(found[name], value) < 5e-6, name


def test_views_of_one_packed_tensor_are_read_without_copies(monkeypatch):
    """q, k, v as slices of the convolution's output, g and beta of one projection, the state transposed."""
    inputs = cast(rule_inputs(2, 70, 2, 4, 12, 8), torch.bfloat16)
    fused = torch.cat([inputs[name].flatten(2) for name in "qkv"], -1)
    q, k, v = fused.split([24, 24, 32], -1)
    views = dict(q=q.unflatten(-1, (2, 12)), k=k.unflatten(-1, (2, 12)), v=v.unflatten(-1, (4, 8)))
    views["g"], views["beta"] = torch.stack([inputs["g"], inputs["beta"]], -1).unbind(-1)
    views["initial_state"] = inputs["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not any(x.is_contiguous() for x in views.values())
    leaves = {name: x.requires_grad_() for name, x in views.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        outputs = rule(*(leaves[n] for n in "qkv"), **{n: leaves[n] for n in NAMES[3:]}, use_qk_l2norm_in_kernel=True)
    assert {views[n].data_ptr() for n in "qkv"} < set(saved)
    grads = torch.autograd.grad(loss(*outputs), list(leaves.values()))
    expected = run(rule, inputs, use_qk_l2norm_in_kernel=True)
    assert all(torch.equal(x, y) for x, y in zip(outputs, expected[0].values(), strict=True))
    assert all(torch.equal(grad, expected[1][name]) for name, grad in zip(leaves, grads, strict=True))


def test_any_strides_of_tokens_and_of_the_gradient_of_o():
    """Heads before tokens, the last dimension not contiguous, and a gradient that is one expanded number."""
    inputs = cast(rule_inputs(1, 70, 1, 2, 16, 16), torch.float32)

    def transposed(q, k, v, **keywords):
        q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k))
        o, final = rule(q, k, v.transpose(1, 2).contiguous().transpose(1, 2), **keywords)
        return o.transpose(1, 2), final

    def plain(*tokens, **keywords):
        o, final = rule(*tokens, **keywords)
        return o.transpose(1, 2), final

    for found, expected in zip(run(transposed, inputs), run(plain, inputs), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    v = inputs["v"].clone().requires_grad_()
    o, _ = rule(inputs["q"], inputs["k"], v, g=inputs["g"], beta=inputs["beta"])
    (summed,) = torch.autograd.grad(o.sum(), v, retain_graph=True)
    (ones,) = torch.autograd.grad(o, v, torch.ones_like(o))
    assert torch.equal(summed, ones)


@pytest.mark.parametrize("wanted", [("v",), ("g", "initial_state"), ("q", "beta"), ("initial_state",)], ids=",".join)
def test_gradients_of_some_inputs_only(wanted):
    """The same bits as when all are asked for."""
    inputs = cast(rule_inputs(1, 70, 1, 2, 16, 16), torch.float32)
    _, expected = run(rule, inputs)
    leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    loss(*rule(*(leaves[n] for n in "qkv"), **{n: leaves[n] for n in NAMES[3:]})).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[name])


def test_only_one_output_is_used():
    inputs = cast(rule_inputs(1, 70, 1, 1, 16, 16), torch.float32)
    for i in range(2):

        def one(function, tensors, i=i):
            leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
            out = function(*(leaves[n] for n in "qkv"), **{n: leaves[n] for n in NAMES[3:]}, output_final_state=True)
            return torch.autograd.grad(out[i].square().sum(), [leaves[n] for n in NAMES], materialize_grads=True)

        exact = one(recurrent_gated_delta_rule_ref, {n: x.double() for n, x in inputs.items()})
        for name, found, expected in zip(NAMES, one(rule, inputs), exact, strict=True):
            # q has no part in the final state: exactly 0.
            assert rms_error(found, expected, smallest=1e-30) < 1e-5, name


def test_no_tokens_pass_the_state_through():
    for lengths in (None, (0, 0)):
        inputs = cast(rule_inputs(1 if lengths else 2, 0, 1, 2, 16, 20, num_states=2), torch.bfloat16)
        outputs, grads = run(rule, inputs, cu_seqlens=bounds(*lengths) if lengths else None)
        assert outputs["o"].shape == inputs["v"].shape and grads["q"].shape == inputs["q"].shape
        assert torch.equal(outputs["final_state"], inputs["initial_state"])
        assert outputs["final_state"].data_ptr() != inputs["initial_state"].data_ptr()
        assert grads["initial_state"].abs().sum() > 0


def test_kept_states_and_two_runs_give_the_same_bits():
    inputs = cast(rule_inputs(1, 130, 1, 2, 16, 16), torch.bfloat16)
    first, *others = (run(rule, inputs, recompute_states=recompute) for recompute in (True, True, False))
    for other in others:
        for found, expected in zip(other, first, strict=True):
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_kept_for_the_backward_pass():
    inputs = cast(rule_inputs(1, 64, 1, 2, 16, 32), torch.bfloat16)
    inputs["v"].requires_grad_()
    sizes = {}
    for recompute in (True, False):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=tensors: kept.append(x) or x, lambda x: x):
            rule(*(inputs[n] for n in "qkv"), g=inputs["g"], beta=inputs["beta"], recompute_states=recompute)
        saved = {x.data_ptr(): x for x in tensors}
        sizes[recompute] = sum(x.numel() * x.element_size() for x in saved.values())
    tokens_and_gates = 64 * (2 * 16 * 2 + 2 * 32 * 2 + 2 * 4)
    assert sizes[True] == tokens_and_gates + 64 * 2 * (64 * 2 + 4)  # T and G
    assert sizes[False] == sizes[True] + 2 * 32 * (16 + 64) * 2  # S and U
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o, _ = rule(*(inputs[n] for n in "qkv"), g=inputs["g"], beta=inputs["beta"])
    assert not saved and not o.requires_grad


def test_dtypes_of_results_and_autocast():
    inputs = cast(rule_inputs(1, 70, 1, 2, 16, 16), torch.bfloat16)
    inputs |= {name: inputs[name].bfloat16() for name in ("g", "beta", "initial_state")}
    outputs, grads = run(rule, inputs)
    assert outputs["o"].dtype == torch.bfloat16 and outputs["final_state"].dtype == torch.float32
    assert {name: x.dtype for name, x in grads.items()} == {name: x.dtype for name, x in inputs.items()}
    # The state keeps more than bfloat16 can hold.
    assert rms_error(outputs["final_state"].bfloat16(), outputs["final_state"]) > 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        again = run(rule, inputs)
    assert all(torch.equal(again[i][name], x) for i, part in enumerate((outputs, grads)) for name, x in part.items())


def test_second_derivative_is_refused():
    inputs = {n: x.float().requires_grad_() for n, x in rule_inputs(1, 5, 1, 1, 16, 16).items()}
    o, _ = rule(*(inputs[n] for n in "qkv"), g=inputs["g"], beta=inputs["beta"])
    (grad,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
