"""Signals stop all ranks after the same step; a folder has one live job."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from megatron_gdn.training.faults import LockError, OutputLock, StopSignal
from tests.ranks import pool

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def stop_step_of_rank(signalled_rank: int, number: int, at_step: int) -> tuple[int, str]:
    """Steps until the stop when one rank alone gets the signal, and the name of the signal."""
    import torch.distributed as dist

    with StopSignal() as stop:
        for step in range(1, 20):
            if dist.get_rank() == signalled_rank and step == at_step:
                os.kill(os.getpid(), number)
            if stop.requested():
                return step, stop.name
    return 0, "none"


@pytest.mark.parametrize("signalled_rank, number", [(0, signal.SIGTERM), (1, signal.SIGUSR1), (1, signal.SIGINT)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(signalled_rank, number):
    results = pool(2).run(stop_step_of_rank, signalled_rank, number, at_step=7)
    assert results == [(7, number.name)] * 2


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noticed_and_the_handlers_return(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignal() as stop:
        assert not stop.requested() and stop.name is None
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.name == number.name
        assert stop.requested()  # it stays
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_only_a_second_interrupt_raises():
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested() and stop.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


STEPS = """
import sys, time
from megatron_gdn.training.faults import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    for step in range(1000):
        time.sleep(0.01)
        if stop.requested():
            break
print("saved after", stop.name, flush=True)
"""

LOCK = """
import sys, time
from megatron_gdn.training.faults import OutputLock
with OutputLock(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(60)
"""


def started(script: str, *arguments) -> subprocess.Popen:
    """A Python process that has printed "ready"."""
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_process_ends_in_order_after_sigterm():
    process = started(STEPS)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saved after SIGTERM\n"
    assert process.returncode == 0


def test_a_live_job_keeps_others_out_and_a_killed_one_does_not(tmp_path, caplog):
    process = started(LOCK, tmp_path)
    try:
        with pytest.raises(LockError, match=rf"in use by process {process.pid} on {socket.gethostname()}: stop that"):
            OutputLock(tmp_path).acquire()
    finally:
        process.kill()
        # Not yet reaped: a zombie counts as dead.
        deadline = time.monotonic() + 10
        while open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with OutputLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    process.communicate()
    assert f"belongs to process {process.pid}, which is dead" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, accepted",
    [
        ({}, False),  # this very process
        ({"start": "1"}, True),  # the number was given to a later process
        ({"boot": "another"}, True),  # the machine was restarted
        ({"pid": 2**22 + 1}, True),  # above the largest number of a process
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),  # nobody can tell from here
    ],
)
def test_which_locks_are_stale(tmp_path, change, accepted):
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    first.acquire()
    owner = first.path.read_text()
    other = json.dumps(json.loads(owner) | change)
    first.path.write_text(other)
    if accepted:
        second.acquire()
        assert second.path.read_text() == owner
    else:
        with pytest.raises(LockError, match="delete .*lock" if "host" in change else "stop that job"):
            second.acquire()
        assert first.path.read_text() == other


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_a_job_that_restarts_on_another_host_takes_its_own_lock_over(tmp_path, monkeypatch, variable):
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "17")
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    first.acquire()
    first.path.write_text(json.dumps(json.loads(first.path.read_text()) | {"host": "elsewhere"}))
    for other in ("18", "none"):  # torchrun says none where it was given no name
        monkeypatch.setenv(variable, other)
        with pytest.raises(LockError, match="on elsewhere"):
            second.acquire()
    monkeypatch.setenv(variable, "17")
    second.acquire()
    assert json.loads(second.path.read_text())["host"] == socket.gethostname()


def test_a_lock_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    def full_disk(_):
        raise OSError("no space")

    with monkeypatch.context() as context, pytest.raises(OSError, match="no space"):
        context.setattr(json, "dumps", full_disk)
        OutputLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_release_leaves_the_lock_of_another(tmp_path):
    with OutputLock(tmp_path) as lock:
        lock.path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert lock.path.exists()


def test_a_broken_lock_is_refused(tmp_path):
    (tmp_path / ".lock").write_text("")
    with pytest.raises(LockError, match="an unknown host"):
        OutputLock(tmp_path).acquire()
    OutputLock(tmp_path, enabled=False).acquire()  # other ranks do not look
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]


def winners(directory: str, rounds: int) -> list[int]:
    """How many of the ranks get a lock whose owner is dead, when all try at once."""
    import torch
    import torch.distributed as dist

    counts = []
    for _ in range(rounds):
        if dist.get_rank() == 0:
            with OutputLock(directory) as lock:
                dead = json.loads(lock.path.read_text()) | {"start": "1"}
            lock.path.write_text(json.dumps(dead))
        dist.barrier()
        won = torch.zeros(1)
        lock = OutputLock(directory)
        try:
            lock.acquire()
            won += 1
        except LockError:
            pass
        dist.all_reduce(won)
        lock.release()
        counts.append(int(won))
        dist.barrier()
    return counts


def test_one_of_two_jobs_takes_over_a_stale_lock(tmp_path):
    assert pool(2).run(winners, str(tmp_path), 300)[0] == [1] * 300
