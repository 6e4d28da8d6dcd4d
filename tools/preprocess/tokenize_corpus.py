"""Text to token ids: files of documents to one dataset in Megatron's format, with a manifest of its origin.

python -m tools.preprocess.tokenize_corpus --input 'corpus/*.jsonl.zst' --tokenizer tokenizer --append-eod \
    --output-prefix data/train

Writes data/train.bin, data/train.idx, data/train.json (the manifest) and data/train.summary.json; they appear when they
are complete. Work in between is kept in data/train.work/: the same command after a kill goes on from there, and the
result is the same to the byte, whatever the number of workers. Ends with 1 for data that cannot be used, 2 for wrong
arguments.

Several machines: give each --num-shards N --shard-index I, as Slurm arrays and Kubernetes jobs number their tasks, then
merge data/train-*-of-*.idx; or --executor ray.
"""

import argparse
import hashlib
import math
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line("stopped: the same command goes on from here")

from tqdm import tqdm

from megatron_gdn.training.indexed import DatasetError, check_dataset
from tools.preprocess.encode import ENGINES, choose_engine, engine_version
from tools.preprocess.executors import Local, RayCluster, Results
from tools.preprocess.indexed import Output, contents, optimal_dtype, write_json
from tools.preprocess.libraries import open_tokenizer
from tools.preprocess.merge_datasets import concatenate_records
from tools.preprocess.readers import DamagedError, UnitReader
from tools.preprocess.shards import Specification, key_of
from tools.preprocess.sources import (
    FORMATS,
    ArgumentError,
    InputError,
    Source,
    Unit,
    count_lines_before,
    default_unit_bytes,
    find_sources,
    plan_units,
    units_of_shard,
)

_SAMPLE_CHARACTERS = 2**17
_LISTED_PROBLEMS = 1000


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=f"files, patterns or fsspec URLs: {FORMATS}; a .txt is one document")
    add("--output-prefix", required=True, help="path of the dataset without .bin")
    add(
        "--tokenizer", required=True, help="folder with tokenizer.json, tokenizer.model or tiktoken.json; tiktoken:NAME"
    )
    add("--text-key", nargs="+", default=["text"], help="keys of the text in JSON, columns in parquet; of several, "
        "each gives a dataset PREFIX_KEY")  # fmt: skip
    add("--tar-field", default="txt", help="extension of the texts in WebDataset shards; json: objects with --text-key")
    add("--append-eod", action="store_true", help="put the end-of-document token after every document")
    add("--eod-token", default=None, help="that token; default: the tokenizer's end of sequence, or <|endoftext|>")
    add("--special-in-text", choices=("error", "escape", "allow"), default="error", help="text with special tokens: a "
        "bad record, encoded as plain text, or kept as the token")  # fmt: skip
    add("--on-error", choices=("fail", "skip"), default="fail", help="what a bad record or file does; skip counts them")
    add("--max-document-mb", type=float, default=8.0, help="longer lines and texts are bad records")
    add("--engine", choices=ENGINES, default="auto", help="auto: gigatoken if it gives the same ids on a sample")
    add("--workers", type=int, default=_usable_cores(), help="cores that tokenize, all by default")
    add("--executor", choices=("local", "ray"), default="local", help="processes here, or tasks of a Ray cluster")
    add("--unit-mb", type=float, default=None, help="how large files are cut, a kill loses at most this per worker; "
        "default: a 64th of the input, 1 to 32")  # fmt: skip
    add("--num-shards", type=int, default=1, help="how many commands share the work")
    add("--shard-index", type=int, default=None, help="which of them this is, from 0")
    return parser.parse_args(argv)


def _usable_cores() -> int:
    """Cores that this process may use, which a job's allocation limits; all of them on macOS, which cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError for arguments that do not fit together; sets the shard of a run that has one."""
    if arguments.workers < 1:
        raise ArgumentError(f"--workers ({arguments.workers}) must be at least 1.")
    for name in ("unit_mb", "max_document_mb"):
        value = getattr(arguments, name)
        if value is not None and not 1e-6 <= value < math.inf:
            raise ArgumentError(f"--{name.replace('_', '-')} ({value}) must be a number of MB above 0.")
    if arguments.shard_index is None:
        if arguments.num_shards != 1:
            raise ArgumentError(
                f"--num-shards ({arguments.num_shards}) needs --shard-index, or every command would do the same part: "
                "give each its own, from 0."
            )
        arguments.shard_index = 0
    if not 0 <= arguments.shard_index < arguments.num_shards:
        raise ArgumentError(
            f"--shard-index ({arguments.shard_index}) must be at least 0 and below --num-shards "
            f"({arguments.num_shards})."
        )
    prefix = arguments.output_prefix
    if not prefix or prefix.endswith(os.sep) or Path(prefix).is_dir():
        raise ArgumentError(f"--output-prefix ({prefix}) must not be a folder: name the files, as in data/train.")
    if arguments.eod_token is not None and not arguments.append_eod:
        raise ArgumentError(f"--eod-token ({arguments.eod_token}) needs --append-eod: add it.")
    if len(set(arguments.text_key)) < len(arguments.text_key):
        raise ArgumentError(f"--text-key ({' '.join(arguments.text_key)}) must name every key once.")
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(Path(prefix).parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ArgumentError(f"--output-prefix ({prefix}) cannot be written: name a folder that you may write to.")


def tokenize(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the tool; the manifest of each dataset.

    Raises:
        ArgumentError: see `check_arguments`, `find_sources`, `open_tokenizer`, `choose_engine`.
        InputError: a bad record or file under --on-error fail, no document at all, another process at the same output.
    """
    check_arguments(arguments)
    sources = find_sources(arguments.input)
    unit_bytes = default_unit_bytes(sources) if arguments.unit_mb is None else int(arguments.unit_mb * 1e6)
    units = plan_units(sources, unit_bytes)
    mine = units_of_shard(units, arguments.num_shards, arguments.shard_index)
    if arguments.executor == "ray":
        return _tokenize_keys(units, mine, RayCluster(), arguments)
    with Local(arguments.workers, len(mine)) as executor:
        executor.start(arguments.engine if arguments.engine == "reference" else "gigatoken")
        return _tokenize_keys(units, mine, executor, arguments)


def _tokenize_keys(
    units: list[Unit], mine: list[Unit], executor: Local | RayCluster, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A dataset of this shard's units for each key; engines are chosen on all units, so alike in every shard."""
    tokenizer = open_tokenizer(arguments.tokenizer, allow_special=arguments.special_in_text == "allow")
    eod_id = None
    if arguments.append_eod:
        token = arguments.eod_token or tokenizer.end_of_document()
        eod_id = tokenizer.token_id(token)
        if eod_id is None:
            raise ArgumentError(f"--eod-token ({token}) must be a token of {arguments.tokenizer}: name one it has.")
    manifests = []
    for key in arguments.text_key:
        specification = Specification(
            tokenizer=arguments.tokenizer,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            engine=tokenizer.library if arguments.engine == "reference" else "gigatoken",
            text_key=key,
            tar_field=arguments.tar_field,
            eod_id=eod_id,
            special_in_text=arguments.special_in_text,
            max_document_bytes=int(arguments.max_document_mb * 1e6),
        )
        executor.prepare(specification)  # while it is found out here whether that engine can be used
        engine, reason = choose_engine(tokenizer, arguments.engine, _sample(units, key, arguments))
        print(f"engine: {engine_version(engine)} ({reason})")
        specification = replace(specification, engine=engine)
        prefix = arguments.output_prefix + (f"_{key}" if len(arguments.text_key) > 1 else "")
        if arguments.num_shards > 1:
            prefix += f"-{arguments.shard_index:05d}-of-{arguments.num_shards:05d}"
        manifests.append(make_dataset(mine, specification, prefix, executor, arguments))
    return manifests


def make_dataset(
    units: list[Unit],
    specification: Specification,
    prefix: str,
    executor: Local | RayCluster,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Tokenize units into one dataset, here or on a cluster; its manifest.

    Raises:
        InputError: see `tokenize`.
    """
    if not units:
        raise InputError(f"{prefix} has no part of the input: use fewer --num-shards, or a smaller --unit-mb.")
    fingerprint = hashlib.sha256("".join(key_of(unit, specification) for unit in units).encode()).hexdigest()
    if (done := _finished(prefix, fingerprint, arguments.on_error)) is not None:
        print(f"{prefix} is complete: nothing to do")
        return done
    if Path(f"{prefix}.idx").exists():
        print(f"{prefix} is broken, or of another input, tokenizer or option: replaced when this run is complete")
    work = Path(f"{prefix}.work")
    with Output(prefix) as output:
        work.mkdir(parents=True, exist_ok=True)
        run = _Run(units, arguments.on_error)
        records = run.collect(executor.run(units, specification, work))
        left_out = {units[i].source.path for i, record in enumerate(records) if record["damaged"]}
        used = [i for i, unit in enumerate(units) if unit.source.path not in left_out and records[i]["documents"]]
        if not used:
            raise InputError(f"{prefix} would have no documents: check --input and --text-key.")
        idx_sha256 = concatenate_records([(work / records[i]["key"], records[i]) for i in used], output)
        manifest = _manifest(units, records, used, left_out, specification, output, idx_sha256)
        manifest["fingerprint"] = fingerprint
        write_json(Path(f"{prefix}.summary.json"), run.summary(records, manifest, specification, arguments))
        output.commit(manifest)
    shutil.rmtree(work)
    print(f"{prefix}: {run.text_bytes / 1e6:.1f} MB of text in {run.seconds:.1f} s", end=": ")
    print(f"{run.text_bytes / 1e6 / run.seconds:.1f} MB/s, {run.tokens / run.seconds:.0f} tokens/s")
    return manifest


def _finished(prefix: str, fingerprint: str, on_error: str) -> dict[str, Any] | None:
    """The manifest of a dataset that was made from the same units in the same way."""
    try:
        manifest = check_dataset(prefix).manifest
    except DatasetError:
        return None
    same = manifest.get("fingerprint") == fingerprint and (on_error == "skip" or not manifest["skipped"])
    return manifest if same else None


class _Run:
    """Collects the records of the units, shows the progress, and applies the policy for what is bad."""

    def __init__(self, units: list[Unit], on_error: str):
        self.units, self.on_error = units, on_error
        self.seconds = 0.0
        self.resumed = self.tokens = self.text_bytes = 0
        self.rss_mb = 0.0

    def collect(self, results: Results) -> list[dict[str, Any]]:
        """Records in the order of the units.

        Args:
            results: position and record of each unit as they are done.

        Raises:
            InputError: something bad under --on-error fail, by file and line.
        """
        records: list[Any] = [None] * len(self.units)
        total, start = sum(unit.end - unit.start for unit in self.units), time.monotonic()
        quiet = not sys.stderr.isatty()
        with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=quiet) as bar:
            for i, record in results:
                records[i] = record
                self._judge(i, record, bar)
                self.rss_mb = max(self.rss_mb, record["rss_mb"])
                if record["resumed"]:
                    self.resumed += 1
                    if not quiet:  # so that the bar's rate is that of this run
                        bar.initial += self.units[i].end - self.units[i].start
                else:
                    self.tokens += record["tokens"]
                    self.text_bytes += record["text_bytes"]
                seconds = time.monotonic() - start
                rates = f"{self.tokens / seconds:.3g} tokens/s, {self.text_bytes / 1e6 / seconds:.1f} MB/s of text"
                bar.set_postfix_str(rates, refresh=False)
                bar.update(self.units[i].end - self.units[i].start)
        self.seconds = max(time.monotonic() - start, 1e-9)
        return records

    def _judge(self, i: int, record: dict[str, Any], bar) -> None:
        source = self.units[i].source
        if not record["damaged"] and not record["examples"]:
            return
        if record["damaged"]:
            worst = f"{source.path}{record['damaged']}: the file is cut or broken: fetch it again"
        else:
            before = 0
            if self.on_error == "fail" and source.kind == "jsonl" and record["examples"][0][1]:
                before = count_lines_before(self.units[i])
            _, number, message = record["examples"][0]
            worst = f"{source.place(number + before)}: {message}"
        if self.on_error == "fail":
            kept = "; what is done is kept for the next run" if len(self.units) > 1 else ""
            raise InputError(f"{worst} (--on-error skip leaves such records out and counts them{kept})")
        if record["damaged"]:
            bar.write(f"skipped the whole file: {worst}", file=sys.stderr)

    def problems(self, records: list[dict[str, Any]]) -> tuple[dict[str, int], list[str]]:
        """Counts by kind, and the places of the first ones, with lines numbered from the file's beginning."""
        counts, places, before = Counter(), [], {}
        for unit, record in zip(self.units, records, strict=True):
            source = unit.source
            if record["damaged"]:
                counts["damaged_file"] += 1
                places.append(f"{source.path}{record['damaged']}: cut or broken, all of it is left out")
                continue
            counts.update(record["problems"])
            if source.kind == "jsonl":
                if source.path not in before:
                    needed = unit.start and any(r["examples"] for r in records)
                    before[source.path] = count_lines_before(unit) if needed else 0
                offset = before[source.path]
                before[source.path] += record["records"]
            else:
                offset = 0
            if len(places) < _LISTED_PROBLEMS:
                places += [f"{source.place(n + offset if n else 0)}: {m}" for _, n, m in record["examples"]]
        return dict(sorted(counts.items())), places[:_LISTED_PROBLEMS]

    def summary(self, records, manifest, specification: Specification, arguments) -> dict[str, Any]:
        """What happened in this run."""
        counts, places = self.problems(records)
        return {
            "documents": manifest["documents"],
            "tokens": manifest["tokens"],
            "text_bytes": sum(record["text_bytes"] for record in records),
            "input_bytes": sum(unit.end - unit.start for unit in self.units),
            "engine": engine_version(specification.engine),
            "executor": arguments.executor,
            "workers": arguments.workers,
            "units": len(records),
            "units_resumed": self.resumed,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.tokens / self.seconds),
            "text_mb_per_s": round(self.text_bytes / 1e6 / self.seconds, 3),
            "peak_rss_mb_of_a_worker": round(self.rss_mb, 1),
            "skipped": counts,
            "skipped_places": places,
        }


def _manifest(units, records, used, left_out, specification: Specification, output: Output, idx_sha256: str):
    counts = Counter()
    for record in records:
        counts.update({"damaged_file": 1} if record["damaged"] else record["problems"])
    facts = contents(
        num_documents=sum(records[i]["documents"] for i in used),
        num_tokens=sum(records[i]["tokens"] for i in used),
        max_token_id=max(records[i]["max_token_id"] for i in used),
        dtype=optimal_dtype(specification.vocab_size),
        parts=[part for i in used for part in records[i]["files"]["bin"]["parts"]],
        idx_bytes=output.idx.stat().st_size,
        idx_sha256=idx_sha256,
    )
    ranges = defaultdict(list)
    for unit, record in zip(units, records, strict=True):
        ranges[unit.source].append((unit, record))
    return facts | {
        **{name: value for name, value in specification.describe().items() if name != "max_document_bytes"},
        "skipped": sum(counts.values()),
        "skipped_kinds": dict(sorted(counts.items())),
        "sources": [_describe_source(source, parts, source.path in left_out) for source, parts in ranges.items()],
    }


def _describe_source(source: Source, parts: list[tuple[Unit, dict[str, Any]]], left_out: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": source.name, "bytes": source.num_bytes}
    if left_out:
        return facts | {"left_out": "cut or broken"}
    if len(parts) == 1 and parts[0][0].end - parts[0][0].start == source.num_bytes:
        return facts | {"sha256": parts[0][1]["sha256"]}
    ranges = [{"start": unit.start, "end": unit.end, "sha256": record["sha256"]} for unit, record in parts]
    return facts | {"ranges": ranges}


def _sample(units: list[Unit], text_key: str, arguments: argparse.Namespace) -> list[str]:
    """Texts of the beginnings of a few units."""
    texts: list[str] = []
    chosen = units[:: max(1, len(units) // 4)][:4]
    for unit in chosen:
        reader = UnitReader(
            unit,
            text_key=text_key,
            tar_field=arguments.tar_field,
            max_document_bytes=int(arguments.max_document_mb * 1e6),
        )
        room = _SAMPLE_CHARACTERS // len(chosen)
        try:
            for batch in reader:
                for text in batch.texts:
                    texts.append(text[:room])
                    room -= len(text)
                    if room <= 0:
                        break
                if room <= 0:
                    break
        except DamagedError:
            continue  # reported when the unit is read as a whole
    return texts


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 1 for data that cannot be used, 2 for wrong arguments."""
    arguments = parse_arguments(argv)
    try:
        manifests = tokenize(arguments)
    except (ArgumentError, InputError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError | ImportError) else 1
    for manifest in manifests:
        skipped = f", {manifest['skipped']} skipped" if manifest["skipped"] else ""
        print(f"{manifest['documents']} documents, {manifest['tokens']} tokens, {manifest['dtype']}{skipped}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
