"""Text files to Megatron's indexed binaries.

python -m tools.preprocess.tokenize_corpus --input 'corpus/*.jsonl' --tokenizer tokenizer --output-prefix data/train \\
    --append-eod --workers 2 [--validation-prefix data/validation --validation-percent 2]

Each line of a JSON lines file is a document, and so is each text file as a whole. Writes data/train.bin, data/train.idx
and the manifest data/train.json: all of them, or none. The output is the same at every number of workers. Ends with 1
for data that cannot be used, 2 for wrong arguments.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.preprocess.encode import Encoded, Specification, encode, load_tokenizer, start_worker, vocabulary_size
from tools.preprocess.indexed import DatasetWriter, sha256_of
from tools.preprocess.readers import FORMATS, ArgumentError, InputError, Record, find_files, read_records

# Together they bound the memory that waiting records and results take: bytes of text per task, tasks per worker.
_TASK_BYTES = 2**18
_TASKS_AHEAD = 4


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=f"files or patterns: {FORMATS}; a text file is one document")
    add("--output-prefix", required=True, help="path of the dataset without .bin")
    add("--tokenizer", type=Path, required=True, help="folder with a Hugging Face tokenizer.json")
    add("--text-key", default="text", help="key of the text in JSON lines")
    add("--append-eod", action="store_true", help="put the end-of-document token after every document")
    add("--eod-token", default=None, help="that token; default: eos_token of tokenizer_config.json, or <|endoftext|>")
    add("--workers", type=int, default=os.cpu_count(), help="processes that tokenize")
    add("--on-error", choices=("fail", "skip"), default="fail", help="what a record without usable text does")
    add("--special-in-text", choices=("error", "escape", "allow"), default="error", help="special tokens in the text")
    add("--validation-prefix", default=None, help="second dataset, for the documents that validate")
    add("--validation-percent", type=float, default=0.0, help="share of the documents, chosen by their hash")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError for arguments that do not fit together."""
    if arguments.workers < 1:
        raise ArgumentError(f"--workers ({arguments.workers}) must be at least 1.")
    if not 0 <= arguments.validation_percent < 100:
        raise ArgumentError(f"--validation-percent ({arguments.validation_percent}) must be at least 0 and below 100.")
    if (arguments.validation_prefix is None) != (arguments.validation_percent == 0):
        raise ArgumentError("--validation-prefix and --validation-percent go together: give both or neither.")
    for name in ("output_prefix", "validation_prefix"):
        prefix = getattr(arguments, name)
        if prefix is not None and (not prefix or prefix.endswith(os.sep) or Path(prefix).is_dir()):
            option = "--" + name.replace("_", "-")
            raise ArgumentError(f"{option} ({prefix}) must not be a folder: name the files, as in data/train.")
    if arguments.validation_prefix == arguments.output_prefix:
        raise ArgumentError(f"--validation-prefix ({arguments.validation_prefix}) must differ from --output-prefix.")
    if arguments.eod_token is not None and not arguments.append_eod:
        raise ArgumentError(f"--eod-token ({arguments.eod_token}) needs --append-eod: add it.")


def eod_token_id(folder: Path, token: str | None) -> int:
    """Id of the end-of-document token.

    Args:
        folder: of the tokenizer.
        token: None takes `eos_token` of its configuration, or else <|endoftext|>.

    Raises:
        ArgumentError: the tokenizer has no such token.
    """
    settings = folder / "tokenizer_config.json"
    if token is None and settings.is_file():
        try:
            token = json.loads(settings.read_text()).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ArgumentError(f"{settings} is not a JSON object ({error}): save the tokenizer again.") from error
        token = token["content"] if isinstance(token, dict) else token
    token = token or "<|endoftext|>"
    token_id = load_tokenizer(folder).token_to_id(token)
    if token_id is None:
        raise ArgumentError(f"--eod-token ({token}) must be a token of {folder}: name one that it has.")
    return token_id


def encode_all(files: list[Path], specification: Specification, workers: int) -> Iterator[Encoded]:
    """Tokens of all records, in the order of the files, with a bounded number of tasks under way."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallel over processes, not over threads in each
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(specification,))
    with pool:
        pending = deque()
        try:
            for task in _tasks(record for path in files for record in read_records(path)):
                pending.append(pool.submit(encode, task))
                if len(pending) >= workers * _TASKS_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise InputError("a worker process was killed, perhaps for its memory: use fewer --workers.") from error
        finally:
            for future in pending:
                future.cancel()


def tokenize(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the tool; the manifests of the main dataset and, if asked for, of the one for validation.

    Raises:
        ArgumentError: see `check_arguments`, `find_files`, `load_tokenizer`.
        InputError: see `read_records`, `read_text`; nothing new is left under the output's names.
    """
    check_arguments(arguments)
    files = find_files(arguments.input)
    vocab_size = vocabulary_size(load_tokenizer(arguments.tokenizer))
    specification = Specification(
        tokenizer=str(arguments.tokenizer),
        text_key=arguments.text_key,
        eod_id=eod_token_id(arguments.tokenizer, arguments.eod_token) if arguments.append_eod else None,
        special_in_text=arguments.special_in_text,
        validation_percent=arguments.validation_percent,
    )
    prefixes = [arguments.output_prefix] + ([arguments.validation_prefix] if arguments.validation_prefix else [])
    with ExitStack() as stack:
        writers = [stack.enter_context(DatasetWriter(prefix, vocab_size)) for prefix in prefixes]
        skipped = _fill(writers, files, specification, arguments)
        for writer in writers:
            if writer.num_documents == 0:
                raise InputError(f"{writer.prefix} would have no documents: check --input and --validation-percent.")
        facts = {
            "vocab_size": vocab_size,
            "eod_id": specification.eod_id,
            "skipped": skipped,
            "text_key": specification.text_key,
            "special_in_text": specification.special_in_text,
            "validation_percent": specification.validation_percent,
            "tokenizer_sha256": sha256_of(arguments.tokenizer / "tokenizer.json"),
            "sources": [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files],
        }
        return [writer.finish(facts) for writer in writers]


def _tasks(records: Iterable[Record]) -> Iterator[list[Record]]:
    task, num_bytes = [], 0
    for record in records:
        task.append(record)
        num_bytes += len(record.data)
        if num_bytes >= _TASK_BYTES:
            yield task
            task, num_bytes = [], 0
    if task:
        yield task


def _fill(writers: list[DatasetWriter], files: list[Path], specification: Specification, arguments) -> int:
    """Write all documents; the number of records that were skipped."""
    skipped, num_bytes = 0, 0
    with tqdm(unit="token", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()) as progress:
        start = time.monotonic()
        for encoded in encode_all(files, specification, arguments.workers):
            for problem in encoded.problems:
                if arguments.on_error == "fail":
                    raise InputError(f"{problem} (--on-error skip leaves such records out and counts them)")
                progress.write(f"skipped: {problem}", file=sys.stderr)
            skipped += len(encoded.problems)
            for ids, in_validation in zip(encoded.ids, encoded.in_validation, strict=True):
                writers[in_validation].add(ids)
            num_bytes += encoded.num_bytes
            speed = num_bytes / 1e6 / (time.monotonic() - start)
            progress.set_postfix_str(f"{speed:.1f} MB/s", refresh=False)
            progress.update(sum(len(ids) for ids in encoded.ids))
        seconds = time.monotonic() - start
    num_tokens = sum(writer.num_tokens for writer in writers)
    print(f"{num_bytes / 1e6:.1f} MB of text in {seconds:.1f} s: {num_bytes / 1e6 / seconds:.1f} MB/s,", end=" ")
    print(f"{num_tokens / seconds:.0f} tokens/s" + (f"; skipped {skipped} records" if skipped else ""))
    return skipped


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 1 for data that cannot be used, 2 for wrong arguments."""
    arguments = parse_arguments(argv)
    try:
        manifests = tokenize(arguments)
    except (ArgumentError, InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    for prefix, manifest in zip((arguments.output_prefix, arguments.validation_prefix), manifests, strict=False):
        print(f"{prefix}: {manifest['documents']} documents, {manifest['tokens']} tokens, {manifest['dtype']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
