"""A whole run: its sections, and the rules between them."""

from pydantic import Field

from megatron_gdn.config.engine import EngineConfig, FP8Config, ParallelConfig
from megatron_gdn.config.model import ModelConfig
from megatron_gdn.config.training import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_gdn.config.types import ConfigError, section
from megatron_gdn.hybrid.pattern import parse_pattern


@section
class Config:
    """A run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig
    training: TrainingConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    fp8: FP8Config = Field(default_factory=FP8Config)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @property
    def slices_optimizer(self) -> bool:
        """Whether Megatron's distributed optimizer gives ranks equal slices of gradients; Muon needs whole matrices."""
        return self.parallel.distributed_optimizer and self.optimizer.name != "muon"

    def __post_init__(self):
        model, parallel, training = self.model, self.parallel, self.training
        if model.ffn_hidden_size % parallel.tensor:
            raise ValueError(
                f"model.ffn_hidden_size ({model.ffn_hidden_size}) must be divisible by parallel.tensor "
                f"({parallel.tensor}): use {-(-model.ffn_hidden_size // parallel.tensor) * parallel.tensor} or a "
                "smaller parallel.tensor."
            )
        if "M" in model.symbols and parallel.tensor > 1:
            from megatron_gdn.sections import check_mamba2  # imports torch, which other wrong values need not wait for

            check_mamba2(model, parallel.tensor)
        if model.vocab_multiple % parallel.tensor:
            raise ValueError(
                f"model.vocab_multiple ({model.vocab_multiple}) must be divisible by parallel.tensor "
                f"({parallel.tensor}): use {model.vocab_multiple * parallel.tensor}."
            )
        shards = parallel.tensor * parallel.context
        if parallel.sequence and training.sequence_length % shards:
            of = "parallel.tensor" if parallel.context == 1 else "parallel.tensor x parallel.context"
            raise ValueError(
                f"training.sequence_length ({training.sequence_length}) must be divisible by {of} ({shards}) with "
                "parallel.sequence: use a multiple or turn parallel.sequence off."
            )
        if parallel.context > 1:
            self._check_context()
        stages, num_layers = parallel.pipeline_layers, len(parse_pattern(model.pattern))
        if stages is not None and (len(stages) != parallel.pipeline or sum(stages) != num_layers):
            raise ValueError(
                f"parallel.pipeline_layers ({stages}) must be {parallel.pipeline} numbers with the sum {num_layers}: "
                "one per pipeline stage, all layers of the pattern together."
            )
        if num_layers < parallel.pipeline:
            raise ValueError(
                f"model.pattern has {num_layers} layers and parallel.pipeline ({parallel.pipeline}) needs one per "
                "stage: use fewer stages."
            )
        if self.optimizer.warmup_tokens >= training.train_steps * training.tokens_per_step:
            raise ValueError(
                f"optimizer.warmup_tokens ({self.optimizer.warmup_tokens}) must be below the tokens of the run "
                f"({training.train_steps * training.tokens_per_step}): warm up for less, or train on more."
            )
        self._check_fp8()
        if self.optimizer.name == "muon":
            self._check_muon()
        if self.engine.name == "deepspeed" and parallel.pipeline > 1:
            raise ValueError(
                f"parallel.pipeline ({parallel.pipeline}) must be 1 with engine.name=deepspeed, whose ZeRO does not go "
                "with Megatron's pipeline schedules: use tensor parallelism and a higher zero_stage."
            )
        self._check_universal()
        wants_validation = training.validation_samples > 0
        if wants_validation and not self.data.validation and not self.data.split:
            raise ValueError(
                "data.validation and data.split are empty, but training.validation_samples "
                f"({training.validation_samples}) needs one: set data.split, such as '95,5,0'."
            )

    def _check_fp8(self) -> None:
        fp8, provider = self.fp8, self.model.provider
        if fp8.recipe == "none":
            return
        if (fp8.backend == "te") != (provider == "te"):
            needed = "te" if fp8.backend == "te" else "local"
            raise ValueError(
                f"fp8.backend ({fp8.backend}) needs model.provider={needed} and has {provider}: who multiplies in FP8 "
                "makes the linear layers."
            )
        if fp8.recipe == "delayed" and self.training.recompute == "full":
            raise ValueError(
                "fp8.recipe (delayed) must not go with training.recompute=full, whose second pass would use other "
                "scales than the first: use tensorwise, or recompute none."
            )

    def _check_universal(self) -> None:
        engine, checkpoint = self.engine, self.checkpoint
        if engine.name != "deepspeed":
            for name in ("deepspeed", "initial_universal"):
                if value := getattr(checkpoint, name):
                    raise ValueError(
                        f"checkpoint.{name} ({value}) needs engine.name=deepspeed and has {engine.name}: set it, and "
                        "any engine continues the run's own checkpoints."
                    )
        if checkpoint.deepspeed and engine.zero_stage not in (1, 2):
            raise ValueError(
                f"engine.zero_stage ({engine.zero_stage}) must be 1 or 2 with checkpoint.deepspeed: use one of them, "
                "or the run's own checkpoints, which any stage reads."
            )

    def _check_muon(self) -> None:
        if self.engine.name == "deepspeed":
            raise ValueError(
                "optimizer.name (muon) needs engine.name=megatron and has deepspeed, whose ZeRO cuts weights at places "
                "that are no bounds of matrices: use the engine megatron, or optimizer.name=adamw."
            )
        if self.fp8.param_gather:
            raise ValueError(
                "fp8.param_gather (true) must be false with optimizer.name=muon: weights in FP8 are made by "
                "Megatron's distributed optimizer, which Muon does not go with."
            )

    def _check_context(self) -> None:
        # Here, as it imports torch: without context parallelism a wrong value is reported before that.
        from megatron_gdn.parallel.fragments import check_fragments

        model, parallel = self.model, self.parallel
        size = parallel.context
        attention = [
            model.attention_options(number)
            for number, layer in enumerate(parse_pattern(model.pattern), start=1)
            if layer.symbol in ("S", "*")
        ]
        windows = [options.window for options in attention if options.window is not None]
        try:
            check_fragments(
                self.training.sequence_length,
                layout=parallel.context_layout,
                size=size,
                conv_width=model.linear_conv_kernel_dim if model.symbols & {"G", "M"} else None,
                window=max(windows, default=None),
            )
        except ValueError as error:
            raise ValueError(f"parallel.context ({size}) and training.sequence_length: {error}") from None
        whole = [options for options in attention if options.window is None]
        if whole and parallel.context_attention == "a2a":
            ranks = parallel.tensor * size
            heads = [("num_attention_heads", model.num_attention_heads)]
            heads += [("num_query_groups", options.num_query_groups) for options in whole]
            for name, value in heads:
                if value % ranks:
                    raise ValueError(
                        f"model.{name} ({value}) must be divisible by parallel.tensor ({parallel.tensor}) x "
                        f"parallel.context ({size}) with parallel.context_attention a2a: use all_gather."
                    )


def check_world(config: Config, world_size: int) -> int:
    """Check the layout against the number of processes.

    Args:
        config: the run.
        world_size: processes.

    Returns:
        The data-parallel size.

    Raises:
        ConfigError: the layout needs more processes or does not divide them, or the batch does not divide.
    """
    parallel, training = config.parallel, config.training
    replica = parallel.ranks_per_replica
    if world_size % replica:
        context = f" x parallel.context ({parallel.context})" if parallel.context > 1 else ""
        raise ConfigError(
            f"parallel.tensor ({parallel.tensor}){context} x parallel.pipeline ({parallel.pipeline}) = {replica} must "
            f"divide the number of processes ({world_size}): start {replica} or a multiple "
            f"(torchrun --nproc-per-node {replica} ...)."
        )
    data_parallel = world_size // replica
    per_step = data_parallel * training.micro_batch_size
    if training.global_batch_size % per_step:
        raise ConfigError(
            f"training.global_batch_size ({training.global_batch_size}) must be divisible by micro_batch_size "
            f"({training.micro_batch_size}) x data-parallel size ({data_parallel}) = {per_step}: "
            f"use {-(-training.global_batch_size // per_step) * per_step}."
        )
    return data_parallel
