"""Recurrent states across ranks: exact, and as large for a million tokens as for a thousand.

Over a fragment the state of a linear recurrence is an affine function of the one that enters it, S_out = M S_in + S
(kernels/README.md, "Context parallelism"). Every rank makes M and S of its own fragments, all ranks exchange them in
float32 (float64 for float64 inputs), and each folds what lies before its fragments, in the sequence's order:

    S_in(f + 1) = M_f S_in(f) + S_f             0 where a document starts

Then it runs as usual. Backward the same: from the gradient dS_f of S_in(f) that fragment f itself causes,

    dS_out(f) = dS_in(f + 1)                    dS_in(f) = M_f^T dS_out(f) + dS_f

dS_out enters the usual backward pass as the gradient of the final state, which then gives the inputs all that they
contribute to later fragments, so M and S need no gradients of their own.

Two ways to exchange them: "all_gather", one step, memory that grows with the number of ranks; and "scan", which
composes neighbouring maps in log2(fragments) steps, in memory that does not grow.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.parallel.exchange import shift, start_gather
from megatron_gdn.parallel.fragments import Fragments

EXCHANGES = ("all_gather", "scan")


def _apply(M: Tensor, X: Tensor) -> Tensor:
    """M X for matrices `[..., K, K]`, or for numbers `[..., 1, 1]`."""
    if M.shape[-1] == 1:
        return M * X
    with torch.autocast(M.device.type, enabled=False):  # it would multiply in 16 bits
        return M @ X


class StatePassing:
    """One exchange of states forward, and one of their gradients backward.

    Args:
        fragments: of the batch.
        exchange: "all_gather" or "scan".
    """

    def __init__(self, fragments: Fragments, exchange: str = "all_gather"):
        if exchange not in EXCHANGES:
            raise ValueError(f"state_exchange ({exchange}) must be 'all_gather' or 'scan': 'scan' saves memory.")
        self.fragments, self.exchange = fragments, exchange
        self.M = None
        """What the backward pass needs: of all later fragments, or with scan of this rank's."""

    @torch.no_grad()
    def start(self, M: Tensor, S: Tensor):
        """Start to send this rank's maps.

        Args:
            M: `[F, b, H, K, K]` for its F fragments, or numbers `[F, b, H, 1, 1]`; read where a document spans the
                whole fragment and runs on.
            S: `[F, b, H, K, V]`, read where a document runs on into the next fragment.

        Returns:
            A function that waits and returns the states that enter this rank's fragments, like S.
        """
        if self.exchange == "scan":
            self.M = M
            return lambda: self._scan(M, S, backward=False)
        shapes = S.shape[3:], M.shape[3:]
        wait = start_gather(torch.cat([S.flatten(3), M.flatten(3)], -1), self.fragments)

        def fold() -> Tensor:
            S_all, M_all = wait().split([shape.numel() for shape in shapes], -1)
            S_all, M_all = S_all.unflatten(-1, shapes[0]), M_all.unflatten(-1, shapes[1])
            self.first = min(self.fragments.owned) + 1
            self.M = M_all[self.first :].clone()  # a view would keep all states alive
            return self._fold(M_all, S_all)

        return fold

    @torch.no_grad()
    def start_backward(self, dS: Tensor):
        """Start to send gradients.

        Args:
            dS: like S, the gradient of the state that enters each of this rank's fragments, from its own outputs.

        Returns:
            A function that waits and returns the gradients of the states that leave this rank's fragments.
        """
        if self.exchange == "scan":
            return lambda: self._scan(self.M.transpose(-1, -2), dS, backward=True)
        wait = start_gather(dS, self.fragments)
        return lambda: self._fold_backward(wait())

    def _fold(self, M: Tensor, S: Tensor) -> Tensor:
        """From all fragments' maps."""
        fragments, found = self.fragments, {}
        state = torch.zeros_like(S[0])
        for f in range(max(fragments.owned) + 1):
            found[f] = state
            if not fragments.passes_on(f):
                state = torch.zeros_like(state)
            else:
                state = S[f] if fragments.is_reset(f) else _apply(M[f], state) + S[f]
        return torch.stack([found[f] for f in fragments.owned])

    def _fold_backward(self, dS: Tensor) -> Tensor:
        """From all fragments' gradients."""
        fragments, found = self.fragments, {}
        gradient = torch.zeros_like(dS[0])  # of the state that leaves fragment f
        for f in reversed(range(min(fragments.owned), fragments.num_fragments)):
            if not fragments.passes_on(f):
                gradient = torch.zeros_like(gradient)
            found[f] = gradient
            if f == min(fragments.owned):
                break
            if fragments.is_reset(f):
                gradient = dS[f]
            else:
                gradient = _apply(self.M[f - self.first].transpose(-1, -2), gradient) + dS[f]
        return torch.stack([found[f] for f in fragments.owned])

    def _scan(self, A: Tensor, B: Tensor, *, backward: bool) -> Tensor:
        """Compose the maps X -> A X + B of all fragments before, or after, each of this rank's, by doubling."""
        fragments, step = self.fragments, -1 if backward else 1
        A, B = A.clone(), B.clone()
        for place, f in enumerate(fragments.owned):
            if fragments.is_reset(f):
                A[place] = 0
            # What leaves the map of f: forward into fragment f + 1, backward out of fragment f - 1.
            if not (fragments.passes_on(f) if not backward else f > 0 and fragments.passes_on(f - 1)):
                A[place], B[place] = 0, 0
        shapes = B.shape[3:], A.shape[3:]
        distance = 1
        while distance < fragments.num_fragments:
            pair = torch.cat([B.flatten(3), A.flatten(3)], -1)
            received, places = shift(pair, fragments, step * distance)
            B_other, A_other = received.split([shape.numel() for shape in shapes], -1)
            B_other, A_other = B_other.unflatten(-1, shapes[0]), A_other.unflatten(-1, shapes[1])
            for place in places:
                B[place] += _apply(A[place], B_other[place])
                A[place] = _apply(A[place], A_other[place])
            distance *= 2
        return shift(B, fragments, step)[0]


class _ReturnGradient(torch.autograd.Function):
    """o as it is; backward gives the final states the gradient that later fragments send."""

    @staticmethod
    def forward(ctx, o, final, passing: StatePassing, local_gradient, spread, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.passing, ctx.local_gradient, ctx.spread, ctx.dtype = passing, local_gradient, spread, final.dtype
        return o.view_as(o)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        wait = ctx.passing.start_backward(ctx.local_gradient(do, *ctx.saved_tensors))
        return do, ctx.spread(wait()).to(ctx.dtype), None, None, None, *[None] * len(ctx.saved_tensors)


def return_gradient(
    o: Tensor, final: Tensor, passing: StatePassing, local_gradient, spread, *tensors: Tensor
) -> Tensor:
    """Connect the output of a recurrence with the ranks that go on from its final states.

    Args:
        o: the output.
        final: `[N, H, K, V]`, final states of its sequences.
        passing: as used for the states that entered.
        local_gradient: function (do, *tensors) -> `[F, b, H, K, V]`, the gradient of the states that entered this
            rank's fragments, where those that left have none.
        spread: function from `[F, b, H, K, V]`, one state for each fragment, to `[N, H, K, V]`, 0 elsewhere.
        tensors: what local_gradient needs; kept for the backward pass.

    Returns:
        o, to be used in its place.
    """
    return _ReturnGradient.apply(o, final, passing, local_gradient, spread, *tensors)
