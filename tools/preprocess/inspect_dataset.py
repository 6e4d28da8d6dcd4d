"""What an indexed dataset holds, and whether it is whole.

python -m tools.preprocess.inspect_dataset data/train [more prefixes] [--verify] [--tokenizer tokenizer --documents 3]
    [--histogram lengths.png]

Sizes and headers are always checked. --verify reads everything: checksums against the manifest, the order of the index,
every token id against the vocabulary. Ends with 1 for a broken dataset, 2 for wrong arguments.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

import numpy as np

from megatron_gdn.training.indexed import DatasetError, IndexedFiles, check_dataset
from tools.preprocess.indexed import blocks_of, sha256_of
from tools.preprocess.libraries import open_tokenizer
from tools.preprocess.merge_datasets import without_suffix
from tools.preprocess.sources import ArgumentError

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
    end = 0
    for lengths, starts in zip(blocks_of(files.lengths()), blocks_of(files.starts()), strict=True):
        ends = end + np.cumsum(lengths, dtype=np.int64) * files.dtype.itemsize
        if lengths.min() < 0 or starts[0] != end or not np.array_equal(starts[1:], ends[:-1]):
            raise DatasetError(f"{prefix}.idx is broken: its sequences do not follow each other in .bin without gaps.")
        end = int(ends[-1])
    documents = files.documents()
    ordered = all(np.all(np.diff(block) >= 0) for block in blocks_of(documents))
    if documents[0] != 0 or documents[-1] != files.num_sequences or not ordered:
        raise DatasetError(f"{prefix}.idx is broken: its documents do not cover its {files.num_sequences} sequences.")
    good = ["index"]
    if manifest:
        _verify_checksums(files)
        largest = files.scan_max_token_id()
        if largest >= manifest["vocab_size"]:
            raise DatasetError(f"{prefix} has token id {largest} and a vocabulary of {manifest['vocab_size']}.")
        good += ["SHA-256 of .bin and .idx", "token ids"]
    return good


def _verify_checksums(files: IndexedFiles) -> None:
    try:
        recorded = files.manifest["files"]
        parts = [("bin", num_bytes, sha256) for num_bytes, sha256 in recorded["bin"]["parts"]]
        parts.append(("idx", recorded["idx"]["bytes"], recorded["idx"]["sha256"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{files.prefix}.json has no checksums that this version reads: build it again.") from error
    start = 0
    for suffix, num_bytes, sha256 in parts:
        start = 0 if suffix == "idx" else start
        found = sha256_of(Path(f"{files.prefix}.{suffix}"), start, num_bytes)
        if found != sha256:
            raise DatasetError(
                f"{files.prefix}.{suffix} has SHA-256 {found} in bytes {start} to {start + num_bytes} and its manifest "
                f"says {sha256}: build the dataset again or copy it whole."
            )
        start += num_bytes
    covered = sum(num_bytes for suffix, num_bytes, _ in parts if suffix == "bin")
    if covered != recorded["bin"]["bytes"]:
        raise DatasetError(f"{files.prefix}.json has checksums of {covered} bytes of {recorded['bin']['bytes']}.")


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
            "skipped": f"{manifest['skipped']} records"
            + "".join(f", {n} {kind}" for kind, n in manifest.get("skipped_kinds", {}).items()),
            "tokenizer": f"SHA-256 {manifest['tokenizer_sha256']}",
        }
    else:
        facts["manifest"] = "none: checksums and vocabulary are unknown"
    return "\n".join([files.prefix, *(f"  {name:<16}{value}" for name, value in facts.items())])


def show_documents(files: IndexedFiles, tokenizer: str, num_documents: int) -> Iterator[str]:
    """The first documents as text, special tokens included, long ones cut."""
    decoder = open_tokenizer(tokenizer)
    if files.manifest and decoder.sha256 != files.manifest["tokenizer_sha256"]:
        raise ArgumentError(f"--tokenizer ({tokenizer}) is not the one that made {files.prefix}: give that one.")
    tokens, starts, bounds = files.tokens(), files.starts() // files.dtype.itemsize, files.documents()
    for i in range(min(num_documents, files.num_documents)):
        last = starts[bounds[i + 1]] if bounds[i + 1] < files.num_sequences else files.num_tokens
        ids = tokens[starts[bounds[i]] : last]
        text = decoder.decode(ids.tolist())
        cut = f" ... {len(text)} characters" if len(text) > _SHOWN_CHARACTERS else ""
        yield f"--- document {i}, {len(ids)} tokens\n{text[:_SHOWN_CHARACTERS]}{cut}"


def length_counts(files: IndexedFiles) -> tuple[np.ndarray, np.ndarray]:
    """Documents by length: edges [bins + 1], powers of two from 1, and documents in each bin, [bins] int64."""
    edges = 2 ** np.arange(33, dtype=np.int64)
    counts = np.zeros(len(edges) - 1, np.int64)
    for begin in range(0, files.num_documents, 2**20):
        bounds = files.documents()[begin : begin + 2**20 + 1]
        lengths = np.add.reduceat(files.lengths()[bounds[0] : bounds[-1]].astype(np.int64), bounds[:-1] - bounds[0])
        counts += np.histogram(lengths, edges)[0]
    used = int(np.flatnonzero(counts).max()) + 1
    return edges[: used + 1], counts[:used]


def draw_histogram(files: IndexedFiles, path: Path) -> None:
    """Documents by their length, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges, counts = length_counts(files)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", edgecolor="white")
    axes.set_xscale("log", base=2)
    axes.set_xlim(left=edges[int(np.flatnonzero(counts).min())], right=edges[-1])
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.set_title(f"{Path(files.prefix).name}: {files.num_documents} documents, {files.num_tokens} tokens")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 1 for a broken dataset, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path of a dataset without .bin")
    parser.add_argument("--verify", action="store_true", help="read everything: checksums, index, token ids")
    parser.add_argument("--tokenizer", help="the tokenizer, as in tokenize_corpus; shows documents as text")
    parser.add_argument("--documents", type=int, default=3, help="how many documents to show")
    parser.add_argument("--histogram", type=Path, metavar="PNG", help="draw the lengths of the documents")
    arguments = parser.parse_args(argv)
    try:
        if arguments.histogram and (len(arguments.prefixes) > 1 or arguments.histogram.suffix != ".png"):
            raise ArgumentError(f"--histogram ({arguments.histogram}) must be a .png, and of one dataset.")
        if arguments.histogram and not arguments.histogram.parent.is_dir():
            raise ArgumentError(f"--histogram ({arguments.histogram}) must be in a folder that exists.")
        if arguments.documents < 1:
            raise ArgumentError(f"--documents ({arguments.documents}) must be at least 1.")
        for prefix in arguments.prefixes:
            files = check_dataset(without_suffix(prefix))
            print(describe(files))
            checked = ["sizes", *(verify(files) if arguments.verify else [])]
            print(f"  {'checked':<16}{', '.join(checked)}")
            if arguments.tokenizer is not None:
                print(*show_documents(files, arguments.tokenizer, arguments.documents), sep="\n")
            if arguments.histogram is not None:
                draw_histogram(files, arguments.histogram)
    except (ArgumentError, DatasetError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError | ImportError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
