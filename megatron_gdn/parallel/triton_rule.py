"""The gated delta rule under context parallelism on the Triton stages, which `triton_chunk.py` runs for one rank.

prepare                 once, for the maps too
affine_maps             M and S of the fragments       -> sent, folded -> the states that enter
states, output          as on one rank

state_gradients         dS of the fragments            -> sent          meanwhile: states, computed again
state_gradients         with the gradient that later fragments send
input_gradients         as on one rank
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.gated_delta_rule.backward_inputs import input_gradients
from megatron_gdn.kernels.gated_delta_rule.backward_state import state_gradients
from megatron_gdn.kernels.gated_delta_rule.output import output
from megatron_gdn.kernels.gated_delta_rule.prepare import Prepared, prepare
from megatron_gdn.kernels.gated_delta_rule.state import states
from megatron_gdn.kernels.gated_delta_rule.stretch_triton import affine_maps
from megatron_gdn.kernels.triton_support.tiles import with_unit_stride
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable
from megatron_gdn.parallel.state import StatePassing


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonContextSetting:
    """What forward and backward share besides tensors.

    table: of the pieces of this rank's fragments.
    passing: of this call.
    of_last, of_first: functions that give `[F, b, ...]` from what `compute(sequences)` gives for the last, or first,
        pieces that something is sent of.
    entering, leaving: functions from `[F, b, ...]` to all sequences, `[N, ...]`.
    """

    table: ChunkTable
    scale: float
    l2norm_eps: float | None
    negative_eigenvalues: bool
    passing: StatePassing
    of_last: Callable
    of_first: Callable
    entering: Callable
    leaving: Callable


class TritonContextRule(torch.autograd.Function):
    """apply(q, k, v, g, beta, setting) -> (o, final states), shapes and dtypes as of `TritonChunkGatedDeltaRule`."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, setting: TritonContextSetting):
        table, passing = setting.table, setting.passing
        q, k, v = (with_unit_stride(x) for x in (q, k, v))
        with torch.cuda.device_of(v):
            prepared = prepare(
                q,
                k,
                g,
                beta,
                table=table,
                l2norm_eps=setting.l2norm_eps,
                negative_eigenvalues=setting.negative_eigenvalues,
            )
            M, S = setting.of_last(
                lambda sequences: affine_maps(
                    k, v, beta, select_prepared(prepared, table, sequences), table=table.select(sequences)
                )
            )
            entering = setting.entering(passing.start(M, S)())
            S, U, final = states(k, v, beta, prepared, table=table, initial_state=entering, output_final_state=True)
            o = output(q, k, prepared, S, U, table=table, scale=setting.scale, like=v)
        ctx.save_for_backward(q, k, v, beta, entering, prepared.G, prepared.T, prepared.rq, prepared.rk)
        ctx.setting, ctx.g_dtype = setting, g.dtype
        ctx.mark_non_differentiable(final)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, beta, entering, G, T, rq, rk = ctx.saved_tensors
        setting, prepared = ctx.setting, Prepared(G=G, T=T, rq=rq, rk=rk)
        table, scale, do = setting.table, setting.scale, with_unit_stride(do)
        with torch.cuda.device_of(v):
            (dS,) = setting.of_first(
                lambda sequences: state_gradients(
                    q,
                    k,
                    beta,
                    do,
                    select_prepared(prepared, table, sequences),
                    None,
                    table=table.select(sequences),
                    scale=scale,
                    needs_dinitial=True,
                )[2:]
            )
            wait = setting.passing.start_backward(dS)
            S, U, _ = states(k, v, beta, prepared, table=table, initial_state=entering, output_final_state=False)
            dfinal = setting.leaving(wait())
            dS, dB, _ = state_gradients(
                q, k, beta, do, prepared, dfinal, table=table, scale=scale, needs_dinitial=False
            )
            grads = input_gradients(
                q,
                k,
                v,
                beta,
                do,
                prepared,
                S,
                U,
                dS,
                dB,
                table=table,
                scale=scale,
                l2norm=setting.l2norm_eps is not None,
            )
        dtypes = (q.dtype, k.dtype, v.dtype, ctx.g_dtype, beta.dtype)
        needs = ctx.needs_input_grad
        return *(x.to(dtype) if needed else None for x, needed, dtype in zip(grads, needs, dtypes, strict=False)), None


def select_prepared(prepared: Prepared, table: ChunkTable, sequences: list[int]) -> Prepared:
    """What belongs to the chunks of some sequences of a table, in the order of `table.select(sequences)`."""
    if sequences == list(range(len(table.lengths))):
        return prepared
    ends = torch.tensor([-(-length // CHUNK_SIZE) for length in table.lengths]).cumsum(0).tolist()
    ranges = [slice(ends[i - 1] if i else 0, ends[i]) for i in sequences]

    def select(x: Tensor | None) -> Tensor | None:
        if x is None or len(ranges) == 1:
            return x if x is None else x[ranges[0]]
        return torch.cat([x[rows] for rows in ranges])

    return Prepared(G=select(prepared.G), T=select(prepared.T), rq=select(prepared.rq), rk=select(prepared.rk))
