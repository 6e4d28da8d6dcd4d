"""Benchmarks on a GPU, run from the root of the repository:

    TRITON_INTERPRET=0 python -m tests.bench.gpu rule operators mixer kernels --save

rule: ours against fla, FlashQLA and FlashInfer, where they can be imported, forward and backward.
operators: convolution, gated norm, gate, and Mamba2's state-space op against mamba_ssm's.   mixer: the whole layer.
kernels: each kernel of our rule by itself.

Each call is timed by CUDA events with a cold L2 cache, implementations take turns; "limit" is the roofline of this
device, measured in the same run, "predicted" the least time of our kernels' own traffic. With --save one entry per
shape is appended to tests/bench/results/gpu_<part>.json, also when it disappoints.
"""

import argparse
import datetime
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_gdn.kernels import prepare_chunk_table
from tests.bench import rivals, ssd
from tests.bench.clock import Clock, Limits, Time, describe_device, measure_limits
from tests.bench.run import append, commit
from tests.bench.shapes import BACKWARD_KERNELS, FORWARD_KERNELS, RULE_GPU, Cost, RuleShape, kernel_costs, least_costs
from tests.kernels.data import rms_error

# Between two implementations in bfloat16, each within 5e-3 and 8e-3 of float64, gates within 2e-2.
AGREEMENT = 3e-2
SMALL = RuleShape(B=1, T=130, H=1, HV=2, K=16, V=16, dtype="float32", l2norm=True)


def inputs(shape: RuleShape, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves q, k, v, g, beta and the gradient of o."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    B, T, H, HV = shape.B, shape.T, shape.H, shape.HV
    leaves = dict(
        q=normal(B, T, H, shape.K).to(dtype),
        k=(normal(B, T, H, shape.K) + 0.5).to(dtype),
        v=normal(B, T, HV, shape.V).to(dtype),
        g=torch.nn.functional.logsigmoid(normal(B, T, HV) + 2),
        beta=normal(B, T, HV).sigmoid(),
    )
    return {name: x.requires_grad_() for name, x in leaves.items()}, normal(B, T, HV, shape.V).to(dtype)


def cu_seqlens_of(shape: RuleShape, device: torch.device) -> Tensor | None:
    """Bounds of the documents, odd ones; None for one."""
    if shape.documents == 1:
        return None
    inner = torch.linspace(0, shape.T, shape.documents + 1).long()[1:-1] + torch.arange(shape.documents - 1) % 7
    return torch.cat([torch.tensor([0]), inner, torch.tensor([shape.T])]).to(device)


def bench_rule(shape: RuleShape, clock: Clock, limits: Limits, backend: str) -> dict:
    """Times of every implementation that runs the shape; of the others, what they say."""
    leaves, do = inputs(shape, clock.device)
    cu_seqlens = cu_seqlens_of(shape, clock.device)
    table = None if cu_seqlens is None else prepare_chunk_table(cu_seqlens)
    forward, backward, errors, refusals, reference = {}, {}, {}, {}, None
    for name in rivals.RULES:
        try:
            function = rivals.rule(name, backend)
            given = _normalised(leaves) if name in rivals.NORMALISED_OUTSIDE else leaves
            graph = name not in rivals.FORWARD_ONLY
            found, forward[name], backward[name] = _prepare_rule(function, given, do, table, cu_seqlens, graph)
        except rivals.Refusal as refusal:
            refusals[name] = str(refusal)
        except Exception as error:  # a rival that fails is a result
            if name == rivals.OURS:
                raise
            refusals[name] = f"refuses: {type(error).__name__}: {str(error)[:300]}"
        else:
            reference = reference or found
            errors[name] = _disagreement(found, reference, outside=name in rivals.NORMALISED_OUTSIDE)
            if max(errors[name].values()) > AGREEMENT:
                refusals[name] = f"gives other results than ours: {errors[name]}"
        if name in refusals:
            forward.pop(name, None), backward.pop(name, None)
    times = {"forward": clock.compare(forward)}
    times["backward"] = clock.compare({name: function for name, function in backward.items() if function})
    entry = dict(implementations={}, refusals=refusals, differences_from_ours=errors)
    heads = shape.B * shape.T * shape.HV
    for direction, found in times.items():
        cost = least_costs(shape.H, shape.HV, shape.K, shape.V)[direction]
        kernels = FORWARD_KERNELS if direction == "forward" else BACKWARD_KERNELS
        each = kernel_costs(shape.H, shape.HV, shape.K, shape.V)
        predicted = sum(limits.seconds(each[kernel].bytes, each[kernel].flops) for kernel in kernels)
        entry[direction] = dict(
            limit_ns=round(1e9 * limits.seconds(cost.bytes, cost.flops), 4), predicted_ns=round(1e9 * predicted, 4)
        )
        for name, value in found.items():
            entry["implementations"].setdefault(name, {})[direction] = _rates(value, heads, cost)
    return entry


def _normalised(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """q and k normalised, for implementations without a norm inside: it is not in their times."""
    changed = dict(leaves)
    for name in ("q", "k"):
        changed[name] = torch.nn.functional.normalize(leaves[name].detach().float(), dim=-1).to(leaves[name].dtype)
        changed[name].requires_grad_()
    return changed


def _prepare_rule(function, leaves, do, table, cu_seqlens, graph: bool):
    """Results by name (o, gradients), and the functions to time: forward, and backward or None."""

    def forward():
        with torch.set_grad_enabled(graph):
            return function(*leaves.values(), table, cu_seqlens)

    o = forward()
    found = dict(o=o.detach())
    if not graph:
        return found, forward, None

    def backward():
        return torch.autograd.grad(o, list(leaves.values()), do, retain_graph=True)

    found |= {f"d{name}": grad for name, grad in zip(leaves, backward(), strict=True)}
    return found, forward, backward


def _disagreement(found: dict, reference: dict, *, outside: bool) -> dict[str, float]:
    """Relative differences by result; without those of q and k where the norm is outside."""
    names = [name for name in found if not (outside and name in ("dq", "dk"))]
    return {name: float(f"{rms_error(found[name], reference[name]):.2g}") for name in names}


def _rates(value: Time, heads: int, cost: Cost) -> dict:
    """Times and what they mean: ns per token and value head, GB/s and TFLOP/s of the least work."""
    ns = 1e6 * value.median / heads
    return dict(
        ms=value.median,
        quartiles_ms=value.quartiles,
        rounds=value.rounds,
        ns=round(ns, 4),
        gb_per_s=round(cost.bytes / ns, 1),
        tflop_per_s=round(cost.flops / ns / 1e3, 2),
    )


def bench_operators(clock: Clock, limits: Limits, backend: str, tokens: int) -> list[dict]:
    """Convolution, gated norm and gate at the sizes of Qwen3-Next's layer, Mamba2's op at its own; small on a CPU."""
    cuda = clock.device.type == "cuda"
    D, HV, V, dtype = (8192, 32, 128, torch.bfloat16) if cuda else (12, 2, 8, torch.float32)
    generator = torch.Generator(clock.device).manual_seed(0)

    def normal(*sizes: int, dtype=dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=clock.device).to(dtype).requires_grad_()

    size = normal(1).element_size()
    heads, P, N = (ssd.HEADS, ssd.P, ssd.N) if cuda else (2, 8, 16)
    of_ssd = ssd.least_costs(tokens, heads, P, N, size=size)
    cases = {
        # operator: inputs, bytes or Cost forward, backward
        "convolution": ([normal(1, tokens, D), normal(D, 4)], 2 * tokens * D * size, 3 * tokens * D * size),
        "gated norm": (
            [normal(tokens, HV, V), normal(V), normal(tokens, HV, V)],
            3 * tokens * HV * V * size,
            5 * tokens * HV * V * size,
        ),
        "gate": (
            [normal(1, tokens, HV), normal(HV, dtype=torch.float32), normal(HV, dtype=torch.float32)],
            tokens * HV * (size + 4),
            tokens * HV * (2 * size + 4),
        ),
        "state-space op": (
            ssd.inputs(generator, T=tokens, heads=heads, P=P, N=N, dtype=dtype),
            of_ssd["forward"],
            of_ssd["backward"],
        ),
    }
    entries = []
    for operator, (tensors, *moved) in cases.items():
        make, names = rivals.OPERATORS[operator]
        forward, backward, refusals, reference, errors = {}, {}, {}, None, {}
        for name in names:
            try:
                found, forward[name], backward[name] = _prepare_operator(make(name, backend), tensors)
            except rivals.Refusal as refusal:
                refusals[name] = str(refusal)
            except Exception as error:  # a rival that fails is a result
                if name == rivals.OURS:
                    raise
                refusals[name] = f"refuses: {type(error).__name__}: {str(error)[:300]}"
            else:
                reference = reference or found
                errors[name] = _disagreement(found, reference, outside=False)
        entry = dict(shape_name=operator, tokens=tokens, refusals=refusals, differences_from_ours=errors)
        entry["implementations"] = {}
        for direction, functions, least in (("forward", forward, moved[0]), ("backward", backward, moved[1])):
            cost = least if isinstance(least, Cost) else Cost(bytes=least, flops=0)
            entry[direction] = dict(limit_ms=round(1e3 * limits.seconds(cost.bytes, cost.flops), 5))
            for name, value in clock.compare(functions).items():
                rates = dict(ms=value.median, quartiles_ms=value.quartiles, rounds=value.rounds)
                rates["gb_per_s"] = round(cost.bytes / value.median / 1e6, 1)
                rates["tflop_per_s"] = round(cost.flops / value.median / 1e9, 2)
                entry["implementations"].setdefault(name, {})[direction] = rates
        entries.append(entry)
    return entries


def _prepare_operator(function, tensors: list[Tensor]):
    """Results by name, and the functions to time: forward and backward."""
    y = function(*tensors)
    dy = torch.ones_like(y)

    def backward():
        return torch.autograd.grad(y, tensors, dy, retain_graph=True)

    found = dict(y=y.detach()) | {f"d{i}": grad for i, grad in enumerate(backward())}
    return found, lambda: function(*tensors), backward


def bench_mixer(clock: Clock, limits: Limits, backend: str, tokens: int) -> dict:
    """The whole layer at Qwen3-Next's sizes, ours against fla's layer; ms, and the share of its linear layers."""
    from tests.bench.mixer import Mixer

    cuda = clock.device.type == "cuda"
    sizes = dict(hidden_size=2048, H=16, HV=32, K=128, V=128) if cuda else dict(hidden_size=32, H=1, HV=2, K=8, V=8)
    dtype = torch.bfloat16 if cuda else torch.float32
    layers: dict[str, Callable] = {}
    refusals = {}
    for name, chosen in ((rivals.OURS, backend), ("ours, one by one", backend), ("torch", "torch")):
        joined = name != "ours, one by one"
        layers[name] = Mixer(**sizes, device=clock.device, backend=chosen, dtype=dtype, joined=joined)
    try:
        layer = rivals._import("fla.layers", "GatedDeltaNet")(
            hidden_size=sizes["hidden_size"],
            head_dim=sizes["K"],
            num_heads=sizes["H"],
            num_v_heads=sizes["HV"],
            expand_v=sizes["V"] / sizes["K"],
            mode="chunk",
        )
        layer = layer.to(clock.device, dtype)
        layers["fla"] = lambda x: layer(x)[0]
    except rivals.Refusal as refusal:
        refusals["fla"] = str(refusal)
    except Exception as error:
        refusals["fla"] = f"refuses: {type(error).__name__}: {str(error)[:300]}"
    x = torch.randn(1, tokens, sizes["hidden_size"], device=clock.device, dtype=dtype).requires_grad_()
    dy = torch.randn_like(x)
    forward, backward = {}, {}
    for name, layer in layers.items():
        try:
            y = layer(x)
            wanted = [x, *(layer.parameters() if isinstance(layer, torch.nn.Module) else [])]
            torch.autograd.grad(y, wanted, dy, retain_graph=True)
        except Exception as error:
            if name == rivals.OURS:
                raise
            refusals[name] = f"refuses: {type(error).__name__}: {str(error)[:300]}"
            continue
        forward[name] = lambda layer=layer: layer(x)
        backward[name] = lambda y=y, wanted=wanted: torch.autograd.grad(y, wanted, dy, retain_graph=True)
    entry = dict(shape_name=f"layer, T {tokens}", shape=sizes, refusals=refusals, implementations={})
    in_rows = 2 * sizes["H"] * sizes["K"] + 2 * sizes["HV"] * sizes["V"] + 2 * sizes["HV"]
    flops = 2 * tokens * sizes["hidden_size"] * (in_rows + sizes["HV"] * sizes["V"])
    for direction, functions in (("forward", forward), ("backward", backward)):
        entry[direction] = dict(linear_ms=round(flops * (1 + (direction == "backward")) / limits.tflop_per_s / 1e9, 5))
        for name, value in clock.compare(functions).items():
            rates = dict(ms=value.median, quartiles_ms=value.quartiles, rounds=value.rounds)
            entry["implementations"].setdefault(name, {})[direction] = rates
    return entry


def bench_kernels(shape: RuleShape, clock: Clock, limits: Limits) -> dict:
    """Each kernel of our rule by itself, in the order of the pipeline."""
    from tests.bench.pipeline import stages

    functions = stages(shape, *inputs(shape, clock.device), cu_seqlens_of(shape, clock.device))
    heads, costs = shape.B * shape.T * shape.HV, kernel_costs(shape.H, shape.HV, shape.K, shape.V)
    entry = dict(implementations={})
    for name, value in clock.compare(functions).items():
        cost = costs[name]
        limit = round(1e9 * limits.seconds(cost.bytes, cost.flops), 4)
        entry["implementations"][name] = {"kernel": _rates(value, heads, cost) | dict(limit_ns=limit)}
    return entry


def table(entries: list[dict], unit: str) -> str:
    """Markdown: a row per shape and direction, a column per implementation, what refuses below."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["implementations"]))
    lines = [f"| {unit} | | limit | predicted | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for entry in entries:
        directions = dict.fromkeys(d for times in entry["implementations"].values() for d in times)
        for direction in directions:
            bound = entry.get(direction, {})
            limit = next((bound[key] for key in ("limit_ns", "limit_ms", "linear_ms") if key in bound), "")
            cells = []
            for name in names:
                found = entry["implementations"].get(name, {}).get(direction)
                cells.append("" if found is None else f"{found.get(unit[:2], found['ms']):.3f}")
            head = f"| {entry['shape_name']} | {direction} | {limit} | {bound.get('predicted_ns', '')} |"
            lines.append(f"{head} {' | '.join(cells)} |")
    said = dict.fromkeys(f"{name}: {text}" for entry in entries for name, text in entry.get("refusals", {}).items())
    return "\n".join([*lines, *said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", choices=["rule", "operators", "mixer", "kernels"])
    parser.add_argument("--shape", action="append", choices=list(RULE_GPU), help="of rule and kernels; default: all")
    parser.add_argument("--seconds", type=float, default=1.5, help="clock time per comparison")
    parser.add_argument("--minutes", type=float, default=8.0, help="no further shape is begun after this")
    parser.add_argument("--save", action="store_true", help="append to tests/bench/results/")
    parser.add_argument("--rehearse", choices=["torch", "triton"], help="tiny sizes on the CPU with this backend")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.rehearse:
        device, backend, shapes, tokens = torch.device("cpu"), arguments.rehearse, {"small": SMALL}, 130
    else:
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: benchmarks of GPU kernels need one (or --rehearse torch).")
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise SystemExit("TRITON_INTERPRET is 1: set it to 0, the interpreter is no GPU.")
        device, backend, tokens = torch.device("cuda"), "triton", 32768
        shapes = {name: RULE_GPU[name] for name in arguments.shape or RULE_GPU}
    clock = Clock(device, seconds=arguments.seconds if not arguments.rehearse else 0.01)
    limits = measure_limits(clock)
    about = dict(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        commit=commit(),
        machine=describe_device(device) | dict(gb_per_s=limits.gb_per_s, tflop_per_s=limits.tflop_per_s),
    )
    print(f"{about['machine']}\n", flush=True)
    for part in arguments.parts:
        entries = []
        for entry in _entries(part, shapes, clock, limits, backend, tokens):
            entries.append(about | entry)
            if arguments.save:
                append(f"gpu_{part}", [about | entry])
            if time.perf_counter() - start > 60 * arguments.minutes:
                print(f"{part}: stopped after {len(entries)} entries, --minutes is {arguments.minutes}", flush=True)
                break
        unit = "ns per token and value head" if part in ("rule", "kernels") else "ms"
        print(f"{part}\n\n{table(entries, unit)}\n", flush=True)


def _entries(part: str, shapes: dict, clock: Clock, limits: Limits, backend: str, tokens: int):
    """Results of a part, one after the other."""
    if part == "operators":
        yield from bench_operators(clock, limits, backend, tokens)
    elif part == "mixer":
        for length in (tokens // 4, tokens):
            yield bench_mixer(clock, limits, backend, length)
    else:
        for name, shape in shapes.items():
            found = bench_rule(shape, clock, limits, backend) if part == "rule" else bench_kernels(shape, clock, limits)
            yield dict(shape_name=name, shape=shape.describe()) | found
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
