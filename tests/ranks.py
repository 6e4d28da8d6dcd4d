"""A pool of processes that stay up and run test functions on every rank of a gloo world.

Importing Megatron-Core takes seconds, so a server that has imported it forks the ranks, and a pool is kept per world
size and serves many tests. A function given to `run` must be importable (module level) and finds its rank in
torch.distributed. Each call finds model-parallel groups of the asked sizes; they are made again where the sizes differ
from the call before, or where that failed.
"""

import atexit
import gc
import importlib
import os
import tempfile
import traceback
from collections.abc import Callable

from tests.training.runs import CONTEXT, let_signals_through


def _serve(rank: int, world_size: int, store: str, pipe) -> None:
    os.environ.update(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    let_signals_through()
    import torch

    torch.set_num_threads(1)
    import torch.distributed as dist

    from megatron_gdn.parallel import cpu

    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while (job := pipe.recv()) is not None:
        module, name, args, kwargs, groups, as_before = job
        try:
            torch.manual_seed(1234)
            if not as_before:
                parallel_state.destroy_model_parallel()
                dist.barrier()  # no rank is still reading from a group
                _destroy_groups()
                if groups is not None:
                    parallel_state.initialize_model_parallel(**groups)
            if groups is not None:
                tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
            result = getattr(importlib.import_module(module), name)(*args, **kwargs)
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def _destroy_groups() -> None:
    """Destroy every process group but the world's.

    Megatron only forgets its groups, and the threads of some hundreds of them keep a small machine busy.
    """
    import torch.distributed as dist

    gc.collect()  # a group that something refers to keeps its threads
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


class RankError(AssertionError):
    """A test function failed on a rank; the text holds every failing rank's traceback."""


class RankPool:
    """`world_size` processes joined by gloo.

    Args:
        world_size: number of ranks.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        handle, self._store = tempfile.mkstemp()
        os.close(handle)
        os.unlink(self._store)
        self._pipes, self._processes = [], []
        self._groups: dict | None = None  # as the last call left them
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            # Not a daemon: Megatron's checkpoint writer starts processes of its own.
            process = CONTEXT.Process(target=_serve, args=(rank, world_size, self._store, theirs), daemon=False)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, function: Callable, *args, groups: dict | None = None, timeout_s: float = 120.0, **kwargs) -> list:
        """Call `function(*args, **kwargs)` on every rank.

        Args:
            function: an importable function.
            groups: arguments of Megatron's `initialize_model_parallel`; None for no model-parallel groups.
            timeout_s: seconds to wait for each rank; afterwards the pool is killed.

        Returns:
            The results, in the order of the ranks.

        Raises:
            RankError: a rank raised or did not answer in time.
        """
        # All ranks or none make new groups, so a call that failed on one of them counts for all.
        as_before, self._groups = groups is not None and groups == self._groups, None
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args, kwargs, groups, as_before))
        results, errors, stuck = [], [], False
        for rank, pipe in enumerate(self._pipes):
            # After one failure the others may wait for a collective that never completes.
            if not pipe.poll(5.0 if errors else timeout_s):
                errors.append(f"rank {rank}: no answer")
                stuck = True
                continue
            ok, value = pipe.recv()
            (results if ok else errors).append(value if ok else f"rank {rank}:\n{value}")
        if stuck:
            self.kill()
        if errors:
            raise RankError("\n".join(errors))
        self._groups = groups
        return results

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def close(self) -> None:
        if not self.alive:
            return
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


_pools: dict[int, RankPool] = {}


def pool(world_size: int) -> RankPool:
    """The shared pool of that size, started on first use and again after a failure. Shut by `close_pools`."""
    if world_size not in _pools or not _pools[world_size].alive:
        _pools[world_size] = RankPool(world_size)
    return _pools[world_size]


def close_pools() -> None:
    """Stop every pool (at the end of the test session)."""
    while _pools:
        _pools.popitem()[1].close()


# Where the session's fixture does not come to it; before multiprocessing waits for its children.
atexit.register(close_pools)
