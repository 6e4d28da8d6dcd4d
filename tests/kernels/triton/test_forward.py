"""Each forward stage of the chunked rule in Triton against float64: what it leaves in memory for the others."""

import pytest
import torch
from torch import Tensor

from megatron_gdn.kernels.gated_delta_rule.output import output
from megatron_gdn.kernels.gated_delta_rule.prepare import Prepared, prepare
from megatron_gdn.kernels.gated_delta_rule.state import states
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable, table_of_batch
from tests.kernels.data import bounds, rms_error, rule_inputs

EPS = 1e-6
# Relative error of a product or stored number: float32 after sums of 64 to 130 terms, and one rounding to 16 bits of a
# result whose operands were rounded too (uniform in 2^-p: rms 0.29 * 2^-(p-1), and up to three of them).
TOLERANCES = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
DTYPES = list(TOLERANCES)


def exact_chunks(inputs: dict[str, Tensor], table: ChunkTable, l2norm: bool) -> dict[str, Tensor]:
    """All that the stages write, from the recurrence token by token and an inverse, in float64."""
    q, k, v, g, beta, state = (inputs[n].double() for n in ("q", "k", "v", "g", "beta", "initial_state"))
    (_, num_tokens, H, K), HV, V = k.shape, *v.shape[2:]
    found = {name: k.new_zeros(table.num_chunks, HV, CHUNK_SIZE, size) for name, size in (("T", 64), ("U", V))}
    found |= dict(G=g.new_zeros(table.num_chunks, HV, CHUNK_SIZE), S=k.new_zeros(table.num_chunks, HV, K, V))
    found |= {name: k.new_full((table.num_chunks, H, CHUNK_SIZE), EPS**-0.5) for name in ("rq", "rk")}
    found |= dict(o=torch.zeros_like(v), final_state=state.clone())
    eye = torch.eye(CHUNK_SIZE, dtype=torch.float64)
    for c, ((start, end), n) in enumerate(zip(table.chunk_bounds.tolist(), table.chunk_sequence.tolist(), strict=True)):
        b, t, size = start // num_tokens, start % num_tokens, end - start
        for h in range(HV):
            rows = [x[b, t : t + size, h * x.shape[2] // HV] for x in (q, k, v, g, beta)]
            factors = [(x.square().sum(-1) + EPS).rsqrt() for x in rows[:2]]
            if l2norm:
                rows[:2] = (x * r[:, None] for x, r in zip(rows[:2], factors, strict=True))
            query, key, value, gate, strength = rows
            G = gate.cumsum(0)
            A = (strength[:, None] * (key @ key.T) * (G[:, None] - G).tril().exp()).tril(-1)
            found["G"][c, h] = G[-1] / torch.tensor(2.0).double().log()
            found["G"][c, h, :size] = G / torch.tensor(2.0).double().log()
            found["T"][c, h] = eye
            found["T"][c, h, :size, :size] = torch.linalg.inv(eye[:size, :size] + A)
            for name, r in zip(("rq", "rk"), factors, strict=True):
                found[name][c, h * H // HV, :size] = r
            S = found["final_state"][n, h]
            found["S"][c, h] = S
            for i in range(size):
                S = S * gate[i].exp()
                u = strength[i] * (value[i] - key[i] @ S)
                S = S + torch.outer(key[i], u)
                found["U"][c, h, i], found["o"][b, t + i, h] = u, query[i] @ S
            found["final_state"][n, h] = S
    return found


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype if name in ("q", "k", "v") else torch.float32) for name, x in inputs.items()}


def prepare_all(inputs: dict[str, Tensor], table: ChunkTable, l2norm: bool, negative: bool = False) -> Prepared:
    tensors = [inputs[name] for name in ("q", "k", "g", "beta")]
    return prepare(*tensors, table=table, l2norm_eps=EPS if l2norm else None, negative_eigenvalues=negative)


def rounded(exact: dict[str, Tensor], dtype: torch.dtype, l2norm: bool) -> Prepared:
    """The first stage's results without its errors, for the stages that follow."""
    factors = {name: exact[name].float() if l2norm else None for name in ("rq", "rk")}
    return Prepared(G=exact["G"].float(), T=exact["T"].to(dtype), **factors)


# (B, T, H, HV, K, V) or lengths of documents: tails, groups, sizes that are no power of two, empty documents.
BATCHES = {
    "one token": ((2, 1, 1, 1, 16, 16), None),
    "tail of one, three heads per key": ((2, 65, 1, 3, 12, 20), None),
    "sizes beyond a block of the kernel": ((1, 70, 2, 2, 100, 130), None),
    "documents": ((1, 140, 1, 2, 16, 24), (0, 64, 0, 3, 73, 0)),
}


def batch(name: str) -> tuple[dict[str, Tensor], ChunkTable]:
    shape, lengths = BATCHES[name]
    inputs = rule_inputs(*shape, num_states=len(lengths) if lengths else None)
    return inputs, table_of_batch(inputs["v"], bounds(*lengths) if lengths else None)


@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_prepare(name, dtype, l2norm):
    inputs, table = batch(name)
    inputs = cast(inputs, dtype)
    exact, found = exact_chunks(inputs, table, l2norm), prepare_all(inputs, table, l2norm)
    # Rounded once, from sums in float64 of terms in float32.
    assert rms_error(found.G, exact["G"]) < 2e-7
    assert found.T.dtype == dtype and rms_error(found.T, exact["T"]) < TOLERANCES[dtype]
    assert torch.equal(found.T.triu(1), torch.zeros_like(found.T))
    if l2norm:
        # Sums of squares and rsqrt in float32.
        assert rms_error(found.rq, exact["rq"]) < 5e-7 and rms_error(found.rk, exact["rk"]) < 5e-7
    else:
        assert found.rq is None and found.rk is None


def test_solve_of_hard_keys():
    """Errors of T in float32 where cancellation is worst: sums of powers of A would be off by more than 1."""
    inputs = rule_inputs(1, 128, 1, 4, 16, 16)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 128, -1, -1).clone()
    inputs["g"] = torch.zeros_like(inputs["g"])
    inputs["beta"][..., 0], inputs["beta"][..., 1], inputs["beta"][..., 2] = 1.0, 2.0, inputs["beta"][..., 2] * 2
    inputs = cast(inputs, torch.float32)
    table = table_of_batch(inputs["v"], None)
    exact, found = exact_chunks(inputs, table, False), prepare_all(inputs, table, False, negative=True)
    # beta 2 and |k| = 1 + 1e-7: each of 64 steps may double what rounding left of the steps before.
    assert (found.T - exact["T"]).abs().max() < 1e-4
    # Without the factor of two the solve contracts.
    assert (found.T - exact["T"])[:, [0, 3]].abs().max() < 2e-6


def test_gates_of_any_size():
    """Small differences survive between steps of -1000; minus infinity is a reset, and nothing is NaN."""
    inputs = cast(rule_inputs(1, 64, 1, 2, 16, 16), torch.float32)
    slow, o = inputs["g"] / 1000, torch.arange(64)[:, None]
    exact_g = torch.where(o % 9 == 4, -1e3, slow)
    inputs["g"] = torch.where(o % 18 == 4, -float("inf"), exact_g)
    table = table_of_batch(inputs["v"], None)
    found = prepare_all(inputs, table, False)
    exact = exact_chunks(inputs | dict(g=exact_g), table, False)
    # 7 resets of at least 2^-80: G reaches -560, whose float32 neighbours are 6e-5 apart.
    assert rms_error(found.T, exact["T"]) < 2e-5 and found.G[..., -1].max() < -500
    inputs["g"][0, 10, 1] = float("nan")
    assert prepare_all(inputs, table, False).G[0, 1, 10:].isnan().all()


@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_states_and_output(name, dtype, l2norm):
    inputs, table = batch(name)
    inputs = cast(inputs, dtype)
    exact = exact_chunks(inputs, table, l2norm)
    prepared = rounded(exact, dtype, l2norm)
    tensors = [inputs[name] for name in ("k", "v", "beta")]
    S, U, final = states(
        *tensors, prepared, table=table, initial_state=inputs["initial_state"], output_final_state=True
    )
    tolerance = TOLERANCES[dtype]
    assert S.dtype == U.dtype == dtype and final.dtype == torch.float32
    assert rms_error(S, exact["S"]) < tolerance and rms_error(U, exact["U"]) < tolerance
    assert rms_error(final, exact["final_state"]) < tolerance
    o = output(
        inputs["q"],
        inputs["k"],
        prepared,
        exact["S"].to(dtype),
        exact["U"].to(dtype),
        table=table,
        scale=0.3,
        like=inputs["v"],
    )
    assert o.dtype == dtype and rms_error(o, 0.3 * exact["o"]) < tolerance


def test_states_from_nothing_and_without_the_last():
    inputs, table = batch("documents")
    inputs = cast(inputs, torch.float32)
    inputs["initial_state"].zero_()
    exact = exact_chunks(inputs, table, True)
    arguments = [inputs[name] for name in ("k", "v", "beta")] + [rounded(exact, torch.float32, True)]
    S, U, final = states(*arguments, table=table, initial_state=None, output_final_state=False)
    assert final is None and rms_error(S, exact["S"]) < 2e-6 and rms_error(U, exact["U"]) < 2e-6
    _, _, final = states(*arguments, table=table, initial_state=None, output_final_state=True)
    # Empty documents among them: zeros.
    assert rms_error(final, exact["final_state"]) < 2e-6 and torch.equal(final[0], torch.zeros_like(final[0]))
