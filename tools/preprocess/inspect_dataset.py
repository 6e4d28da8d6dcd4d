"""What an indexed dataset holds, and whether it is whole.

python -m tools.preprocess.inspect_dataset data/train [more prefixes] [--verify] [--tokenizer tokenizer --documents 3]

Sizes and headers are always checked. --verify reads everything: checksums against the manifest, the order of the index,
every token id against the vocabulary. Ends with 1 for a broken dataset, 2 for wrong arguments.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_gdn.training.indexed import DatasetError, IndexedFiles, check_dataset, open_indexed
from tools.preprocess.encode import load_tokenizer
from tools.preprocess.indexed import sha256_of
from tools.preprocess.readers import ArgumentError

_SHOWN_CHARACTERS = 400


def verify(files: IndexedFiles) -> list[str]:
    """Read a dataset whole.

    Returns:
        What was found good.

    Raises:
        DatasetError: a checksum that is not the manifest's, an index that does not tile .bin, an id outside the
            vocabulary.
    """
    prefix, manifest = files.prefix, files.manifest
    lengths, starts, documents = files.lengths(), files.starts(), files.documents()
    ends = np.cumsum(lengths, dtype=np.int64) * files.dtype.itemsize
    if lengths.min() < 0 or starts[0] != 0 or not np.array_equal(starts[1:], ends[:-1]):
        raise DatasetError(f"{prefix}.idx is broken: its sequences do not follow each other in .bin without gaps.")
    if documents[0] != 0 or documents[-1] != files.num_sequences or np.any(np.diff(documents) < 0):
        raise DatasetError(f"{prefix}.idx is broken: its documents do not cover its {files.num_sequences} sequences.")
    good = ["index"]
    if manifest:
        for suffix in ("bin", "idx"):
            found, recorded = sha256_of(Path(f"{prefix}.{suffix}")), manifest["files"][suffix]["sha256"]
            if found != recorded:
                raise DatasetError(
                    f"{prefix}.{suffix} has SHA-256 {found} and its manifest says {recorded}: build the dataset again "
                    "or copy it whole."
                )
        largest = files.scan_max_token_id()
        if largest >= manifest["vocab_size"]:
            raise DatasetError(f"{prefix} has token id {largest} and a vocabulary of {manifest['vocab_size']}.")
        good += ["SHA-256 of .bin and .idx", "token ids"]
    return good


def describe(files: IndexedFiles) -> str:
    """Counts of a dataset, and what its manifest adds."""
    per_document = files.num_tokens / max(files.num_documents, 1)
    facts = {
        "documents": f"{files.num_documents}",
        "tokens": f"{files.num_tokens}, {files.dtype.name}, {per_document:.1f} per document",
    }
    if files.manifest:
        manifest, names = files.manifest, [source["name"] for source in files.manifest["sources"]]
        facts |= {
            "vocabulary": f"{manifest['vocab_size']}, largest id {manifest['max_token_id']}",
            "end of document": f"{manifest['eod_id']}",
            "sources": ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
            "skipped": f"{manifest['skipped']} records",
            "tokenizer": f"SHA-256 {manifest['tokenizer_sha256']}",
        }
    else:
        facts["manifest"] = "none: checksums and vocabulary are unknown"
    return "\n".join([files.prefix, *(f"  {name:<16}{value}" for name, value in facts.items())])


def show_documents(files: IndexedFiles, tokenizer: Path, num_documents: int) -> Iterator[str]:
    """The first documents as text, special tokens included, long ones cut."""
    decoder = load_tokenizer(tokenizer)
    if files.manifest and sha256_of(tokenizer / "tokenizer.json") != files.manifest["tokenizer_sha256"]:
        raise ArgumentError(f"--tokenizer ({tokenizer}) is not the one that made {files.prefix}: give that one.")
    dataset, bounds = open_indexed(files.prefix), files.documents()
    for i in range(min(num_documents, files.num_documents)):
        ids = np.concatenate([dataset[j] for j in range(bounds[i], bounds[i + 1])])
        text = decoder.decode(ids.tolist(), skip_special_tokens=False)
        cut = f" ... {len(text)} characters" if len(text) > _SHOWN_CHARACTERS else ""
        yield f"--- document {i}, {len(ids)} tokens\n{text[:_SHOWN_CHARACTERS]}{cut}"


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 1 for a broken dataset, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path of a dataset without .bin")
    parser.add_argument("--verify", action="store_true", help="read everything: checksums, index, token ids")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; shows documents as text")
    parser.add_argument("--documents", type=int, default=3, help="how many documents to show")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of packages that only training can use
    try:
        for prefix in arguments.prefixes:
            files = check_dataset(prefix.removesuffix(".bin").removesuffix(".idx"))
            print(describe(files))
            checked = ["sizes", *(verify(files) if arguments.verify else [])]
            print(f"  {'checked':<16}{', '.join(checked)}")
            if arguments.tokenizer is not None:
                print(*show_documents(files, arguments.tokenizer, arguments.documents), sep="\n")
    except (ArgumentError, DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
