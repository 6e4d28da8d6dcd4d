"""The `torch` backend: chunks of 64 tokens, forward and explicit backward, any device.

Notation of kernels/README.md, per chunk and value head: G cumulative log-decay, gamma = exp(G), lambda = exp(G_C - G),
D_ij = exp(G_i - G_j) for i >= j, T = (I + A)^-1. The only loop over time is the recurrence of the state over the steps
of the chunk table, in which all sequences advance together. The rest is computed for a block of chunks at once: large
enough for full matrix multiplications, small enough that its tensors stay in a CPU's cache and that the peak of memory
does not grow with T.

Tensors of a block are `[Z, C, ...]`: Z runs over its chunks and, within a chunk, over value heads. Multiplications
write into given memory, which autocast leaves alone: it would multiply in 16 bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.varlen import CHUNK_SIZE, Block, ChunkTable

# Elements of a block's tensors [Z, C, max(K, V)]: 1 MiB in float32, on a CPU with 1 MiB of L2 per core the fastest of
# 2**16 to 2**19 with two threads, and within 5 % of it with one. On a GPU a block should fill the device; not measured.
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What forward and backward share besides tensors."""

    table: ChunkTable
    scale: float
    l2norm_eps: float | None
    """In the sum of squares of q and k; None: they are used as they are."""
    dtype: torch.dtype
    """Of all arithmetic and of the states."""

    def norm_factor(self, x: Tensor) -> Tensor | None:
        """What normalises the rows of q or k, `[..., 1]`; None where nothing does."""
        if self.l2norm_eps is None:
            return None
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.dtype)
        return norm.square_().add_(self.l2norm_eps).rsqrt_()


class _Scratch:
    """Memory that the blocks of one pass use one after the other, so that it stays in the cache."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.empty = like.new_empty(0, dtype=dtype)
        self.identity = torch.eye(CHUNK_SIZE, dtype=dtype, device=like.device)
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory, valid until the name is asked for again."""
        held = self.tensors.get(name)
        if held is None or held.shape[0] < shape[0]:
            held = self.tensors[name] = self.empty.new_empty(shape)
        return held if held.shape[0] == shape[0] else held[: shape[0]]


@dataclass(kw_only=True, slots=True)
class _Gates:
    """Numbers per token and value head, `[Z, C, 1]`."""

    G: Tensor  # float64: sums of very negative g lose the small differences between neighbours in float32
    gamma: Tensor
    lam: Tensor
    beta: Tensor

    @classmethod
    def of_batch(cls, g: Tensor, beta: Tensor, setting: Setting) -> "_Gates":
        """Of all chunks; g, beta `[tokens, HV, 1]`."""
        g, beta = (setting.table.read(x, setting.table.whole).transpose(-3, -2).flatten(0, -3) for x in (g, beta))
        G = g.to(torch.float64).cumsum(1)
        return cls(
            G=G,
            gamma=G.exp().to(setting.dtype),
            lam=(G[:, -1:] - G).exp_().to(setting.dtype),
            beta=beta.to(setting.dtype, memory_format=torch.contiguous_format),
        )

    def rows(self, rows: slice) -> "_Gates":
        """Of some chunks."""
        return _Gates(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def decay(self, out: Tensor) -> Tensor:
        """D `[Z, C, C]`; what overflows above the diagonal is overwritten with 0."""
        return out.copy_(self.G - self.G.transpose(1, 2)).exp_().tril_()


def _by_head(x: Tensor, out: Tensor, factor: Tensor | float | None = None) -> Tensor:
    """Chunks `[..., C, H, D]` to `[Z, C, D]`, once for every value head.

    Args:
        out: `[Z, C, D]`, where to; its Z may be a multiple of that of x.
        factor: `[..., C, H, 1]`, or a number.
    """
    heads = x.transpose(-3, -2)
    group = out.shape[0] // heads.shape[:-2].numel()
    target = out.unflatten(0, (*heads.shape[:-2], group))  # [..., H, group, C, D]
    heads = heads.unsqueeze(-3)
    if factor is None:
        target.copy_(heads)
    else:
        # A number would multiply in the dtype of x; a vector makes it that of out. new_full does not wait for a GPU.
        by_head = factor.transpose(-3, -2).unsqueeze(-3) if isinstance(factor, Tensor) else out.new_full((1,), factor)
        torch.mul(heads.expand(target.shape), by_head, out=target)
    return out


def _by_token(x: Tensor, num_heads: int) -> Tensor:
    """`[Z, C, D]` to chunks `[M, C, H, D]`, a view."""
    return x.unflatten(0, (-1, num_heads)).transpose(1, 2)


def _rows(chunks: slice, num_heads: int) -> slice:
    """Chunks to their part of Z."""
    return slice(chunks.start * num_heads, chunks.stop * num_heads)


def _block_size(v: Tensor, K: int) -> int:
    """Chunks of a block."""
    elements = _BLOCK_ELEMENTS["cpu" if v.device.type == "cpu" else "cuda"]
    return max(1, elements // (v.shape[1] * CHUNK_SIZE * max(K, v.shape[2])))


def _steps(block: Block, state: Tensor, num_heads: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each step of a block its part of the states `[N * HV, K, V]` and of tensors `[Z, ...]`."""
    states = [state[_rows(positions, num_heads)] for _, positions in block.parts]
    sizes = [len(part) for part in states]
    return zip(states, *(x.split(sizes) for x in tensors), strict=True)


class ChunkGatedDeltaRule(torch.autograd.Function):
    """Forward and backward over chunks; tokens of all sequences lie in one dimension.

    Saves the inputs and, per chunk, T, U and the entering state, in the dtype of the arithmetic.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial_state, setting: Setting):
        """q, k `[tokens, H, K]`, v `[tokens, HV, V]`, g, beta `[tokens, HV, 1]`, state `[N, HV, K, V]` -> o, final."""
        table, dtype = setting.table, setting.dtype
        K, (HV, V), N = q.shape[-1], v.shape[1:], len(table.lengths)
        if initial_state is None:
            state = v.new_zeros(N * HV, K, V, dtype=dtype)
        else:
            state = initial_state.to(dtype)[table.order].flatten(0, 1)
        o = v.new_empty(v.shape)
        keep, size = any(ctx.needs_input_grad), _block_size(v, K)
        # Without gradients the blocks share the room of one.
        num_chunks = table.num_chunks if keep else min(size, table.num_chunks)
        shapes = ((CHUNK_SIZE, CHUNK_SIZE), (CHUNK_SIZE, V), (K, V))
        saved = [v.new_empty(num_chunks * HV, *shape, dtype=dtype) for shape in shapes]
        gates, scratch = _Gates.of_batch(g, beta, setting), _Scratch(v, dtype)
        for block in table.blocks(size):
            rows = _rows(block.chunks, HV)
            T, U, S = (x[rows] if keep else x[: rows.stop - rows.start] for x in saved)
            q_block, k_block, v_block, beta_block = (table.read(x, block) for x in (q, k, v, beta))
            values = _by_head(v_block, scratch("values", *U.shape), beta_block.to(dtype))
            o_block = _forward(q_block, k_block, values, gates.rows(rows), T, U, S, state, block, setting, scratch)
            table.write(o, block, _by_token(o_block, HV))
        final = state.new_empty(N, HV, K, V)
        final[table.order] = state.unflatten(0, (N, HV))
        ctx.save_for_backward(q, k, v, g, beta, initial_state, *saved)
        ctx.setting = setting
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        """The solve form: dB = T^T dU is the gradient of the right-hand side of (I + A) U = B."""
        q, k, v, g, beta, initial_state, *saved = ctx.saved_tensors
        setting, table, HV = ctx.setting, ctx.setting.table, v.shape[1]
        dq, dk, dv, dg, dbeta = (
            x.new_empty(x.shape) if needed else None
            for x, needed in zip((q, k, v, g, beta), ctx.needs_input_grad, strict=False)
        )
        dstate = dfinal.to(setting.dtype)[table.order].flatten(0, 1)
        gates, scratch = _Gates.of_batch(g, beta, setting), _Scratch(v, setting.dtype)
        dG, dbeta_rows = torch.empty_like(gates.G), torch.empty_like(gates.beta)
        for block in reversed(table.blocks(_block_size(v, q.shape[-1]))):
            rows = _rows(block.chunks, HV)
            T, U, S = (x[rows] for x in saved)
            blocks = [table.read(x, block) for x in (q, k, v, do)]
            *parts, dG[rows], dbeta_rows[rows] = _backward(
                *blocks, gates.rows(rows), T, U, S, dstate, block, setting, scratch
            )
            for grad, part in zip((dq, dk, dv), parts, strict=True):
                if grad is not None:
                    table.write(grad, block, _by_token(part, grad.shape[1]))
        dg_rows = dG.flip(1).cumsum(1).flip(1)
        for grad, part in ((dg, dg_rows), (dbeta, dbeta_rows)):
            if grad is not None:
                table.write(grad, table.whole, _by_token(part, HV))
        dinitial = None
        if ctx.needs_input_grad[5]:
            dinitial = initial_state.new_empty(initial_state.shape)
            dinitial[table.order] = dstate.unflatten(0, (-1, HV)).to(dinitial.dtype)
        return dq, dk, dv, dg, dbeta, dinitial, None


def _forward(
    q: Tensor,
    k: Tensor,
    R: Tensor,
    gates: _Gates,
    T: Tensor,
    U: Tensor,
    S: Tensor,
    state: Tensor,
    block: Block,
    setting: Setting,
    scratch: _Scratch,
) -> Tensor:
    """The output of a block, `[Z, C, V]`.

    Args:
        q, k: chunks `[..., C, H, K]`.
        R: `[Z, C, V]`, beta v; overwritten.
        gates: of the block.
        T, U, S: `[Z, C, C]`, `[Z, C, V]`, `[Z, K, V]`; filled.
        state: `[N * HV, K, V]`, moved in place from before the block to after it.
    """
    Z, C, K = *R.shape[:2], q.shape[-1]
    q_factor = setting.norm_factor(q)
    query = _by_head(q, scratch("q", Z, C, K), setting.scale if q_factor is None else q_factor.mul_(setting.scale))
    key = _by_head(k, scratch("k", Z, C, K), setting.norm_factor(k))
    D = gates.decay(scratch("D", Z, C, C))
    A = torch.bmm(key, key.transpose(1, 2), out=scratch("A", Z, C, C)).mul_(D).mul_(gates.beta)
    # unitriangular: the diagonal of A is not read.
    T.copy_(torch.linalg.solve_triangular(A, scratch.identity.expand_as(A), upper=False, unitriangular=True))
    P = torch.bmm(query, key.transpose(1, 2), out=A).mul_(D)
    read = torch.mul(key, gates.beta * gates.gamma, out=scratch("read", Z, C, K))
    write = key.mul_(gates.lam).transpose(1, 2)
    steps = _steps(
        block, state, state.shape[0] // len(setting.table.lengths), T, U, S, R, read, write, gates.gamma[:, -1:]
    )
    for current, T_now, U_now, S_now, R_now, read_now, write_now, gamma in steps:
        S_now.copy_(current)
        torch.bmm(T_now, R_now.baddbmm_(read_now, current, alpha=-1), out=U_now)
        current.mul_(gamma).baddbmm_(write_now, U_now)
    return torch.bmm(query.mul_(gates.gamma), S, out=R).baddbmm_(P, U)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    gates: _Gates,
    T: Tensor,
    U: Tensor,
    S: Tensor,
    dstate: Tensor,
    block: Block,
    setting: Setting,
    scratch: _Scratch,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, G, beta of a block: per key head `[Z, C, K]` twice, `[Z, C, V]`, `[Z, C, 1]` twice.

    What reads the state lies stacked, [q; -beta k] and its gradient [dO; dB], so that one multiplication serves both.

    Args:
        q, k, v, do: chunks `[..., C, H, D]`.
        gates, T, U, S: of the block, as the forward pass left them.
        dstate: `[N * HV, K, V]`, gradient of the states after the block; changed in place to that before it.
    """
    Z, C, K, V = *U.shape[:2], q.shape[-1], U.shape[-1]
    q_factor, k_factor = setting.norm_factor(q), setting.norm_factor(k)
    readers, upstream = scratch("readers", Z, 2 * C, K), scratch("upstream", Z, 2 * C, V)
    query, (dO, dB) = readers[:, :C], upstream.split(C, dim=1)
    _by_head(q, query, q_factor)
    key = _by_head(k, scratch("k", Z, C, K), k_factor)
    torch.mul(key, -gates.beta, out=readers[:, C:])
    _by_head(do, dO, setting.scale)
    gamma = torch.cat([gates.gamma, gates.gamma], 1)
    D = gates.decay(scratch("D", Z, C, C))

    # The recurrence backward: dB, and the gradient dS of the state that leaves each chunk.
    P = torch.bmm(query, key.transpose(1, 2), out=scratch("P", Z, C, C)).mul_(D)
    dU = torch.bmm(P.transpose(1, 2), dO, out=scratch("dU", Z, C, V))
    write = torch.mul(key, gates.lam, out=scratch("write", Z, C, K))
    read = torch.mul(readers, gamma, out=scratch("read", Z, 2 * C, K)).transpose(1, 2)
    dS = scratch("dS", *S.shape)
    heads = dstate.shape[0] // len(setting.table.lengths)
    steps = list(
        _steps(block, dstate, heads, T.transpose(1, 2), dU, dS, dB, upstream, read, write, gates.gamma[:, -1:])
    )
    for current, T_now, dU_now, dS_now, dB_now, upstream_now, read_now, write_now, gamma_now in reversed(steps):
        dS_now.copy_(current)
        torch.bmm(T_now, dU_now.baddbmm_(write_now, current), out=dB_now)
        current.mul_(gamma_now).baddbmm_(read_now, upstream_now)

    # Gradients of q_i . k_j and of -beta_i k_i . k_j, and what each pair of tokens adds to dG_i and takes from dG_j:
    # the same number, because dG is a small difference of large sums.
    KK = torch.bmm(key, key.transpose(1, 2), out=scratch("KK", Z, C, C))
    dweights = torch.bmm(upstream, U.transpose(1, 2), out=scratch("dweights", Z, 2 * C, C))
    pairs = P.mul_(dweights[:, :C])
    dweights[:, :C].mul_(D)
    pairs_solve = KK.mul_(dweights[:, C:].mul_(D.tril_(-1)))
    q_dot = pairs.sum(2, keepdim=True, dtype=torch.float64)
    k_dot = pairs_solve.sum(2, keepdim=True, dtype=torch.float64)
    written = pairs.addcmul_(pairs_solve, gates.beta, value=-1).sum(1, dtype=torch.float64).unsqueeze(2)
    dG = q_dot - gates.beta * k_dot - written

    # Gradients of the readers, and of k as what is written.
    products = scratch("products", Z, C, K)
    dreaders = torch.bmm(upstream, S.transpose(1, 2), out=scratch("read", Z, 2 * C, K)).mul_(gamma)
    dquery, minus_dreader = dreaders.split(C, dim=1)
    from_state = torch.mul(query, dquery, out=products).sum(2, keepdim=True)
    q_dot += from_state
    dG += from_state
    from_state = torch.mul(key, minus_dreader, out=products).sum(2, keepdim=True)
    k_dot += from_state
    dG -= gates.beta * from_state
    dreaders.baddbmm_(dweights, key)
    dwritten = torch.bmm(U, dS.transpose(1, 2), out=write).mul_(gates.lam)
    to_state = torch.mul(key, dwritten, out=products).sum(2, keepdim=True)
    written += to_state
    dG -= to_state
    # The last G moves the decay of the whole chunk.
    kept = dS.mul_(S).sum((1, 2), keepdim=True).mul_(gates.gamma[:, -1:])
    dG[:, -1:] += to_state.sum(1, keepdim=True, dtype=torch.float64) + kept
    dwritten.baddbmm_(dweights.transpose(1, 2), readers)

    dbeta = _by_head(v, dU).mul_(dB).sum(2, keepdim=True) - k_dot
    dkey = dwritten.addcmul_(minus_dreader, gates.beta, value=-1)
    k_dot = written - gates.beta * k_dot
    group = Z * C * K // q.numel()
    return (
        _of_key_head(dquery, query, q_dot, q_factor, group),
        _of_key_head(dkey, key, k_dot, k_factor, group),
        torch.mul(dB, gates.beta, out=dU),
        dG,
        dbeta,
    )


def _of_key_head(dx: Tensor, x: Tensor, dot: Tensor, factor: Tensor | None, group: int) -> Tensor:
    """Gradient of q or k as they came in: summed over the value heads of a key head, then through the L2 norm.

    Args:
        dx, x: `[Z, C, K]` per value head; dx may be overwritten.
        dot: `[Z, C, 1]`, x . dx row by row.
        factor: `[..., C, H, 1]`, what normalised x; None: nothing did.
        group: value heads per key head.
    """
    if group > 1:
        dx, dot = (part.unflatten(0, (-1, group)).sum(1) for part in (dx, dot))
    if factor is None:
        return dx
    return dx.addcmul_(x[::group], dot.to(dx.dtype), value=-1).mul_(factor.transpose(-3, -2).flatten(0, -3))
