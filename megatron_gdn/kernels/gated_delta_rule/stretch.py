"""A stretch of tokens as a map of the state, for context parallelism: what other ranks need to know of it, in torch.

Over any stretch the rule is affine in the state that enters it, and its gradient is affine in that of the state that
leaves (kernels/README.md, "Context parallelism"):

    S_out = M S_in + S                  dS_in = M^T dS_out + dS

`affine_map` gives M and S in one pass of the recurrence of the state, started from [0 | I] with values [v | 0];
`state_gradient` gives dS, with a pass in reverse. Neither computes an output or a gradient of an input.
"""

import torch
from torch import Tensor

from megatron_gdn.kernels.backend import accumulate_dtype
from megatron_gdn.kernels.gated_delta_rule.chunk import Setting, _block_size, _by_head, _Gates, _rows, _Scratch, _steps
from megatron_gdn.kernels.l2norm import L2NORM_EPS
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@torch.no_grad()
def affine_map(
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    table: ChunkTable,
    use_qk_l2norm_in_kernel: bool,
) -> tuple[Tensor, Tensor]:
    """M and S of each sequence of a table.

    Args:
        k, v, g, beta: see `chunk_gated_delta_rule`.
        table: of the batch, or a selection of its sequences.
        use_qk_l2norm_in_kernel: as the rule's.

    Returns:
        M `[N, HV, K, K]` and S `[N, HV, K, V]`, float32 (float64 where v is float64).
    """
    setting = _torch_setting(v, table, 1.0, use_qk_l2norm_in_kernel)
    k, v, g, beta = (x.flatten(0, 1) for x in (k, v, g.unsqueeze(-1), beta.unsqueeze(-1)))
    (K, (HV, V)), N = (k.shape[-1], v.shape[1:]), len(table.lengths)
    state = v.new_zeros(N * HV, K, V + K, dtype=setting.dtype)
    state[:, :, V:] = torch.eye(K, dtype=setting.dtype, device=v.device)
    gates, scratch = _Gates.of_batch(g, beta, setting), _Scratch(v, setting.dtype)
    with torch.autocast(v.device.type, enabled=False):
        for block in table.blocks(_block_size(v, K)):
            rows = _rows(block.chunks, HV)
            of_block, Z = gates.rows(rows), rows.stop - rows.start
            key, T, _ = _solve(table.read(k, block), of_block, setting, scratch, Z)
            R = scratch("R", Z, CHUNK_SIZE, V + K).zero_()
            values = _by_head(table.read(v, block), scratch("values", Z, CHUNK_SIZE, V))
            torch.mul(values, of_block.beta, out=R[:, :, :V])
            read = torch.mul(key, of_block.beta * of_block.gamma, out=scratch("read", *key.shape))
            write = key.mul_(of_block.lam).transpose(1, 2)
            steps = _steps(block, state, HV, T, R, read, write, of_block.gamma[:, -1:])
            for current, T_now, R_now, read_now, write_now, gamma in steps:
                U = torch.bmm(T_now, R_now.baddbmm_(read_now, current, alpha=-1))
                current.mul_(gamma).baddbmm_(write_now, U)
    found = state.new_empty(N, HV, K, V + K)
    found[table.order] = state.unflatten(0, (N, HV))
    return found[..., V:], found[..., :V]


@torch.no_grad()
def state_gradient(
    q: Tensor,
    k: Tensor,
    do: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    table: ChunkTable,
    scale: float,
    use_qk_l2norm_in_kernel: bool,
) -> Tensor:
    """The gradient of the state that enters each sequence of a table, where that of the state that leaves is 0.

    Args:
        q, k, g, beta, scale: see `chunk_gated_delta_rule`.
        do: `[B, T, HV, V]`, gradient of its output.
        table, use_qk_l2norm_in_kernel: see `affine_map`.

    Returns:
        `[N, HV, K, V]`, float32 (float64 where do is float64).
    """
    setting = _torch_setting(do, table, scale, use_qk_l2norm_in_kernel)
    q, k, do, g, beta = (x.flatten(0, 1) for x in (q, k, do, g.unsqueeze(-1), beta.unsqueeze(-1)))
    (K, (HV, V)), N = (k.shape[-1], do.shape[1:]), len(table.lengths)
    dstate = do.new_zeros(N * HV, K, V, dtype=setting.dtype)
    gates, scratch = _Gates.of_batch(g, beta, setting), _Scratch(do, setting.dtype)
    with torch.autocast(do.device.type, enabled=False):
        for block in reversed(table.blocks(_block_size(do, K))):
            rows = _rows(block.chunks, HV)
            of_block, Z = gates.rows(rows), rows.stop - rows.start
            key, T, D = _solve(table.read(k, block), of_block, setting, scratch, Z)
            q_block = table.read(q, block)
            query = _by_head(q_block, scratch("q", *key.shape), setting.norm_factor(q_block))
            dO = _by_head(table.read(do, block), scratch("dO", Z, CHUNK_SIZE, V), setting.scale)
            P = torch.bmm(query, key.transpose(1, 2), out=scratch("A", *D.shape)).mul_(D)
            dU = torch.bmm(P.transpose(1, 2), dO, out=scratch("dU", *dO.shape))
            read = torch.mul(key, of_block.beta * of_block.gamma, out=scratch("read", *key.shape)).transpose(1, 2)
            from_output = torch.bmm(query.mul_(of_block.gamma).transpose(1, 2), dO)
            write = key.mul_(of_block.lam)
            steps = _steps(block, dstate, HV, T.transpose(1, 2), dU, read, write, from_output, of_block.gamma[:, -1:])
            for current, T_now, dU_now, read_now, write_now, output_now, gamma in reversed(list(steps)):
                dB = torch.bmm(T_now, dU_now.baddbmm_(write_now, current))
                current.mul_(gamma).add_(output_now).baddbmm_(read_now, dB, alpha=-1)
    found = dstate.new_empty(N, HV, K, V)
    found[table.order] = dstate.unflatten(0, (N, HV))
    return found


def _torch_setting(x: Tensor, table: ChunkTable, scale: float, l2norm: bool) -> Setting:
    eps = L2NORM_EPS if l2norm else None
    return Setting(table=table, scale=scale, l2norm_eps=eps, dtype=accumulate_dtype(x.dtype))


def _solve(k: Tensor, gates: _Gates, setting: Setting, scratch: _Scratch, Z: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys by value head `[Z, C, K]`, T and D `[Z, C, C]` of a block; k: chunks `[..., C, H, K]`."""
    key = _by_head(k, scratch("k", Z, CHUNK_SIZE, k.shape[-1]), setting.norm_factor(k))
    D = gates.decay(scratch("D", Z, CHUNK_SIZE, CHUNK_SIZE))
    A = torch.bmm(key, key.transpose(1, 2), out=scratch("A", *D.shape)).mul_(D).mul_(gates.beta)
    T = torch.linalg.solve_triangular(A, scratch.identity.expand_as(A), upper=False, unitriangular=True)
    return key, T, D
