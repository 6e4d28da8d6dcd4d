"""A file that names several corpora with their weights, for training on a blend without merging anything.

python -m tools.preprocess.blend_datasets data/web=0.7 data/code=0.3 --output data/blend.txt

Without weights, each corpus counts by its tokens. The file has "weight prefix" lines, the form of Megatron-LM's
--data-args-path; the list that `data.train` takes is printed. Ends with 1 for data that cannot be used, 2 for wrong
arguments.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

from megatron_gdn.training.indexed import DatasetError
from tools.preprocess.merge_datasets import open_datasets
from tools.preprocess.sources import ArgumentError


def blend(entries: list[str]) -> list[str]:
    """Lines "weight prefix", weights with sum 1.

    Args:
        entries: all PREFIX, or all PREFIX=WEIGHT.

    Raises:
        ArgumentError: a mixture of both, or a weight that is not above 0.
        DatasetError: a broken dataset, or datasets of different tokenizers.
    """
    parts = [entry.rpartition("=") for entry in entries]
    if all(equals for _, equals, _ in parts):
        prefixes = [prefix for prefix, _, _ in parts]
        try:
            weights = [float(weight) for _, _, weight in parts]
        except ValueError:
            weights = []
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ArgumentError(f"weights of {' '.join(entries)} must be numbers above 0.")
        open_datasets(prefixes)
    elif any(equals for _, equals, _ in parts):
        raise ArgumentError(f"{' '.join(entries)} must all be PREFIX, or all PREFIX=WEIGHT.")
    else:
        prefixes = entries
        weights = [files.num_tokens for files in open_datasets(entries)]
    return [f"{weight / sum(weights):.6g} {prefix}" for weight, prefix in zip(weights, prefixes, strict=True)]


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 1 for data that cannot be used, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="+", metavar="PREFIX[=WEIGHT]", help="path of a dataset without .bin")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    arguments = parser.parse_args(argv)
    try:
        lines = blend(arguments.entries)
        aside = arguments.output.with_name(f".{arguments.output.name}.writing")
        aside.write_text("".join(line + "\n" for line in lines))
        os.replace(aside, arguments.output)
    except (ArgumentError, DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    print(f"data.train={json.dumps(lines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
