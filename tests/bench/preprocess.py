"""Benchmarks of the preprocessing, run from the root of the repository:

    python -m tests.bench.preprocess corpus --text FOLDER ... --output /data/corpus.jsonl
    python -m tests.bench.preprocess throughput --corpus /data/corpus.jsonl --megatron-lm DIR --megatron-main DIR \
        --datatrove PYTHON --save
    python -m tests.bench.preprocess equality | memory | merge | kills  --corpus /data/corpus.jsonl --save

`corpus` makes JSON lines of the text files of folders, such as unpacked documentation packages. The others take turns
in one call and append an entry to tests/bench/results/preprocess_<name>.json. CPU seconds count the whole tree of
processes, so they mean something on a machine with other work; wall seconds mean something only on a quiet one.
"""

import argparse
import contextlib
import ctypes
import datetime
import gzip
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.bench.preprocess_rivals import BARE_GIGATOKEN, BARE_TOKENIZERS, DATATROVE, MERGE, WITH_OVERRIDE

ROOT = Path(__file__).parents[2]
_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
RESULTS = Path(__file__).parent / "results"
TOKENIZE = [sys.executable, "-m", "tools.preprocess.tokenize_corpus", "--append-eod"]


def build_corpus(folders: list[Path], output: Path) -> None:
    """One document per text file of at least 200 characters, in a fixed random order, each text once."""
    seen, num_bytes = set(), 0
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    random.Random(0).shuffle(paths)
    with output.open("w") as file:
        for path in paths:
            if not path.name.endswith((".txt", ".md", ".rst", ".py", ".txt.gz", ".rst.gz", ".md.gz")):
                continue
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = data.decode("utf-8", "replace")
            # Text with special tokens is what the candidates treat differently.
            if len(text) >= 200 and text not in seen and "<|" not in text:
                seen.add(text)
                num_bytes += len(data)
                file.write(json.dumps({"source": path.name, "text": text}, ensure_ascii=False) + "\n")
    print(f"{output}: {len(seen)} documents, {num_bytes / 1e6:.1f} MB of text")


def environment() -> dict:
    """What a number depends on."""
    packages = ("tokenizers", "gigatoken", "orjson", "numpy", "megatron-core", "torch")
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit.stdout.strip(),
        "cpu": f"{model}, {os.cpu_count()} cores",
        "load_average_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def run(command: list[str], **environ: str) -> dict:
    """Run a command; its wall and CPU seconds, peak of a process in MB, and output. Raises on failure.

    The CPU seconds are of all its processes: of those that it does not wait for itself, this one becomes the parent.
    """
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall, usages = time.perf_counter() - start, [usage]
        process.returncode = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(ChildProcessError):
            while True:
                usages.append(os.wait4(-1, 0)[2])
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} ended with {process.returncode}:\n{text[-2000:]}")
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    rss = max(usage.ru_maxrss for usage in usages)
    return {"wall_s": wall, "cpu_s": cpu, "rss_mb": rss * 1024 / 1e6, "output": text}


def head_of(corpus: Path, megabytes: float, output: Path) -> Path:
    """The first lines of a corpus, so many MB."""
    remaining = megabytes * 1e6
    with corpus.open("rb") as source, output.open("wb") as target:
        for line in source:
            target.write(line)
            remaining -= len(line)
            if remaining <= 0:
                break
    return output


def train_tokenizer(corpus: Path, folder: Path) -> Path:
    """Byte-level BPE of 32,000 ids, from the first 20 MB."""
    if not (folder / "tokenizer.json").is_file():
        head_of(corpus, 20, folder.with_suffix(".jsonl"))
        command = [sys.executable, "-m", "tools.preprocess.train_tokenizer", "--vocab-size", "32000"]
        run([*command, "--input", str(folder.with_suffix(".jsonl")), "--output", str(folder)])
    return folder


def ours(source: Path, tokenizer: Path, prefix: Path, *options: str) -> list[str]:
    if source.parent.name == "one":  # two units, so that both workers start
        options = (*options, "--unit-mb", str((source.stat().st_size // 2 + 1) / 1e6))
    return [
        *TOKENIZE, "--input", str(source), "--tokenizer", str(tokenizer), "--output-prefix", str(prefix),
        "--workers", "2", *options,
    ]  # fmt: skip


def candidates(arguments) -> dict:
    """Name -> (MB of corpus, command of source, tokenizer, prefix, and environment)."""
    python = sys.executable
    found = {
        "ours, gigatoken": (arguments.fast_mb, ours, {}),
        "bare gigatoken encode_files": (
            arguments.fast_mb,
            lambda s, t, p: [python, "-c", BARE_GIGATOKEN, str(s), str(t)],
            {"RAYON_NUM_THREADS": "2"},
        ),
        "ours, tokenizers": (arguments.slow_mb, lambda *places: ours(*places, "--engine", "reference"), {}),
        "bare tokenizers encode_batch_fast": (
            arguments.slow_mb,
            lambda s, t, p: [python, "-c", BARE_TOKENIZERS, str(s), str(t)],
            {"RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"},
        ),
    }
    tokenizer_options = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    if arguments.megatron_lm:
        found["Megatron-LM 0.16.1 preprocess_data.py"] = (
            arguments.slow_mb,
            lambda s, t, p: [
                python, "-c", WITH_OVERRIDE, f"{arguments.megatron_lm}/tools/preprocess_data.py", "--input", str(s),
                "--output-prefix", str(p), *tokenizer_options, str(t), "--append-eod", "--workers", "2",
            ],
            {"PYTHONPATH": arguments.megatron_lm},
        )  # fmt: skip
    if arguments.megatron_main:
        found["Megatron-LM main preprocess_data_fast.py"] = (
            arguments.fast_mb,
            lambda s, t, p: [
                python, "-c", WITH_OVERRIDE, f"{arguments.megatron_main}/tools/preprocess_data_fast.py",
                "--input", str(s), "--output-prefix", str(p), *tokenizer_options, str(t),
                "--append-eod", "--use-gigatoken",
            ],
            {"PYTHONPATH": arguments.megatron_main, "RAYON_NUM_THREADS": "2"},
        )  # fmt: skip
    if arguments.datatrove:
        found["datatrove MegatronDocumentTokenizer"] = (
            arguments.slow_mb,
            lambda s, t, p: [arguments.datatrove, str(_script(p)), str(_halves(s)), str(t), str(p)],
            {},
        )
    return found


def _halves(source: Path) -> Path:
    """A folder with the lines in two files: datatrove's unit of work is the file."""
    folder, lines = source.parent / "halves", source.read_bytes().splitlines(keepends=True)
    folder.mkdir(exist_ok=True)
    for i in range(2):
        (folder / f"{i}.jsonl").write_bytes(b"".join(lines[i::2]))
    return folder


def _script(prefix: Path) -> Path:
    """datatrove's processes import the main module, so it must be a file."""
    path = prefix.with_name("with_datatrove.py")
    path.write_text(DATATROVE)
    return path


def throughput(arguments, folder: Path) -> dict:
    """Tokens per CPU second and per second of every candidate, in turns; start-up is that of an input of two lines."""
    tokenizer = train_tokenizer(arguments.corpus, arguments.tokenizer)
    plan, tokens = candidates(arguments), {}
    sources = {}
    for megabytes in (arguments.fast_mb, arguments.slow_mb):
        (folder / f"{megabytes:g}").mkdir(exist_ok=True)
        sources[megabytes] = head_of(arguments.corpus, megabytes, folder / f"{megabytes:g}/corpus.jsonl")
        run(ours(sources[megabytes], tokenizer, folder / f"count{megabytes:g}"))
        manifest = json.loads((folder / f"count{megabytes:g}.json").read_text())
        tokens[megabytes] = manifest["tokens"]
    (folder / "one").mkdir()
    one = folder / "one/corpus.jsonl"
    one.write_bytes(b'{"text": "one"}\n' * 2)
    times: dict = {name: [] for name in plan}
    for repeat in range(arguments.repeats):
        for name, (megabytes, command, environ) in plan.items():
            measured = []
            for kind, source in (("one", one), ("all", sources[megabytes])):
                prefix = folder / f"out-{kind}-{repeat}-{abs(hash(name))}"
                measured.append(run(command(source, tokenizer, prefix), **environ))
            times[name].append(measured)
            start, whole = (m["cpu_s"] for m in measured)
            print(f"{name}: {whole:.1f} CPU s, {start:.1f} of them to start", flush=True)
    rows = {name: _rates(times[name], tokens[megabytes], megabytes) for name, (megabytes, _, _) in plan.items()}
    return {"tokens": {f"{m:g} MB": n for m, n in tokens.items()}, "candidates": rows} | _ratios(rows)


def _rates(times: list, tokens: int, megabytes: float) -> dict:
    median = statistics.median
    start_cpu, start_wall = median(t[0]["cpu_s"] for t in times), median(t[0]["wall_s"] for t in times)
    cpu, wall = median(t[1]["cpu_s"] for t in times), median(t[1]["wall_s"] for t in times)
    return {
        "corpus_mb": megabytes,
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "start_cpu_s": round(start_cpu, 2),
        "start_wall_s": round(start_wall, 2),
        "mtokens_per_cpu_s_after_start": round(tokens / 1e6 / max(cpu - start_cpu, 1e-3), 3),
        "mtokens_per_wall_s_after_start": round(tokens / 1e6 / max(wall - start_wall, 1e-3), 3),
        "mtokens_per_cpu_s": round(tokens / 1e6 / cpu, 3),
        "mtokens_per_wall_s": round(tokens / 1e6 / wall, 3),
        "peak_rss_mb": round(max(t[1]["rss_mb"] for t in times)),
    }


def _ratios(rows: dict) -> dict:
    pairs = {
        "ours / preprocess_data.py (target 50)": ("ours, gigatoken", "Megatron-LM 0.16.1 preprocess_data.py"),
        "ours / preprocess_data_fast.py (target 1.5)": ("ours, gigatoken", "Megatron-LM main preprocess_data_fast.py"),
        "ours / bare gigatoken (target 0.5)": ("ours, gigatoken", "bare gigatoken encode_files"),
        "ours on tokenizers / encode_batch_fast (target 0.85)": (
            "ours, tokenizers",
            "bare tokenizers encode_batch_fast",
        ),
        "ours / datatrove": ("ours, gigatoken", "datatrove MegatronDocumentTokenizer"),
    }
    ratios = {}
    for name, (a, b) in pairs.items():
        if a in rows and b in rows:
            kinds = [kind for kind in rows[a] if kind.startswith("mtokens")]
            ratios[name] = {kind.removeprefix("mtokens_"): round(rows[a][kind] / rows[b][kind], 2) for kind in kinds}
    return {"ratios": ratios}


def equality(arguments, folder: Path) -> dict:
    """Bytes of ours against Megatron's builder fed by the plain tokenizer, and IndexedDataset against the tokenizer."""
    import warnings

    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from tokenizers import Tokenizer

    import megatron_gdn  # noqa: F401 - hides broken optional packages from Megatron-Core

    tokenizer = train_tokenizer(arguments.corpus, arguments.tokenizer)
    source = head_of(arguments.corpus, arguments.equality_mb, folder / "corpus.jsonl")
    run(ours(source, tokenizer, folder / "ours", "--unit-mb", "4"))
    plain = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=DType.optimal_dtype(plain.get_vocab_size()))
    end, text_bytes, documents = plain.token_to_id("<|endoftext|>"), 0, 0
    read = IndexedDataset(str(folder / "ours"))
    for line in source.open("rb"):
        text = json.loads(line)["text"]
        ids = [*plain.encode(text, add_special_tokens=False).ids, end]
        builder.add_document(np.array(ids), [len(ids)])
        if read[documents].tolist() != ids:
            raise RuntimeError(f"document {documents} differs")
        text_bytes += len(text.encode())
        documents += 1
    builder.finalize(str(folder / "theirs.idx"))
    for suffix in ("bin", "idx"):
        if (folder / f"ours.{suffix}").read_bytes() != (folder / f"theirs.{suffix}").read_bytes():
            raise RuntimeError(f".{suffix} differs")
    manifest = json.loads((folder / "ours.json").read_text())
    return {
        "text_mb": round(text_bytes / 1e6, 2),
        "documents": documents,
        "tokens": manifest["tokens"],
        "engine": manifest["engine"],
        "equal_to_megatron_builder_of_tokenizers_ids": True,
        "read_back_by_IndexedDataset": documents == len(read),
    }


def memory(arguments, folder: Path) -> dict:
    """Peak memory of a worker and of the main process for 100 MB and 1 GB, as one file, plain and compressed."""
    tokenizer = train_tokenizer(arguments.corpus, arguments.tokenizer)
    peaks = {}
    for megabytes in (100, 1000):
        source = folder / f"{megabytes}.jsonl"
        with source.open("wb") as file:
            while file.tell() < megabytes * 1e6:
                with arguments.corpus.open("rb") as corpus:
                    while file.tell() < megabytes * 1e6 and (block := corpus.readline()):
                        file.write(block)
        for compressed in (False, True):
            if compressed:
                subprocess.run(["gzip", "-1", str(source)], check=True)
                source = source.with_name(source.name + ".gz")
            measured = run(ours(source, tokenizer, folder / "out"))
            summary = json.loads((folder / "out.summary.json").read_text())
            name = f"{megabytes} MB{', one gz file' if compressed else ''}"
            peaks[name] = {
                "worker_mb": summary["peak_rss_mb_of_a_worker"],
                "largest_process_mb": round(measured["rss_mb"], 1),
                "text_mb": round(summary["text_bytes"] / 1e6),
                "cpu_s": round(measured["cpu_s"], 1),
            }
            print(name, peaks[name], flush=True)
        source.unlink()
    return {"peaks": peaks}


def merge(arguments, folder: Path) -> dict:
    """CPU seconds to merge 5 million short documents in 10 datasets: ours against Megatron's add_index and finalize."""
    from tools.preprocess.indexed import IndexedWriter

    prefixes = [str(folder / f"part{i}") for i in range(10)]
    generator = np.random.default_rng(0)
    for prefix in prefixes:
        writer = IndexedWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), np.uint16)
        lengths = generator.integers(1, 40, 500_000)
        writer.add(generator.integers(0, 32000, lengths.sum(), dtype=np.uint16), lengths)
        writer.finish()
    measured: dict = {name: [] for name in MERGE}
    for _ in range(arguments.repeats):
        for name, program in MERGE.items():
            start = run([sys.executable, "-c", program])
            whole = run([sys.executable, "-c", program, str(folder / name[:4]), *prefixes])
            measured[name].append((whole["cpu_s"] - start["cpu_s"], whole["rss_mb"] - start["rss_mb"]))
    for suffix in ("bin", "idx"):
        if (folder / f"ours.{suffix}").read_bytes() != (folder / f"Mega.{suffix}").read_bytes():
            raise RuntimeError(f"the merged .{suffix} differs")
    rows = {
        name: {
            "cpu_s_after_start": round(statistics.median(cpu for cpu, _ in pairs), 3),
            "rss_mb_after_start": round(statistics.median(rss for _, rss in pairs)),
        }
        for name, pairs in measured.items()
    }
    ratio = rows["Megatron's builder"]["cpu_s_after_start"] / rows["ours"]["cpu_s_after_start"]
    return {"documents": 5_000_000, "equal_bytes": True, "rows": rows, "times_faster (target 10)": round(ratio, 1)}


def kills(arguments, folder: Path) -> dict:
    """20 times SIGKILL to the main process at random moments, and the result against that of a whole run."""
    tokenizer = train_tokenizer(arguments.corpus, arguments.tokenizer)
    source = head_of(arguments.corpus, arguments.slow_mb, folder / "corpus.jsonl")
    options = ("--unit-mb", "0.2", "--engine", "reference")
    run(ours(source, tokenizer, folder / "whole", *options))
    generator, done, finished = random.Random(0), 0, 0
    while done < 20:
        command = ours(source, tokenizer, folder / "killed", *options)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=generator.uniform(0.5, arguments.kill_after_s))
            finished += 1  # earlier than the kill: again from nothing
            for path in folder.glob("killed.*"):
                path.unlink()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            if (folder / "killed.idx").exists() and not (folder / "killed.bin").exists():
                raise RuntimeError("an index without tokens") from None
    run(ours(source, tokenizer, folder / "killed", *options))
    for suffix in ("bin", "idx", "json"):
        if (folder / f"killed.{suffix}").read_bytes() != (folder / f"whole.{suffix}").read_bytes():
            raise RuntimeError(f".{suffix} differs after {done} kills")
    summary = json.loads((folder / "killed.summary.json").read_text())
    return {
        "kills": done,
        "runs_that_finished_before_their_kill": finished,
        "units": summary["units"],
        "units_resumed_by_the_last_run": summary["units_resumed"],
        "equal_bytes": True,
    }


BENCHMARKS = {f.__name__: f for f in (throughput, equality, memory, merge, kills)}


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["corpus", *BENCHMARKS])
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="corpus: folders of text files")
    parser.add_argument("--output", type=Path, help="corpus: the file to write")
    parser.add_argument("--corpus", type=Path, help="JSON lines")
    parser.add_argument("--tokenizer", type=Path, default=Path(tempfile.gettempdir()) / "bench_tokenizer")
    parser.add_argument("--megatron-lm", help="a checkout of Megatron-LM, core_v0.16.1")
    parser.add_argument("--megatron-main", help="a checkout of Megatron-LM, main, with preprocess_data_fast.py")
    parser.add_argument("--datatrove", help="python of an environment with datatrove[processing]")
    parser.add_argument("--fast-mb", type=float, default=100, help="corpus of the fast candidates")
    parser.add_argument("--slow-mb", type=float, default=5, help="corpus of the slow ones")
    parser.add_argument("--equality-mb", type=float, default=24)
    parser.add_argument("--kill-after-s", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="append to tests/bench/results/")
    parser.add_argument("--note", help="what the numbers hold for, in the entry")
    arguments = parser.parse_args()
    if arguments.name == "corpus":
        build_corpus(arguments.text, arguments.output)
        return 0
    before = environment() | ({"note": arguments.note} if arguments.note else {})
    with tempfile.TemporaryDirectory() as folder:
        entry = before | BENCHMARKS[arguments.name](arguments, Path(folder))
    entry["load_average_after"] = round(os.getloadavg()[0], 1)
    print(json.dumps(entry, indent=1))
    if arguments.save:
        path = RESULTS / f"preprocess_{arguments.name}.json"
        entries = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*entries, entry], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
