"""The recurrent operators under context parallelism: what each exchanges, and the result of one rank, exactly.

    causal_conv1d        width - 1 rows before each fragment
    gated_delta_rule     states and transition matrices of the fragments (`megatron_gdn.parallel.state`)
    ssd                  the same, with one number per head for the matrix

Each takes this rank's part of a batch as its one-rank counterpart takes the whole. With one rank, and where no document
crosses a fragment's edge, nothing is sent.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_gdn.kernels.backend import accumulate_dtype, check_triton_dtypes, resolve_backend
from megatron_gdn.kernels.causal_conv1d import causal_conv1d
from megatron_gdn.kernels.gated_delta_rule.api import chunk_gated_delta_rule
from megatron_gdn.kernels.gated_delta_rule.stretch import affine_map, state_gradient
from megatron_gdn.kernels.l2norm import L2NORM_EPS
from megatron_gdn.kernels.ssd.api import ssd
from megatron_gdn.kernels.varlen import table_of_batch
from megatron_gdn.parallel.exchange import PendingRows, start_rows
from megatron_gdn.parallel.fragments import Fragments, check_fragments
from megatron_gdn.parallel.state import StatePassing, return_gradient


def start_conv_halo(x: Tensor, width: int, fragments: Fragments) -> PendingRows | None:
    """Start to fetch the rows that a convolution reads before each fragment; None where there are none.

    Args:
        x: `[b, s, D]`, input of the convolution.
        width: of the convolution, tokens.
        fragments: of the batch.

    Raises:
        ValueError: a fragment shorter than width - 1, a batch that is not of these fragments.
    """
    fragments.check(x, "x")
    check_fragments(fragments.num_tokens, layout=fragments.layout, size=fragments.size, conv_width=width)
    return start_rows(x.transpose(0, 1), fragments, width - 1) if fragments.crossed else None


def context_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    fragments: Fragments,
    halo: PendingRows | None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """`causal_conv1d` of this rank's tokens, whose first ones see the rows of the rank before.

    Args:
        x, weight, bias, activation, backend: see `causal_conv1d`; x `[b, s, D]` of this rank.
        fragments: of the batch.
        halo: from `start_conv_halo`.

    Returns:
        `[b, s, D]` in x's dtype.
    """
    state = None
    if halo is not None:
        before = weight.shape[1] - 1
        rows = [torch.nn.functional.pad(part, (0, 0, 0, 0, before - len(part), 0)) for part in halo.wait()]
        by_fragment = torch.stack(rows).transpose(1, 2)  # [F, b, W - 1, D]
        state = _of_sequences(by_fragment, fragments, fragments.first_piece)
    y, _ = causal_conv1d(
        fragments.fold(x),
        weight,
        bias,
        activation=activation,
        initial_state=state,
        cu_seqlens=fragments.table,
        backend=backend,
    )
    return fragments.unfold(y)


def context_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    fragments: Fragments,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_exchange: str = "all_gather",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`chunk_gated_delta_rule` of this rank's tokens, which go on from the states of the ranks before.

    Args:
        q, k, v, g, beta, scale, use_qk_l2norm_in_kernel, allow_neg_eigval: see `chunk_gated_delta_rule`; tensors
            `[b, s, ...]` of this rank.
        fragments: of the batch.
        state_exchange: "all_gather" or "scan", see `megatron_gdn.parallel.state`.
        backend: "torch", "triton" or "auto".

    Returns:
        o `[b, s, HV, V]` in v's dtype, and the states after the pieces of the fragments, float32 (float64), detached.

    Raises:
        ValueError: as `chunk_gated_delta_rule`; a batch that is not of these fragments.
    """
    fragments.check(v, "v")
    backend = resolve_backend(backend, v.device)
    batch, scale = len(v), q.shape[-1] ** -0.5 if scale is None else scale
    passing = StatePassing(fragments, state_exchange)
    q, k, v, g, beta = (fragments.fold(x) for x in (q, k, v, g, beta))
    if not fragments.crossed:
        o, final = chunk_gated_delta_rule(
            q,
            k,
            v,
            g=g,
            beta=beta,
            scale=scale,
            output_final_state=True,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            allow_neg_eigval=allow_neg_eigval,
            cu_seqlens=fragments.table,
            backend=backend,
        )
        return fragments.unfold(o), final.detach()
    whole, (HV, V), K = table_of_batch(v, fragments.table), v.shape[2:], q.shape[-1]
    zeros = functools.partial(v.new_zeros, dtype=accumulate_dtype(v.dtype))

    def of_last(compute: Callable) -> list[Tensor]:
        needed = [fragments.passes_on(f) for f in fragments.owned]
        found = [zeros(len(needed), batch, HV, K, size) for size in (K, V)]
        return _fill(found, compute, needed, _sequences(fragments, fragments.last_piece, batch))

    def of_first(compute: Callable) -> list[Tensor]:
        needed = [f > 0 and fragments.passes_on(f - 1) for f in fragments.owned]
        found = [zeros(len(needed), batch, HV, K, V)]
        return _fill(found, compute, needed, _sequences(fragments, fragments.first_piece, batch))

    def leaving(gradients: Tensor) -> Tensor:
        return _of_sequences(gradients, fragments, fragments.last_piece)

    def entering(states: Tensor) -> Tensor:
        return _of_sequences(states, fragments, fragments.first_piece)

    if backend == "triton":
        from megatron_gdn.kernels.first_use import check_rule
        from megatron_gdn.parallel.triton_rule import TritonContextRule, TritonContextSetting

        check_triton_dtypes(q=q, k=k, v=v, g=g, beta=beta)
        setting = TritonContextSetting(
            table=whole,
            scale=scale,
            l2norm_eps=L2NORM_EPS if use_qk_l2norm_in_kernel else None,
            negative_eigenvalues=allow_neg_eigval,
            passing=passing,
            of_last=of_last,
            of_first=of_first,
            entering=entering,
            leaving=leaving,
        )
        check_rule(v, (q.shape[2], HV), (K, V), setting, has_state=True, maps=True)
        o, final = TritonContextRule.apply(q, k, v, g, beta, setting)
        return fragments.unfold(o), final
    l2norm = dict(use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
    M, S = of_last(lambda chosen: affine_map(k, v, g=g, beta=beta, table=whole.select(chosen), **l2norm))
    o, final = chunk_gated_delta_rule(
        q,
        k,
        v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=entering(passing.start(M, S)()),
        output_final_state=True,
        cu_seqlens=fragments.table,
        backend=backend,
        **l2norm,
    )

    def local_gradient(do: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        how = dict(g=g, beta=beta, scale=scale, **l2norm)
        (dS,) = of_first(lambda chosen: (state_gradient(q, k, do, table=whole.select(chosen), **how),))
        return dS

    o = return_gradient(o, final, passing, local_gradient, leaving, q, k, g, beta)
    return fragments.unfold(o), final.detach()


def context_ssd(
    x: Tensor,
    *,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    fragments: Fragments,
    state_exchange: str = "all_gather",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`ssd` of this rank's tokens, which go on from the states of the ranks before.

    The decay of a head is one number, so the state that a stretch writes is one product over its tokens, and so is the
    gradient of the state that enters it:

        M = exp(c_n)        S = sum_t exp(c_n - c_t) dt_t B_t^T x_t        dS = sum_t exp(c_t) C_t^T dy_t

    with c_t = A (dt_1 + ... + dt_t) from the start of the stretch.

    Args:
        x, dt, A, B, C, D, backend: see `ssd`; tensors `[b, s, ...]` of this rank.
        fragments, state_exchange: see `context_gated_delta_rule`.

    Returns:
        y `[b, s, H, P]` in x's dtype, and the states after the pieces of the fragments, float32 (float64), detached.

    Raises:
        ValueError: as `ssd`; a batch that is not of these fragments.
    """
    fragments.check(x, "x")
    passing, entering = StatePassing(fragments, state_exchange), None
    if fragments.crossed:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            M, S = _ssd_maps(x, dt, A, B, fragments)
        entering = _of_sequences(passing.start(M, S)(), fragments, fragments.first_piece)
    y, final = ssd(
        fragments.fold(x),
        dt=fragments.fold(dt),
        A=A,
        B=fragments.fold(B),
        C=fragments.fold(C),
        D=D,
        initial_state=entering,
        output_final_state=True,
        cu_seqlens=fragments.table,
        backend=backend,
    )
    if fragments.crossed:

        def local_gradient(dy: Tensor, dt: Tensor, A: Tensor, C: Tensor) -> Tensor:
            with torch.autocast(dy.device.type, enabled=False):
                return _ssd_gradients(fragments.unfold(dy), dt, A, C, fragments)

        def leaving(gradients: Tensor) -> Tensor:
            return _of_sequences(gradients, fragments, fragments.last_piece)

        y = return_gradient(y, final, passing, local_gradient, leaving, dt, A, C)
    return fragments.unfold(y), final.detach()


def _sequences(fragments: Fragments, pieces: list[int] | None, batch: int) -> list[list[int]]:
    """For each owned fragment its sequences, one for each row, as the kernels number them."""
    if fragments.packed:
        return [[piece] for piece in pieces]
    count = len(fragments.owned)
    return [[row * count + place for row in range(batch)] for place in range(count)]


def _of_sequences(x: Tensor, fragments: Fragments, pieces: list[int] | None) -> Tensor:
    """What enters or leaves the fragments, `[F, b, ...]`, by sequences, `[N, ...]`, 0 elsewhere; differentiable.

    Args:
        pieces: `first_piece` or `last_piece`.
    """
    if not fragments.packed:
        return x.transpose(0, 1).flatten(0, 1)
    found = x.new_zeros(len(fragments.table.lengths), *x.shape[2:])
    for place, piece in enumerate(pieces):
        found[piece] = x[place, 0]
    return found


def _fill(found: list[Tensor], compute: Callable, needed: list[bool], sequences: list[list[int]]) -> list[Tensor]:
    """`found`, zeros `[F, b, ...]`, with what `compute(sequences)` gives for the fragments that are needed."""
    places = [place for place, need in enumerate(needed) if need]
    if places:
        results = compute([sequence for place in places for sequence in sequences[place]])
        for target, result in zip(found, results, strict=True):
            for place, part in zip(places, result.split(target.shape[1]), strict=True):
                target[place] = part
    return found


def _stretches(fragments: Fragments, *, first: bool) -> list[slice]:
    """Local tokens of the first, or last, piece of each owned fragment."""
    found = []
    for place in range(len(fragments.owned)):
        start, lengths = place * fragments.length, fragments.piece_lengths(place) or [fragments.length]
        low = start if first else start + sum(lengths[:-1])
        found.append(slice(low, low + lengths[0 if first else -1]))
    return found


def _ssd_maps(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, fragments: Fragments) -> tuple[Tensor, Tensor]:
    """M `[F, b, H, 1, 1]` and S `[F, b, H, N, P]` of the last pieces."""
    dtype, maps = accumulate_dtype(x.dtype), []
    for tokens in _stretches(fragments, first=False):
        # float64 as in the kernel: sums of fast decays lose small differences.
        c = (dt[:, tokens].double() * A.double()).cumsum(1)
        weights = (dt[:, tokens].double() * (c[:, -1:] - c).exp()).to(dtype)
        written = (x[:, tokens].to(dtype) * weights.unsqueeze(-1)).unflatten(2, (B.shape[2], -1))
        S = torch.einsum("btgn,btgrp->bgrnp", B[:, tokens].to(dtype), written).flatten(1, 2)
        maps.append((c[:, -1].exp().to(dtype)[..., None, None], S))
    return tuple(torch.stack(parts) for parts in zip(*maps, strict=True))


def _ssd_gradients(dy: Tensor, dt: Tensor, A: Tensor, C: Tensor, fragments: Fragments) -> Tensor:
    """dS `[F, b, H, N, P]` of the first pieces."""
    dtype, found = accumulate_dtype(dy.dtype), []
    for tokens in _stretches(fragments, first=True):
        gamma = (dt[:, tokens].double() * A.double()).cumsum(1).exp().to(dtype)
        read = (dy[:, tokens].to(dtype) * gamma.unsqueeze(-1)).unflatten(2, (C.shape[2], -1))
        found.append(torch.einsum("btgn,btgrp->bgrnp", C[:, tokens].to(dtype), read).flatten(1, 2))
    return torch.stack(found)
