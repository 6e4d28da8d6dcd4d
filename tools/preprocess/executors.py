"""Who runs `tokenize_unit`: this process, a pool of processes, or tasks of a Ray cluster; the bytes are the same.

A tokenizer's own library is run on several threads of a process, which share its tables and its cache: faster than as
many processes with tables of their own (tools/preprocess/README.md).
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from megatron_gdn.optional import require
from tools.preprocess.shards import Specification, prepare, tokenize_unit
from tools.preprocess.sources import InputError, Unit

# What a worker imports anyway.
_IMPORTS = ["tools.preprocess.shards", "tools.preprocess.merge_datasets", "tqdm", "gigatoken", "orjson"]
# A cautious bound: threads hold Python's lock while ids become arrays. Two are measured.
_MAX_THREADS = 4
# Units under way per process, so that none waits and a failure stops soon.
_AHEAD = 2

Results = Iterator[tuple[int, dict[str, Any]]]


class Local:
    """Cores of this machine: this process, or a pool of processes that lives until another kind of engine is used.

    Args:
        workers: cores to use.
        num_units: of the input; there are no more processes than that.
    """

    def __init__(self, workers: int, num_units: int):
        self._workers, self._num_units = workers, num_units
        self._shape, self._pool = (1, 1), None

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *error) -> None:
        if self._pool:
            self._pool.__exit__(*error)
            self._pool = None

    def start(self, engine: str) -> None:
        """Start the processes for an engine, if there are to be several."""
        shape = divide_workers(self._workers, engine, self._num_units)
        if shape == self._shape:
            return
        self.__exit__(None, None, None)
        self._shape = shape
        if shape[0] > 1:
            self._pool = Pool(*shape).__enter__()

    def prepare(self, specification: Specification) -> None:
        """Let every process make ready for a specification that is likely to come."""
        self.start(specification.engine)
        if self._pool:
            self._pool.prepare(specification)

    def run(self, units: list[Unit], specification: Specification, folder: Path) -> Results:
        """Position and record of each unit as they are done.

        Raises:
            InputError: a process was killed.
        """
        self.start(specification.engine)
        if self._pool:
            return self._pool.run(units, specification, folder)
        return _run_here(units, specification, folder, threads=self._shape[1])


def divide_workers(workers: int, engine: str, num_units: int) -> tuple[int, int]:
    """Processes, and threads of each, for a number of cores and the engine of a specification."""
    if engine == "gigatoken":
        return min(workers, num_units), 1
    processes = -(-workers // _MAX_THREADS)
    return min(processes, num_units), -(-workers // processes)


def _run_here(units: list[Unit], specification: Specification, folder: Path, threads: int) -> Results:
    for i, unit in enumerate(units):
        yield i, tokenize_unit(unit, specification, folder, threads)


class Pool:
    """Processes of this machine; a context manager, whose end waits for what they do.

    A server forks them, which imports what they need while this process does something else. A fork of this process
    itself would have the locks of its threads.
    """

    def __init__(self, processes: int, threads: int):
        self._processes, self._threads = processes, threads
        self._interrupted, self._starting = threading.Event(), False

    def __enter__(self) -> "Pool":
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        _start_server()
        context = multiprocessing.get_context("forkserver")
        self._executor = ProcessPoolExecutor(self._processes, mp_context=context, initializer=_start_worker)
        return self

    def __exit__(self, *error) -> None:
        self._executor.shutdown(cancel_futures=True)
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def prepare(self, specification: Specification) -> None:
        """Let every process make ready for a specification that is likely to come."""
        for _ in range(self._processes):
            self._submit(prepare, specification)

    def run(self, units: list[Unit], specification: Specification, folder: Path) -> Results:
        """Position and record of each unit as they are done.

        Raises:
            InputError: a process was killed.
        """
        pending, waiting = {}, iter(enumerate(units))
        try:
            while True:
                while len(pending) < self._processes * _AHEAD and (following := next(waiting, None)):
                    i, unit = following
                    pending[self._submit(tokenize_unit, unit, specification, folder, self._threads)] = i
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool as error:
            if self._interrupted.is_set():  # Control-C reached the workers too, and was lost in a callback here
                raise KeyboardInterrupt from None
            raise InputError("a worker process was killed, perhaps for its memory: use fewer --workers.") from error

    def _submit(self, *task) -> Future:
        """Control-C waits meanwhile: a process that is started by half would say that its other half is gone."""
        self._starting = True
        try:
            return self._executor.submit(*task)
        finally:
            self._starting = False
            if self._interrupted.is_set():
                raise KeyboardInterrupt

    def _interrupt(self, *_) -> None:
        self._interrupted.set()
        if not self._starting:
            raise KeyboardInterrupt


def _start_server() -> None:
    resource_tracker.ensure_running()  # by itself the server starts it, and it would let Control-C through again
    # Control-C waits until a worker can end without a word; `_start_worker` lets it through.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        multiprocessing.set_forkserver_preload(_IMPORTS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RayCluster:
    """Ray tasks of one CPU each.

    The cluster is that of RAY_ADDRESS, or this machine. Its nodes must see the inputs and the output's folder under the
    same paths, and have this package.
    """

    def prepare(self, specification: Specification) -> None:
        """Nothing: a cluster's processes are there."""

    def run(self, units: list[Unit], specification: Specification, folder: Path) -> Results:
        """Position and record of each unit as they are done."""
        return _run_ray(units, specification, folder)


def _run_ray(units: list[Unit], specification: Specification, folder: Path) -> Results:
    ray = require("ray", extra="ray", purpose="--executor ray")
    started = not ray.is_initialized()
    if started:
        root = str(Path(__file__).parents[2])
        ray.init(logging_level="warning", runtime_env={"env_vars": {"PYTHONPATH": root}})
    try:
        task = ray.remote(num_cpus=1)(_tokenize_in)
        common = ray.put(specification)
        slots = max(1, int(ray.cluster_resources().get("CPU", 1))) * _AHEAD
        pending, waiting = {}, iter(enumerate(units))
        while True:
            while len(pending) < slots and (following := next(waiting, None)):
                i, unit = following
                pending[task.remote(os.getcwd(), unit, common, folder)] = i
            if not pending:
                return
            for done in ray.wait(list(pending))[0]:
                yield pending.pop(done), ray.get(done)
    finally:
        if started:
            ray.shutdown()


def _tokenize_in(cwd: str, unit: Unit, specification: Specification, folder: Path) -> dict[str, Any]:
    """`tokenize_unit` in the folder that relative paths are from."""
    os.chdir(cwd)
    return tokenize_unit(unit, specification, folder)


def _start_worker() -> None:
    """End with the process that started this one: a worker of a killed parent would wait for tasks for ever."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the main process says what happened
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
