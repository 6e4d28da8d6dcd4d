"""One dataset to training, validation and test, by a hash of each document.

python -m tools.preprocess.split_dataset data/all --shares 98,1,1 --output-dir data

Writes data/train, data/validation and data/test (.bin, .idx, .json). The hash depends on the document's tokens alone:
copies of a document go to the same part, and a document goes to the same part in every corpus and in every order. Ends
with 1 for data that cannot be used, 2 for wrong arguments.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

import numpy as np

from megatron_gdn.training.indexed import DatasetError
from tools.preprocess.documents import document_hashes, shares_of, write_documents
from tools.preprocess.indexed import IndexedWriter, Output
from tools.preprocess.merge_datasets import merged_facts, open_datasets, without_suffix
from tools.preprocess.sources import ArgumentError, InputError

PARTS = ("train", "validation", "test")


def parse_shares(text: str) -> list[float]:
    """Three fractions with sum 1 from text such as "98,1,1" or "95,5".

    Raises:
        ArgumentError: not two or three numbers of at least 0, or fewer than two above 0.
    """
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) not in (2, 3) or not all(0 <= share < float("inf") for share in shares):
        raise ArgumentError(f"--shares ({text}) must be two or three numbers of at least 0, such as 98,1,1.")
    if sum(share > 0 for share in shares) < 2:
        raise ArgumentError(f"--shares ({text}) must give two parts more than 0, or there is nothing to split.")
    return [share / sum(shares) for share in (*shares, 0.0)[:3]]


def split(prefix: str, shares: list[float], output_dir: Path) -> dict[str, int]:
    """Write the parts; documents of each. Nothing appears under its name before all parts are written.

    Raises:
        DatasetError: a broken dataset.
        InputError: a part without documents, or another process at the same output.
    """
    datasets = open_datasets([prefix])
    parts = shares_of(document_hashes(datasets), shares)
    counts, written = {}, []
    with ExitStack() as stack:
        for i, name in enumerate(PARTS):
            if not shares[i]:
                continue
            order = np.flatnonzero(parts == i)
            counts[name] = len(order)
            if not len(order):
                raise InputError(f"{name} would have no documents of {len(parts)}: give it a larger share.")
            output = stack.enter_context(Output(str(Path(output_dir) / name)))
            writer = IndexedWriter(output.bin, output.idx, datasets[0].dtype)
            stack.callback(writer.close)
            write_documents(datasets, order, writer)
            manifest = writer.finish() | {"split": {"part": name, "shares": shares}}
            written.append((output, manifest | merged_facts(datasets) if datasets[0].manifest else None))
        for output, manifest in written:
            output.commit(manifest)
    return counts


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 1 for data that cannot be used, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="path of a dataset without .bin")
    parser.add_argument("--shares", required=True, help="of train, validation and, if wanted, test: 98,1,1")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the parts")
    arguments = parser.parse_args(argv)
    try:
        shares = parse_shares(arguments.shares)
        prefix = without_suffix(arguments.prefix)
        if Path(prefix).absolute() in [(arguments.output_dir / name).absolute() for name in PARTS]:
            raise ArgumentError(f"--output-dir ({arguments.output_dir}) would replace {prefix}: name another folder.")
        if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
            raise ArgumentError(f"--output-dir ({arguments.output_dir}) must be a folder: name another.")
        counts = split(prefix, shares, arguments.output_dir)
    except (ArgumentError, DatasetError, InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    for name, count in counts.items():
        print(f"{arguments.output_dir / name}: {count} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
