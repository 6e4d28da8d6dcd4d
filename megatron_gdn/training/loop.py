"""The training loop: steps, validation, checkpoints, metrics; it continues where a checkpoint stopped."""

import logging
import math
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_gdn.config import Config, ConfigError, check_world, dump_config
from megatron_gdn.cost import model_cost, peak_flops
from megatron_gdn.fp8.alignment import check_alignment
from megatron_gdn.providers import get_provider
from megatron_gdn.training.checkpoint import CheckpointStore
from megatron_gdn.training.data import TrainingBatches, build_datasets, data_key, read_vocabulary
from megatron_gdn.training.deepspeed_config import deepspeed_config
from megatron_gdn.training.engine import MegatronEngine
from megatron_gdn.training.faults import OutputLock, StopSignal
from megatron_gdn.training.health import HealthMonitor
from megatron_gdn.training.metrics import MetricWriter, ProgressLine, StepTimer
from megatron_gdn.training.setup import Launch, choose_device, init_distributed, shutdown
from megatron_gdn.training.state import TrainState
from megatron_gdn.training.streaming import StreamedDataset, TextShards, find_shards
from megatron_gdn.training.tokenizer import keep_tokenizer
from megatron_gdn.training.universal import PROGRESS_FILE, read_progress

logger = logging.getLogger(__name__)


def pretrain(config: Config, *, resume: bool = False) -> None:
    """Train from the configuration to its last step, or to a stop signal, and leave a checkpoint.

    Args:
        config: the run.
        resume: continue the run in `run.output_dir`; starts it when there is none yet.

    Raises:
        ConfigError: a setting that cannot work, before any process group exists.
        MissingPackageError: Transformer Engine is asked for and cannot be used, likewise.
        DatasetError: data that is missing, broken or does not fit the vocabulary, likewise.
        CheckpointError: checkpoints exist and none is valid.
    """
    launch = Launch.from_environment()
    check_world(config, launch.world_size)
    check_alignment(config)
    check_validation(config, launch.world_size)
    get_provider(config.model.provider)
    if engine_type(config) is not MegatronEngine:
        deepspeed_config(config, launch.world_size // config.parallel.tensor)
    shards, entries = None, config.data.train + config.data.validation
    if config.data.streams:
        shards, entries = find_shards(config.data), config.data.validation
    tokenizer = config.data.tokenizer
    vocabulary = read_vocabulary(entries, vocab_size=config.model.vocab_size, shards=shards, tokenizer=tokenizer)
    output_dir = Path(config.run.output_dir)
    if not (resume and any((output_dir / "checkpoints").glob("step_*"))):  # a run that goes on reads its own
        check_initial(config)
    if launch.rank == 0:
        check_output_dir(output_dir, config, resume=resume)
    with OutputLock(output_dir, enabled=launch.rank == 0):
        if launch.rank == 0 and tokenizer is not None:
            keep_tokenizer(Path(tokenizer), output_dir / "checkpoints")
        device = choose_device(config, launch)
        init_distributed(config, launch, device)
        try:
            trainer = Trainer(config, output_dir, vocabulary, device, shards)
            trainer.start(resume=resume)
            trainer.train()
        finally:
            shutdown()


def engine_type(config: Config) -> type[MegatronEngine]:
    """The class that drives the model.

    Raises:
        MissingPackageError: DeepSpeed is asked for and cannot be used.
    """
    if config.engine.name == "megatron":
        return MegatronEngine
    from megatron_gdn.training.deepspeed_engine import DeepSpeedEngine, import_deepspeed

    import_deepspeed()
    return DeepSpeedEngine


def check_validation(config: Config, world_size: int) -> None:
    """Raise ConfigError when the samples of a validation do not fill whole micro-batches on every rank."""
    data_parallel = world_size // config.parallel.ranks_per_replica
    per_round = data_parallel * config.training.micro_batch_size
    if config.training.validation_samples % per_round:
        raise ConfigError(
            f"training.validation_samples ({config.training.validation_samples}) must be divisible by "
            f"micro_batch_size ({config.training.micro_batch_size}) x data-parallel size ({data_parallel}) = "
            f"{per_round}: use {-(-config.training.validation_samples // per_round) * per_round}."
        )


def check_initial(config: Config) -> None:
    """Raise ConfigError when what a new run is to start from is no such checkpoint; contents are verified later."""
    weights, universal = config.checkpoint.initial_weights, config.checkpoint.initial_universal
    if weights is not None and not any(Path(weights).glob("step_*/manifest.json")):
        raise ConfigError(
            f"checkpoint.initial_weights ({weights}) must be a folder with a checkpoint, step_*/manifest.json: name "
            "the checkpoints folder of a run, or the --output of tools.convert.hf_to_megatron."
        )
    if universal is None:
        return
    if not ((Path(universal) / PROGRESS_FILE).is_file() and (Path(universal) / "zero").is_dir()):
        raise ConfigError(
            f"checkpoint.initial_universal ({universal}) must be a folder with {PROGRESS_FILE} and zero/: name the "
            "--output_folder of deepspeed.checkpoint.ds_to_universal."
        )


def check_output_dir(output_dir: Path, config: Config, *, resume: bool) -> None:
    """Create the folder of a new run; refuse one that holds something else, unless it is resumed.

    Raises:
        ConfigError: not a folder, not writable, or not empty.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".write-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run.output_dir ({output_dir}) cannot be written: {error.strerror}.") from error
    if resume:
        return
    read = [Path(entry.split()[-1]).resolve() for entry in config.data.train + config.data.validation]
    found = sorted(
        entry.name
        for entry in output_dir.iterdir()
        if entry.name != "cache"  # sample indices, named by their data, which also a start that failed leaves
        and not any(path.is_relative_to(entry.resolve()) or path.parent == entry.resolve() for path in read)
    )
    if found:
        raise ConfigError(
            f"run.output_dir ({output_dir}) must be empty for a new run and holds {', '.join(found[:5])}: "
            "continue that run with --resume or choose another folder."
        )


class Trainer:
    """One process's part of a run.

    Args:
        config: the run.
        output_dir: folder of the run.
        vocabulary: from `read_vocabulary`.
        device: of this process.
        shards: text to train on, in place of indexed datasets.
    """

    def __init__(
        self, config: Config, output_dir: Path, vocabulary, device: torch.device, shards: TextShards | None = None
    ):
        self.config, self.output_dir, self.device = config, output_dir, device
        self.is_first_rank = torch.distributed.get_rank() == 0
        self.data_parallel = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        self.train_set, self.validation_set = self._build_datasets(vocabulary, shards)
        self.vocab_size = vocabulary.size
        self.engine = engine_type(config).build(config, vocab_size=vocabulary.size, device=device)
        self.state = TrainState(
            model=self.engine.model,
            optimizer=self.engine.optimizer,
            scheduler=self.engine.scheduler,
            vocabulary=vocabulary,
            data_key=data_key(config.data.train, shards),
            gathered=self.engine.gathered,
        )
        self.store = CheckpointStore(output_dir / "checkpoints", keep=config.checkpoint.keep)
        self.timer = StepTimer()
        self.health = HealthMonitor(self.engine.model)
        self.flops_per_token = model_cost(config, vocab_size=vocabulary.size).flops_per_token

    def _build_datasets(self, vocabulary, shards: TextShards | None) -> tuple:
        data, training = self.config.data, self.config.training
        num_samples = training.train_steps * training.global_batch_size
        common = dict(
            cache_dir=Path(data.cache_dir or self.output_dir / "cache"),
            sequence_length=training.sequence_length,
            seed=self.config.run.seed,
            eod_mask_loss=data.eod_mask_loss,
            documents=data.documents,
        )
        train_set, validation_set = None, None
        if shards is None or training.validation_samples:
            train_set, validation_set = build_datasets(
                train=data.train if shards is None else [],
                validation=data.validation,
                split=data.split,
                num_train_samples=num_samples if shards is None else 0,
                num_validation_samples=training.validation_samples,
                vocab_size=vocabulary.size,
                eod_id=vocabulary.eod_id,
                **common,
            )
        if shards is not None:
            train_set = StreamedDataset(shards, num_samples=num_samples, num_lanes=training.global_batch_size, **common)
        return train_set, validation_set

    def start(self, *, resume: bool) -> None:
        """Load the newest checkpoint when resuming, and write down the resolved configuration."""
        if resume and self.state.load(self.store, self.config):
            logger.info("continues at step %d of %d", self.state.step, self.config.training.train_steps)
        elif resume:
            logger.info("no checkpoint in %s: starts at step 0", self.output_dir)
        weights = self.config.checkpoint.initial_weights
        if self.state.step == 0 and weights is not None:
            self.state.load_weights(CheckpointStore(Path(weights)))
            logger.info("weights from %s", weights)
        universal = self.config.checkpoint.initial_universal
        if self.state.step == 0 and universal is not None:
            self.state.continue_from(read_progress(Path(universal))["info"], self.config, Path(universal))
            self.engine.load_universal(Path(universal))
            logger.info("continues %s at step %d", universal, self.state.step)
        self.last_logged_step = self.state.step
        if self.is_first_rank:
            (self.output_dir / "config.yaml").write_text(dump_config(self.config))

    def train(self) -> None:
        """Run to the last step or to a stop, with a checkpoint at the end."""
        config, state = self.config, self.state
        total = config.training.train_steps
        last_step = min(total, config.training.exit_after_steps or total)
        batches = self._batches(self.train_set, state.consumed_samples)
        tensorboard = config.logging.tensorboard
        with (
            StopSignal() as stop,
            MetricWriter(
                self.output_dir, resume_step=state.step, enabled=self.is_first_rank, tensorboard=tensorboard
            ) as metrics,
            ProgressLine(total, start=state.step, enabled=self.is_first_rank) as progress,
        ):
            if state.step == 0:
                self._validate(metrics)
            stopped = False
            while state.step < last_step and not stopped:
                self._step(batches, metrics, progress)
                stopped = stop.requested()
                if self._is_due(config.training.validation_interval) or state.step == total:
                    self._validate(metrics)
                if stopped or state.step == last_step or self._is_due(config.checkpoint.interval):
                    self._save(metrics)
            if config.checkpoint.deepspeed:
                folder = self.output_dir / "deepspeed" / f"step_{state.step:08d}"
                self.engine.save_deepspeed(folder, state.info(config))
            if stopped:
                logger.info("stopped by %s after step %d; continue with --resume", stop.name, state.step)

    @property
    def _num_microbatches(self) -> int:
        training = self.config.training
        return training.global_batch_size // (training.micro_batch_size * self.data_parallel[1])

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.state.step % interval == 0

    def _batches(self, dataset, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches of this rank from a position in the data; reading is timed as `data`."""
        source = iter(
            TrainingBatches(
                dataset,
                consumed_samples=consumed_samples,
                micro_batch_size=self.config.training.micro_batch_size,
                data_parallel_rank=self.data_parallel[0],
                data_parallel_size=self.data_parallel[1],
                num_workers=self.config.data.num_workers,
                pin_memory=self.device.type == "cuda",
                vocab_size=self.vocab_size,
            )
        )
        while True:
            with self.timer("data"):
                try:
                    batch = next(source)
                except StopIteration:
                    return
            yield batch

    def _step(self, batches: Iterator, metrics: MetricWriter, progress: ProgressLine) -> None:
        config, state = self.config, self.state
        learning_rate = self.engine.learning_rate
        health_due = (state.step + 1) % (config.logging.health_interval or math.inf) == 0
        if health_due:
            self.health.start()
        with self.timer("forward_backward"):
            total = self.engine.forward_backward(batches, self._num_microbatches)
        with self.timer("optimizer"):
            grad_norm = self.engine.update()
        state.step += 1
        state.consumed_samples += config.training.global_batch_size
        if health_due:
            metrics.log(state.step, self.health.take())
        if not self._is_due(config.logging.interval) and state.step != config.training.train_steps:
            return
        loss = self.engine.mean_loss(total)  # collective, and waits for the device
        times = self.timer.take(state.step - self.last_logged_step)
        self.last_logged_step = state.step
        tokens_per_s = config.training.tokens_per_step / times["perf/step_s"]
        row = {
            "train/loss": loss,
            "train/perplexity": math.exp(min(loss, 100.0)),
            "train/grad_norm": grad_norm,
            "train/lr": learning_rate,
            "perf/tokens_per_s": tokens_per_s,
            "perf/tokens_per_s_per_gpu": tokens_per_s / torch.distributed.get_world_size(),
            **self._device_metrics(tokens_per_s / torch.distributed.get_world_size()),
            "progress/tokens": state.step * config.training.tokens_per_step,
            "progress/samples": state.consumed_samples,
        }
        metrics.log(state.step, row | times)
        progress.update(state.step, loss=loss, lr=learning_rate, tokens_per_s=tokens_per_s)

    def _device_metrics(self, tokens_per_s: float) -> dict[str, float]:
        """Use of this rank's device at `tokens_per_s` per rank."""
        flops_per_s = tokens_per_s * self.flops_per_token
        found = {"perf/tflops_per_gpu": flops_per_s / 1e12}
        if self.device.type != "cuda":
            found["perf/memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
        else:
            found["perf/memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            if (peak := peak_flops(torch.cuda.get_device_name(self.device))) is not None:
                found["perf/mfu"] = flops_per_s / peak
        return found

    def _validate(self, metrics: MetricWriter) -> None:
        training = self.config.training
        if training.validation_samples == 0:
            return
        num_microbatches = training.validation_samples // (training.micro_batch_size * self.data_parallel[1])
        with self.timer.paused():
            batches = self._batches(self.validation_set, 0)
            self.engine.wrapped.eval()
            with torch.no_grad():
                total = self.engine.forward_backward(batches, num_microbatches, forward_only=True)
            self.engine.wrapped.train()
            loss = self.engine.mean_loss(total)
        metrics.log(self.state.step, {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 100.0))})
        logger.info("step %d: validation loss %.4f", self.state.step, loss)

    def _save(self, metrics: MetricWriter) -> None:
        metrics.flush()  # a checkpoint never knows steps that the metrics lost
        with self.timer("checkpoint"):
            self.engine.sync_parameters()
            self.state.save(self.store, self.config)
