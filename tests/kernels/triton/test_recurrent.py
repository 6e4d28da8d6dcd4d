"""The decoding kernel against the recurrence in float64 on the same inputs."""

import pytest
import torch

from megatron_gdn.kernels import fused_recurrent_gated_delta_rule
from megatron_gdn.kernels.gated_delta_rule.recurrent import recurrent
from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from megatron_gdn.kernels.varlen import table_of_batch
from tests.kernels.data import NAMES, bounds, rms_error, rule_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def decode(inputs: dict, *, l2norm: bool = False, lengths: tuple[int, ...] | None = None, **options):
    table = table_of_batch(inputs["v"], bounds(*lengths) if lengths else None)
    keywords = dict(table=table, scale=0.3, output_final_state=True, l2norm_eps=1e-6 if l2norm else None)
    return recurrent(*(inputs[n] for n in "qkv"), **{n: inputs[n] for n in NAMES[3:]}, **keywords | options)


def exact(inputs: dict, *, l2norm: bool = False, lengths: tuple[int, ...] | None = None):
    wide = {name: x.double() for name, x in inputs.items()}
    options = dict(scale=0.3, use_qk_l2norm_in_kernel=l2norm, output_final_state=True)
    options["cu_seqlens"] = bounds(*lengths) if lengths else None
    return recurrent_gated_delta_rule_ref(*(wide[n] for n in "qkv"), **{n: wide[n] for n in NAMES[3:]}, **options)


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype if name in ("q", "k", "v") else torch.float32) for name, x in inputs.items()}


def check(found, expected, steps: int):
    """Results are rounded once on their way out; float32 inside is off by 6e-8 per step."""
    for ours, value in zip(found, expected, strict=True):
        once = rms_error(value.to(ours.dtype), value, smallest=1e-30)
        assert rms_error(ours, value, smallest=1e-30) <= 1.02 * once + 2e-7 * (1 + steps)


# (B, T, H, HV, K, V): one token of a batch, a few as when speculating, sizes that are no power of two.
SHAPES = [(3, 1, 1, 2, 16, 16), (2, 5, 2, 2, 32, 16), (1, 9, 1, 3, 60, 100)]


@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_recurrence(shape, dtype, l2norm):
    inputs = cast(rule_inputs(*shape), dtype)
    check(decode(inputs, l2norm=l2norm), exact(inputs, l2norm=l2norm), shape[1])


def test_packed_documents():
    lengths = (0, 3, 0, 1, 6, 0)
    inputs = cast(rule_inputs(1, 10, 1, 2, 16, 20, num_states=6), torch.bfloat16)
    check(decode(inputs, lengths=lengths), exact(inputs, lengths=lengths), 6)


def test_views_gates_in_16_bit_and_no_state():
    inputs = cast(rule_inputs(2, 4, 1, 2, 16, 16), torch.bfloat16)
    inputs |= {name: inputs[name].bfloat16() for name in ("g", "beta")}
    inputs["initial_state"].zero_()
    expected = exact(inputs)
    fused = torch.cat([inputs[name].flatten(2) for name in "qkv"], -1)
    views = dict(zip("qkv", fused.split([16, 16, 32], -1), strict=True))
    inputs |= {name: x.unflatten(-1, inputs[name].shape[2:]) for name, x in views.items()}
    inputs["v"] = inputs["v"].transpose(2, 3).contiguous().transpose(2, 3)
    inputs["initial_state"] = None
    found = decode(inputs)
    check(found, expected, 4)
    o, final = decode(inputs, output_final_state=False)
    assert final is None and torch.equal(o, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_pool_in_place(dtype):
    inputs = cast(rule_inputs(3, 2, 1, 2, 16, 20), torch.bfloat16)
    inputs["initial_state"] = inputs["initial_state"].to(dtype)
    expected, pool = exact(inputs), inputs["initial_state"]
    untouched = decode(inputs)
    address = pool.data_ptr()
    o, state = decode(inputs, in_place=True, output_final_state=False)
    assert state is pool and pool.data_ptr() == address and torch.equal(o, untouched[0])
    check((o, state), expected, 2)


@pytest.mark.parametrize("l2norm, scale, in_place", [(True, None, True), (False, 0.3, False)])
def test_public_function(l2norm, scale, in_place):
    """What is not given is as everywhere: the scale of the head size, a new state."""
    inputs = cast(rule_inputs(2, 3, 1, 2, 16, 20), torch.float32)
    options = dict(scale=scale, use_qk_l2norm_in_kernel=l2norm, output_final_state=True)
    wide = {name: x.double() for name, x in inputs.items()}
    expected = recurrent_gated_delta_rule_ref(
        *(wide[n] for n in "qkv"), **{n: wide[n] for n in NAMES[3:]}, **options | dict(scale=scale or 0.25)
    )
    found = fused_recurrent_gated_delta_rule(
        *(inputs[n] for n in "qkv"),
        **{n: inputs[n] for n in NAMES[3:]},
        **options,
        update_state=in_place,
        backend="triton",
    )
    assert (found[1] is inputs["initial_state"]) == in_place
    check(found, expected, 3)


def test_gates_of_any_size():
    inputs = cast(rule_inputs(1, 6, 1, 1, 16, 16), torch.float32)
    inputs["g"][0, 2], inputs["g"][0, 4], inputs["beta"][0, 3] = -1e3, 0.0, 2.0
    check(decode(inputs), exact(inputs), 6)


def test_no_tokens_pass_the_state_through():
    inputs = cast(rule_inputs(2, 0, 1, 2, 16, 20), torch.float32)
    o, final = decode(inputs)
    assert o.shape == inputs["v"].shape and torch.equal(final, inputs["initial_state"])


def test_gradients_are_refused():
    inputs = cast(rule_inputs(1, 1, 1, 1, 16, 16), torch.float32)
    inputs["g"].requires_grad_()
    with pytest.raises(ValueError, match="computes no gradients, and an input requires them: use chunk_gated_delta"):
        decode(inputs)
    with torch.no_grad():
        o, _ = decode(inputs)
    assert not o.requires_grad


def test_a_pool_must_be_contiguous():
    inputs = cast(rule_inputs(2, 1, 1, 1, 16, 16), torch.float32)
    inputs["initial_state"] = inputs["initial_state"].transpose(2, 3)
    with pytest.raises(ValueError, match=r"initial_state \(strides \[256, 256, 1, 16\]\) must be contiguous to be up"):
        decode(inputs, in_place=True)
    with pytest.raises(ValueError, match=r"initial_state \(None\) must be contiguous"):
        decode(inputs | dict(initial_state=None), in_place=True)
