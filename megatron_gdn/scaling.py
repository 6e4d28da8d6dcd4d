"""Weak scaling by the cost model: what a step should take on many GPUs. A calculation, never a measurement.

    python -m megatron_gdn.scaling --config examples/recipes/h1_1.3b.yaml [section.field=value ...]

For each number of GPUs and each length it takes the fastest layout that fits into memory, of tensor and context
parallelism with and without recomputation; the rest of the GPUs repeats it. The work of a GPU stays the same, so the
batch grows with the GPUs. `Cluster` holds the assumptions, which are printed with the table.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

from megatron_gdn.config import Config, ConfigError, load_config, parse_config
from megatron_gdn.cost import ModelCost, model_cost
from megatron_gdn.layer_cost import head_exchange_bytes

GPUS = (8, 64, 512, 4096)
LENGTHS = {"32k": 2**15, "128k": 2**17, "1M": 2**20}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Assumptions on the machine; links are those of one GPU, in one direction. The share of the peak is a guess."""

    node_gpus: int = 8
    """GPUs of a node, joined by NVLink."""
    peak_flops: float = 989e12
    """Dense bf16 of an H100, FLOP/s."""
    compute_share: float = 0.45
    """Share of the peak that executed matrix products reach."""
    memory_gib: float = 72.0
    """Of 80 GB; the rest is for the allocator and NCCL."""
    nvlink_gb_per_s: float = 360.0
    """Within a node: 0.8 of 450."""
    network_gb_per_s: float = 40.0
    """Between nodes: 0.8 of 400 Gbit/s InfiniBand for each GPU."""
    nvlink_hop_us: float = 5.0
    """Latency of one step of a ring within a node."""
    network_hop_us: float = 10.0
    """Latency of one step of a ring between nodes."""
    data_overlap: float = 0.8
    """Share of one micro-batch's computation behind which gradients are reduced and weights gathered."""
    gpu_tokens: int = 65536
    """Tokens of one GPU and step, or one sequence's share where that is more."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of the model's calculation, times in milliseconds.

    cost: of the run, with its layout.
    compute_ms: matrix products.
    tensor_ms, context_ms, data_ms: exchanges that nothing hides.
    state_passing_ms: the part of context_ms that Gated DeltaNet layers take.
    head_exchange_ms: what they would take instead, if they gave each context-parallel rank all tokens of a part of
        their heads; None where the heads are not divisible.
    """

    cost: ModelCost
    compute_ms: float
    tensor_ms: float
    context_ms: float
    data_ms: float
    state_passing_ms: float
    head_exchange_ms: float | None

    @property
    def total_ms(self) -> float:
        """Of the step."""
        return self.compute_ms + self.tensor_ms + self.context_ms + self.data_ms

    @property
    def num_gpus(self) -> int:
        """Of all."""
        return self.cost.config.parallel.ranks_per_replica * self.cost.data_parallel

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Speed."""
        return self.cost.config.training.tokens_per_step / self.num_gpus / self.total_ms * 1e3

    @property
    def memory_gib(self) -> float:
        """Of a GPU."""
        return sum(self.cost.memory_bytes(0).values()) / 2**30


def step_of(config: Config, *, data_parallel: int, cluster: Cluster) -> Step:
    """The calculation for one layout without pipeline stages.

    Args:
        config: the run; model.vocab_size is set.
        data_parallel: number of model replicas.
        cluster: the assumptions.
    """
    parallel, training = config.parallel, config.training
    cost = model_cost(config, vocab_size=config.model.vocab_size, data_parallel=data_parallel)
    num_micro = training.global_batch_size // data_parallel
    replica = parallel.ranks_per_replica
    gpu_tokens = training.tokens_per_step / (replica * data_parallel)
    again = 4 / 3 if training.recompute == "full" else 1.0  # a forward pass is a third
    flops = _executed_flops(cost) * again * gpu_tokens
    compute_ms = flops / (cluster.peak_flops * cluster.compute_share) * 1e3
    sent = cost.communication_bytes(0)

    def link(gpus: int) -> tuple[float, float]:
        """Bytes per ms and ms per hop between so many neighbours."""
        if gpus <= cluster.node_gpus:
            return cluster.nvlink_gb_per_s * 1e6, cluster.nvlink_hop_us / 1e3
        return cluster.network_gb_per_s * 1e6, cluster.network_hop_us / 1e3

    context_bandwidth, hop_ms = link(replica)
    passes = (2 if training.recompute == "full" else 1) + 1
    hops = sum(_hops(layer.name, parallel.context) for layer in cost.layers) * passes * num_micro
    data_ms = sent["data"] / link(replica * data_parallel)[0]
    mixers = [layer for layer in cost.layers if layer.name == "Gated DeltaNet"]
    forward, backward = (sum(layer.context_bytes[i] for layer in mixers) for i in (0, 1))
    state_bytes = num_micro * ((passes - 1) * forward + backward)
    state_hops = _hops("Gated DeltaNet", parallel.context) * len(mixers) * passes * num_micro
    heads = config.model.linear_num_key_heads or 1
    head_exchange_ms = None
    if parallel.context > 1 and heads % (parallel.tensor * parallel.context) == 0:
        exchanged = num_micro * passes * len(mixers) * head_exchange_bytes(config)
        # Two exchanges a pass, each one step.
        head_exchange_ms = exchanged / context_bandwidth + 2 * len(mixers) * passes * num_micro * hop_ms
    return Step(
        cost=cost,
        compute_ms=compute_ms,
        tensor_ms=sent["tensor"] / link(parallel.tensor)[0],
        context_ms=sent["context"] / context_bandwidth + hops * hop_ms,
        data_ms=max(0.0, data_ms - cluster.data_overlap * compute_ms / num_micro),
        state_passing_ms=state_bytes / context_bandwidth + state_hops * hop_ms,
        head_exchange_ms=head_exchange_ms,
    )


def _executed_flops(cost: ModelCost) -> float:
    """Per token of a step; of attention what fused kernels compute, which skip what a token does not see."""
    total = 0.0
    for layer in cost.layers:
        total += layer.executed_flops + layer.context_flops
        if "attention" in layer.name:
            scores = layer.flops - 2 * layer.parameters  # the norms' few weights aside
            # Backward computes the scores once more, and four products instead of two.
            total += 3 * layer.flops + scores / 2 - layer.executed_flops
    return total


def _hops(layer: str, ranks: int) -> int:
    """Steps of rings in one pass: an all-gather takes ranks - 1, neighbours' rows one."""
    if ranks == 1:
        return 0
    gathers = {"Gated DeltaNet": ranks, "Mamba2": ranks, "full attention": ranks - 1, "sliding-window attention": 1}
    return gathers.get(layer.partition(" of layer")[0], 0)


def best_step(base: Config, *, num_gpus: int, length: int, cluster: Cluster) -> Step | None:
    """The fastest layout that fits, or None when none does.

    Args:
        base: the run; layout, length and batch are replaced.
        num_gpus: of all.
        length: tokens of a sequence.
        cluster: the assumptions.
    """
    found = []
    contexts = [2**i for i in range(num_gpus.bit_length())]
    for tensor, context, recompute in product((1, 2, 4, 8), contexts, ("none", "full")):
        replica = tensor * context
        if num_gpus % replica:
            continue
        data_parallel = num_gpus // replica
        num_micro = max(1, round(cluster.gpu_tokens * replica / length))
        values = asdict(base)
        values["parallel"] = {
            "tensor": tensor,
            "sequence": tensor > 1,
            "context": context,
            "context_layout": "zigzag" if "*" in base.model.symbols else "contiguous",
        }
        values["training"] |= {
            "recompute": recompute,
            "sequence_length": length,
            "micro_batch_size": 1,
            "global_batch_size": data_parallel * num_micro,
            "train_tokens": 10**18,
        }
        try:
            config = parse_config(values)
        except ConfigError:
            continue  # heads or tokens that this layout does not divide
        step = step_of(config, data_parallel=data_parallel, cluster=cluster)
        if step.memory_gib <= cluster.memory_gib:
            found.append(step)
    return max(found, key=lambda step: step.tokens_per_s_per_gpu, default=None)


def table(base: Config, cluster: Cluster) -> list[str]:
    """Lines of a Markdown table for a run."""
    lines = [
        "| tokens | GPUs | TP x CP x DP | recompute | sequences | GiB | compute ms | TP ms | CP ms | DP ms "
        "| tokens/s/GPU | of 8 GPUs | MFU | GDN states ms | GDN heads ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, length in LENGTHS.items():
        first = None
        for num_gpus in GPUS:
            step = best_step(base, num_gpus=num_gpus, length=length, cluster=cluster)
            if step is None:
                lines.append(f"| {name} | {num_gpus} | does not fit |" + " |" * 12)
                continue
            first = first or step
            parallel, training = step.cost.config.parallel, step.cost.config.training
            speed = step.tokens_per_s_per_gpu
            times = (step.compute_ms, step.tensor_ms, step.context_ms, step.data_ms)
            heads = "-" if parallel.context == 1 else "heads do not divide"
            if step.head_exchange_ms is not None:
                heads = f"{step.head_exchange_ms:.1f}"
            cells = [
                name,
                num_gpus,
                f"{parallel.tensor} x {parallel.context} x {step.cost.data_parallel}",
                training.recompute,
                training.global_batch_size,
                f"{step.memory_gib:.0f}",
                *(f"{ms:.1f}" for ms in times),
                f"{speed:,.0f}",
                f"{speed / first.tokens_per_s_per_gpu:.2f}"
                + ("" if first.num_gpus == GPUS[0] else f" of {first.num_gpus}"),
                f"{speed * step.cost.flops_per_token / cluster.peak_flops:.2f}",
                f"{step.state_passing_ms:.1f}",
                heads,
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def assumptions(cluster: Cluster) -> list[str]:
    """Lines that name every assumption."""
    return [
        "A calculation by `megatron_gdn.cost`, not a measurement. Assumed:",
        "",
        *(f"- `{field.name}` = {getattr(cluster, field.name):g}" for field in fields(cluster)),
        "- nothing hides the exchanges of tensor and context parallelism; ranks of a replica are neighbours, and use "
        "NVLink when the replica fits into a node, else the network",
        "- data parallelism uses the network when there is more than one node; its latency, the optimizer's own time, "
        "operations that are not matrix products, stragglers and checkpoints are left out",
        "- recipes with full attention use the zigzag layout, others the contiguous one; no pipeline stages",
    ]


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe, YAML; model.vocab_size is set")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings that replace the recipe's"
    )
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if config.model.vocab_size is None:
            raise ConfigError("model.vocab_size (null) must be a number: set it.")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cluster = Cluster()
    cost = model_cost(config, vocab_size=config.model.vocab_size)
    lines = assumptions(cluster)
    lines += ["", f"### {arguments.config.stem}: {cost.parameters / 1e9:.2f}B parameters, {config.model.pattern}", ""]
    lines += table(config, cluster)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
