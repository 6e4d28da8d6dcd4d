"""Functions that run an operator on the ranks of a pool and on one rank, and compare."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.nn import functional as F

from megatron_gdn.kernels import causal_conv1d, chunk_gated_delta_rule
from megatron_gdn.kernels.sliding_window import sliding_window_attention
from megatron_gdn.kernels.ssd.api import ssd
from megatron_gdn.parallel.context import (
    context_causal_conv1d,
    context_gated_delta_rule,
    context_ssd,
    start_conv_halo,
)
from megatron_gdn.parallel.context_attention import context_attention
from megatron_gdn.parallel.fragments import prepare_fragments
from tests.parallel.traffic import counted_traffic

# Inputs that lie on every rank: their gradients are summed over ranks.
SHARED = ("weight", "bias", "A", "D")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv_inputs(b, T):
    return dict(x=normal(b, T, 6, seed=1), weight=normal(6, 4, seed=2), bias=normal(6, seed=3))


def conv(x, weight, bias, *, fragments=None, cu_seqlens=None, **options):
    if fragments is None:
        return causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens, **options)[0]
    halo = start_conv_halo(x, weight.shape[1], fragments)
    return context_causal_conv1d(x, weight, bias, fragments=fragments, halo=halo, **options)


def gated_delta_inputs(b, T):
    return dict(
        q=normal(b, T, 1, 8, seed=1),
        k=F.normalize(normal(b, T, 1, 8, seed=2) + 0.5, dim=-1),
        v=normal(b, T, 2, 6, seed=3),
        # Slow decay: what a far fragment adds must not vanish in the tolerance.
        g=0.02 * F.logsigmoid(normal(b, T, 2, seed=4)),
        beta=0.5 * normal(b, T, 2, seed=5).sigmoid(),
    )


def gated_delta(q, k, v, *, g, beta, fragments=None, cu_seqlens=None, **options):
    if fragments is not None:
        o, final = context_gated_delta_rule(q, k, v, g=g, beta=beta, fragments=fragments, **options)
        assert not final.requires_grad
        return o
    options.pop("state_exchange", None)
    return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, cu_seqlens=cu_seqlens, **options)[0]


def mamba_inputs(b, T):
    return dict(
        x=normal(b, T, 4, 3, seed=1),
        dt=F.softplus(normal(b, T, 4, seed=2)),
        A=-0.02 * normal(4, seed=3).exp(),
        B=normal(b, T, 2, 5, seed=4),
        C=normal(b, T, 2, 5, seed=5),
        D=normal(4, seed=6),
    )


def mamba(x, *, fragments=None, cu_seqlens=None, **arguments):
    if fragments is not None:
        y, final = context_ssd(x, fragments=fragments, **arguments)
        assert not final.requires_grad
        return y
    arguments.pop("state_exchange", None)
    return ssd(x, cu_seqlens=cu_seqlens, **arguments)[0]


def attention_inputs(b, T):
    return dict(q=normal(b, T, 8, 6, seed=1), k=normal(b, T, 4, 6, seed=2), v=normal(b, T, 4, 5, seed=3))


def attention(q, k, v, *, fragments=None, cu_seqlens=None, window=None, cp_comm_type="all_gather"):
    if fragments is None:
        return sliding_window_attention(q, k, v, window=window, cu_seqlens=cu_seqlens)
    rows_first = (x.transpose(0, 1) for x in (q, k, v))
    o = context_attention(*rows_first, fragments=fragments, window=window, cp_comm_type=cp_comm_type)
    return o.transpose(0, 1)


OPERATORS = {
    "conv": (conv, conv_inputs),
    "gated delta": (gated_delta, gated_delta_inputs),
    "mamba": (mamba, mamba_inputs),
    "attention": (attention, attention_inputs),
}


def outputs(function, tensors, weights, **options):
    """o and the gradient of each input, of the sum of o * weights."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    o = function(**leaves, **options)
    (o * weights.to(o.dtype)).sum().backward()
    return dict(o=o.detach()) | {name: x.grad for name, x in leaves.items()}


def errors(name, T, layout, bounds, dtype=torch.float64, **options):
    """Largest difference to one rank over the largest value, for the output and each gradient of one operator.

    Args:
        name: key of OPERATORS.
        T, layout: of the sequence.
        bounds: of packed documents; None: two rows without.
        dtype: of the ranks; one rank is float64.
        options: of the operator.
    """
    function, make = OPERATORS[name]
    tensors = make(2 if bounds is None else 1, T)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    with torch.no_grad():
        weights = normal(*function(**tensors, cu_seqlens=cu_seqlens, **_for_one_rank(options)).shape, seed=9)
    reference = outputs(function, tensors, weights, cu_seqlens=cu_seqlens, **_for_one_rank(options))
    group = parallel_state.get_context_parallel_group()
    fragments = prepare_fragments(T, layout=layout, group=group, cu_seqlens=cu_seqlens)
    local = {n: (x if n in SHARED else fragments.local(x)).to(dtype) for n, x in tensors.items()}
    ours = outputs(function, local, fragments.local(weights), fragments=fragments, **options)
    found = {}
    for key, expected in reference.items():
        if key in SHARED:
            dist.all_reduce(ours[key], group=group)
        else:
            expected = fragments.local(expected)
        found[key] = ((ours[key].double() - expected).abs().max() / expected.abs().max()).item()
    return found


def _for_one_rank(options):
    return {name: value for name, value in options.items() if name != "backend"}


def all_errors(cases):
    """`errors` of many cases in one call."""
    return [errors(*args, **options) for args, options in cases]


def float32_errors(name, layout, dtype, autocast, **options):
    """Largest difference to one rank over the largest value, of float32 numbers alone, with inputs of 16 bits.

    Compared are the states after each row and the gradients of the gates; one rank runs the same operator.

    Args:
        name: "gated delta" or "mamba"; two rows.
        dtype: of all inputs but those that are float32.
        autocast: whether the ranks, alone, run under autocast.
    """
    T, wide = 96, ("g", "beta", "dt", "A", "D")
    tensors = OPERATORS[name][1](2, T)
    tensors = {n: x.to(torch.float32 if n in wide else dtype) for n, x in tensors.items()}
    whole, parallel = {"gated delta": (chunk_gated_delta_rule, context_gated_delta_rule), "mamba": (ssd, context_ssd)}[
        name
    ]
    group = parallel_state.get_context_parallel_group()
    fragments = prepare_fragments(T, layout=layout, group=group)
    gates = [n for n in tensors if n in wide and n not in SHARED]

    def run(function, inputs, **more):
        leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
        first = [leaves.pop(n) for n in ("q", "k", "v", "x") if n in leaves]
        o, final = function(*first, **leaves, **more)
        return o, final, leaves

    expected, state, theirs = run(whole, tensors, output_final_state=True)
    expected.float().sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        o, final, ours = run(
            parallel, {n: x if n in SHARED else fragments.local(x) for n, x in tensors.items()},
            fragments=fragments, **options,
        )  # fmt: skip
        o.float().sum().backward()
    pairs = {f"grad {n}": (ours[n].grad, fragments.local(theirs[n].grad)) for n in gates}
    if fragments.num_fragments - 1 in fragments.owned:
        last = fragments.owned.index(fragments.num_fragments - 1)
        pairs["state"] = final.unflatten(0, (2, -1))[:, last], state
    return {n: ((found - value).abs().max() / value.abs().max()).item() for n, (found, value) in pairs.items()}


def all_float32_errors(cases):
    """`float32_errors` of many cases in one call."""
    return [float32_errors(*args, **options) for args, options in cases]


def traffic(name, T, layout, bounds, **options):
    """Bytes sent by kind of collective, in the forward and in the backward pass."""
    function, make = OPERATORS[name]
    tensors = make(1, T)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    group = parallel_state.get_context_parallel_group()
    fragments = prepare_fragments(T, layout=layout, group=group, cu_seqlens=cu_seqlens)
    leaves = {n: (x if n in SHARED else fragments.local(x)).requires_grad_() for n, x in tensors.items()}
    with counted_traffic() as forward:
        o = function(**leaves, fragments=fragments, **options)
    with counted_traffic() as backward:
        o.sum().backward()
    return dict(forward), dict(backward)


def all_traffic(cases):
    """`traffic` of many cases in one call."""
    return [traffic(*args, **options) for args, options in cases]


def refusal(name, T, layout, **options):
    """The message of the ValueError that an operator raises on this rank."""
    try:
        traffic(name, T, layout, None, **options)
    except ValueError as error:
        return str(error)


def trial(T) -> tuple:
    """What the kernels of the rule are tried for before their first use between ranks."""
    from unittest import mock

    from megatron_gdn.kernels import first_use

    group = parallel_state.get_context_parallel_group()
    inputs = {name: x.float() for name, x in gated_delta_inputs(1, T).items()}
    fragments = prepare_fragments(T, layout="contiguous", group=group)
    mine = {name: fragments.local(x) for name, x in inputs.items()}
    with mock.patch.object(first_use, "check_rule", side_effect=InterruptedError) as tried:
        try:
            gated_delta(**mine, fragments=fragments, backend="triton", allow_neg_eigval=True)
        except InterruptedError:
            (_, heads, sizes, setting), options = tried.call_args
            return heads, sizes, setting.negative_eigenvalues, setting.l2norm_eps, options
