"""The `torch` backend: chunks of 64 tokens, forward and explicit backward, any device.

Per chunk and head, with c_i = A (dt_1 + ... + dt_i), gamma_i = exp(c_i), lambda_i = exp(c_64 - c_i), u = dt x and
L_ij = exp(c_i - c_j) for i >= j, else 0:

    y = gamma C S + (L * C B^T) u + D x             S_next = gamma_64 S + (lambda B)^T u

Backward, with dS the gradient of S_next and Q = (dy u^T) * L:

    du = (L * C B^T)^T dy + lambda B dS             dx = dt du + D dy
    dC = Q B + gamma dy S^T                         dB = Q^T C + lambda u dS^T          both summed over a group's heads
    dS_prev = gamma_64 dS + (gamma C)^T dy          dD = sum dy . x

The gradient of dt_t A is the sum of all that passes token t, each a term without differences:

    sum_{i >= t > j} (Q * C B^T)_ij + sum_{i >= t} dy_i . (gamma C S)_i + sum_{j < t} u_j . (lambda B dS)_j
        + gamma_64 dS . S

The gradients of dt and A follow, with x . du added to that of dt.

B and C belong to a group of heads, so tensors of a block of chunks are `[Z, 64, ...]` with Z running over its chunks
and, within a chunk, over groups: all heads of a group read and write the state in one multiplication. The only loop
over time scales and adds states, step by step of the chunk table; a block bounds the memory of everything else.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.varlen import CHUNK_SIZE, Block, ChunkTable

# Elements of a block's tensor [Z, heads of a group, 64, max(64, N, P)]: see the README for the measurement on a CPU.
# On a GPU a block should fill the device; not measured.
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What forward and backward share besides tensors."""

    table: ChunkTable
    dtype: torch.dtype
    """Of all arithmetic and of the states."""
    grad_enabled: bool
    """Of the caller; within the function it never is."""


@dataclass(kw_only=True, slots=True)
class _Decays:
    """Numbers per token and head, of some chunks."""

    c: Tensor  # [Z, R, 64] float64: sums of fast decays lose the small differences between neighbours in float32
    gamma: Tensor  # [Z, 64, R, 1]
    lam: Tensor  # [Z, 64, R, 1]
    last: Tensor  # [Z, 1, R, 1], gamma_64

    @classmethod
    def of_batch(cls, dt: Tensor, A: Tensor, num_groups: int, setting: Setting) -> "_Decays":
        """Of all chunks; dt `[tokens, H]`, A `[H]`."""
        table = setting.table
        rows = table.read(dt, table.whole).flatten(0, -3).to(torch.float64) * A.to(torch.float64)  # [M, 64, H]
        c = rows.cumsum(1).unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1).flatten(0, 1)
        c = c.contiguous()

        def spread(x: Tensor) -> Tensor:
            return x.exp().to(setting.dtype).transpose(1, 2).unsqueeze(-1)

        last = c[..., -1:]
        return cls(c=c, gamma=spread(c), lam=spread(last - c), last=spread(last))

    def of(self, rows: slice) -> "_Decays":
        """Of a block."""
        return _Decays(c=self.c[rows], gamma=self.gamma[rows], lam=self.lam[rows], last=self.last[rows])

    def between(self) -> Tensor:
        """L `[Z, R, 64, 64]`; what would overflow above the diagonal never meets exp."""
        L = (self.c.unsqueeze(-1) - self.c.unsqueeze(-2)).to(self.gamma.dtype)
        above = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool, device=L.device).triu_(1)
        return L.masked_fill_(above, -math.inf).exp_()


def _read(x: Tensor, block: Block, num_groups: int, setting: Setting) -> Tensor:
    """Tokens `[tokens, H or G, ...]` to a block's chunks `[Z, 64, R or 1, ...]`, contiguous."""
    chunks = setting.table.read(x, block)
    tail = x.dim() - 2
    chunks = chunks.flatten(0, -3 - tail).unflatten(2, (num_groups, -1)).transpose(1, 2)  # [M, G, 64, R, ...]
    return chunks.to(setting.dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def _write(x: Tensor, block: Block, chunks: Tensor, num_groups: int, setting: Setting) -> None:
    """The inverse of `_read`: chunks `[Z, 64, R or 1, ...]` into `[tokens, H or G, ...]`, rounded to its dtype."""
    by_token = chunks.unflatten(0, (-1, num_groups)).transpose(1, 2).flatten(2, 3)
    setting.table.write(x, block, by_token)


def _by_head(x: Tensor) -> Tensor:
    """`[Z, 64, R, P]` to `[Z * R, 64, P]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_group(x: Tensor, heads: int) -> Tensor:
    """`[Z * R, 64, P]` to `[Z, 64, R, P]`, a view."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def _state_to_groups(state: Tensor, num_groups: int, setting: Setting) -> Tensor:
    """`[M, H, N, P]` to `[M * G, N, R, P]` in the order of the table, new memory."""
    state = state.to(setting.dtype)[setting.table.order].unflatten(1, (num_groups, -1))
    return state.transpose(2, 3).contiguous().flatten(0, 1)


def _state_from_groups(state: Tensor, num_groups: int, table: ChunkTable) -> Tensor:
    """The inverse, new memory."""
    by_head = state.unflatten(0, (-1, num_groups)).transpose(2, 3).flatten(1, 2)
    return by_head.new_empty(by_head.shape).index_copy_(0, table.order, by_head)


def _rows(chunks: slice, num_groups: int) -> slice:
    """Chunks, or sequences, to their part of Z."""
    return slice(chunks.start * num_groups, chunks.stop * num_groups)


def _blocks(table: ChunkTable, x: Tensor, N: int) -> list[Block]:
    """Blocks of a pass over x `[tokens, H, P]`."""
    elements = _BLOCK_ELEMENTS["cpu" if x.device.type == "cpu" else "cuda"]
    return table.blocks(max(1, elements // (x.shape[1] * CHUNK_SIZE * max(CHUNK_SIZE, N, x.shape[2]))))


def _steps(block: Block, state: Tensor, num_groups: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each step of a block its part of the states `[M * G, ...]` and of tensors `[Z, ...]`."""
    states = [state[_rows(positions, num_groups)] for _, positions in block.parts]
    sizes = [len(part) for part in states]
    return zip(states, *(t.split(sizes) for t in tensors), strict=True)


class ChunkSSD(torch.autograd.Function):
    """Forward and backward over chunks; tokens of all sequences lie in one dimension.

    Saves the inputs and the state that enters each chunk, in the dtype of the arithmetic.
    """

    @staticmethod
    def forward(ctx, x, dt, B, C, A, D, initial_state, setting: Setting):
        """x `[tokens, H, P]`, dt `[tokens, H]`, B, C `[tokens, G, N]`, A, D `[H]`, state `[M, H, N, P]` -> y, final."""
        table, (H, P), (G, N) = setting.table, x.shape[1:], B.shape[1:]
        if initial_state is None:
            state = x.new_zeros(len(table.lengths) * G, N, H // G, P, dtype=setting.dtype)
        else:
            state = _state_to_groups(initial_state, G, setting)
        keep, blocks = setting.grad_enabled and any(ctx.needs_input_grad), _blocks(table, x, N)
        saved = x.new_empty(table.num_chunks * G if keep else 0, N, H // G, P, dtype=setting.dtype)
        y = x.new_empty(x.shape)
        # Autocast would multiply in 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            decays = _Decays.of_batch(dt, A, G, setting)
            for block in blocks:
                rows = _rows(block.chunks, G)
                S = saved[rows] if keep else saved.new_empty(rows.stop - rows.start, N, H // G, P)
                x_block, dt_block, B_block, C_block = (_read(t, block, G, setting) for t in (x, dt, B, C))
                y_block = _forward(
                    x_block, dt_block, B_block[:, :, 0], C_block[:, :, 0], decays.of(rows), S, state, block, G
                )
                if D is not None:
                    y_block.unflatten(0, (-1, G)).addcmul_(*_skip(x_block, D, G))
                _write(y, block, y_block, G, setting)
        ctx.save_for_backward(x, dt, B, C, A, D, initial_state, saved)
        ctx.setting = setting
        return y, _state_from_groups(state, G, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        """The blocks from the last to the first."""
        x, dt, B, C, A, D, initial_state, saved = ctx.saved_tensors
        setting, table, H, (G, N) = ctx.setting, ctx.setting.table, x.shape[1], B.shape[1:]
        dx, d_dt, dB, dC = (
            t.new_empty(t.shape) if needed else None
            for t, needed in zip((x, dt, B, C), ctx.needs_input_grad, strict=False)
        )
        # Sums over all tokens; A's is of small differences of large sums.
        dA, dD = (x.new_zeros(H, dtype=torch.float64) for _ in range(2))
        with torch.autocast(x.device.type, enabled=False):
            dstate = _state_to_groups(dfinal, G, setting)
            decays = _Decays.of_batch(dt, A, G, setting)
            for block in reversed(_blocks(table, x, N)):
                rows = _rows(block.chunks, G)
                x_block, dt_block, B_block, C_block, dy_block = (_read(t, block, G, setting) for t in (x, dt, B, C, dy))
                du, dB_block, dC_block, dg = _backward(
                    x_block,
                    dt_block,
                    B_block[:, :, 0],
                    C_block[:, :, 0],
                    dy_block,
                    decays.of(rows),
                    saved[rows],
                    dstate,
                    block,
                    G,
                )
                dA += (dg * dt_block).unflatten(0, (-1, G)).sum((0, 2)).flatten()
                if d_dt is not None:
                    dg = (dg.unflatten(0, (-1, G)) * A.to(torch.float64).view(G, 1, -1)).flatten(0, 1)
                    _write(d_dt, block, dg + (du * x_block).sum(-1), G, setting)
                if D is not None:
                    dD += (dy_block * x_block).sum(-1).unflatten(0, (-1, G)).sum((0, 2), dtype=torch.float64).flatten()
                if dx is not None:
                    du.mul_(dt_block.unsqueeze(-1))
                    if D is not None:
                        du.unflatten(0, (-1, G)).addcmul_(*_skip(dy_block, D, G))
                    _write(dx, block, du, G, setting)
                for grad, part in ((dB, dB_block), (dC, dC_block)):
                    if grad is not None:
                        _write(grad, block, part.unsqueeze(2), G, setting)
            dinitial = None
            if ctx.needs_input_grad[6]:
                dinitial = _state_from_groups(dstate, G, table).to(initial_state.dtype)
        dA = dA.to(A.dtype) if ctx.needs_input_grad[4] else None
        dD = dD.to(D.dtype) if ctx.needs_input_grad[5] else None
        return dx, d_dt, dB, dC, dA, dD, dinitial, None


def _skip(x: Tensor, D: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """x `[Z, 64, R, P]` and D to factors `[M, G, 64, R, P]` and `[G, 1, R, 1]`."""
    return x.unflatten(0, (-1, num_groups)), D.to(x.dtype).view(num_groups, 1, -1, 1)


def _forward(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    decays: _Decays,
    S: Tensor,
    state: Tensor,
    block: Block,
    num_groups: int,
) -> Tensor:
    """The output of a block without its skip, `[Z, 64, R, P]`.

    Args:
        x: `[Z, 64, R, P]`.
        dt: `[Z, 64, R]`.
        B, C: `[Z, 64, N]`.
        decays: of the block.
        S: `[Z, N, R, P]`, filled with the states that enter the chunks.
        state: `[M * G, N, R, P]`, moved in place from before the block to after it.
    """
    heads = x.shape[2]
    u = x * dt.unsqueeze(-1)
    written = torch.bmm(B.transpose(1, 2), (u * decays.lam).flatten(2)).view_as(S)
    for current, S_now, written_now, last in _steps(block, state, num_groups, S, written, decays.last):
        S_now.copy_(current)
        current.mul_(last).add_(written_now)
    weights = decays.between().mul_(torch.bmm(C, B.transpose(1, 2)).unsqueeze(1))
    y = torch.bmm(C, S.flatten(2)).view_as(u).mul_(decays.gamma)
    return y.add_(_by_group(torch.bmm(weights.flatten(0, 1), _by_head(u)), heads))


def _backward(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    dy: Tensor,
    decays: _Decays,
    S: Tensor,
    dstate: Tensor,
    block: Block,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, B, C and dt A of a block: `[Z, 64, R, P]`, `[Z, 64, N]` twice, `[Z, 64, R]` in float64.

    Args:
        x, dt, B, C, decays: see `_forward`.
        dy: `[Z, 64, R, P]`.
        S: `[Z, N, R, P]`, as the forward pass left it.
        dstate: `[M * G, N, R, P]`, gradient of the states after the block; changed in place to that before it.
    """
    heads = x.shape[2]
    u, read = x * dt.unsqueeze(-1), dy * decays.gamma

    # The recurrence backward: the gradient dS of the state that leaves each chunk.
    from_reads = torch.bmm(C.transpose(1, 2), read.flatten(2)).view_as(S)
    dS = torch.empty_like(S)
    for current, dS_now, read_now, last in reversed(
        list(_steps(block, dstate, num_groups, dS, from_reads, decays.last))
    ):
        dS_now.copy_(current)
        current.mul_(last).add_(read_now)

    # Within a chunk.
    L, CB = decays.between(), torch.bmm(C, B.transpose(1, 2)).unsqueeze(1)
    dy_heads = _by_head(dy)
    Q = torch.bmm(dy_heads, _by_head(u).transpose(1, 2)).view_as(L).mul_(L)
    du = torch.bmm(L.mul_(CB).flatten(0, 1).transpose(1, 2), dy_heads)
    dCB = Q.sum(1)
    # Of dt A: every write before token t that is read at t or later; no difference of larger sums.
    crossing = Q.mul_(CB).cumsum(3).tril_(-1).sum(2, dtype=torch.float64)[..., :-1]

    # From and to the state.
    dC = torch.bmm(dCB, B).baddbmm_(read.flatten(2), S.flatten(2).transpose(1, 2))
    reads = torch.bmm(C, S.flatten(2)).view_as(read).mul_(read).sum(-1, dtype=torch.float64).transpose(1, 2)
    dB = torch.bmm(dCB.transpose(1, 2), C)
    dB.baddbmm_((u * decays.lam).flatten(2), dS.flatten(2).transpose(1, 2))
    from_state = torch.bmm(B, dS.flatten(2)).view_as(u).mul_(decays.lam)
    writes = (u * from_state).sum(-1, dtype=torch.float64).transpose(1, 2)
    kept = (dS * S).sum((1, 3), dtype=torch.float64) * decays.last.flatten(1)
    dg = reads.flip(-1).cumsum(-1).flip(-1) + kept.unsqueeze(-1)
    dg[..., 1:] += writes[..., :-1].cumsum(-1) + crossing
    return from_state.add_(_by_group(du, heads)), dB, dC, dg.transpose(1, 2)
