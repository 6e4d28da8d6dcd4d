"""The configuration of a run: one YAML recipe, overrides `section.field=value`, strict.

    config = load_config(Path("examples/recipes/demo.yaml"), ["optimizer.lr=1e-3"])

Each section is a small dataclass that checks its own fields; rules across sections are in `Config`. Nothing here needs
a GPU, Megatron or a process group, so a wrong value is reported before any of them exists.
"""

import difflib
import re
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_gdn.hybrid.pattern import parse_pattern

_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9.]+(?:[eE][+-]?\d+)?)\s*([kKMBT]?)")


class ConfigError(ValueError):
    """A configuration that cannot be used: every wrong value with its rule and remedy."""


def _parse_count(value: Any) -> Any:
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip())):
        value = float(match[1]) * _UNITS[match[2]]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(_parse_count)]
"""An integer that may be written 4096, 1e9, 15B or 0.5M."""
Positive = Annotated[Count, Field(gt=0)]
NonNegative = Annotated[Count, Field(ge=0)]

_section = dataclass(kw_only=True, slots=True, config=ConfigDict(extra="forbid"))


@_section
class RunConfig:
    """Where and on what the run happens."""

    output_dir: str
    """Folder of the run: checkpoints, metrics, resolved configuration."""
    seed: NonNegative = 1234
    """Seed of the initial weights and of the order of the samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu uses gloo, cuda NCCL; auto takes cuda where a GPU exists."""
    timeout_s: Positive = 600
    """Seconds after which a collective operation that does not complete ends the run."""


@_section
class AttentionConfig:
    """Options of the attention layers of one symbol."""

    window: Positive | None = None
    """Tokens that a token sees, itself included; None: all before it."""
    rope: bool = True
    """Rotate q and k by position; False: no positions (NoPE)."""
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head that is rotated."""
    qk_norm: bool = False
    """RMSNorm of each q and k head."""
    output_gate: bool = False
    """Multiply the output by sigmoid of a gate that is projected beside q (Qwen3-Next)."""
    num_query_groups: Positive | None = None
    """Key/value heads; None: the model's."""


@_section
class ModelConfig:
    """Shape and initialisation of the model; field names are Megatron-Core's."""

    pattern: str
    """Mixers and MLPs, see megatron_gdn/hybrid/pattern.py."""
    hidden_size: Positive
    """Width of the residual stream."""
    ffn_hidden_size: Positive
    """Inner width of the SwiGLU MLP."""
    linear_num_key_heads: Positive | None = None
    """Heads of q and k in Gated DeltaNet layers."""
    linear_num_value_heads: Positive | None = None
    """Heads of v and z; a multiple of linear_num_key_heads."""
    linear_key_head_dim: Positive | None = None
    """K: size of one q or k head."""
    linear_value_head_dim: Positive | None = None
    """V: size of one v head."""
    linear_conv_kernel_dim: Annotated[Count, Field(ge=2, le=4)] = 4
    """Width of the causal convolution, tokens."""
    allow_neg_eigval: bool = False
    """beta in (0, 2): the state transition may have negative eigenvalues (arXiv 2411.12537)."""
    use_output_gate: bool = True
    """Multiply the normalised output by silu(z)."""
    use_qk_l2norm: bool = True
    """L2-normalise q and k."""
    use_decay: bool = True
    """False: no alpha, the state keeps what is not overwritten (DeltaNet, arXiv 2406.06484)."""
    mamba_num_heads: Positive | None = None
    """Heads of Mamba2 layers."""
    mamba_head_dim: Positive = 64
    """P: size of one Mamba2 head."""
    mamba_state_dim: Positive = 128
    """N: size of B and C, rows of a head's state."""
    mamba_num_groups: Positive = 1
    """Groups of Mamba2 heads that share B and C."""
    num_attention_heads: Positive | None = None
    """Query heads of attention layers."""
    num_query_groups: Positive | None = None
    """Key/value heads of attention layers; None: as many as query heads."""
    kv_channels: Positive | None = None
    """Size of an attention head; None: hidden_size / num_attention_heads."""
    rotary_base: Positive = 10000
    """Base of the rotary embedding of attention layers."""
    full_attention: AttentionConfig = Field(default_factory=AttentionConfig)
    """Options of layers `*`."""
    sliding_attention: AttentionConfig = Field(default_factory=lambda: AttentionConfig(window=2048))
    """Options of layers `S`."""
    attention_layers: dict[Positive, dict[str, Any]] = Field(default_factory=dict)
    """Options of single attention layers in place of their symbol's, by the layer's number from 1, such as
    `{4: {window: 512}, 12: {rope: false}}`."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight, and the weight starts at 0."""
    vocab_size: Positive | None = None
    """Tokens of the vocabulary; None: as the training data's manifest says."""
    vocab_multiple: Positive = 128
    """The embedding has vocab_size rounded up to this, at every tensor-parallel size."""
    tie_embeddings: bool = False
    """Use the embedding as the output layer."""
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in every RMSNorm."""
    initialization: Literal["megatron", "paper"] = "megatron"
    """megatron: normal with init_method_std, weights that write to the residual stream / sqrt(2 * layers). paper: as in
    the paper's code, uniform in +-1/sqrt(inputs), those of MLPs, attention and Mamba2 that write to the residual stream
    / sqrt(2 * layers), those of Gated DeltaNet not; embeddings normal with 0.02."""
    init_method_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights of initialization megatron."""
    provider: Literal["local", "te"] = "local"
    """Who makes linear layers and norms: Megatron's own modules, or Transformer Engine's, which need CUDA."""
    kernel_backend: Literal["auto", "torch", "triton", "fla"] = "auto"
    """Backend of the kernels of Gated DeltaNet and Mamba2; auto: triton on CUDA, torch on a CPU."""
    attention_backend: Literal["auto", "torch", "te", "flash", "flex"] = "auto"
    """Who computes attention; auto: te, flash or flex on CUDA, the first that is installed, torch on a CPU."""

    def __post_init__(self):
        symbols = self.symbols
        for symbol, names in _NEEDED_FIELDS.items():
            for name in names:
                if symbol in symbols and getattr(self, name) is None:
                    raise ValueError(f"{name} is required by the layers {symbol} of the pattern: set model.{name}.")
        keys, values = self.linear_num_key_heads, self.linear_num_value_heads
        if "G" in symbols and values % keys:
            raise ValueError(
                f"linear_num_value_heads ({values}) must be divisible by linear_num_key_heads ({keys}): "
                f"use {keys * max(1, values // keys)} value heads."
            )
        self._check_attention_layers()
        if symbols & {"S", "*"}:
            self._check_attention()
        if "M" in symbols and self.mamba_num_heads % self.mamba_num_groups:
            raise ValueError(
                f"mamba_num_heads ({self.mamba_num_heads}) must be divisible by mamba_num_groups "
                f"({self.mamba_num_groups}): every group serves the same number of heads."
            )

    @property
    def symbols(self) -> set[str]:
        """Mixers that the pattern names."""
        return {layer.symbol for layer in parse_pattern(self.pattern)}

    @property
    def attention_head_dim(self) -> int:
        """Size of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def _check_attention(self) -> None:
        heads = self.num_attention_heads
        if self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads ({heads}): set kv_channels "
                "or change the number of heads."
            )
        for number, layer in enumerate(parse_pattern(self.pattern), start=1):
            if layer.symbol in ("S", "*"):
                self._check_attention_layer(layer.symbol, self.attention_options(number))

    def _check_attention_layer(self, symbol: str, options: AttentionConfig) -> None:
        heads, groups = self.num_attention_heads, options.num_query_groups
        if heads % groups:
            raise ValueError(
                f"num_attention_heads ({heads}) must be divisible by num_query_groups ({groups}): every key/value head "
                "serves the same number of query heads."
            )
        if symbol == "*" and options.window is not None:
            raise ValueError(f"full_attention.window ({options.window}) must be null: layers with a window are S.")
        if symbol == "S" and options.window is None:
            raise ValueError("sliding_attention.window (null) must be a number of tokens: full attention is *.")
        turned = int(self.attention_head_dim * options.rotary_percent)
        if options.rope and (turned < 2 or turned % 2):
            raise ValueError(
                f"rotary_percent ({options.rotary_percent}) of attention heads of {self.attention_head_dim} must be an "
                f"even number of dimensions, not {turned}: dimensions turn in pairs; change it, kv_channels, or set "
                "rope to false."
            )

    def attention_options(self, number: int) -> AttentionConfig:
        """Options of an attention layer, those of `attention_layers` and the model's key/value heads filled in.

        Args:
            number: of the layer, from 1.
        """
        layers = parse_pattern(self.pattern)
        symbol = layers[number - 1].symbol
        options = self.sliding_attention if symbol == "S" else self.full_attention
        groups = options.num_query_groups or self.num_query_groups or self.num_attention_heads
        return replace(options, **{"num_query_groups": groups, **self.attention_layers.get(number, {})})

    def _check_attention_layers(self) -> None:
        layers, known = parse_pattern(self.pattern), [field.name for field in fields(AttentionConfig)]
        attention = [number for number, layer in enumerate(layers, start=1) if layer.symbol in ("S", "*")]
        for number, options in self.attention_layers.items():
            if number not in attention:
                raise ValueError(
                    f"attention_layers has options of layer {number}, which must be one of the attention layers of the "
                    f"pattern: {', '.join(map(str, attention)) or 'there are none'}."
                )
            for key in options.keys() - set(known):
                near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known
                raise ValueError(f"attention_layers.{number}.{key} is not a known key: did you mean {', '.join(near)}?")
            try:
                self.attention_options(number)
            except ValidationError as error:
                details = error.errors()[0]
                name = ".".join(["attention_layers", str(number), *map(str, details["loc"])])
                raise ValueError(f"{name} ({details['input']!r}): {_lower(details['msg'])}.") from None


_NEEDED_FIELDS = {
    "G": ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "M": ("mamba_num_heads",),
    "S": ("num_attention_heads",),
    "*": ("num_attention_heads",),
}


@_section
class DataConfig:
    """Indexed datasets; each entry of a list is a prefix, or "weight prefix" for a blend. Or text in tar shards."""

    train: list[str] = Field(min_length=1)
    """Prefixes of the .bin/.idx pairs to train on; or WebDataset shards, patterns that end in .tar, whose text is
    tokenised while it is read."""
    validation: list[str] = Field(default_factory=list)
    """Prefixes to validate on; empty: the split's second part."""
    split: str | None = None
    """Shares of train, validation and test documents, such as "95,5,0", when `validation` is empty."""
    tokenizer: str | None = None
    """Folder with tokenizer.json, for WebDataset shards."""
    text_field: str = "txt"
    """Field of each sample in the shards that holds the text."""
    eod_token: str = "<|endoftext|>"
    """Token that is put after every text of the shards."""
    cache_dir: str | None = None
    """Folder of Megatron's sample indices; None: output_dir/cache."""
    documents: Literal["join", "separate"] = "join"
    """Documents of a sample; join: one text, as Megatron trains. separate: states, convolutions, attention and
    positions restart with each, and none predicts the next one's first token; their bounds come from the index. TFLOP/s
    and MFU still count attention over whole samples."""
    eod_mask_loss: bool = False
    """Leave the prediction after an end-of-document token out of the loss."""
    num_workers: NonNegative = 2
    """Processes that read ahead; 0 reads in the training process."""

    @property
    def streams(self) -> bool:
        """Whether the training data is text in WebDataset shards."""
        return self.train[0].endswith(".tar")

    def __post_init__(self):
        if len({entry.endswith(".tar") for entry in self.train}) > 1:
            raise ValueError(f"train ({self.train}) must be all prefixes or all .tar shards: tokenize the shards.")
        if self.streams != (self.tokenizer is not None):
            rule = "is required by" if self.streams else "must be null without"
            raise ValueError(f"tokenizer ({self.tokenizer}) {rule} .tar shards in data.train.")
        if self.streams and self.split:
            raise ValueError(f"split ({self.split}) must be null with .tar shards: set data.validation to a dataset.")


@_section
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
    """Shard optimizer states over data-parallel and context-parallel ranks."""
    overlap: bool = True
    """Overlap gradient reduction and parameter gathering with computation."""

    def __post_init__(self):
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence (true) needs tensor > 1: set parallel.sequence=false or parallel.tensor=2.")

    @property
    def ranks_per_replica(self) -> int:
        """Processes that hold one model and one sequence together; data parallelism repeats them."""
        return self.tensor * self.context * self.pipeline


@_section
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """wsd: warm-up, stable, linear decay over the last decay_tokens."""
    warmup_tokens: NonNegative = 0
    """Tokens of linear warm-up from 0."""
    decay_tokens: NonNegative | None = None
    """Tokens of wsd's decay; None: the last 10 % of the run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay; norms, A_log, dt_bias and other vectors have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self):
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) must not exceed lr ({self.lr:g}).")


@_section
class TrainingConfig:
    """Batch, length and precision."""

    sequence_length: Positive
    """Tokens of a sample."""
    micro_batch_size: Positive = 1
    """Samples of one forward pass on one data-parallel rank."""
    global_batch_size: Positive
    """Samples of one optimizer step."""
    train_tokens: Positive
    """Tokens of the whole run; rounded down to whole steps."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights, gradients, A_log and dt_bias."""
    recompute: Literal["none", "full"] = "none"
    """full: keep only each layer's input for the backward pass."""
    validation_interval: Positive | None = None
    """Steps between validations; None: only at the end."""
    validation_samples: NonNegative = 0
    """Samples of one validation; 0 turns validation off."""
    exit_after_steps: Positive | None = None
    """Save and stop after this step of the schedule, to be resumed."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch_size * self.sequence_length

    @property
    def train_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train_tokens // self.tokens_per_step

    def __post_init__(self):
        if self.train_steps == 0:
            raise ValueError(
                f"train_tokens ({self.train_tokens}) must hold one step of {self.tokens_per_step} tokens: "
                "raise it or lower global_batch_size."
            )


@_section
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
        if self.name == "megatron" and self.deepspeed_config is not None:
            raise ValueError(
                f"deepspeed_config ({self.deepspeed_config}) needs name deepspeed: set engine.name=deepspeed."
            )
        if self.offload_optimizer and (self.name == "megatron" or self.zero_stage == 0):
            raise ValueError(
                f"offload_optimizer (true) needs name deepspeed and zero_stage 1 to 3, not {self.name} and "
                f"{self.zero_stage}: set engine.name=deepspeed engine.zero_stage=1."
            )


@_section
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


@_section
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    interval: Positive | None = None
    """Steps between checkpoints; None: only at the end and on SIGTERM."""
    keep: Positive | None = None
    """Newest checkpoints that stay; None keeps all."""
    initial_weights: str | None = None
    """Folder of checkpoints whose newest gives a new run its weights, such as tools.convert.hf_to_megatron writes."""


@_section
class LoggingConfig:
    """What is reported, and how often."""

    interval: Positive = 1
    """Steps between rows of metrics."""
    health_interval: Positive | None = 100
    """Steps between samples of each layer's gates, states and attention; null: never."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


@_section
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
        if self.engine.name == "deepspeed" and parallel.pipeline > 1:
            raise ValueError(
                f"parallel.pipeline ({parallel.pipeline}) must be 1 with engine.name=deepspeed, whose ZeRO does not go "
                "with Megatron's pipeline schedules: use tensor parallelism and a higher zero_stage."
            )
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


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file with the sections of `Config`.
        overrides: `section.field=value`, the value in YAML.

    Raises:
        ConfigError: no such file, broken YAML, an unknown key, a value that breaks a rule; all of them at once.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config ({path}) cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config ({path}) is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config ({path}) must hold sections such as 'model:' and 'training:'.")
    for override in overrides or []:
        _apply_override(values, override)
    return parse_config(values)


def parse_config(values: dict) -> Config:
    """A Config from nested dictionaries, see `load_config`."""
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives the same run."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _apply_override(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    *path, field = key.split(".")
    if not (separator and path and all(path) and field):
        raise ConfigError(f"override ({override!r}) must be section.field=value, such as optimizer.lr=1e-3.")
    for section in path:
        values[section] = values.get(section) or {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"override ({override!r}) names a part of {section}, which has none: see the recipe.")
    try:
        # A pattern may start with "*", which YAML would read as an alias.
        values[field] = text if text.startswith("*") else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override ({override!r}) has a value that is not YAML: {error}") from error


def _explain(error: dict) -> str:
    """One line for one of pydantic's errors: value, rule, and for an unknown key the near ones."""
    location = [str(part) for part in error["loc"]]
    name = ".".join(location) or "configuration"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=3, cutoff=0.5) or known
        prefix = ".".join(location[:-1])
        names = ", ".join(f"{prefix}.{key}" if prefix else key for key in near)
        return f"{name} is not a known key: did you mean {names}?"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{name} is required: set it in the recipe or as {name}=VALUE."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message if not location else f"{name}: {message}"
    return f"{name} ({error['input']!r}): {_lower(message)}."


def _lower(message: str) -> str:
    return f"{message[0].lower()}{message[1:]}"


def _known_keys(location: list[str]) -> list[str]:
    known: Any = Config
    for part in location:
        known = next((field.type for field in fields(known) if field.name == part), None)
        if not is_dataclass(known):
            return []
    return [field.name for field in fields(known)]
