"""The `triton` backend of the chunked rule: three stages forward, two backward, one launch each.

    prepare           G, T, rq, rk      every chunk by itself
    states            S, U              chunk after chunk
    output            o                 every chunk by itself
    state_gradients   dS, dB            chunk after chunk, from the last
    input_gradients   dq dk dv dg db    every chunk by itself

Notation of kernels/README.md. No atomics: two runs give the same bits. Nothing here multiplies outside of the kernels,
so autocast changes nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.gated_delta_rule.backward_inputs import input_gradients
from megatron_gdn.kernels.gated_delta_rule.backward_state import state_gradients
from megatron_gdn.kernels.gated_delta_rule.output import output
from megatron_gdn.kernels.gated_delta_rule.prepare import Prepared, prepare
from megatron_gdn.kernels.gated_delta_rule.state import states
from megatron_gdn.kernels.triton_support.tiles import with_unit_stride
from megatron_gdn.kernels.varlen import ChunkTable


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonSetting:
    """What forward and backward share besides tensors."""

    table: ChunkTable
    scale: float
    l2norm_eps: float | None
    """In the sum of squares of q and k; None: they are used as they are."""
    negative_eigenvalues: bool = False
    """beta may exceed 1, up to 2: T is solved with more digits."""
    recompute_states: bool = True
    """Compute S and U again in the backward pass instead of keeping them: 768 bytes per token and value head at
    K = V = 128 in 16 bits, against a quarter more arithmetic."""


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    setting: TritonSetting,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Prepared, Tensor, Tensor]:
    """o, final states, and what the backward pass may keep: prepared, S, U.

    Args:
        norms: of the rows of q and k, where an earlier kernel has them, as in `Prepared`.
    """
    table = setting.table
    with torch.cuda.device_of(v):
        prepared = prepare(
            q,
            k,
            g,
            beta,
            table=table,
            l2norm_eps=setting.l2norm_eps,
            negative_eigenvalues=setting.negative_eigenvalues,
            norms=norms,
        )
        S, U, final_state = states(
            k, v, beta, prepared, table=table, initial_state=initial_state, output_final_state=True
        )
        o = output(q, k, prepared, S, U, table=table, scale=setting.scale, like=v)
    return o, final_state, prepared, S, U


def run_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    prepared: Prepared,
    S: Tensor | None,
    U: Tensor | None,
    setting: TritonSetting,
    *,
    needs_inputs: bool = True,
    needs_dinitial: bool = False,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """(dq, dk, dv, dg, dbeta), all None without needs_inputs, and the gradient of the initial states or None.

    Args:
        S, U: of the forward pass; None: computed again.
        into: where dq, dk and dv go, see `input_gradients`.
    """
    table, grads = setting.table, (None,) * 5
    with torch.cuda.device_of(v):
        dS, dB, dinitial = state_gradients(
            q, k, beta, do, prepared, dfinal, table=table, scale=setting.scale, needs_dinitial=needs_dinitial
        )
        if needs_inputs:
            if S is None:
                S, U, _ = states(
                    k, v, beta, prepared, table=table, initial_state=initial_state, output_final_state=False
                )
            l2norm = setting.l2norm_eps is not None
            grads = input_gradients(
                q, k, v, beta, do, prepared, S, U, dS, dB, table=table, scale=setting.scale, l2norm=l2norm, into=into
            )
    return grads, dinitial


class TritonChunkGatedDeltaRule(torch.autograd.Function):
    """apply(q, k, v, g, beta, initial_state, setting) -> (o, final_state).

    q, k `[B, T, H, K]`, v `[B, T, HV, V]` float32, float16 or bfloat16; g, beta `[B, T, HV]` and initial_state
    `[N, HV, K, V]` (or None) any float dtype. o `[B, T, HV, V]` in v's dtype, final_state `[N, HV, K, V]` float32.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial_state, setting: TritonSetting):
        q, k, v = (with_unit_stride(x) for x in (q, k, v))
        o, final_state, prepared, S, U = run_forward(q, k, v, g, beta, initial_state, setting)
        kept = (None, None) if setting.recompute_states else (S, U)
        ctx.save_for_backward(q, k, v, beta, initial_state, prepared.G, prepared.T, prepared.rq, prepared.rk, *kept)
        ctx.setting, ctx.g_dtype = setting, g.dtype
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, beta, initial_state, G, T, rq, rk, S, U = ctx.saved_tensors
        prepared, needs = Prepared(G=G, T=T, rq=rq, rk=rk), ctx.needs_input_grad
        do = torch.zeros_like(v) if do is None else with_unit_stride(do)
        grads, dinitial = run_backward(
            do,
            dfinal,
            q,
            k,
            v,
            beta,
            initial_state,
            prepared,
            S,
            U,
            ctx.setting,
            needs_inputs=any(needs[:5]),
            needs_dinitial=needs[5],
        )
        # A gradient that nobody asked for is not held on to; gates and states may have a dtype of their own.
        dtypes = (q.dtype, k.dtype, v.dtype, ctx.g_dtype, beta.dtype)
        grads = [grad.to(dtype) if needed else None for grad, needed, dtype in zip(grads, needs, dtypes, strict=False)]
        return *grads, dinitial.to(initial_state.dtype) if needs[5] else None, None
