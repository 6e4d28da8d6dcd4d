"""Several datasets to one: one after the other, or without repeated documents, or in a random order.

python -m tools.preprocess.merge_datasets data/train-*-of-00008.idx --output-prefix data/train [--deduplicate]
    [--shuffle-seed 1]

One after the other, the tokens are copied inside the kernel and nothing is read. --deduplicate keeps the first of the
documents with the same tokens; --shuffle-seed orders the documents of all datasets at random. Ends with 1 for data that
cannot be used, 2 for wrong arguments.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

import numpy as np

from megatron_gdn.training.indexed import DatasetError, IndexedFiles, check_dataset
from tools.preprocess.documents import document_hashes, first_of_each, write_documents
from tools.preprocess.indexed import IndexedWriter, Output, concatenate, contents
from tools.preprocess.sources import ArgumentError, InputError

# Equal in datasets that may be merged, or their ids would mean different things.
_MUST_AGREE = {
    "tokenizer_sha256": "were made with different tokenizers",
    "vocab_size": "have vocabularies of different sizes",
    "eod_id": "end their documents with different ids",
}


def concatenate_records(parts: list[tuple[Path, dict[str, Any]]], output: Output) -> str:
    """Write results of `tokenize_unit` one after the other.

    Args:
        parts: prefix and record of each.

    Returns:
        SHA-256 of the index.
    """
    files = [
        IndexedFiles(
            prefix=str(prefix),
            dtype=np.dtype(record["dtype"]),
            num_sequences=record["documents"],
            num_documents=record["documents"],
            num_tokens=record["tokens"],
            manifest=record,
        )
        for prefix, record in parts
    ]
    return concatenate(files, output.bin, output.idx)


def without_suffix(path: str) -> str:
    """Prefix of a dataset, from itself or from one of its files, as a shell's pattern gives them."""
    return path.removesuffix(".bin").removesuffix(".idx")


def open_datasets(prefixes: list[str]) -> list[IndexedFiles]:
    """Check that datasets are whole and belong together.

    Raises:
        DatasetError: a broken dataset, or datasets of different dtypes or tokenizers, or only some with a manifest.
    """
    datasets = [check_dataset(without_suffix(prefix)) for prefix in prefixes]
    first = datasets[0]
    for other in datasets[1:]:
        if other.dtype != first.dtype:
            raise DatasetError(
                f"{first.prefix} has {first.dtype} tokens and {other.prefix} has {other.dtype}: tokenize one again."
            )
        if bool(other.manifest) != bool(first.manifest):
            bare = other if first.manifest else first
            raise DatasetError(f"{bare.prefix} has no manifest and another has: tokenize it again, or remove theirs.")
        for name, what in _MUST_AGREE.items():
            if first.manifest.get(name) != other.manifest.get(name):
                raise DatasetError(
                    f"{first.prefix} and {other.prefix} {what} ({name} {first.manifest[name]} and "
                    f"{other.manifest[name]}): tokenize one of them again."
                )
    for files in datasets:
        if Path(f"{files.prefix}.idx").stat().st_size != 34 + 20 * files.num_sequences + 8 * (
            files.num_documents + 1 - files.num_sequences
        ):
            raise DatasetError(f"{files.prefix} is multimodal (it has a mode per sequence), and only text is merged.")
    return datasets


def merged_facts(datasets: list[IndexedFiles]) -> dict[str, Any]:
    """What the manifests say together of where their tokens are from; what they do not agree on is left out."""
    manifests = [files.manifest for files in datasets]
    first = manifests[0]
    described = ("format_version", "documents", "tokens", "max_token_id", "dtype", "files", "fingerprint")
    facts = {name: value for name, value in first.items() if all(m.get(name) == value for m in manifests)}
    facts = {name: value for name, value in facts.items() if name not in described}
    kinds: dict[str, int] = {}
    for manifest in manifests:
        for kind, count in manifest.get("skipped_kinds", {}).items():
            kinds[kind] = kinds.get(kind, 0) + count
    sources: list[dict[str, Any]] = []
    for source in [source for manifest in manifests for source in manifest["sources"]]:
        last = sources[-1] if sources else {}
        continues = (
            "ranges" in source and "ranges" in last and last["ranges"][-1]["end"] == source["ranges"][0]["start"]
        )
        if continues and (last["name"], last["bytes"]) == (source["name"], source["bytes"]):
            sources[-1] = last | {"ranges": last["ranges"] + source["ranges"]}
        else:
            sources.append(source)
    skipped = sum(manifest["skipped"] for manifest in manifests)
    return facts | {"skipped": skipped, "skipped_kinds": dict(sorted(kinds.items())), "sources": sources}


def merge(
    prefixes: list[str], output_prefix: str, *, deduplicate: bool = False, shuffle_seed: int | None = None
) -> dict[str, Any] | None:
    """Merge datasets into one; its manifest, or None if they have none.

    Raises:
        DatasetError: see `open_datasets`.
        InputError: another process writes the output.
    """
    datasets = open_datasets(prefixes)
    with Output(output_prefix) as output:
        if not deduplicate and shuffle_seed is None:
            idx_sha256 = concatenate(datasets, output.bin, output.idx)
            manifest = _concatenated(datasets, output, idx_sha256) if datasets[0].manifest else None
        else:
            order = np.arange(sum(files.num_documents for files in datasets))
            repeated = 0
            if deduplicate:
                order = first_of_each(document_hashes(datasets))
                repeated = sum(files.num_documents for files in datasets) - len(order)
                print(f"{repeated} documents are repeated and left out")
            if shuffle_seed is not None:
                np.random.default_rng(shuffle_seed).shuffle(order)
            writer = IndexedWriter(output.bin, output.idx, datasets[0].dtype)
            try:
                write_documents(datasets, order, writer)
                facts = writer.finish()
            finally:
                writer.close()
            manifest = None
            if datasets[0].manifest:
                manifest = facts | merged_facts(datasets)
                if deduplicate:
                    manifest["repeated_documents_left_out"] = repeated
                if shuffle_seed is not None:
                    manifest["shuffle_seed"] = shuffle_seed
        output.commit(manifest)
    return manifest


def _concatenated(datasets: list[IndexedFiles], output: Output, idx_sha256: str) -> dict[str, Any]:
    facts = contents(
        num_documents=sum(files.num_documents for files in datasets),
        num_tokens=sum(files.num_tokens for files in datasets),
        max_token_id=max(files.manifest["max_token_id"] for files in datasets),
        dtype=datasets[0].dtype,
        parts=[part for files in datasets for part in files.manifest["files"]["bin"]["parts"]],
        idx_bytes=output.idx.stat().st_size,
        idx_sha256=idx_sha256,
    )
    return facts | merged_facts(datasets)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 1 for data that cannot be used, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="paths of datasets, with or without .bin or .idx")
    parser.add_argument("--output-prefix", required=True, help="path of the merged dataset without .bin")
    parser.add_argument("--deduplicate", action="store_true", help="keep the first of documents with the same tokens")
    parser.add_argument("--shuffle-seed", type=int, default=None, help="put all documents into a random order")
    arguments = parser.parse_args(argv)
    try:
        if arguments.shuffle_seed is not None and arguments.shuffle_seed < 0:
            raise ArgumentError(f"--shuffle-seed ({arguments.shuffle_seed}) must be at least 0.")
        inputs = {Path(without_suffix(prefix)) for prefix in arguments.prefixes}
        if len(inputs) < len(arguments.prefixes):
            raise ArgumentError("a dataset is named twice: name every one once (of .bin and .idx only one).")
        if Path(arguments.output_prefix) in inputs:
            raise ArgumentError(f"--output-prefix ({arguments.output_prefix}) must not be one of the inputs.")
        merge(
            arguments.prefixes,
            arguments.output_prefix,
            deduplicate=arguments.deduplicate,
            shuffle_seed=arguments.shuffle_seed,
        )
        result = check_dataset(arguments.output_prefix)
    except (ArgumentError, DatasetError, InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    print(f"{arguments.output_prefix}: {result.num_documents} documents, {result.num_tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
