"""Time and memory of a command, from outside."""

import subprocess
import tempfile
import time
from pathlib import Path


def timed(command: list[str], **options) -> tuple[float, int, str]:
    """Run a command to its end.

    The size counts Python, libraries and mapped files. It is the kernel's own high-water mark, read until it
    ends; what getrusage says of a child would count its parent at the moment of the fork too.

    Args:
        command: program and arguments.
        options: of `subprocess.Popen`.

    Returns:
        Seconds, largest resident size in bytes, and what it printed.

    Raises:
        RuntimeError: it ended with another code than 0.
    """
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
        while process.poll() is None:
            peak = max(peak, _high_water(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{printed[-3000:]}")
    return seconds, peak, printed


def _high_water(pid: int) -> int:
    """In bytes; 0 for a process that has just ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
