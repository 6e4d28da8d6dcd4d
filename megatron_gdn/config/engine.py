"""Sections of how a run is computed: layout over processes, engine, FP8."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_gdn.config.types import Count, NonNegative, Positive, changed_fields, section


@section
class ParallelConfig:
    """The layout; data parallelism takes the processes that are left."""

    tensor: Positive = 1
    """Tensor-parallel size."""
    pipeline: Positive = 1
    """Pipeline-parallel size."""
    pipeline_layers: list[Positive] | None = None
    """Layers of each pipeline stage; None: as equal as they can be, the first stages having one more."""
    sequence: bool = False
    """Shard the tokens between tensor-parallel regions over the tensor-parallel ranks."""
    context: Positive = 1
    """Context-parallel size: each sequence is cut over so many ranks, which pass on states, windows and keys."""
    context_layout: Literal["contiguous", "zigzag"] = "contiguous"
    """Tokens of a context-parallel rank: one stretch, or one from either half, Megatron's, which balances the work of
    full attention."""
    context_attention: Literal["all_gather", "a2a"] = "all_gather"
    """How full attention sees all tokens: keys and values of all ranks, or all tokens of a part of the heads."""
    state_exchange: Literal["all_gather", "scan"] = "all_gather"
    """How recurrent states pass between context-parallel ranks: one step, or log2 of the ranks in less memory."""
    distributed_optimizer: bool = True
    """Shard optimizer states over data-parallel and context-parallel ranks: in equal slices, with Muon by whole
    parameters."""
    overlap: bool = True
    """Overlap gradient reduction and parameter gathering with computation."""

    def __post_init__(self):
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence (true) needs tensor > 1: set parallel.sequence=false or parallel.tensor=2.")

    @property
    def ranks_per_replica(self) -> int:
        """Processes that hold one model and one sequence together; data parallelism repeats them."""
        return self.tensor * self.context * self.pipeline


@section
class EngineConfig:
    """Who drives the model: gradients over data-parallel ranks, states of the optimizer, updates."""

    name: Literal["megatron", "deepspeed"] = "megatron"
    """megatron: Megatron-Core's DDP and distributed optimizer. deepspeed: ZeRO; parallel.distributed_optimizer and
    parallel.overlap do not apply."""
    zero_stage: Annotated[Count, Field(ge=0, le=3)] = 1
    """What DeepSpeed shards over data-parallel ranks: 1 states of the optimizer, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep and update states of DeepSpeed's optimizer on the CPU (zero_stage 1 to 3)."""
    deepspeed_config: str | None = None
    """A ds_config.json whose further settings are used; what it shares with the recipe must agree with it."""

    def __post_init__(self):
        if self.name == "megatron" and (changed := changed_fields(self)):
            raise ValueError(f"{changed} needs name deepspeed and has megatron: set engine.name=deepspeed.")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer (true) needs zero_stage 1 to 3 and has 0: set engine.zero_stage=1.")


@section
class FP8Config:
    """FP8 in the large linear layers; see megatron_gdn/fp8/recipe.py."""

    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """Scaling recipe, by Megatron-Core's names; mxfp8 needs Blackwell."""
    backend: Literal["te", "scaled_mm", "emulated"] = "te"
    """te: Transformer Engine. scaled_mm: PyTorch's FP8 product, for delayed and tensorwise. emulated: operands are
    rounded to FP8 and multiplied in float32, on any device, to study numerics; slower than no FP8."""
    format: Literal["e4m3", "hybrid"] | None = None
    """hybrid keeps output gradients in e5m2; None: hybrid for delayed and tensorwise, e4m3 for blockwise and mxfp8."""
    first_layers_bf16: NonNegative = 1
    """Layers at the start that stay in the run's precision."""
    last_layers_bf16: NonNegative = 1
    """Layers at the end that stay in the run's precision."""
    param_gather: bool = False
    """Keep and gather weights in FP8 (backend te)."""
    amax_history: Positive = 1024
    """Forward passes whose largest magnitude sets the scale of delayed scaling."""

    def __post_init__(self):
        if self.recipe == "none":
            if changed := changed_fields(self):
                raise ValueError(f"{changed} needs a recipe and has none: set fp8.recipe, such as tensorwise.")
            return
        if self.format is None:
            self.format = "hybrid" if self.recipe in ("delayed", "tensorwise") else "e4m3"
        if self.backend == "scaled_mm" and self.recipe in ("blockwise", "mxfp8"):
            raise ValueError(
                f"recipe ({self.recipe}) must be delayed or tensorwise with backend scaled_mm, which has one scale per "
                "tensor: use one of them or backend te."
            )
        if self.param_gather and self.backend != "te":
            raise ValueError(
                f"param_gather (true) needs backend te and has {self.backend}: set fp8.param_gather=false."
            )
        edges = self.first_layers_bf16 + self.last_layers_bf16
        if self.backend == "te" and self.recipe == "delayed" and edges > 0:
            raise ValueError(
                f"first_layers_bf16 ({self.first_layers_bf16}) and last_layers_bf16 ({self.last_layers_bf16}) must be "
                "0 with recipe delayed, whose scales Transformer Engine updates for all layers at once: set both to 0, "
                "or use tensorwise."
            )
