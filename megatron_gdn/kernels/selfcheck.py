"""Compare every kernel with its reference on the present device, as this machine's compiler made it.

    python -m megatron_gdn.kernels.selfcheck                     the default backend of the device
    python -m megatron_gdn.kernels.selfcheck --backend torch --device cpu --quick

Prints a table of relative errors (root mean square of the difference over that of the reference in float64) and whether
two runs give the same bits; ends with 1 when a bound is broken. A kernel that a compiler breaks shows here before it
shows in a loss curve. On a CPU the Triton kernels run where TRITON_INTERPRET=1 is set, with --quick in minutes.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_gdn.kernels import (
    causal_conv1d,
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_gate,
    gated_delta_mixer,
    l2norm,
    prepare_chunk_table,
    rms_norm_gated,
    ssd,
)
from megatron_gdn.kernels.backend import resolve_backend
from megatron_gdn.kernels.causal_conv1d import causal_conv1d_ref, causal_conv1d_update, causal_conv1d_update_ref
from megatron_gdn.kernels.gated_delta_rule.gate import gated_delta_gate_ref
from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from megatron_gdn.kernels.gated_delta_rule.stretch import affine_map
from megatron_gdn.kernels.gated_rms_norm import rms_norm_gated_ref
from megatron_gdn.kernels.l2norm import L2NORM_EPS, l2norm_ref
from megatron_gdn.kernels.ssd.reference import recurrent_ssd_ref
from megatron_gdn.kernels.varlen import table_of_batch

# Relative errors that a kernel may have: of outputs and states, of gradients, of gradients of gates (sums of many
# products of both signs). In 16 bits they are those that fla holds its kernels to; float32 is tf32x3 on tensor cores.
BOUNDS = {
    torch.float32: (1e-5, 1e-5, 5e-5),
    torch.bfloat16: (0.005, 0.008, 0.02),
    torch.float16: (0.005, 0.008, 0.02),
}
_GATES = ("g", "beta", "alpha", "gates", "A_log", "dt_bias", "dt", "A")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One kernel with one set of inputs.

    name: shown in the table.
    function, reference: of the inputs by name, to outputs by name.
    inputs: float64; those in `rounded` are given in `dtype`, the others in float32.
    gradients: whether there are any; a kernel for decoding has none.
    slack: of the bounds in 16 bits, for a chain of operations, which rounds more often.
    """

    name: str
    dtype: torch.dtype
    function: Callable[..., dict[str, Tensor]]
    reference: Callable[..., dict[str, Tensor]]
    inputs: dict[str, Tensor]
    rounded: tuple[str, ...]
    gradients: bool = True
    slack: float = 1.0


def rule_checks(device: torch.device, backend: str, *, quick: bool) -> Iterator[Check]:
    """The chunked rule with gradients, at every head size and dtype of the launch table, and the decoding kernel."""
    sizes = [(16, 16), (60, 100)] if quick else [(64, 64), (128, 128), (60, 100), (192, 384), (200, 400), (256, 512)]
    length = 70 if quick else 520
    dtypes = [torch.float32, torch.bfloat16] if quick else list(BOUNDS)
    for K, V in sizes:
        for dtype in dtypes:
            yield _rule(f"rule K {K} V {V}", device, backend, dtype=dtype, B=2, T=length, H=1, HV=2, K=K, V=V)
    K, V = sizes[0]
    common = dict(dtype=torch.bfloat16, H=1, HV=2, K=K, V=V)
    lengths = (0, 1, length // 2, 64, 0, length // 3)
    packed = prepare_chunk_table(torch.tensor([0, *lengths]).cumsum(0), device=device)
    yield _rule("rule packed", device, backend, B=1, T=sum(lengths), table=packed, **common)
    yield _rule("rule beta < 2", device, backend, B=1, T=length, beta_max=2.0, **common)
    yield _rule("decoding", device, backend, B=3, T=3, recurrent=True, **common)
    for dtype in (torch.float32, torch.bfloat16):
        yield _fragment(device, backend, dtype=dtype, T=length, H=1, HV=2, K=K, V=V)


def _rule(
    name: str,
    device: torch.device,
    backend: str,
    *,
    dtype: torch.dtype,
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    table=None,
    beta_max: float = 1.0,
    recurrent: bool = False,
) -> Check:
    normal = _normal(device)
    num_states = B if table is None else len(table.lengths)
    inputs = dict(
        q=normal(B, T, H, K),
        k=normal(B, T, H, K) + 0.5,
        v=normal(B, T, HV, V),
        g=F.logsigmoid(2 * normal(B, T, HV) + 1),
        beta=normal(B, T, HV).sigmoid() * beta_max,
        initial_state=normal(num_states, HV, K, V),
    )
    ours = fused_recurrent_gated_delta_rule if recurrent else chunk_gated_delta_rule

    def call(function, documents, q, k, v, **gates):
        options = {} if function is recurrent_gated_delta_rule_ref else dict(backend=backend)
        if function is chunk_gated_delta_rule:
            options["allow_neg_eigval"] = beta_max > 1
        o, state = function(
            q,
            k,
            v,
            **gates,
            **options,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=documents,
        )
        return dict(o=o, state=state)

    return Check(
        name=name,
        dtype=dtype,
        function=lambda **x: call(ours, table, **x),
        reference=lambda **x: call(recurrent_gated_delta_rule_ref, None if table is None else table.bounds, **x),
        inputs=inputs,
        rounded=("q", "k", "v"),
        gradients=not recurrent,
        # Entries of T are at most beta: 16 bits round them by up to beta half units, and what is made of them likewise.
        slack=max(1.0, beta_max),
    )


def _fragment(
    device: torch.device, backend: str, *, dtype: torch.dtype, T: int, H: int, HV: int, K: int, V: int
) -> Check:
    """M and S of a fragment, which context parallelism sends: what zeros and what the identity as a state lead to."""
    normal = _normal(device)
    inputs = dict(
        k=normal(1, T, H, K) + 0.5,
        v=normal(1, T, HV, V),
        g=F.logsigmoid(2 * normal(1, T, HV) + 1) / T,  # something is left of the state that enters
        beta=normal(1, T, HV).sigmoid() / 8,
    )

    def ours(k, v, g, beta):
        table = table_of_batch(v, None)
        if backend == "torch":
            M, S = affine_map(k, v, g=g, beta=beta, table=table, use_qk_l2norm_in_kernel=True)
            return dict(M=M, S=S)
        from megatron_gdn.kernels.gated_delta_rule.prepare import prepare
        from megatron_gdn.kernels.gated_delta_rule.stretch_triton import affine_maps

        prepared = prepare(k, k, g, beta, table=table, l2norm_eps=L2NORM_EPS, negative_eigenvalues=False)
        return dict(zip("MS", affine_maps(k, v, beta, prepared, table=table), strict=True))

    def reference(k, v, g, beta):
        options = dict(g=g, beta=beta, use_qk_l2norm_in_kernel=True, output_final_state=True)
        identity = torch.eye(K, dtype=k.dtype, device=device).expand(1, HV, K, K)
        _, M = recurrent_gated_delta_rule_ref(k, k, v.new_zeros(1, T, HV, K), initial_state=identity, **options)
        return dict(M=M, S=recurrent_gated_delta_rule_ref(k, k, v, **options)[1])

    # In its own size M shows roundings that the values of S hide: the bound of gradients, 0.008.
    return Check(
        name="fragment",
        dtype=dtype,
        function=ours,
        reference=reference,
        inputs=inputs,
        rounded=("k", "v"),
        gradients=False,
        slack=1.6,
    )


def state_space_checks(device: torch.device, backend: str, *, quick: bool) -> Iterator[Check]:
    """Mamba2's op with gradients, at the sizes and dtypes of the launch table, and packed."""
    normal = _normal(device)
    # heads, groups, N, P; more heads in a group than a program sums, with a rest
    sizes = [(3, 1, 20, 12)] if quick else [(9, 1, 128, 64), (4, 2, 64, 64), (2, 1, 60, 100), (2, 1, 256, 128)]
    length = 70 if quick else 520
    lengths = (0, 1, length // 2, 64, 0, length // 3)
    packed = prepare_chunk_table(torch.tensor([0, *lengths]).cumsum(0), device=device)
    cases = [(*size, dtype, None) for size in sizes for dtype in (BOUNDS if not quick else (torch.float32,))]
    for H, G, N, P, dtype, table in [*cases, (*sizes[0], torch.bfloat16, packed)]:
        batch, T, states = (2, length, 2) if table is None else (1, sum(lengths), len(lengths))

        def call(function, documents, **x):
            options = dict(backend=backend) if function is ssd else {}
            y, state = function(**x, **options, output_final_state=True, cu_seqlens=documents)
            return dict(y=y, state=state)

        yield Check(
            name=f"ssd N {N} P {P}" if table is None else "ssd packed",
            dtype=dtype,
            function=lambda call=call, table=table, **x: call(ssd, table, **x),
            reference=lambda call=call, table=table, **x: call(
                recurrent_ssd_ref, None if table is None else table.bounds, **x
            ),
            inputs=dict(
                x=normal(batch, T, H, P),
                dt=F.softplus(2 * normal(batch, T, H) - 2),
                A=-normal(H).exp(),
                B=normal(batch, T, G, N),
                C=normal(batch, T, G, N),
                D=normal(H),
                initial_state=normal(states, H, N, P),
            ),
            rounded=("x", "B", "C"),
        )


def mixer_checks(device: torch.device, backend: str, *, quick: bool) -> Iterator[Check]:
    """A layer between its projections, documents packed, against the torch operations in float64."""
    T, H, HV, K, V = (70, 1, 2, 12, 20) if quick else (520, 4, 8, 128, 128)
    packed = prepare_chunk_table(torch.tensor([0, T // 2, T // 2, T]), device=device)
    normal, channels = _normal(device), 2 * H * K + HV * V
    inputs = dict(
        mixed=normal(1, T, channels + HV * V),
        gates=normal(1, T, 2 * HV),
        conv_weight=normal(channels, 4) / 2,
        norm_weight=normal(V),
        A_log=normal(HV),
        dt_bias=normal(HV),
    )
    options = dict(num_key_heads=H, num_value_heads=HV, key_head_dim=K, cu_seqlens=packed)
    for dtype in (torch.float32, torch.bfloat16):
        yield Check(
            name="mixer packed",
            dtype=dtype,
            function=lambda **x: dict(y=gated_delta_mixer(**x, **options, backend=backend)),
            reference=lambda **x: dict(y=gated_delta_mixer(**x, **options, backend="torch")),
            inputs=inputs,
            rounded=("mixed", "gates", "conv_weight", "norm_weight"),
            # Norms magnify the rounding of small rows: with backend torch too, gradients are off by 4e-2 in bfloat16.
            slack=6.0,
        )


def other_checks(device: torch.device, backend: str, *, quick: bool) -> Iterator[Check]:
    """Convolution, norms and gate."""
    normal, T, D = _normal(device), 70 if quick else 1030, 48 if quick else 1536
    packed = prepare_chunk_table(torch.tensor([0, 0, 2, T // 2, T]), device=device)
    for dtype in (torch.float32, torch.bfloat16):
        x = dict(x=normal(1, T, D), weight=normal(D, 4), initial_state=normal(4, 3, D))
        yield Check(
            name="conv + SiLU packed",
            dtype=dtype,
            function=lambda **x: dict(y=causal_conv1d(**x, cu_seqlens=packed, backend=backend)[0]),
            reference=lambda **x: dict(y=causal_conv1d_ref(**x, cu_seqlens=packed.bounds)[0]),
            inputs=x,
            rounded=tuple(x),
        )
        size = 40 if quick else 256
        x = dict(x=normal(T, 4, size), weight=normal(size), z=normal(T, 4, size))
        yield Check(
            name="gated RMSNorm",
            dtype=dtype,
            function=lambda **x: dict(y=rms_norm_gated(**x, backend=backend)),
            reference=lambda **x: dict(y=rms_norm_gated_ref(**x)),
            inputs=x,
            rounded=tuple(x),
        )
        yield Check(
            name="L2 norm",
            dtype=dtype,
            function=lambda **x: dict(y=l2norm(**x, backend=backend)),
            reference=lambda **x: dict(y=l2norm_ref(**x)),
            inputs=dict(x=normal(T, 4, size)),
            rounded=("x",),
        )
        yield Check(
            name="gate",
            dtype=dtype,
            function=lambda **x: dict(g=gated_delta_gate(**x, backend=backend)),
            reference=lambda **x: dict(g=gated_delta_gate_ref(**x)),
            inputs=dict(alpha=4 * normal(1, T, 6), A_log=normal(6), dt_bias=normal(6)),
            rounded=("alpha",),
        )
        yield Check(
            name="conv update",
            dtype=dtype,
            function=lambda state, **x: _updated(state, **x, backend=backend),
            reference=lambda state, **x: dict(
                zip(("y", "state"), causal_conv1d_update_ref(state=state, **x), strict=True)
            ),
            inputs=dict(x=normal(5, D), state=normal(5, 3, D), weight=normal(D, 4), bias=normal(D)),
            rounded=("x", "state", "weight", "bias"),
            gradients=False,
        )


def _updated(state: Tensor, **inputs) -> dict[str, Tensor]:
    """The convolution's step, with the state that it leaves in place."""
    pool = state.clone()
    return dict(y=causal_conv1d_update(state=pool, **inputs), state=pool)


def run_check(check: Check) -> tuple[float, bool, list[str]]:
    """Largest share of a bound that an error takes, whether two runs are bitwise equal, and the broken bounds."""
    given = {name: x.to(check.dtype if name in check.rounded else torch.float32) for name, x in check.inputs.items()}
    exact = {name: x.double() for name, x in given.items()}
    expected = _outputs_and_gradients(check, check.reference, exact)
    ours, again = (_outputs_and_gradients(check, check.function, given) for _ in range(2))
    share, problems = 0.0, []
    for name, value in expected.items():
        of_gradient = name.startswith("d ")
        bound = BOUNDS[check.dtype][2 if name[2:] in _GATES and of_gradient else 1 if of_gradient else 0]
        bound *= check.slack if check.dtype != torch.float32 else 1.0
        # Results that are rounded to 16 bits once on their way out are off by at least that.
        error = (ours[name].double() - value).square().mean().sqrt() / value.square().mean().sqrt().clamp(min=1e-30)
        share = max(share, error.item() / bound if torch.isfinite(error) else float("inf"))
        if not error <= bound:
            problems.append(f"{name} {error.item():.1e} > {bound:g}")
    same = all(torch.equal(ours[name], again[name]) for name in ours)
    return share, same, problems + ([] if same else ["two runs differ"])


def _outputs_and_gradients(check: Check, function: Callable, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_(check.gradients) for name, x in inputs.items()}
    outputs = function(**leaves)
    found = {name: x.detach() for name, x in outputs.items()}
    if not check.gradients:
        return found
    rng = torch.Generator().manual_seed(7)
    weights = {name: torch.randn(x.shape, generator=rng, dtype=torch.float64) for name, x in outputs.items()}
    # The gradient of a 16-bit output is rounded; a sum of it, such as dD, may cancel until nothing but that is left.
    weights = {name: weight.to(check.dtype).double() for name, weight in weights.items()}
    loss = sum((x.double() * weights[name].to(x.device)).sum() for name, x in outputs.items())
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return found | {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _normal(device: torch.device) -> Callable[..., Tensor]:
    rng = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64).to(device)


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="torch or triton; auto: the device's default")
    parser.add_argument("--quick", action="store_true", help="small sizes, for the interpreter")
    arguments = parser.parse_args(argv)
    try:
        device = torch.device(arguments.device)
        backend = resolve_backend(arguments.backend, device)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"backend {backend} on {name}, torch {torch.__version__}\n")
    print(f"{'kernel':<22}{'dtype':<10}{'share of bound':>15}  {'bitwise':<9}result")
    failed = 0
    for make in (rule_checks, mixer_checks, state_space_checks, other_checks):
        for check in make(device, backend, quick=arguments.quick):
            share, same, problems = run_check(check)
            failed += bool(problems)
            dtype = str(check.dtype).removeprefix("torch.")
            verdict = "; ".join(problems) or "ok"
            print(
                f"{check.name:<22}{dtype:<10}{share:>15.3f}  {'equal' if same else 'differs':<9}{verdict}", flush=True
            )
    print(f"\n{failed} failed" if failed else "\nall within their bounds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
