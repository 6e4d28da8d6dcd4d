"""What a run costs before it starts: parameters, FLOPs, memory and communication, as the sum of its layers' terms.

Memory and communication are of one rank and estimates of what training keeps and sends, not of allocators.
"""

import math
from dataclasses import dataclass

from megatron_gdn.config import Config
from megatron_gdn.hybrid.pattern import parse_pattern
from megatron_gdn.layer_cost import (
    BYTES,
    LayerCost,
    Sizes,
    add_pairs,
    embedding_cost,
    mixer_cost,
    mlp_cost,
    output_cost,
    sizes_of,
)

# Dense bf16 on tensor cores, FLOP/s, from NVIDIA's data sheets; a part of the device's name tells which.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "GB200": 2500e12}

_LINEARS = ("column_linears", "row_linears")


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Costs of a run.

    config: of the run.
    data_parallel: number of model replicas.
    vocab_size: rows of the embedding, padding included.
    stages: terms of each pipeline stage, in order.
    """

    config: Config
    data_parallel: int
    vocab_size: int
    stages: list[list[LayerCost]]

    @property
    def layers(self) -> list[LayerCost]:
        """Terms of all stages."""
        return [layer for stage in self.stages for layer in stage]

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters_without_embeddings(self) -> int:
        """Without the embedding and the output layer."""
        tied = self.config.model.tie_embeddings
        return self.parameters - (1 if tied else 2) * self.vocab_size * self.config.model.hidden_size

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a training step, forward and backward, per token."""
        return 3 * sum(layer.flops for layer in self.layers)

    @property
    def executed_flops_per_token(self) -> float:
        """FLOPs of the matrix products of a training step without recomputation, per token."""
        return sum(layer.executed_flops + layer.context_flops for layer in self.layers)

    def memory_bytes(self, stage: int) -> dict[str, float]:
        """Bytes on a rank of a pipeline stage: weights, gradients, optimizer states, activations."""
        parallel, training = self.config.parallel, self.config.training
        layers, element = self.stages[stage], BYTES[training.precision]
        copied = 0
        if parallel.pipeline > 1 and self.config.model.tie_embeddings and stage == parallel.pipeline - 1:
            # The last stage has a copy of the embedding.
            copied = self.vocab_size * self.config.model.hidden_size // parallel.tensor
        parameters = sum(layer.rank_parameters for layer in layers) + copied
        # 1F1B keeps one micro-batch more on each stage before it.
        in_flight = min(parallel.pipeline - stage, self._num_microbatches)
        tokens = training.micro_batch_size * training.sequence_length // parallel.context
        activations = [layer.activation_bytes for layer in layers]
        if training.recompute == "full":
            kept = self._sizes.hidden_bytes * len(layers)
            activation_bytes = tokens * (in_flight * kept + max(activations))
        else:
            activation_bytes = tokens * in_flight * sum(activations)
        return {
            "weights": parameters * element,
            "gradients": parameters * 4,
            "optimizer": self._optimizer_bytes(layers, copied),
            "activations": activation_bytes,
        }

    def _optimizer_bytes(self, layers: list[LayerCost], copied: int) -> float:
        """Adam's two moments, or Muon's momentum, and under bf16 the master weights.

        Args:
            layers: of a stage.
            copied: parameters that the stage has beside theirs.
        """
        parallel = self.config.parallel
        masters = 4 if self.config.training.precision == "bf16" else 0
        of_adam, of_muon = 8 + masters, 4 + masters
        whole = of_adam * (sum(layer.rank_parameters for layer in layers) + copied)
        if self._uses_muon:
            whole -= (of_adam - of_muon) * sum(layer.matrix_parameters for layer in layers)
        if not parallel.distributed_optimizer:
            return whole
        share = whole / (self.data_parallel * parallel.context)
        if not self._uses_muon:
            return share
        # Muon's ranks own whole parameters. Where none is larger than a share the fullest rank has up to a seventh more
        # than it (h1_1.3b, gdn_1.3b, h2_1.3b and qwen3_next_style_7b on 2 to 64 ranks).
        largest = [layer.largest_parameter * (of_muon if layer.matrix_parameters else of_adam) for layer in layers]
        return max(share, copied * of_adam, *largest)

    def communication_bytes(self, stage: int) -> dict[str, float]:
        """Bytes that a rank of a pipeline stage sends per optimizer step, with ring algorithms."""
        parallel, training = self.config.parallel, self.config.training
        layers, hidden = self.stages[stage], self.config.model.hidden_size
        element, tp, replicas = BYTES[training.precision], parallel.tensor, self.data_parallel
        shards = replicas * parallel.context
        tokens = training.tokens_per_step // shards
        whole = tokens * hidden * element
        columns, rows = (sum(getattr(layer, name) for layer in layers) for name in _LINEARS)
        # Recomputed layers, which are all but the embedding and the output, run their forward pass twice.
        recomputed = [x for x in layers if x.name not in ("embedding", "output") and training.recompute == "full"]
        columns_again, rows_again = (sum(getattr(x, name) for x in recomputed) for name in _LINEARS)
        if parallel.sequence:
            # Gather before a column-parallel layer, again for its weight's gradient, scatter its input's gradient;
            # scatter after a row-parallel layer, gather its output's gradient.
            tensor = (3 * columns + columns_again + 2 * rows + rows_again) * whole * (tp - 1) / tp
        else:
            # A sum of its input's gradient for a column-parallel layer, of its output for a row-parallel one.
            tensor = (columns + rows + rows_again) * whole * 2 * (tp - 1) / tp
        tensor += tokens * (2 * sum(x.tensor_bytes for x in layers) + sum(x.tensor_bytes for x in recomputed))
        parameters = sum(layer.rank_parameters for layer in layers)
        # Gradients in float32: scattered by the distributed optimizer, else whole on every rank.
        data = parameters * 4 * (1 if self.config.slices_optimizer else 2) * (shards - 1) / shards
        if parallel.distributed_optimizer:
            data += parameters * element * (shards - 1) / shards  # updated weights
        if self._uses_muon:
            # Tensor-parallel ranks gather what is split of the weights that they make orthogonal.
            updated = shards if parallel.distributed_optimizer else 1
            tensor += sum(layer.split_parameters for layer in layers) * element * (tp - 1) / updated
        boundaries = (stage > 0) + (stage < parallel.pipeline - 1)
        pipeline = boundaries * whole / (tp if parallel.sequence else 1)
        if self.config.model.tie_embeddings and boundaries and stage in (0, parallel.pipeline - 1):
            # The first and the last stage sum the gradients of their embeddings, in float32.
            pipeline += self.vocab_size * hidden // tp * 4
        forward, backward = add_pairs((0.0, 0.0), *(layer.context_bytes for layer in layers))
        passes = 2 if training.recompute == "full" else 1
        context = training.global_batch_size // replicas * (passes * forward + backward)
        return {"tensor": tensor, "context": context, "data": data, "pipeline": pipeline}

    def report(self) -> dict:
        """All of it, for `--dry-run --json`; memory and communication are those of the stage that has most."""
        parallel, training = self.config.parallel, self.config.training
        stages = range(parallel.pipeline)
        memory = max((self.memory_bytes(stage) for stage in stages), key=lambda terms: sum(terms.values()))
        sent = max((self.communication_bytes(stage) for stage in stages), key=lambda terms: sum(terms.values()))
        kinds = {layer.name: layer for layer in self.layers}
        return {
            "parameters": self.parameters,
            "parameters_without_embeddings": self.parameters_without_embeddings,
            "flops_per_token": self.flops_per_token,
            "executed_flops_per_token": self.executed_flops_per_token,
            "state_bytes_per_sequence": sum(layer.state_bytes for layer in self.layers),
            "memory_bytes_per_rank": memory | {"sum": sum(memory.values())},
            "communication_bytes_per_step_and_rank": sent | {"sum": sum(sent.values())},
            "layout": {
                "processes": parallel.ranks_per_replica * self.data_parallel,
                "tensor": parallel.tensor,
                "context": parallel.context,
                "pipeline": parallel.pipeline,
                "data": self.data_parallel,
                "sequence": parallel.sequence,
                "micro_batches": self._num_microbatches,
                "layers_per_stage": stage_sizes(self.config),
            },
            "training": {
                "tokens_per_step": training.tokens_per_step,
                "steps": training.train_steps,
                "flops": self.flops_per_token * training.train_steps * training.tokens_per_step,
            },
            "layers": {
                name: {
                    "count": sum(other.name == name for other in self.layers),
                    "parameters": layer.parameters,
                    "flops_per_token": 3 * layer.flops,
                    "activation_bytes_per_token_and_rank": layer.activation_bytes,
                    "state_bytes_per_sequence": layer.state_bytes,
                }
                for name, layer in kinds.items()
            },
        }

    @property
    def _uses_muon(self) -> bool:
        return self.config.optimizer.name == "muon"

    @property
    def _num_microbatches(self) -> int:
        training = self.config.training
        return training.global_batch_size // (training.micro_batch_size * self.data_parallel)

    @property
    def _sizes(self) -> Sizes:
        return sizes_of(self.config)


def format_report(report: dict) -> str:
    """The report of a run as lines for a terminal."""
    layout, memory = report["layout"], report["memory_bytes_per_rank"]
    sent, training = report["communication_bytes_per_step_and_rank"], report["training"]
    kinds = ", ".join(f"{terms['count']} {name}" for name, terms in report["layers"].items())
    terms = {
        "parameters": f"{report['parameters']:,}, {report['parameters_without_embeddings']:,} without embeddings",
        "parts": kinds,
        "FLOPs per token": f"{report['flops_per_token'] / 1e9:.2f} G (model), "
        f"{report['executed_flops_per_token'] / 1e9:.2f} G (executed)",
        "whole run": f"{training['steps']:,} steps of {training['tokens_per_step']:,} tokens, "
        f"{training['flops']:.3g} model FLOPs",
        "layout": f"{layout['processes']} processes: tensor {layout['tensor']}, context {layout['context']}, pipeline "
        f"{layout['pipeline']} (layers {layout['layers_per_stage']}), data {layout['data']}, "
        f"{layout['micro_batches']} micro-batches",
        "memory per rank": ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items()) + " GiB",
        "sent per step": ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sent.items()) + " GiB per rank",
        "state": f"{report['state_bytes_per_sequence'] / 2**20:.2f} MiB per sequence when decoding",
    }
    return "\n".join(f"{name:<16} {text}" for name, text in terms.items())


def stage_sizes(config: Config) -> list[int]:
    """Layers of each pipeline stage."""
    stages, num_layers = config.parallel.pipeline, len(parse_pattern(config.model.pattern))
    return config.parallel.pipeline_layers or [len(range(stage, num_layers, stages)) for stage in range(stages)]


def model_cost(config: Config, *, vocab_size: int, data_parallel: int = 1) -> ModelCost:
    """Costs of a run.

    Args:
        config: the run.
        vocab_size: tokens of the vocabulary, before padding.
        data_parallel: number of model replicas.
    """
    sizes = sizes_of(config)
    multiple = config.model.vocab_multiple
    padded = math.ceil(vocab_size / multiple) * multiple
    layers = parse_pattern(config.model.pattern)
    stages: list[list[LayerCost]] = []
    number = 0
    for size in stage_sizes(config):
        stages.append([])
        for layer in layers[number : number + size]:
            number += 1
            stages[-1].append(mixer_cost(sizes, number, layer.symbol))
            if layer.mlp:
                stages[-1].append(mlp_cost(sizes))
    stages[0].insert(0, embedding_cost(sizes, padded))
    stages[-1].append(output_cost(sizes, padded))
    return ModelCost(config=config, data_parallel=data_parallel, vocab_size=padded, stages=stages)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device such as "NVIDIA H100 80GB HBM3"; None for one that `PEAK_FLOPS` does not know."""
    found = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(found, key=len)] if found else None
