"""Megatron-LM's own pretrain_gpt.py on a CPU, over gloo, to see that `--spec megatron_gdn...` trains there:

    torchrun --nproc-per-node 2 -m tests.hybrid.megatron_lm_on_cpu CHECKOUT [arguments of pretrain_gpt.py]

Runs the script of a checkout (core_v0.16.1) unchanged. `megatron_gdn.parallel.cpu` answers `megatron.core` where it
asks for CUDA; here are the answers that `megatron.training` needs besides. Only for tests: nothing here makes a CPU a
place to train with Megatron-LM.
"""

import functools
import os
import runpy
import sys
import time
import types
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch

FIRST_STEP = "MEGATRON_GDN_TEST_FIRST_STEP"
"""Name of the variable with a file for the weights, tokens, labels and losses of the first step."""


class _Event:
    """`torch.cuda.Event`, timed by the clock."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        self.time = time.perf_counter()

    def elapsed_time(self, other: "_Event") -> float:
        return 1000 * (other.time - self.time)

    def synchronize(self):
        pass


def answer_calls_of_the_training() -> None:
    """One device without memory of its own."""
    cuda = torch.cuda
    cuda.device_count = lambda: 1
    cuda.set_device = cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *args: None
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.get_device_name = lambda *args: "cpu"
    properties = dict(name="cpu", total_memory=2**34, major=9, minor=0, multi_processor_count=1)
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(**properties)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args: 0)
    cuda.device_memory_used = lambda *args: 0
    cuda.memory_stats = lambda *args: defaultdict(int)
    cuda.Event = _Event
    for name, dtype in (("Float", torch.float32), ("Int", torch.int32), ("Long", torch.int64)):
        setattr(cuda, f"{name}Tensor", functools.partial(torch.tensor, dtype=dtype))


def keep_first_step(training: types.ModuleType, path: Path) -> None:
    """Write what goes into the model in the first step, and comes out."""
    train_step = training.train_step

    def kept(forward_step, data, model, *args, **kwargs):
        training.train_step = train_step
        from megatron.core.utils import unwrap_model

        from tests.training.test_engine import stored_weights

        (gpt,) = unwrap_model(model)
        seen = {"weights": stored_weights(gpt), "batches": []}

        def keep(_, inputs, named, losses):
            tokens, positions, mask = inputs
            assert mask is None
            seen["batches"].append((tokens, positions, named["labels"], losses.detach().clone()))

        handle = gpt.register_forward_hook(keep, with_kwargs=True)
        found = train_step(forward_step, data, model, *args, **kwargs)
        handle.remove()
        if torch.distributed.get_rank() == 0:
            torch.save(seen, path)
        return found

    training.train_step = kept


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(checkout))
    from megatron_gdn.parallel import cpu

    cpu.install()
    answer_calls_of_the_training()
    import megatron.legacy.fused_kernels
    import megatron.training.training as training

    megatron.legacy.fused_kernels.load = lambda args: None
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    if FIRST_STEP in os.environ:
        keep_first_step(training, Path(os.environ[FIRST_STEP]))
    sys.argv = ["pretrain_gpt.py", *sys.argv[2:]]
    runpy.run_path(str(checkout / "pretrain_gpt.py"), run_name="__main__")


if __name__ == "__main__":
    main()
