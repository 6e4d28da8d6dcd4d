"""The first use of kernels where Triton may compile them to wrong code: they run on a small problem, and must be right.

`triton_support/guards.py` lists what is known of Triton's faults. Some have no known cause, so that no look at a kernel
rules them out; Hopper has had such reports for every Triton from 3.4 on. There the kernels of the rule and of the
state-space op, which multiply on tensor cores, are tried before their first results are used: once per process, device,
dtype and shape of heads, as the caller's own binaries, against backend `torch` in float64. This takes milliseconds
beyond the compilation that is due anyway, waits for the device, and needs nobody to remember a command. What is wrong
is an error; where no such fault is known, and in the interpreter, nothing is tried.

The problem has two chunks and a bit, with the same tokens in all rows and groups of heads. So one group is enough to
compare with, and a race shows as a difference between groups: some faults came only with a thousand blocks at once.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_gdn.kernels.triton_support import guards
from megatron_gdn.kernels.varlen import CHUNK_SIZE, table_of_batch

logger = logging.getLogger(__name__)

NUM_TOKENS = 2 * CHUNK_SIZE + 2
BLOCKS = 1024
"""Chunks times heads of the problem: on Blackwell a kernel of fla was right below, and wrong from there on."""
GATES = ("g", "beta", "dt", "A")


def limit_of(name: str, dtype: torch.dtype) -> float:
    """Relative error that means wrong code. fla's issue 984 has 0.54 and 0.68; rounding is at most a fifth of this."""
    if dtype == torch.float32:
        return 1e-3
    return 0.1 if name[1:] in GATES else 0.04


@functools.cache
def unproven_faults(device: torch.device) -> tuple[guards.Miscompile, ...]:
    """Faults of this Triton on this device that nobody can say our kernels do not have."""
    import triton

    from megatron_gdn.kernels.triton_support.configs import architecture
    from megatron_gdn.kernels.triton_support.language import INTERPRETED

    if INTERPRETED or device.type != "cuda":
        return ()
    hit = guards.check_compiler(architecture(device), triton.__version__)
    return tuple(fault for fault in hit if fault.verdict == "unproven")


def check_rule(
    like: Tensor,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    setting,
    *,
    has_state: bool,
    norms: bool = False,
    maps: bool = False,
) -> None:
    """Raise RuntimeError where the rule's kernels are wrong on this device.

    Args:
        like: of the device and dtype of q, k and v.
        heads, sizes: (H, HV) and (K, V).
        setting: the call's, with l2norm_eps and negative_eigenvalues.
        has_state: it starts from given states.
        norms: an earlier kernel gives the norms of q and k.
        maps: the kernel of context parallelism is used too.
    """
    if faults := unproven_faults(like.device):
        options = (has_state, setting.l2norm_eps, setting.negative_eigenvalues, norms, maps)
        _try_rule(faults, like.device, like.dtype, heads, sizes, *options)


def check_ssd(x: Tensor, B: Tensor, D: Tensor | None, initial_state: Tensor | None) -> None:
    """Raise RuntimeError where the kernels of the state-space op are wrong on this device; arguments as of `ssd`."""
    if faults := unproven_faults(x.device):
        heads, sizes = (B.shape[2], x.shape[2]), (B.shape[3], x.shape[3])
        _try_ssd(faults, x.device, x.dtype, heads, sizes, D is not None, initial_state is not None)


@functools.cache
def _try_rule(faults, device, dtype, heads, sizes, has_state, eps, negative, norms, maps) -> None:
    from megatron_gdn.kernels.gated_delta_rule import stretch, triton_chunk
    from megatron_gdn.kernels.gated_delta_rule.api import chunk_gated_delta_rule
    from megatron_gdn.kernels.gated_delta_rule.stretch_triton import affine_maps

    (H, HV), (K, V), T = heads, sizes, NUM_TOKENS
    group, normal = HV // H, _normal()
    one = dict(
        q=normal(1, T, 1, K),
        k=F.normalize(normal(1, T, 1, K) + 0.5, dim=-1),
        v=normal(1, T, group, V),
        g=F.logsigmoid(2 * normal(1, T, group) + 1),
        beta=normal(1, T, group).sigmoid() * (2 if negative else 1),
        initial_state=normal(1, group, K, V),
        do=normal(1, T, group, V),
        dfinal=normal(1, group, K, V),
    )
    one = {n: x.to(dtype if n in ("q", "k", "v", "do") else torch.float32) for n, x in one.items()}
    rows = -(-BLOCKS // (3 * HV))
    given = {n: x.repeat(rows, *((1, H) if x.shape[1] == T else (H, 1)), *[1] * (x.dim() - 3)) for n, x in one.items()}
    given = {n: x.to(device) for n, x in given.items()}
    q, k, v, g, beta = (given[n] for n in ("q", "k", "v", "g", "beta"))
    state, dfinal = (given[n] if has_state else None for n in ("initial_state", "dfinal"))
    setting = triton_chunk.TritonSetting(
        table=table_of_batch(v, None), scale=K**-0.5, l2norm_eps=eps, negative_eigenvalues=negative
    )

    def ours() -> dict[str, Tensor]:
        factors = None
        if norms:
            prepared = triton_chunk.run_forward(q, k, v, g, beta, state, setting)[2]
            factors = prepared.rq, prepared.rk
        o, final, prepared, *_ = triton_chunk.run_forward(q, k, v, g, beta, state, setting, norms=factors)
        grads, dstate = triton_chunk.run_backward(
            given["do"], dfinal, q, k, v, beta, state, prepared, None, None, setting, needs_dinitial=has_state
        )
        found = dict(zip(("o", "dq", "dk", "dv", "dg", "dbeta"), (o, *grads), strict=True)) | dict(final_state=final)
        if has_state:
            found["dinitial_state"] = dstate
        if maps:
            with torch.cuda.device_of(v):
                found["M"], found["S"] = affine_maps(k, v, beta, prepared, table=setting.table)
        return found

    def reference() -> dict[str, Tensor]:
        exact = {n: x.double() for n, x in one.items()}
        leaves = {n: exact[n].requires_grad_() for n in ("q", "k", "v", "g", "beta", "initial_state")}
        l2norm = dict(use_qk_l2norm_in_kernel=eps is not None)
        tensors = leaves if has_state else leaves | dict(initial_state=None)
        o, final = chunk_gated_delta_rule(**tensors, **l2norm, output_final_state=True, backend="torch")
        loss = (o * exact["do"]).sum() + ((final * exact["dfinal"]).sum() if has_state else 0)
        loss.backward()
        found = dict(o=o, final_state=final) | {f"d{n}": x.grad for n, x in leaves.items() if x.grad is not None}
        if maps:
            tokens = (exact[n].detach() for n in ("k", "v"))
            gates = {n: exact[n].detach() for n in ("g", "beta")}
            table = table_of_batch(exact["v"], None)
            found["M"], found["S"] = stretch.affine_map(*tokens, **gates, table=table, **l2norm)
        return found

    what = f"the gated delta rule ({H}/{HV} heads of {K}/{V}, {str(dtype).removeprefix('torch.')})"
    _compare(what, faults, device, dtype, ours, reference)


@functools.cache
def _try_ssd(faults, device, dtype, heads, sizes, has_D, has_state) -> None:
    from megatron_gdn.kernels.ssd.api import ssd
    from megatron_gdn.kernels.ssd.triton_ssd import TritonSSD

    (G, H), (N, P), T = heads, sizes, NUM_TOKENS
    group, normal = H // G, _normal()
    one = dict(
        x=normal(1, T, group, P),
        dt=F.softplus(2 * normal(1, T, group) - 2),
        B=normal(1, T, 1, N),
        C=normal(1, T, 1, N),
        A=-normal(group).exp(),
        D=normal(group),
        initial_state=normal(1, group, N, P),
    )
    weights = dict(y=normal(1, T, group, P), state=normal(1, group, N, P))
    one = {n: x.to(dtype if n in ("x", "B", "C") else torch.float32) for n, x in one.items()}
    absent = {n: None for n, present in (("D", has_D), ("initial_state", has_state)) if not present}
    rows = -(-BLOCKS // (3 * H))

    def repeated(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x.repeat(G).to(device)
        return x.repeat(rows, *((1, G) if x.shape[1] == T else (G, 1)), *[1] * (x.dim() - 3)).to(device)

    def run(function, inputs, weigh, copies) -> dict[str, Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in inputs.items() if n not in absent}
        y, state = function(**leaves, **absent)
        loss = (y * weigh["y"].to(y.dtype)).sum() + (state * weigh["state"].to(state.dtype)).sum()
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        grads |= {n: grads[n] / copies for n in ("A", "D") if n in grads}
        return dict(y=y, state=state) | {f"d{n}": x for n, x in grads.items()}

    given, weigh = ({n: repeated(x) for n, x in tensors.items()} for tensors in (one, weights))
    table = table_of_batch(given["x"], None)

    def apply(x, dt, A, B, C, D, initial_state):
        return TritonSSD.apply(x, dt, B, C, A, D, initial_state, table)

    def exact(**tensors):
        return ssd(**tensors, output_final_state=True, backend="torch")

    _compare(
        f"the state-space op ({H} heads of {N}/{P}, {str(dtype).removeprefix('torch.')})",
        faults,
        device,
        dtype,
        lambda: run(apply, given, weigh, rows),
        lambda: run(exact, {n: x.double() for n, x in one.items()}, weights, 1),
    )


def _compare(
    what: str,
    faults: tuple[guards.Miscompile, ...],
    device: torch.device,
    dtype: torch.dtype,
    ours: Callable[[], dict[str, Tensor]],
    reference: Callable[[], dict[str, Tensor]],
) -> None:
    """Raise RuntimeError unless two runs of ours agree, with each other and in each group with the reference of one."""
    import triton

    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"the first use of {what} must not be captured in a CUDA graph: run the layer once before.")
    logger.info("trying the kernels of %s, as Triton %s has unproven faults here", what, triton.__version__)
    # Leaving inference mode also turns gradients on.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        expected = reference()
        try:
            found, again = ours(), ours()
            if on_gpu:
                torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise _wrong(what, faults, device, str(error).partition("\n")[0]) from error
        for name, exact in expected.items():
            x, exact = found[name].detach(), exact.detach()
            x = x.unflatten(0, (-1, exact.shape[0]))
            if not torch.equal(x, again[name].detach().reshape(x.shape)):
                raise _wrong(what, faults, device, f"two runs differ in {name}")
            x = _groups(x, exact)
            if not torch.equal(x, x[:1].expand_as(x)):
                raise _wrong(what, faults, device, f"groups of heads with the same inputs differ in {name}")
            error = ((x[0].cpu().double() - exact).norm() / exact.norm()).item()
            if not error <= limit_of(name, dtype):
                raise _wrong(what, faults, device, f"{name} is off by {error:.1e} of its size")


def _groups(x: Tensor, one: Tensor) -> Tensor:
    """`[rows, *shape]` with repeated heads as `[copies, *shape of one]`."""
    for d, size in enumerate(one.shape):
        if x.shape[d + 1] != size:
            x = x.unflatten(d + 1, (-1, size)).movedim(d + 1, 1).flatten(0, 1)
    return x


def _wrong(what: str, faults: tuple[guards.Miscompile, ...], device: torch.device, problem: str) -> RuntimeError:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    issues = ", ".join(fault.issue for fault in faults)
    return RuntimeError(
        f"Triton ({triton.__version__}) compiles the kernels of {what} to wrong code for {name}: {problem}. Install "
        f"another Triton (reported for this one: {issues}), or use backend 'torch'; python -m "
        "megatron_gdn.kernels.selfcheck tries all kernels."
    )


def _normal() -> Callable[..., Tensor]:
    rng = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)
