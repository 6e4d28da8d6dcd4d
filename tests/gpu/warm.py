"""Compile what the suite launches, several processes at a time; Triton keeps the results on disk.

    TRITON_INTERPRET=0 python -m tests.gpu.warm --processes 12

A process per shape and dtype runs the rule once, forward and backward. Without it the tests compile one kernel after
the other.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed


def compile_rule(shape: str, dtype: str) -> str:
    """Run the rule on a little of a shape of test_rule, in every way that specialises a kernel."""
    import torch

    from megatron_gdn.kernels import chunk_gated_delta_rule
    from tests.gpu.stage import Stage, results
    from tests.gpu.test_rule import DTYPES, SHAPES

    stage = Stage(device=torch.device("cuda"), backend="triton", rehearsal=False)
    options = dict(use_qk_l2norm_in_kernel=True, backend="triton")
    # Triton compiles anew for integers that 16 divides, and for 1.
    for T in (64, 65):
        results(chunk_gated_delta_rule, stage.rule_inputs(1, T, *SHAPES[shape], DTYPES[dtype], states=1), **options)
    return f"{shape}, {dtype}"


def compile_ssd(shape: str, dtype: str) -> str:
    """The same for a shape of test_ssd."""
    import torch

    from megatron_gdn.kernels import ssd
    from tests.gpu import test_ssd
    from tests.gpu.stage import Stage

    stage = Stage(device=torch.device("cuda"), backend="triton", rehearsal=False)
    for T in (64, 65):
        test_ssd.results(ssd, test_ssd.inputs(stage, shape, T, dtype), backend="triton")
    return f"ssd {shape}, {dtype}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    arguments = parser.parse_args()
    from tests.gpu import test_rule, test_ssd

    jobs = list(dict.fromkeys((compile_rule, shape, dtype) for shape, _, dtype in test_rule.GRID))
    jobs += dict.fromkeys((compile_ssd, shape, dtype) for shape, _, dtype in test_ssd.GRID)
    # The largest tiles take the longest: first, so that none is left alone at the end.
    jobs.sort(key=lambda job: ("256" not in job[1], "200" not in job[1], "192" not in job[1], job[1:]))
    start, failed = time.perf_counter(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as processes:
        waiting = {processes.submit(*job): job for job in jobs}
        for done in as_completed(waiting):
            error = done.exception()
            failed += error is not None
            outcome = "compiled" if error is None else f"FAILED: {error}"
            print(f"{time.perf_counter() - start:5.0f} s  {', '.join(waiting[done][1:])}: {outcome}", flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(jobs)} shapes did not compile or run: the tests say more.")


if __name__ == "__main__":
    main()
