"""Sections of what happens in a run: place, data, optimizer, batch, checkpoints, metrics."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_gdn.config.entries import split_shares, split_weights
from megatron_gdn.config.types import Count, NonNegative, Positive, changed_fields, section


@section
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


@section
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
    """Folder of the tokenizer that made the data. Checkpoints take it along; WebDataset shards need its
    tokenizer.json."""
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
        if self.streams and self.tokenizer is None:
            raise ValueError("tokenizer (None) is required by .tar shards in data.train: name its folder.")
        if self.streams and self.split:
            raise ValueError(f"split ({self.split}) must be null with .tar shards: set data.validation to a dataset.")
        for entries in (self.train, self.validation):
            if entries:
                split_weights(entries)
        if self.split:
            split_shares(self.split)


@section
class MuonConfig:
    """Muon of the matrices between the embedding and the output layer; decay, schedule and clipping are AdamW's."""

    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; falls as optimizer.lr does. None: optimizer.lr, which fits updates of AdamW's size."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of lr for a matrix. match_rms_adamw: 0.2 sqrt(max(rows, columns)), AdamW's size of updates (arXiv
    2502.16982); original: sqrt(max(1, rows / columns)), by its author (kellerjordan.github.io/posts/muon)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Of the gradients' moving mean."""
    nesterov: bool = True
    """Make the mean one step ahead orthogonal."""
    num_steps: Annotated[Count, Field(gt=0, lt=100)] = 5
    """Newton-Schulz iterations."""
    coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    """a, b, c of an iteration a x + (b A + c A A) x with A = x x^T; the author's, for five of them."""

    def __post_init__(self):
        if self.scale == "original" and self.lr is None:
            raise ValueError(
                "scale (original) gives updates of another size than AdamW's and needs lr: set optimizer.muon.lr, such "
                "as 0.02, or use scale match_rms_adamw."
            )


@section
class OptimizerConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of mixers and MLPs, AdamW for the rest; see megatron_gdn/training/muon.py."""
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

    muon: MuonConfig = Field(default_factory=MuonConfig)
    """Options of name muon."""

    def __post_init__(self):
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) must not exceed lr ({self.lr:g}).")
        if self.name != "muon" and (changed := changed_fields(self.muon)):
            raise ValueError(f"muon: {changed} needs name muon and has {self.name}: set optimizer.name=muon.")


@section
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


@section
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    interval: Positive | None = None
    """Steps between checkpoints; None: only at the end and on SIGTERM."""
    keep: Positive | None = None
    """Newest checkpoints that stay; None keeps all."""
    initial_weights: str | None = None
    """Folder of checkpoints whose newest gives a new run its weights, such as tools.convert.hf_to_megatron writes."""
    initial_universal: str | None = None
    """A universal checkpoint of DeepSpeed's that a new run goes on from: weights, optimizer, schedule, place in the
    data (engine deepspeed)."""
    deepspeed: bool = False
    """At the end and on SIGTERM, write DeepSpeed's own checkpoint too, which its ds_to_universal converts (engine
    deepspeed, zero_stage 1 or 2)."""

    def __post_init__(self):
        if self.initial_weights is not None and self.initial_universal is not None:
            raise ValueError(
                f"initial_weights ({self.initial_weights}) and initial_universal ({self.initial_universal}) must not "
                "both be set: a universal checkpoint brings weights of its own."
            )


@section
class LoggingConfig:
    """What is reported, and how often."""

    interval: Positive = 1
    """Steps between rows of metrics."""
    health_interval: Positive | None = 100
    """Steps between samples of each layer's gates, states and attention; null: never."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
