"""Triton kernels of the backward pass, interpreted, against gradients of the recurrence in float64.

What the forward kernels would hand over (G, T, S, U) comes from the formulas in float64, rounded to the kernels' dtype,
so that the backward kernels are judged alone.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from megatron_gdn.kernels.l2norm import L2NORM_EPS
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable, table_of_batch
from tests.kernels.data import bounds, rms_error, rule_inputs

pytest.importorskip("triton")

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
C = CHUNK_SIZE

# float32: sums of up to 130 tokens, rounded to 6e-8 each, in other orders than the reference.
# 16 bits: bounds of the field against the recurrence on the same inputs (fla's tests); bfloat16 rounds every operand of
# a product to 2e-3 rms, and dg and dbeta are differences of sums of such products.
FLOAT32 = dict.fromkeys(NAMES, 1e-5)
HALF = dict.fromkeys(("q", "k", "v", "initial_state"), 0.008) | dict.fromkeys(("g", "beta"), 0.02)


def rounded(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """q, k, v in dtype, the rest in float32."""
    return {name: x.to(dtype if name in ("q", "k", "v") else torch.float32) for name, x in inputs.items()}


def chunks_of(x: Tensor, table: ChunkTable) -> Tensor:
    """`[B, T, HEADS, D]` to chunks `[NC, HEADS, 64, D]`, padded with 0."""
    tokens = x.flatten(0, 1)
    out = x.new_zeros(table.num_chunks, x.shape[2], C, x.shape[3])
    for c, (start, end) in enumerate(table.chunk_bounds.tolist()):
        out[c, :, : end - start] = tokens[start:end].transpose(0, 1)
    return out


def forward_pass(inputs: dict[str, Tensor], table: ChunkTable, l2norm: bool) -> tuple[SimpleNamespace, Tensor, Tensor]:
    """Prepared, S and U of the formulas in float64, rounded to the dtype of v."""
    dtype = inputs["v"].dtype
    q, k, v, g, beta, state = (inputs[name].double() for name in NAMES)
    q, k, v, g, beta = (chunks_of(x, table) for x in (q, k, v, g.unsqueeze(-1), beta.unsqueeze(-1)))
    factors = [(x.square().sum(-1) + L2NORM_EPS).rsqrt() if l2norm else None for x in (q, k)]
    if l2norm:
        k = k * factors[1].unsqueeze(-1)
    k = k.repeat_interleave(v.shape[1] // k.shape[1], 1)
    G = g.cumsum(2)
    D = (G - G.mT).exp().tril()
    # inv returns it column by column.
    T = torch.linalg.inv(torch.eye(C) + (beta * D * (k @ k.mT)).tril(-1)).contiguous()
    S, U = v.new_empty(*v.shape[:2], k.shape[-1], v.shape[-1]), torch.empty_like(v)
    for n, (first, last) in enumerate(zip(table.first_chunk[:-1], table.first_chunk[1:], strict=True)):
        current = state[n]
        for c in range(first, last):
            S[c] = current
            U[c] = T[c] @ (beta[c] * (v[c] - G[c].exp() * (k[c] @ current)))
            current = G[c, :, -1:].exp() * current + (k[c] * (G[c, :, -1:] - G[c]).exp()).mT @ U[c]
    rq, rk = (None if x is None else x.float() for x in factors)
    # Log2, as the kernels have it.
    prepared = SimpleNamespace(G=(G[..., 0] / math.log(2)).float(), T=T.to(dtype), rq=rq, rk=rk)
    return prepared, S.to(dtype), U.to(dtype)


@pytest.fixture(autouse=True)
def _memory_starts_as_nan(monkeypatch):
    """What a kernel does not write shows."""
    new_empty = Tensor.new_empty

    def nan(x, *shape, **options):
        out = new_empty(x, *shape, **options)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(Tensor, "new_empty", nan)


def backward(
    inputs: dict[str, Tensor],
    do: Tensor,
    dfinal: Tensor | None,
    *,
    lengths=None,
    l2norm=False,
    scale=None,
    needs_dinitial=True,
    **options,
) -> dict[str, Tensor]:
    """Gradients by the kernels, by name."""
    from megatron_gdn.kernels.gated_delta_rule.backward_inputs import input_gradients
    from megatron_gdn.kernels.gated_delta_rule.backward_state import state_gradients

    q, k, v, _, beta, _ = (inputs[name] for name in NAMES)
    table = table_of_batch(v, None if lengths is None else bounds(*lengths))
    prepared, S, U = forward_pass(inputs, table, l2norm)
    common = dict(table=table, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    dS, dB, dinitial = state_gradients(q, k, beta, do, prepared, dfinal, needs_dinitial=needs_dinitial, **common)
    grads = input_gradients(q, k, v, beta, do, prepared, S, U, dS, dB, l2norm=l2norm, **common, **options)
    return dict(zip(NAMES, (*grads, dinitial), strict=True))


def reference(inputs: dict[str, Tensor], do: Tensor, dfinal: Tensor | None, *, lengths=None, l2norm=False, scale=None):
    """Gradients of the recurrence in float64, by name."""
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    o, final = recurrent_gated_delta_rule_ref(
        **leaves,
        output_final_state=True,
        use_qk_l2norm_in_kernel=l2norm,
        scale=scale,
        cu_seqlens=None if lengths is None else bounds(*lengths),
    )
    loss = (o * do.double()).sum()
    if dfinal is not None:
        loss = loss + (final * dfinal.double()).sum()
    return dict(zip(NAMES, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))


def upstream(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of o, in v's dtype, and of the final states."""
    rng = torch.Generator().manual_seed(3)
    v, state = inputs["v"], inputs["initial_state"]
    return torch.randn(v.shape, generator=rng).to(v.dtype), torch.randn(state.shape, generator=rng)


def check(inputs: dict[str, Tensor], tolerances: dict[str, float], smallest: float = 1e-6, **options) -> None:
    """Kernels against the reference; errors count relative to at least `smallest` of the largest gradient."""
    do, dfinal = upstream(inputs)
    ours, expected = backward(inputs, do, dfinal, **options), reference(inputs, do, dfinal, **options)
    largest = max(x.square().mean().sqrt().item() for x in expected.values())
    for name, x in expected.items():
        error = rms_error(ours[name], x, smallest=smallest * largest)
        print(f"{name} {error:.1e}", end="  ")
        assert error <= tolerances[name], f"{name}: relative error {error:.1e} > {tolerances[name]:.1e}"


# 1: one row of a chunk; 63, 64, 65: around a whole one; 130: three chunks, a short one last.
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths(T):
    check(rounded(rule_inputs(1, T, 1, 1, 16, 16), torch.float32), FLOAT32)


# (1, 3): an odd group, K a power of two above V; (2, 4): two groups; (2, 2): K and V no powers of two, and more than
# one block of V in each kernel; (1, 2): likewise with a group.
@pytest.mark.parametrize(("H", "HV", "K", "V"), [(1, 3, 32, 16), (2, 4, 16, 40), (2, 2, 60, 100), (1, 2, 20, 36)])
@pytest.mark.parametrize("l2norm", [False, True])
def test_heads(H, HV, K, V, l2norm):
    inputs = rule_inputs(1, 70, H, HV, K, V, seed=1)
    if l2norm:
        inputs["k"] = 3 * inputs["k"]
    check(rounded(inputs, torch.float32), FLOAT32, l2norm=l2norm, scale=0.7)


# Empty documents first, last and in between; one token; a whole chunk; two chunks.
@pytest.mark.parametrize("lengths", [(0, 70, 0, 1, 64, 0), (5, 3)])
def test_packed(lengths):
    num_tokens = sum(lengths)
    check(
        rounded(rule_inputs(1, num_tokens, 1, 2, 16, 16, num_states=len(lengths)), torch.float32),
        FLOAT32,
        lengths=lengths,
    )


def test_strided():
    """Views of one tensor, as after a convolution, batch second; a gradient of o that was expanded in V."""
    B, T, H, HV, K, V = 2, 66, 1, 2, 16, 24
    inputs = rounded(rule_inputs(B, T, H, HV, K, V), torch.float32)
    packed = torch.cat([inputs[name].flatten(2) for name in ("q", "k", "v", "beta")], -1).transpose(0, 1).contiguous()
    q, k, v, beta = packed.transpose(0, 1).split([H * K, H * K, HV * V, HV], -1)
    inputs |= dict(q=q.unflatten(-1, (H, K)), k=k.unflatten(-1, (H, K)), v=v.unflatten(-1, (HV, V)), beta=beta)
    assert not inputs["q"].is_contiguous()
    _, dfinal = upstream(inputs)
    do = torch.randn(B, T, HV, 1, generator=torch.Generator().manual_seed(5)).expand(B, T, HV, V)
    ours, expected = backward(inputs, do, dfinal), reference(inputs, do, dfinal)
    for name, x in expected.items():
        assert rms_error(ours[name], x) <= FLOAT32[name], name


# 0: nothing is written; 1: what k reads is replaced; 2: it is reflected.
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_constant_beta(beta):
    inputs = rounded(rule_inputs(1, 65, 1, 1, 16, 16, seed=2), torch.float32)
    inputs["beta"].fill_(beta)
    check(inputs, FLOAT32)


# "kept": no decay, the hardest case for dg; "dropped": every state is forgotten; "mixed": both, within a chunk.
@pytest.mark.parametrize("g", ["kept", "dropped", "mixed"])
def test_extreme_gates(g):
    inputs = rounded(rule_inputs(1, 70, 1, 1, 16, 16, seed=3), torch.float32)
    often = dict(kept=0.0, dropped=1.0, mixed=0.1)[g]
    inputs["g"] = -1e3 * torch.bernoulli(
        torch.full(inputs["g"].shape, often), generator=torch.Generator().manual_seed(1)
    )
    # dg is a difference of sums as large as the other gradients; where all is dropped it is 0, and rounding stays.
    check(inputs, FLOAT32, smallest=0.1 if g == "dropped" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("l2norm", [False, True])
def test_half_precision(dtype, l2norm):
    check(rounded(rule_inputs(1, 130, 1, 2, 64, 64, seed=4), dtype), HALF, l2norm=l2norm)


def test_half_precision_without_decay():
    """g = 0 and keys that lean to one side: sums are longest and dg is the smallest difference of them."""
    inputs = rounded(rule_inputs(1, 128, 1, 1, 64, 64, seed=5), torch.bfloat16)
    inputs["g"].zero_()
    check(inputs, HALF)


def test_dtypes_of_results():
    """Gradients come in the dtypes of the inputs, dg in the one that is asked for, and rounded to nearest."""
    inputs = rounded(rule_inputs(1, 20, 1, 2, 16, 16), torch.float32)
    do, dfinal = upstream(inputs)
    inputs["beta"] = inputs["beta"].bfloat16().float()
    whole = backward(inputs, do, dfinal)
    inputs["beta"] = inputs["beta"].bfloat16()
    rounded_beta = backward(inputs, do, dfinal, dg_dtype=torch.bfloat16)
    for name in NAMES:
        expected = whole[name].bfloat16() if name in ("g", "beta") else whole[name]
        assert rounded_beta[name].dtype == expected.dtype
        assert torch.equal(rounded_beta[name], expected), name


def test_twice_the_same():
    inputs = rounded(rule_inputs(2, 65, 1, 3, 16, 32, seed=6), torch.bfloat16)
    first, second = (backward(inputs, *upstream(inputs), l2norm=True) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


def test_no_gradient_of_the_final_state():
    """None counts as 0, and no gradient of the initial state is returned where none is needed."""
    inputs = rounded(rule_inputs(1, 65, 1, 1, 16, 16), torch.float32)
    do, dfinal = upstream(inputs)
    ours = backward(inputs, do, None, needs_dinitial=False)
    assert ours["initial_state"] is None
    expected = backward(inputs, do, torch.zeros_like(dfinal))
    for name in ("q", "k", "v", "g", "beta"):
        assert torch.equal(ours[name], expected[name]), name


def test_no_tokens():
    """The gradient of the final state is that of the initial one."""
    inputs = rounded(rule_inputs(2, 0, 1, 1, 16, 16), torch.float32)
    do, dfinal = upstream(inputs)
    ours = backward(inputs, do, dfinal)
    assert torch.equal(ours["initial_state"], dfinal)
    assert all(ours[name].shape == inputs[name].shape for name in NAMES)


def test_padded_rows_are_zero():
    """Of dB: the kernels that read it do not mask."""
    from megatron_gdn.kernels.gated_delta_rule.backward_state import state_gradients

    inputs = rounded(rule_inputs(1, 70, 1, 1, 16, 16), torch.float32)
    do, dfinal = upstream(inputs)
    table = table_of_batch(inputs["v"], None)
    prepared, _, _ = forward_pass(inputs, table, False)
    # What an identity in the padding would hide.
    prepared.T[1, :, 6:] = 3.0
    arguments = (inputs["q"], inputs["k"], inputs["beta"], do, prepared, dfinal)
    _, dB, _ = state_gradients(*arguments, table=table, scale=1.0, needs_dinitial=False)
    assert dB[1, :, :6].abs().min() > 0
    assert torch.equal(dB[1, :, 6:], torch.zeros_like(dB[1, :, 6:]))
