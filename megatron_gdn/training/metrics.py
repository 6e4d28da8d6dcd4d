"""Metrics of a run: TensorBoard events, a JSON-lines twin that survives a kill, step times, a progress line.

`metrics.jsonl` has one object per `MetricWriter.log` call, `{"step": 12, "train/loss": 5.31, ...}`; `read_metrics`
joins the objects of a step. JSON has no NaN, so numbers that are not finite are the strings "NaN", "Infinity" and
"-Infinity", and `read_metrics` turns them back into floats. A resumed run leaves `{"step": 12, "resumed": true}`.

| tag | unit | value of a row |
|---|---|---|
| train/loss | nats per token | mean over the tokens of the step |
| train/perplexity | | exp(train/loss) |
| train/grad_norm | | global L2 norm before clipping |
| train/lr | | learning rate that the step used |
| validation/loss | nats per token | mean over the validation tokens, weights as after the step |
| validation/perplexity | | exp(validation/loss) |
| perf/tokens_per_s | tokens/s | tokens of the step / perf/step_s, all ranks |
| perf/tokens_per_s_per_gpu | tokens/s | the same per rank |
| perf/tflops_per_gpu | TFLOP/s | model FLOPs (megatron_gdn/cost.py) per rank |
| perf/mfu | | the same over the device's dense bf16 peak; only for GPUs that cost.py knows |
| perf/memory_gib | GiB | peak: allocated by torch on a GPU, resident in a process on a CPU |
| perf/step_s | s | wall time of the step, without checkpoints and validation |
| perf/data_s | s | part of it: waiting for micro-batches |
| perf/forward_backward_s | s | part of it: forward and backward passes, without data_s |
| perf/optimizer_s | s | part of it: gradient reduction, clipping, update |
| perf/checkpoint_s | s | blocked by a checkpoint since the previous row; not in step_s |
| progress/tokens | tokens | used since the start of the run |
| progress/samples | samples | used since the start of the run |
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_TENSORBOARD_FLUSH_S = 10  # what a kill can cost; a resumed run repeats those steps anyway
_OUTSIDE_STEP = frozenset({"checkpoint"})


class MetricWriter:
    """Writes rows to `directory/metrics.jsonl` and `directory/tensorboard`; no failure of a write stops training.

    Args:
        directory: folder of the run.
        resume_step: step of the checkpoint that the run continues from. Rows of later steps are dropped, so that the
            curves go on without overlap or gap. None or 0: the run starts, earlier rows are dropped.
        enabled: False makes every method do nothing (all ranks but the first).
        tensorboard: False writes only the JSON lines.

    `dropped` counts the rows that did not reach one of the two; the first failure of each is logged. TensorBoard writes
    in a thread, so of its rows up to ten are lost before the failure is known. `flush` tries a failed one again.
    """

    def __init__(self, directory: Path, *, resume_step: int | None, enabled: bool = True, tensorboard: bool = True):
        self.path = Path(directory) / "metrics.jsonl"
        self.enabled = enabled
        self.dropped = 0
        self._resume_step = resume_step or 0
        self._tensorboard_dir = self.path.parent / "tensorboard" if enabled and tensorboard else None
        self._tensorboard = None
        self._warned: set[str] = set()
        if not enabled:
            return
        with self._tolerate("metrics.jsonl"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            _keep_rows(self.path, self._resume_step)
            if self._resume_step:
                self._append({"step": self._resume_step, "resumed": True})
        self._open_tensorboard(purge_step=self._resume_step + 1 if self._resume_step else 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one row; several rows of a step are joined by the reader.

        Args:
            step: optimizer steps done.
            values: numbers by tag, NaN and infinity included. Tensors are read here, which waits for their device.
        """
        if not self.enabled:
            return
        row = {tag: value if isinstance(value, int) else float(value) for tag, value in values.items()}
        complete = self._tensorboard_dir is None
        if self._tensorboard is not None:
            with self._tolerate("TensorBoard"):
                for tag, value in row.items():
                    self._tensorboard.add_scalar(tag, value, step)
                complete = True
        written = False
        with self._tolerate("metrics.jsonl"):
            self._append({"step": int(step), **row})
            written = True
        self.dropped += not (complete and written)

    def flush(self) -> None:
        """Bring all rows to the disk; called before a checkpoint, so that none knows steps that the metrics lost."""
        if not self.enabled:
            return
        with self._tolerate("metrics.jsonl"):
            _sync(self.path)
        if self._tensorboard is not None:
            with self._tolerate("TensorBoard"):
                self._tensorboard.flush()
        if self._tensorboard is None:
            self._open_tensorboard(purge_step=None)  # the disk may have room again

    def close(self) -> None:
        """Flush and close; does nothing the second time."""
        if not self.enabled:
            return
        self.flush()
        self._close_tensorboard()
        if self.dropped:
            logger.warning("%d rows of metrics were not written completely", self.dropped)
        self.enabled = False

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _append(self, row: dict[str, Any]) -> None:
        line = (json.dumps({tag: _encode(value) for tag, value in row.items()}, allow_nan=False) + "\n").encode()
        # Opened for each row: nothing is buffered in this process, and a folder that was removed is noticed.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):  # a full disk takes what fits
                os.ftruncate(descriptor, size)
                raise OSError(f"no space for {len(line)} bytes")
        finally:
            os.close(descriptor)

    def _open_tensorboard(self, *, purge_step: int | None) -> None:
        if self._tensorboard_dir is None:
            return
        with self._tolerate("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(self._tensorboard_dir), purge_step=purge_step, flush_secs=_TENSORBOARD_FLUSH_S
            )

    def _close_tensorboard(self) -> None:
        writer, self._tensorboard = self._tensorboard, None
        if writer is not None:
            with suppress(Exception):
                writer.close()

    @contextmanager
    def _tolerate(self, target: str) -> Iterator[None]:
        """Log the first failure of a target and go on; a TensorBoard writer that failed stays broken, so close it."""
        try:
            yield
        except Exception as error:
            if target not in self._warned:
                self._warned.add(target)
                logger.warning(
                    "%s in %s cannot be written (%s): training goes on, `dropped` counts the lost rows",
                    target,
                    self.path.parent,
                    error,
                )
            if target == "TensorBoard":
                self._close_tensorboard()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, one per step, in the order of the steps.

    Args:
        path: the file. A line that a kill left unfinished is skipped, with a warning.

    Returns:
        Dictionaries with "step" and the tags; where a step was logged twice, the later value counts. "resumed" is True
        in the row of a step that the run was continued from.
    """
    rows: dict[int, dict[str, Any]] = {}
    for _, row in _parse_lines(Path(path)):
        decoded = {tag: float(value) if value in _NOT_FINITE else value for tag, value in row.items()}
        rows.setdefault(row["step"], {}).update(decoded)
    return [rows[step] for step in sorted(rows)]


def _encode(value: float) -> float | str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _parse_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of the file with their objects."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["step"] = int(row["step"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s line %d is not a row of metrics (unfinished write?): skipped", path, number)
                continue
            yield line.rstrip(b"\n") + b"\n", row


def _keep_rows(path: Path, last_step: int) -> None:
    """Drop the rows after `last_step` (all rows when it is 0) and unfinished lines: written aside, then renamed."""
    lines: Iterable[bytes] = []
    if last_step:
        lines = (line for line, row in _parse_lines(path) if row["step"] <= last_step)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StepTimer:
    """Seconds per part of a step.

        with timer("forward_backward"):
            ...                                 # a part inside another one counts only for itself
        metrics.log(step, timer.take())         # perf/forward_backward_s, perf/step_s

    Args:
        synchronize: called before a part begins and ends, such as `torch.cuda.synchronize`. None: no waiting, so on a
            GPU a part has the time to launch its work, and only the step as a whole is exact once it reads a result.
        clock: seconds; tests replace it.
    """

    def __init__(
        self, *, synchronize: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ):
        self._synchronize, self._clock = synchronize or (lambda: None), clock
        self._running: list[str] = []
        self._restart()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the block as `part`: "data", "forward_backward", "optimizer", "checkpoint" or another name."""
        self._synchronize()
        self._credit()
        self._running.append(part)
        try:
            yield
        finally:
            self._synchronize()
            self._credit()
            self._running.pop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out of the step, with the parts inside it (validation reads data, too)."""
        self._synchronize()
        self._credit()
        kept, begin = self._seconds.copy(), self._mark
        try:
            yield
        finally:
            self._synchronize()
            self._credit()
            self._seconds = kept
            self._outside_s += self._mark - begin

    def take(self, num_steps: int = 1) -> dict[str, float]:
        """Mean seconds per step since the last call (or the construction), and start anew.

        Args:
            num_steps: steps since then.

        Returns:
            `perf/<part>_s` of each part, and `perf/step_s`: the wall time without checkpoints and pauses. Checkpoints
            are not divided by `num_steps`.
        """
        self._credit()
        seconds = dict(self._seconds)
        outside_s = self._outside_s + sum(seconds.get(part, 0.0) for part in _OUTSIDE_STEP)
        taken = {f"perf/{part}_s": s / (1 if part in _OUTSIDE_STEP else num_steps) for part, s in seconds.items()}
        taken["perf/step_s"] = (self._mark - self._start - outside_s) / num_steps
        self._restart()
        return taken

    def _restart(self) -> None:
        self._start = self._mark = self._clock()
        self._seconds: dict[str, float] = {}
        self._outside_s = 0.0

    def _credit(self) -> None:
        """Give the time since the last mark to the innermost running part."""
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] = self._seconds.get(self._running[-1], 0.0) + now - self._mark
        self._mark = now


class ProgressLine:
    """Progress on the terminal: a bar where stderr is one, else a line now and then, so that logs stay readable.

    Args:
        total: steps of the run.
        start: steps done before (a resumed run).
        enabled: False prints nothing (all ranks but the first).
        every: steps between lines where stderr is not a terminal; the last step always has one.
        stream: where to print; None: stderr.
    """

    def __init__(
        self, total: int, *, start: int = 0, enabled: bool = True, every: int = 10, stream: TextIO | None = None
    ):
        self.total, self.every, self.enabled = total, every, enabled
        self._stream = stream or sys.stderr
        self._start, self._began = start, time.monotonic()
        self._last_line = start
        self._bar = self._redirect = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", file=self._stream, dynamic_ncols=True, leave=True)
            # Log lines go above the bar instead of through it.
            self._redirect = logging_redirect_tqdm()
            self._redirect.__enter__()

    def update(
        self, step: int, *, loss: float | None = None, lr: float | None = None, tokens_per_s: float | None = None
    ) -> None:
        """Show the state after `step`; values that are None are left out."""
        if not self.enabled:
            return
        values = [
            f"{name} {value:{form}}"
            for name, value, form in (("loss", loss, ".4f"), ("lr", lr, ".2e"))
            if value is not None
        ]
        if tokens_per_s is not None and math.isfinite(tokens_per_s):
            values.append(f"{tqdm.format_sizeof(tokens_per_s)} tokens/s")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(values), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step - self._last_line >= self.every or step >= self.total:
            self._last_line = step
            eta_s = (self.total - step) * (time.monotonic() - self._began) / max(1, step - self._start)
            values.append(f"ETA {tqdm.format_interval(eta_s)}")
            print(f"step {step}/{self.total} ({step / self.total:.0%})  " + "  ".join(values), file=self._stream)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
            self._redirect.__exit__(None, None, None)
            self._bar = None
        self.enabled = False

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_) -> None:
        self.close()
