"""Times on a GPU: CUDA events around each call, a cold L2 cache before it, implementations in turns.

On a CPU the same functions use the wall clock, so that the benchmarks' own logic can be tested.
"""

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Time:
    """Milliseconds of one call: median and quartiles over `rounds`."""

    median: float
    quartiles: tuple[float, float]
    rounds: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Time":
        ordered = sorted(milliseconds)
        quarter = len(ordered) // 4
        quartiles = (round(ordered[quarter], 5), round(ordered[-1 - quarter], 5))
        return cls(median=round(statistics.median(ordered), 5), quartiles=quartiles, rounds=len(ordered))


@dataclass
class Clock:
    """Measures functions on one device.

    device: of the functions.
    seconds: spent per comparison; each function is called at least 5 times and at most `most_rounds`.
    """

    device: torch.device
    seconds: float = 2.0
    most_rounds: int = 50
    _flushed: torch.Tensor | None = field(default=None, init=False)

    def __post_init__(self):
        if self.device.type == "cuda":  # five times the largest L2 of sm_80 to sm_100
            self._flushed = torch.empty(2**28, dtype=torch.int8, device=self.device)

    def once(self, function: Callable[[], object]) -> float:
        """Milliseconds of one call that finds its inputs in device memory, not in the cache."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        self._flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def compare(self, functions: dict[str, Callable[[], object]]) -> dict[str, Time]:
        """Times of functions that take turns, so that what changes with time (clocks, heat) is shared."""
        started = {}
        for name, function in functions.items():
            for _ in range(2):  # compilation, allocation
                function()
            started[name] = self.once(function)
        rounds = int(1e3 * self.seconds / max(1e-3, sum(started.values())))
        rounds = min(max(rounds, 5), self.most_rounds)
        taken = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                taken[name].append(self.once(function))
        return {name: Time.of(milliseconds) for name, milliseconds in taken.items()}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the device reaches here and now: GB/s of a copy (read and write), TFLOP/s of a large bf16 product."""

    gb_per_s: float
    tflop_per_s: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time for this work: the slower of moving and multiplying."""
        return max(num_bytes / (1e9 * self.gb_per_s), flops / (1e12 * self.tflop_per_s))


def measure_limits(clock: Clock) -> Limits:
    """Of the clock's device; tiny on a CPU."""
    size, n = (2**31, 8192) if clock.device.type == "cuda" else (2**20, 64)
    source = torch.zeros(size, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=clock.device, dtype=torch.bfloat16)
    product = torch.empty_like(a)
    times = clock.compare(dict(copy=lambda: target.copy_(source), multiply=lambda: torch.mm(a, a, out=product)))
    copied, multiplied = (1e-3 * times[name].median for name in ("copy", "multiply"))
    return Limits(gb_per_s=_rounded(2 * size / copied / 1e9), tflop_per_s=_rounded(2 * n**3 / multiplied / 1e12))


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def describe_device(device: torch.device) -> dict:
    """Name and versions, for the results."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "fla", "flash_qla", "flashinfer", "causal_conv1d", "mamba_ssm"):
        try:
            versions[package] = getattr(__import__(package), "__version__", "unknown")
        except Exception:  # a package that breaks on import is as good as none
            versions[package] = None
    if device.type != "cuda":
        return dict(device="cpu", versions=versions)
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        answer = []
    properties = torch.cuda.get_device_properties(device)
    return dict(
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_gib=round(properties.total_memory / 2**30, 1),
        driver_power_clock=answer[0] if answer else None,
        versions=versions,
    )
