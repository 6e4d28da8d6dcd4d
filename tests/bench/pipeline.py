"""The kernels of the chunked rule one by one, each on what the one before it left."""

from collections.abc import Callable

from torch import Tensor

from megatron_gdn.kernels.l2norm import L2NORM_EPS
from megatron_gdn.kernels.varlen import table_of_batch
from tests.bench.shapes import RuleShape


def stages(
    shape: RuleShape, leaves: dict[str, Tensor], do: Tensor, cu_seqlens: Tensor | None
) -> dict[str, Callable[[], object]]:
    """Kernel -> a call of it on the inputs of the rule, in the order of the pipeline."""
    from megatron_gdn.kernels.gated_delta_rule.backward_inputs import input_gradients
    from megatron_gdn.kernels.gated_delta_rule.backward_state import state_gradients
    from megatron_gdn.kernels.gated_delta_rule.output import output
    from megatron_gdn.kernels.gated_delta_rule.prepare import prepare
    from megatron_gdn.kernels.gated_delta_rule.state import states

    q, k, v, g, beta = (x.detach() for x in leaves.values())
    table, scale = table_of_batch(v, cu_seqlens), shape.K**-0.5
    eps = L2NORM_EPS if shape.l2norm else None

    def run_prepare():
        return prepare(q, k, g, beta, table=table, l2norm_eps=eps, negative_eigenvalues=False)

    prepared = run_prepare()

    def run_states():
        return states(k, v, beta, prepared, table=table, initial_state=None, output_final_state=False)

    S, U, _ = run_states()

    def run_state_gradients():
        return state_gradients(q, k, beta, do, prepared, None, table=table, scale=scale, needs_dinitial=False)

    dS, dB, _ = run_state_gradients()

    def run_input_gradients():
        saved = (prepared, S, U, dS, dB)
        return input_gradients(q, k, v, beta, do, *saved, table=table, scale=scale, l2norm=shape.l2norm)

    return {
        "prepare": run_prepare,
        "states": run_states,
        "output": lambda: output(q, k, prepared, S, U, table=table, scale=scale, like=v),
        "state_gradients": run_state_gradients,
        "input_gradients": run_input_gradients,
    }
