"""Faults from outside: signals that ask a run to stop, and a second job in the same folder."""

import fcntl
import json
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Turns SIGTERM, SIGUSR1 (Slurm's --signal) and SIGINT into a request to stop after the step.

        with StopSignal() as stop:
            while not stop.requested():
                ...                             # one step

    A second SIGINT raises KeyboardInterrupt. The earlier handlers return at the end of the block. Python runs signal
    handlers in the main thread between two bytecodes, so a collective operation that waits delays them.
    """

    def __init__(self):
        self._number = 0
        self._interrupted = False
        self._previous: dict[signal.Signals, object] = {}

    @property
    def name(self) -> str | None:
        """Name of the signal, such as "SIGTERM"; None while there is none. The same on all ranks after `requested`."""
        return signal.Signals(self._number).name if self._number else None

    def requested(self, group: dist.ProcessGroup | None = None) -> bool:
        """Whether any rank was asked to stop; collective, so that all ranks stop after the same step.

        Args:
            group: ranks that agree; None: all. Without torch.distributed only this process counts.

        Returns:
            The same value on every rank. With NCCL this waits for the device, once per call.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self._number > 0
        on_gpu = "nccl" in dist.get_backend(group)
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        number = torch.tensor([self._number], dtype=torch.int32, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
        self._number = max(self._number, int(number.item()))
        return self._number > 0

    def __enter__(self) -> "StopSignal":
        for number in _STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            # None: a handler that C code installed, which Python cannot put back.
            if handler is not None:
                signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self._number = max(self._number, number)


class LockError(RuntimeError):
    """Another live job owns the folder."""


class OutputLock:
    """Refuses a second live job in one folder.

    The file `directory/.lock` names host, process and the start of both, and the job of the launcher. A lock whose
    process is dead is taken over. Of a process on another host that cannot be told: its lock is taken over by the same
    job, whose earlier start the launcher has ended, and refused by others.

    Args:
        directory: folder of the run; created when missing.
        enabled: False does nothing (all ranks but the first).
    """

    def __init__(self, directory: Path, *, enabled: bool = True):
        self.path = Path(directory) / ".lock"
        self._enabled = enabled
        self._owner: dict | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            LockError: a live job, or one on another host, has it.
        """
        if not self._enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        owner = {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "start": _start_of(os.getpid())}
        owner["job"] = _job_id()
        with _one_at_a_time(self.path.parent):
            self._remove_stale()
            try:
                file = self.path.open("x")
            except FileExistsError:
                raise LockError(self._refusal()) from None
            try:
                with file:
                    file.write(json.dumps(owner))
            except OSError:
                self.path.unlink()
                raise
        self._owner = owner

    def release(self) -> None:
        """Give the lock back; a lock that is no longer ours stays."""
        if self._owner is not None and _read_owner(self.path) == self._owner:
            self.path.unlink(missing_ok=True)
        self._owner = None

    def __enter__(self) -> "OutputLock":
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _remove_stale(self) -> None:
        owner = _read_owner(self.path)
        if owner is None:
            return
        if owner.get("host") != socket.gethostname():
            if not _job_id() or owner.get("job") != _job_id():
                return
        elif owner.get("boot") == _boot_id() and owner.get("start") == _start_of(owner.get("pid")):
            return
        logger.warning("%s belongs to process %s, which is dead: taking it over", self.path, owner.get("pid"))
        self.path.unlink(missing_ok=True)

    def _refusal(self) -> str:
        owner = _read_owner(self.path) or {}
        host, pid = owner.get("host", "an unknown host"), owner.get("pid", "unknown")
        remedy = "stop that job or choose another folder"
        if host != socket.gethostname():
            remedy = f"choose another folder, or delete {self.path} when you know that the job is dead"
        return f"{self.path.parent} is in use by process {pid} on {host}: {remedy}."


def _read_owner(path: Path) -> dict | None:
    try:
        owner = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _job_id() -> str:
    """Slurm's number of the job, which a requeue keeps, or torchrun's --rdzv-id; empty without a launcher."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is torchrun's default
    return os.environ.get("SLURM_JOB_ID", "" if run_id == "none" else run_id)


def _boot_id() -> str:
    """Changes when the machine restarts; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_of(pid: int | None) -> str | None:
    """When the process started, which tells it from a later one with its number; None when it is dead."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if not Path("/proc/self/stat").exists():
            return str(process.create_time())
        # In clock ticks since boot: unlike seconds, they do not move when the clock is set.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (psutil.Error, OSError, TypeError, ValueError):
        return None


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Two jobs of this host must not both remove a stale lock, or the second would remove the first one's new lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems cannot; a live lock is refused without it
        yield
    finally:
        os.close(descriptor)
