"""What context parallelism sends of a stretch of tokens, against the step-by-step rule and its gradients."""

import pytest
import torch

from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from megatron_gdn.kernels.gated_delta_rule.stretch import affine_map, state_gradient
from megatron_gdn.kernels.varlen import prepare_chunk_table
from tests.kernels.data import bounds, rms_error, rule_inputs

# More than one chunk, one token, and a chunk that is not full.
LENGTHS = (65, 1, 80)
DTYPES = {"torch": torch.float64, "triton": torch.float32}
# As the chunked rule's own tests: float64 rounding, and float32 in the interpreter.
TOLERANCE = {"torch": 1e-12, "triton": 1e-5}


def of_torch(x, table, chosen, scale, l2norm, negative):
    """M, S and dS of the chosen documents."""
    common = dict(g=x["g"], beta=x["beta"], table=table.select(chosen), use_qk_l2norm_in_kernel=l2norm)
    return *affine_map(x["k"], x["v"], **common), state_gradient(x["q"], x["k"], x["do"], scale=scale, **common)


def of_triton(x, table, chosen, scale, l2norm, negative):
    """The same, from what was prepared of all documents."""
    from megatron_gdn.kernels.gated_delta_rule.backward_state import state_gradients
    from megatron_gdn.kernels.gated_delta_rule.prepare import prepare
    from megatron_gdn.kernels.gated_delta_rule.stretch_triton import affine_maps
    from megatron_gdn.parallel.triton_rule import select_prepared

    q, k, v, g, beta, do = (x[name] for name in ("q", "k", "v", "g", "beta", "do"))
    eps = 1e-6 if l2norm else None
    prepared = prepare(q, k, g, beta, table=table, l2norm_eps=eps, negative_eigenvalues=negative)
    prepared, table = select_prepared(prepared, table, chosen), table.select(chosen)
    *_, dS = state_gradients(q, k, beta, do, prepared, None, table=table, scale=scale, needs_dinitial=True)
    return *affine_maps(k, v, beta, prepared, table=table), dS


FUNCTIONS = {"torch": of_torch, "triton": of_triton}


def reference(inputs, start, end, l2norm, dfinal=None):
    """Final state of a document, and the gradient of the state that entered it."""
    part = {name: x[:, start:end] for name, x in inputs.items() if name not in ("initial_state", "do")}
    state = inputs["initial_state"][:1].clone().requires_grad_()
    o, final = recurrent_gated_delta_rule_ref(
        **part, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=l2norm
    )
    loss = (o * inputs["do"][:, start:end]).sum() + (0 if dfinal is None else (final * dfinal).sum())
    return final.detach(), torch.autograd.grad(loss, state)[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [2], [2, 0]], ids=["all", "one", "two"])
@pytest.mark.parametrize("l2norm, negative", [(True, False), (False, True)])
def test_a_stretch_is_an_affine_map(backend, chosen, l2norm, negative):
    inputs = rule_inputs(1, sum(LENGTHS), 1, 2, 16, 24, seed=1)
    if negative:
        inputs["beta"] = 2 * inputs["beta"]
    inputs["do"] = torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    edges = bounds(*LENGTHS).tolist()
    given = {name: x.to(DTYPES[backend]) for name, x in inputs.items()}
    scale = inputs["q"].shape[-1] ** -0.5
    M, S, dS = FUNCTIONS[backend](given, prepare_chunk_table(torch.tensor(edges)), chosen, scale, l2norm, negative)
    assert len(M) == len(S) == len(dS) == len(chosen)
    dfinal = torch.randn(M.shape[1:2] + S.shape[2:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tolerance = TOLERANCE[backend]
    for place, document in enumerate(chosen):
        final, gradient = reference(inputs, *edges[document : document + 2], l2norm)
        assert rms_error(M[place].double() @ inputs["initial_state"][0] + S[place], final[0]) < tolerance
        assert rms_error(dS[place], gradient[0]) < tolerance
        # The transposed map takes the gradient of the last state to that of the first.
        _, gradient = reference(inputs, *edges[document : document + 2], l2norm, dfinal)
        assert rms_error(M[place].double().transpose(1, 2) @ dfinal + dS[place], gradient[0]) < tolerance
