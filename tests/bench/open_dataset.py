"""How long training takes to open a dataset of many documents, and the memory that it needs:

    python -m tests.bench.open_dataset --documents 100M --save

The dataset is synthetic: a true index of documents of 750 tokens on average, over a .bin that is a hole of the file
system. Each stage runs in a process of its own: the check of the files, the first opening, which builds the sample
indices of one epoch at 4096 tokens, and a later opening, which finds them. Memory is the peak of the process above what
it has after its imports; mapped files count in it, as in `top`.
"""

import argparse
import datetime
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.bench.run import append, commit, machine

MEAN_TOKENS, SEQUENCE, VOCABULARY = 750, 4096, 32000
STAGES = ("check", "first_open", "later_open")


def write_dataset(prefix: Path, num_documents: int) -> int:
    """The index, the hole and the manifest; returns the number of tokens."""
    rng = np.random.default_rng(0)
    # Many short documents and few long ones, as in web text.
    lengths = np.maximum(2, rng.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, num_documents)).astype(np.int32)
    ends = lengths.cumsum(dtype=np.int64)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, num_documents, num_documents + 1))
        lengths.tofile(file)
        (2 * (ends - lengths)).tofile(file)
        np.arange(num_documents + 1, dtype=np.int64).tofile(file)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(ends[-1]))
    return int(ends[-1])


def run_stage(stage: str, prefix: str, cache: str, num_samples: int) -> dict:
    """One stage in this process: seconds, CPU seconds and peak memory, without what imports took."""
    from megatron_gdn.training.data import build_datasets
    from megatron_gdn.training.indexed import check_dataset

    def peak_mb() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    before, start, start_cpu = peak_mb(), time.perf_counter(), time.process_time()
    if stage == "check":
        check_dataset(prefix)
    else:
        build_datasets(
            train=[prefix],
            validation=[],
            split="1,0,0",
            cache_dir=Path(cache),
            sequence_length=SEQUENCE,
            num_train_samples=num_samples,
            num_validation_samples=0,
            seed=1,
            vocab_size=VOCABULARY,
            eod_id=0,
            documents="separate",
        )
    found = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - start_cpu)
    found["peak_MB"] = peak_mb() - before
    return {name: round(value, 3) for name, value in found.items()}


def measure(num_documents: int) -> dict:
    """An entry of results."""
    with tempfile.TemporaryDirectory() as folder:
        prefix, cache = Path(folder) / "text", Path(folder) / "cache"
        num_tokens = write_dataset(prefix, num_documents)
        num_samples = (num_tokens - 1) // SEQUENCE
        entry = dict(documents=num_documents, tokens=num_tokens, sequence_length=SEQUENCE, samples=num_samples)
        entry["index_MB"] = round(Path(f"{prefix}.idx").stat().st_size / 1e6, 1)
        for stage in STAGES:
            command = [sys.executable, "-m", "tests.bench.open_dataset", "--stage", stage, "--prefix", str(prefix)]
            command += ["--cache", str(cache), "--samples", str(num_samples)]
            found = subprocess.run(command, capture_output=True, text=True)
            if found.returncode:
                raise RuntimeError(found.stderr[-2000:])
            entry[stage] = json.loads(found.stdout.splitlines()[-1])
        entry["cache_MB"] = round(sum(path.stat().st_size for path in cache.rglob("*.npy")) / 1e6, 1)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", default="100M", help="such as 1M or 100M")
    parser.add_argument("--save", action="store_true", help="append to tests/bench/results/")
    for name in ("--stage", "--prefix", "--cache", "--samples"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, arguments.prefix, arguments.cache, int(arguments.samples))))
        return
    num_documents = int(float(arguments.documents.rstrip("M")) * 10 ** (6 * arguments.documents.endswith("M")))
    entry = measure(num_documents)
    print(json.dumps(entry, indent=1))
    if arguments.save:
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        append("open_dataset", [dict(date=date, commit=commit(), machine=machine(1)) | entry])


if __name__ == "__main__":
    main()
