"""Finds faster launches for the kernels of `triton_support/configs.py` on the GPU at hand, from the repository's root:

    TRITON_INTERPRET=0 python -m tests.bench.tune state output --shape "16/32 heads of 128/128, T 32768"

For each kernel: a grid around the present launch; each candidate runs the whole operation forward and backward in a
process of its own, where it must agree with float64 and give the same bits twice (a wrong launch can take the GPU's
context with it); those that pass take turns under the clock. Prints the ranking, and the rows to put into the table.
Nothing is written: a row enters the table with the results that speak for it.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tests.bench import rivals, ssd
from tests.bench.clock import Clock, Time
from tests.bench.shapes import RULE_GPU, RuleShape

# Below this the difference is of the same kind as from one run to the next.
WORTH = 1.03
RULE_KERNELS = ("prepare", "states", "output", "state_gradients", "input_gradients")
MAPS = "affine_maps"
ROWS_OF_STAGE = {"states": ("state",), "state_gradients": ("scores", "state_gradients"), MAPS: ("affine_map",)}
"""Where the rows of the launch table are not named as the function."""
OPERATORS = {
    "l2norm": ("l2norm_forward", "l2norm_backward"),
    "gated_rms_norm": ("gated_rms_norm_forward", "gated_rms_norm_backward"),
    "gates": ("gates_forward", "gates_backward"),
    "causal_conv1d": ("causal_conv1d_forward", "causal_conv1d_backward"),
    "ssd": (
        "ssd_prepare",
        "ssd_state",
        "ssd_output",
        "ssd_state_gradients",
        "ssd_group_gradients",
        "ssd_head_gradients",
    ),
    "inputs": ("inputs",),
}


def table_rows(dtype: str) -> dict[str, str]:
    """Row of the launch table -> what runs it: a stage of the rule, or an operator. Rows of float32 have a suffix."""
    from megatron_gdn.kernels.triton_support.configs import TABLE

    found = {}
    for stage in (*RULE_KERNELS, MAPS):
        for name in ROWS_OF_STAGE.get(stage, (stage,)):
            if dtype == "float32":
                name = next((row for row in (f"{name}_float32", f"{name} float32") if row in TABLE), name)
            found[name] = stage
    for operator, rows in OPERATORS.items():
        float32 = {row: f"{row} float32" for row in rows if dtype == "float32"}
        found |= {float32[row] if float32.get(row) in TABLE else row: operator for row in rows}
    return {row: runs for row, runs in found.items() if row in TABLE}


def candidates(config) -> Iterator:
    """Launches around the present one, itself first.

    Warps 2 to 8, stages 1 to 4; blocks of half, the same and twice the size; BLOCK_D of rows stays, as it must hold a
    row; BLOCK_I and RUN of the convolution stay a chunk together.
    """
    yield config
    blocks = dict(config.block)
    by_rows = "BLOCK_R" in blocks
    choices = [
        [size] if by_rows and name == "BLOCK_D" else [size // 2, size, 2 * size] for name, size in blocks.items()
    ]
    whole = blocks.get("BLOCK_I", 1) * blocks.get("RUN", 1)
    # Without a loop over loads there is nothing to pipeline.
    stages = (1,) if by_rows or "RUN" in blocks else (1, 2, 3, 4)
    for num_warps, num_stages, *sizes in itertools.product((2, 4, 8), stages, *choices):
        chosen = dict(zip(blocks, sizes, strict=True))
        # A dot takes no less than 16.
        too_small = any(size < (16 if name in ("BK", "BV", "BN", "BP") else 1) for name, size in chosen.items())
        if too_small or chosen.get("BLOCK_I", 1) * chosen.get("RUN", 1) != whole:
            continue
        found = dataclasses.replace(config, num_warps=num_warps, num_stages=num_stages, block=tuple(chosen.items()))
        if found != config:
            yield found


def set_launch(row: str, arch: str, config) -> None:
    """Make `config` the launch of a kernel for all sizes, in this process."""
    from megatron_gdn.kernels.triton_support.configs import TABLE

    TABLE[row] = TABLE[row] | {arch: [((2**30, 2**30), config)]}


def describe(config) -> dict:
    return dict(num_warps=config.num_warps, num_stages=config.num_stages, **dict(config.block))


def parse(description: dict):
    """The inverse of `describe`."""
    from megatron_gdn.kernels.triton_support.configs import Config

    block = tuple((name, value) for name, value in description.items() if name not in ("num_warps", "num_stages"))
    return Config(num_warps=description["num_warps"], num_stages=description["num_stages"], block=block)


def operator_call(operator: str, device: torch.device, dtype: torch.dtype, shape: RuleShape):
    """(ours, reference, inputs) of an operator at the sizes of a layer with this rule."""
    from megatron_gdn.kernels import causal_conv1d, gated_delta_gate, gated_delta_mixer, l2norm, rms_norm_gated
    from megatron_gdn.kernels.causal_conv1d import causal_conv1d_ref
    from megatron_gdn.kernels.gated_delta_rule.gate import gated_delta_gate_ref
    from megatron_gdn.kernels.gated_rms_norm import rms_norm_gated_ref
    from megatron_gdn.kernels.l2norm import l2norm_ref

    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype).requires_grad_()

    T, HV = shape.T, shape.HV
    backend = dict(backend="triton")
    if operator == "l2norm":
        return lambda x: l2norm(x, **backend), l2norm_ref, [normal(T, shape.H, shape.K)]
    if operator == "gated_rms_norm":
        tensors = [normal(T, HV, shape.V), normal(shape.V), normal(T, HV, shape.V)]
        return lambda *x: rms_norm_gated(*x, **backend), rms_norm_gated_ref, tensors
    if operator == "gates":
        tensors = [normal(1, T, HV), normal(HV, dtype=torch.float32), normal(HV, dtype=torch.float32)]
        return lambda *x: gated_delta_gate(*x, **backend), gated_delta_gate_ref, tensors
    if operator == "ssd":
        # Mamba2's own head size and state, whatever the rule's.
        tensors = ssd.inputs(generator, T=T, heads=2 * HV, P=ssd.P, N=ssd.N, dtype=dtype)
        return rivals.state_space(rivals.OURS, "triton"), rivals.state_space("torch", "torch"), tensors
    D = 2 * shape.H * shape.K + HV * shape.V
    if operator == "inputs":
        tensors = [normal(1, T, D + HV * shape.V), normal(1, T, 2 * HV), normal(D, 4), normal(shape.V)]
        tensors += [normal(HV, dtype=torch.float32), normal(HV, dtype=torch.float32)]

        def mix(*x: Tensor, backend: str) -> Tensor:
            names = ("mixed", "gates", "conv_weight", "norm_weight", "A_log", "dt_bias")
            heads = dict(num_key_heads=shape.H, num_value_heads=HV, key_head_dim=shape.K)
            return gated_delta_mixer(**dict(zip(names, x, strict=True)), **heads, backend=backend)

        return lambda *x: mix(*x, backend="triton"), lambda *x: mix(*x, backend="torch"), tensors
    tensors = [normal(1, T, D), normal(D, 4)]
    return lambda *x: causal_conv1d(*x, **backend)[0], lambda *x: causal_conv1d_ref(*x)[0], tensors


def affine_map_of(
    tensors: dict[str, Tensor], *, triton: bool, l2norm: bool = True
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that gives M and S of a fragment, as context parallelism does, without what comes before it."""
    from megatron_gdn.kernels.gated_delta_rule.stretch import affine_map
    from megatron_gdn.kernels.l2norm import L2NORM_EPS
    from megatron_gdn.kernels.varlen import table_of_batch

    k, v, g, beta = (tensors[name].detach() for name in ("k", "v", "g", "beta"))
    table = table_of_batch(v, None)
    if not triton:
        return lambda: affine_map(k, v, g=g, beta=beta, table=table, use_qk_l2norm_in_kernel=l2norm)
    from megatron_gdn.kernels.gated_delta_rule.prepare import prepare
    from megatron_gdn.kernels.gated_delta_rule.stretch_triton import affine_maps

    eps = L2NORM_EPS if l2norm else None
    prepared = prepare(k, k, g, beta, table=table, l2norm_eps=eps, negative_eigenvalues=False)
    return lambda: affine_maps(k, v, beta, prepared, table=table)


def check(row: str, runs: str, shape: RuleShape, device: torch.device) -> None:
    """The operation with the launch that is set now, against float64 and against itself; AssertionError."""
    from tests.gpu.stage import Stage, bounds_of, exact_results, output_gradient, results
    from tests.kernels.data import rms_error

    dtype = getattr(torch, shape.dtype)
    small = dataclasses.replace(shape, T=min(shape.T, 1000), H=1, HV=shape.HV // shape.H, documents=1)
    if runs in RULE_KERNELS:
        from megatron_gdn.kernels import chunk_gated_delta_rule

        stage = Stage(device=device, backend="triton", rehearsal=device.type != "cuda")
        inputs = stage.rule_inputs(1, small.T, small.H, small.HV, small.K, small.V, dtype, states=1)
        options = dict(use_qk_l2norm_in_kernel=True)
        exact = exact_results(inputs, **options)
        ours, again = (results(chunk_gated_delta_rule, inputs, **options, backend="triton") for _ in range(2))
        limits = bounds_of(dtype)
        limits = {name: limits[name if name in limits else name[1:]] for name in exact}
    elif runs == MAPS:
        stage = Stage(device=device, backend="triton", rehearsal=device.type != "cuda")
        inputs = stage.rule_inputs(1, min(small.T, 200), small.H, small.HV, small.K, small.V, dtype, states=1)
        inputs["g"] = inputs["g"] / 50  # something is left of the state that enters
        ours, again = (dict(zip("MS", affine_map_of(inputs, triton=True)(), strict=True)) for _ in range(2))
        wide = {name: x.double() for name, x in inputs.items()}
        exact = dict(zip("MS", affine_map_of(wide, triton=False)(), strict=True))
        # Without values and in its own size M shows roundings that the values of S hide: the bound of gradients.
        limits = dict(S=bounds_of(dtype)["final_state"], M=bounds_of(dtype)["k"])
    else:
        function, reference, tensors = operator_call(runs, device, dtype, small)

        def run(f, tensors):
            y = f(*tensors)
            return dict(enumerate([y.detach(), *torch.autograd.grad(y, tensors, output_gradient(y))]))

        ours, again = (run(function, tensors) for _ in range(2))
        exact = run(reference, [x.detach().double().requires_grad_() for x in tensors])
        # Beyond one rounding: float32's own, and where products have rounded operands the field's bound for gates.
        more = 2e-2 if runs == "ssd" and dtype != torch.float32 else 2e-5
        limits = {i: 1.02 * rms_error(x.to(ours[i].dtype), x, smallest=1e-30) + more for i, x in exact.items()}
        if runs == "inputs":  # a chain of operations, each of which rounds
            limits = dict.fromkeys(exact, 5e-2)
    for name, expected in exact.items():
        assert ours[name].isfinite().all(), f"{name} is not finite"
        error = rms_error(ours[name], expected)
        assert error <= limits[name], f"{name}: relative error {error:.1e} > {limits[name]:.1e}"
        assert torch.equal(ours[name], again[name]), f"{name}: two runs differ"


def check_apart(row: str, runs: str, description: dict, shape_name: str, dtype: str) -> str | None:
    """`check` in a fresh process; what went wrong, or None."""
    job = json.dumps(dict(row=row, runs=runs, launch=description, shape=shape_name))
    command = [sys.executable, "-m", "tests.bench.tune", "--check", job, "--dtype", dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "no answer within 300 s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["died"])[-1][:200]


def to_time(row: str, runs: str, shape: RuleShape, device: torch.device) -> Callable[[], object]:
    """A call that is mostly this kernel."""
    from tests.bench.gpu import cu_seqlens_of, inputs
    from tests.bench.pipeline import stages

    if runs == MAPS:
        return affine_map_of(inputs(shape, device)[0], triton=True)
    if runs in RULE_KERNELS:
        return stages(shape, *inputs(shape, device), cu_seqlens_of(shape, device))[runs]
    function, _, tensors = operator_call(runs, device, getattr(torch, shape.dtype), shape)
    if "_backward" in row or "_gradients" in row:
        y = function(*tensors)
        dy = torch.ones_like(y)
        return lambda: torch.autograd.grad(y, tensors, dy, retain_graph=True)
    return lambda: function(*tensors)


def sizes_of(row: str, runs: str, shape: RuleShape) -> tuple[int, int]:
    """K and V that the kernel looks its launch up with."""
    if runs in (*RULE_KERNELS, MAPS):
        return shape.K, 0 if runs == "prepare" else shape.V
    if runs == "ssd":
        return ssd.N, 0 if row.startswith("ssd_prepare") else ssd.P
    if runs == "inputs":
        return shape.K, shape.V
    return 0, {"l2norm": shape.K, "gated_rms_norm": shape.V, "gates": shape.HV}.get(runs, 0)


def tune(row: str, runs: str, shape_name: str, shape: RuleShape, clock: Clock, processes: int, most: int) -> str | None:
    """Rank the launches of one kernel at one shape; the row for the table, or None where the present one stays."""
    from megatron_gdn.kernels.triton_support import configs

    arch = configs.architecture(clock.device)
    sizes = sizes_of(row, runs, shape)
    kept = configs.TABLE[row]
    present = configs.config(row, arch, *sizes)
    tried = list(candidates(present))[:most]
    start = time.perf_counter()
    if clock.device.type == "cuda":
        with ThreadPoolExecutor(processes) as pool:
            problems = list(pool.map(lambda c: check_apart(row, runs, describe(c), shape_name, shape.dtype), tried))
    else:
        problems = [_check_here(row, runs, arch, candidate, shape, clock.device) for candidate in tried]
    print(f"{row}, {shape_name}: {len(tried)} launches checked in {time.perf_counter() - start:.0f} s", flush=True)
    functions, run = {}, None

    def call(candidate):
        def timed():
            set_launch(row, arch, candidate)
            return run()

        return timed

    try:
        run = to_time(row, runs, shape, clock.device)
        functions = {c: call(c) for c, problem in zip(tried, problems, strict=True) if problem is None}
        times = clock.compare(functions)
    finally:
        configs.TABLE[row] = kept
    for candidate, value in sorted(times.items(), key=lambda item: item[1].median):
        mark = "  <- present" if candidate == present else ""
        print(f"  {value.median:9.4f} ms {value.quartiles}  {describe(candidate)}{mark}")
    for candidate, problem in zip(tried, problems, strict=True):
        if problem is not None:
            print(f"  refused: {describe(candidate)}: {problem}")
    best = faster(times, present)
    if best is None:
        return None
    gain = times[present].median / times[best].median if present in times else float("nan")
    return f'TABLE["{row}"]["{arch}"]: ({sizes}, {best}),  # {gain:.2f} x the speed of {describe(present)}'


def faster(times: dict[object, Time], present) -> object | None:
    """The launch that clearly beats the present one, also in its slow quarter; None: the present one stays."""
    best = min(times, key=lambda candidate: times[candidate].median)
    if present not in times:  # it broke a bound: anything that holds is better
        return best
    clear = times[best].quartiles[1] < times[present].quartiles[0]
    return best if clear and times[present].median >= WORTH * times[best].median else None


def _check_here(row: str, runs: str, arch: str, candidate, shape: RuleShape, device: torch.device) -> str | None:
    from megatron_gdn.kernels.triton_support.configs import TABLE

    kept = TABLE[row]
    set_launch(row, arch, candidate)
    try:
        check(row, runs, shape, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        TABLE[row] = kept
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help="of the launch table; default: all")
    parser.add_argument("--shape", action="append", choices=list(RULE_GPU), help="default: 16/32 heads of 128, T 32768")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="that compile and check")
    parser.add_argument("--most", type=int, default=200, help="launches per kernel")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("tuning needs a CUDA device and TRITON_INTERPRET=0.")
    device = torch.device("cuda")
    from megatron_gdn.kernels.triton_support.configs import architecture

    if arguments.check:
        job = json.loads(arguments.check)
        set_launch(job["row"], architecture(device), parse(job["launch"]))
        shape = dataclasses.replace(RULE_GPU[job["shape"]], dtype=arguments.dtype)
        check(job["row"], job["runs"], shape, device)
        return
    rows = table_rows(arguments.dtype)
    unknown = set(arguments.rows) - set(rows)
    if unknown:
        raise SystemExit(f"rows ({', '.join(sorted(unknown))}) must be among {', '.join(rows)}.")
    clock, changed = Clock(device, seconds=4.0, most_rounds=30), []
    for shape_name in arguments.shape or ["16/32 heads of 128/128, T 32768"]:
        shape = dataclasses.replace(RULE_GPU[shape_name], dtype=arguments.dtype)
        for row in arguments.rows or rows:
            found = tune(row, rows[row], shape_name, shape, clock, arguments.processes, arguments.most)
            changed += [found] if found else []
    print("\n".join(["\nrows to change:", *changed] if changed else ["\nno row to change."]))


if __name__ == "__main__":
    main()
