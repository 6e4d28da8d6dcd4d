"""Metrics survive kills, resumes and full disks: what is read back equals what was logged."""

import contextlib
import errno
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from tensorboard.summary.writer import event_file_writer, record_writer

from megatron_gdn.training import metrics
from megatron_gdn.training.metrics import MetricWriter, ProgressLine, StepTimer, read_metrics
from tests.ranks import pool


@pytest.fixture(autouse=True)
def _event_files_in_order(monkeypatch):
    """TensorBoard reads the files of one second in the order of this counter, as text: 10 would come before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", SimpleNamespace(get=itertools.count(100).__next__))


def scalars(directory, tag: str) -> list[tuple[int, float]]:
    """Points of a tag as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def loss_at(step: int) -> float:
    """A loss that float32 holds exactly, as TensorBoard stores it."""
    return 8.0 - step / 64


def log_steps(directory, steps, *, resume_step=None, **options) -> None:
    """Write a row for each step, with a validation in a row of its own every fifth."""
    with MetricWriter(directory, resume_step=resume_step, **options) as writer:
        for step in steps:
            writer.log(step, {"train/loss": loss_at(step), "progress/tokens": step * 4096})
            if step % 5 == 0:
                writer.log(step, {"validation/loss": loss_at(step) + 1})
    assert writer.dropped == 0


def test_rows_read_back_and_are_the_same_in_tensorboard(tmp_path):
    log_steps(tmp_path, range(1, 8))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    expected = [{"step": s, "train/loss": loss_at(s), "progress/tokens": s * 4096} for s in range(1, 8)]
    expected[4]["validation/loss"] = loss_at(5) + 1
    assert rows == expected
    assert scalars(tmp_path, "train/loss") == [(s, loss_at(s)) for s in range(1, 8)]
    assert scalars(tmp_path, "validation/loss") == [(5, loss_at(5) + 1)]


def test_values_that_are_not_finite_are_strict_json_and_come_back(tmp_path):
    values = {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": -math.inf, "perf/step_s": 0.1}
    with MetricWriter(tmp_path, resume_step=None) as writer:
        writer.log(3, values)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["train/loss"] == "NaN"
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert str(row) == str({"step": 3, **values})
    assert math.isnan(scalars(tmp_path, "train/loss")[0][1])


@pytest.mark.parametrize("resume_step", [9, 5, 12])  # between validations, at one, and the last step written
def test_a_resumed_run_has_the_curves_of_an_uninterrupted_one(tmp_path, resume_step):
    log_steps(tmp_path / "whole", range(1, 21))
    log_steps(tmp_path / "halves", range(1, 13))
    log_steps(tmp_path / "halves", range(resume_step + 1, 21), resume_step=resume_step)
    whole, halves = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves"))
    assert halves[resume_step - 1].pop("resumed") is True
    assert halves == whole
    for tag in ("train/loss", "validation/loss"):
        assert scalars(tmp_path / "halves", tag) == scalars(tmp_path / "whole", tag)


@pytest.mark.parametrize("resume_step", [None, 0])  # a new run, and one whose first checkpoint was never written
def test_a_run_that_starts_drops_earlier_rows(tmp_path, resume_step):
    log_steps(tmp_path, range(0, 13))
    log_steps(tmp_path, range(0, 4), resume_step=resume_step)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [0, 1, 2, 3]


def test_a_line_that_a_kill_left_unfinished_is_skipped_and_then_repaired(tmp_path, caplog):
    log_steps(tmp_path, range(1, 8), tensorboard=False)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 8, "train/lo')
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 8))
    assert "line 9 is not a row" in caplog.text  # 7 steps and a validation are whole
    log_steps(tmp_path, range(8, 10), resume_step=7, tensorboard=False)
    caplog.clear()
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 10))
    assert not caplog.text


KILLED = """
import os, signal, sys
from megatron_gdn.training.metrics import MetricWriter
writer = MetricWriter(sys.argv[1], resume_step=None)
for step in range(1, 8):
    writer.log(step, {f"train/{i}": 1.0 for i in range(20)} | {"train/loss": 8.0 - step / 64})
    if len(sys.argv) > 2:
        writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_no_row_and_no_flushed_event(tmp_path):
    expected = [(step, loss_at(step)) for step in range(1, 8)]
    for name, *flush in (("unflushed",), ("flushed", "flush")):
        process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name), *flush])
        assert process.returncode == -signal.SIGKILL
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [(row["step"], row["train/loss"]) for row in rows] == expected
    assert scalars(tmp_path / "flushed", "train/loss") == expected


def what_a_save_finds(folder):
    """Losses in TensorBoard's folder and files that are on the disk when a checkpoint begins to be written."""
    from megatron_gdn.training.loop import Trainer

    write, synced, found = record_writer.RecordWriter.write, [], []

    def slowly(self, data):
        time.sleep(0.02)
        write(self, data)

    def save(store, config):
        found.extend([scalars(folder, "train/loss"), list(synced)])

    trainer = SimpleNamespace(
        timer=contextlib.nullcontext,
        engine=SimpleNamespace(sync_parameters=lambda: None),
        state=SimpleNamespace(save=save),
        store=None,
        config=None,
    )
    with (
        mock.patch.object(record_writer.RecordWriter, "write", slowly),
        mock.patch.object(metrics, "_sync", lambda path: synced.append(path.name)),
        MetricWriter(folder, resume_step=None) as writer,
    ):
        for step in range(1, 6):
            writer.log(step, {"train/loss": loss_at(step)})
        synced.clear()
        Trainer._save(trainer, writer)
    return found


def test_a_checkpoint_never_knows_steps_that_the_metrics_lost(tmp_path):
    """TensorBoard's thread is behind, and what is written may be in the memory of a machine that stops."""
    [(shown, synced)] = pool(1).run(what_a_save_finds, tmp_path, groups=None)
    assert shown == [(step, loss_at(step)) for step in range(1, 6)]
    assert synced == ["metrics.jsonl"]


def test_the_repair_is_all_or_nothing(tmp_path, monkeypatch):
    log_steps(tmp_path, range(1, 8), tensorboard=False)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    writer = MetricWriter(tmp_path, resume_step=3, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    writer.close()


def fail_with(code: int):
    """A function that raises OSError(code), whatever it is given."""

    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_removed_folder_does_not_stop_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's thread prints the error it passes on
    run = tmp_path / "run"
    writer = MetricWriter(run, resume_step=None)
    writer.log(1, {"train/loss": 1.0})
    writer.flush()
    shutil.rmtree(run)
    for step in (2, 3, 4):
        writer.log(step, {"train/loss": 1.0})
    assert writer.dropped == 3
    writer.flush()  # opens TensorBoard's folder again, and the JSON lines with it
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 2  # one for each
    writer.log(5, {"train/loss": 5.0})
    writer.close()
    assert writer.dropped == 3
    assert read_metrics(run / "metrics.jsonl") == [{"step": 5, "train/loss": 5.0}]
    assert scalars(run, "train/loss") == [(5, 5.0)]


def test_a_full_disk_leaves_whole_lines_and_no_exception(tmp_path, monkeypatch, caplog):
    writer = MetricWriter(tmp_path, resume_step=None)
    writer.log(1, {"train/loss": 1.0})
    write = os.write
    with monkeypatch.context() as full:
        # What a full disk does: a part of the line fits, TensorBoard's thread gets an error.
        full.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:9]))
        full.setattr(writer._tensorboard, "add_scalar", fail_with(errno.ENOSPC))
        for step in (2, 3):
            writer.log(step, {"train/loss": 1.0})
        assert writer.dropped == 2
    writer.flush()
    writer.log(4, {"train/loss": 4.0})
    writer.close()
    caplog.clear()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]
    assert not caplog.text
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 4]


def test_an_error_in_tensorboards_thread_is_counted_and_never_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # as above
    writer = MetricWriter(tmp_path, resume_step=None)
    monkeypatch.setattr(record_writer.RecordWriter, "write", fail_with(errno.ENOSPC))
    for step in range(1, 41):
        writer.log(step, {"train/loss": 1.0})
    writer.flush()
    writer.close()
    assert writer.dropped >= 30  # its queue holds 10 events before the error comes to light
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 40


def test_other_ranks_write_nothing(tmp_path):
    log_steps(tmp_path / "run", range(1, 8), enabled=False)
    assert list(tmp_path.iterdir()) == []


def test_only_json_lines_without_tensorboard(tmp_path):
    log_steps(tmp_path, range(1, 8), tensorboard=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


class Clock:
    """Seconds that pass only when told."""

    now = 100.0

    def __call__(self):
        return self.now


def test_seconds_of_the_parts_of_steps():
    clock = Clock()
    timer = StepTimer(clock=clock)
    for _ in range(2):
        with timer("forward_backward"):
            clock.now += 3
            with timer("data"):
                clock.now += 1
            clock.now += 4
        with timer("optimizer"):
            clock.now += 2
        clock.now += 0.5
    with timer.paused():
        clock.now += 50
        with timer("data"):
            clock.now += 50
    with timer("checkpoint"):
        clock.now += 8
    # 10.5 s a step: 7 + 1 + 2 in parts and 0.5 in none; the pause and the checkpoint stay out
    assert timer.take(num_steps=2) == {
        "perf/forward_backward_s": 7,
        "perf/data_s": 1,
        "perf/optimizer_s": 2,
        "perf/checkpoint_s": 8,
        "perf/step_s": 10.5,
    }
    clock.now += 1
    assert timer.take() == {"perf/step_s": 1}


def test_the_timer_waits_for_the_device_only_when_asked():
    clock, pending = Clock(), [0.0]

    def synchronize():
        clock.now += pending[0]
        pending[0] = 0.0

    expected = {False: 1, True: 6}
    for wait, seconds in expected.items():
        timer = StepTimer(synchronize=synchronize if wait else None, clock=clock)
        with timer("optimizer"):
            clock.now += 1
            pending[0] = 5.0  # launched, not finished
        assert timer.take()["perf/optimizer_s"] == seconds


def test_a_part_that_raises_is_closed():
    clock = Clock()
    timer = StepTimer(clock=clock)
    with pytest.raises(ValueError, match="inside"), timer("data"):
        clock.now += 1
        raise ValueError("inside")
    clock.now += 1
    assert timer.take() == {"perf/data_s": 1, "perf/step_s": 2}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_lines_in_a_log_are_few_and_whole():
    stream = io.StringIO()
    with ProgressLine(25, start=2, every=10, stream=stream) as progress:
        for step in range(3, 26):
            progress.update(step, loss=2.5, lr=3e-4, tokens_per_s=12345.6)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["12/25", "22/25", "25/25"]
    assert re.fullmatch(r"step 12/25 \(48%\)  loss 2.5000  lr 3.00e-04  12.3k tokens/s  ETA \d\d:\d\d", lines[0])
    assert "\r" not in stream.getvalue()


def test_a_terminal_has_a_bar_and_log_lines_beside_it():
    stream, root = Terminal(), logging.getLogger()
    before = root.handlers.copy()
    with ProgressLine(25, start=2, stream=stream) as progress:
        progress.update(14, loss=math.nan)
        progress._bar.refresh()
    assert "14/25" in stream.getvalue() and "loss nan" in stream.getvalue() and "\r" in stream.getvalue()
    assert root.handlers == before


def test_other_ranks_print_nothing():
    stream = Terminal()
    with ProgressLine(5, enabled=False, stream=stream) as progress:
        progress.update(5, loss=1.0)
    assert stream.getvalue() == ""


def test_the_tags_of_the_documentation():
    tags = re.findall(r"^\| (\w+/\w+) \|", metrics.__doc__, flags=re.M)
    assert {"train/loss", "validation/perplexity", "progress/samples"} < set(tags) and len(tags) == len(set(tags))
    timer = StepTimer()
    for part in ("data", "forward_backward", "optimizer", "checkpoint"):
        with timer(part):
            pass
    assert set(timer.take()) <= set(tags)
