"""The `triton` backend of the state-space op: three stages forward, three backward, one launch each.

    prepare           G, CB                     every chunk by itself
    states            S                         chunk after chunk
    output            y                         every chunk by itself
    state_gradients   dS                        chunk after chunk, from the last
    group_gradients   dB dC                     every chunk by itself, heads of a group one after the other
    head_gradients    dx ddt dA dD              every chunk by itself

Notation of kernels/README.md. Only the inputs are kept for the backward pass, which runs the first two stages again. No
atomics: two runs give the same bits. Nothing here multiplies outside of the kernels, so autocast changes nothing.
"""

import torch
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.ssd.backward_groups import group_gradients
from megatron_gdn.kernels.ssd.backward_heads import head_gradients
from megatron_gdn.kernels.ssd.backward_state import state_gradients
from megatron_gdn.kernels.ssd.output import output
from megatron_gdn.kernels.ssd.prepare import prepare
from megatron_gdn.kernels.ssd.state import states
from megatron_gdn.kernels.triton_support.tiles import with_unit_stride
from megatron_gdn.kernels.varlen import ChunkTable


class TritonSSD(torch.autograd.Function):
    """apply(x, dt, B, C, A, D, initial_state, table) -> (y, final_state).

    x `[batch, T, H, P]`, B, C `[batch, T, groups, N]` float32, float16 or bfloat16; dt `[batch, T, H]`, A, D `[H]` and
    initial_state `[M, H, N, P]` any float dtype, D and the state may be None. y `[batch, T, H, P]` in x's dtype,
    final_state `[M, H, N, P]` float32.
    """

    @staticmethod
    def forward(ctx, x, dt, B, C, A, D, initial_state, table: ChunkTable):
        x, B, C = (with_unit_stride(t) for t in (x, B, C))
        prepared = prepare(dt, A, B, C, table=table)
        S, final_state = states(x, dt, B, prepared, table=table, initial_state=initial_state, output_final_state=True)
        y = output(x, dt, C, D, prepared, S, table=table)
        ctx.save_for_backward(x, dt, B, C, A, D, initial_state)
        ctx.table = table
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, B, C, A, D, initial_state = ctx.saved_tensors
        table, needs = ctx.table, ctx.needs_input_grad
        dy = torch.zeros_like(x) if dy is None else dy
        prepared = prepare(dt, A, B, C, table=table)
        dS, dinitial = state_gradients(C, dy, prepared, dfinal, table=table, needs_dinitial=needs[6])
        grads = [None] * 6
        if any(needs[:6]):
            S, _ = states(x, dt, B, prepared, table=table, initial_state=initial_state, output_final_state=False)
            dB, dC, reads = group_gradients(x, dt, B, C, dy, prepared, S, dS, table=table)
            dx, ddt, dA, dD = head_gradients(x, dt, A, B, D, dy, prepared, S, dS, reads, table=table)
            # A gradient that nobody asked for is not held on to.
            grads = [grad if needed else None for grad, needed in zip((dx, ddt, dB, dC, dA, dD), needs, strict=False)]
        return *grads, dinitial.to(initial_state.dtype) if needs[6] else None, None
