"""A Hugging Face folder to a checkpoint that training starts from, exactly, one tensor in memory at a time.

    python -m tools.convert.hf_to_megatron --hf model --output checkpoints/imported

Reads gated_deltanet (fla), qwen3_5_text, qwen3_next and qwen3_5_moe_text as safetensors; nothing pickled, no code of
the folder runs.
Training starts from the result with checkpoint.initial_weights=checkpoints/imported, at any layout; with
--for megatron_lm Megatron-LM reads it. Ends with 1 for a model that this project has no equal of, 2 for wrong
arguments.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

from tools.convert.conversion import DTYPES
from tools.convert.errors import ConvertError
from tools.convert.formats import read_architecture, read_folder_config
from tools.convert.importing import Import, add_arguments, report, run
from tools.convert.safetensors_io import SafetensorsFolder
from tools.convert.settings import HfConfig


def open_folder(folder: Path, arguments: argparse.Namespace) -> Import:
    """The conversion of a folder.

    Raises:
        ConvertError: no model, one that this project has no equal of, or weights that are not those of its
            configuration.
    """
    config = read_folder_config(folder)
    found, architecture = read_architecture(config, arguments.ignore_setting)
    source = SafetensorsFolder(folder)
    return Import(
        source=source,
        table=found.table(source.keys()),
        architecture=architecture,
        target=arguments.target,
        dtype=DTYPES[arguments.dtype],
        source_name=found.name,
        sequence_length=_sequence_length(config),
        special_tokens=_special_tokens(config),
        drop=arguments.drop,
    )


def _sequence_length(config: HfConfig) -> int:
    length = config.get("max_position_embeddings") or 2048
    if type(length) is not int or length < 1:
        raise ConvertError(f"config.json: max_position_embeddings ({length}) must be a positive whole number.")
    return length


def _special_tokens(config: HfConfig) -> dict[str, Any]:
    """An id, several, or None."""
    found = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in found.items():
        ids = value if isinstance(value, list) else [value]
        if value is not None and not (ids and all(type(token) is int for token in ids)):
            raise ConvertError(f"config.json: {name} ({value}) must be the id of a token, a list of some, or null.")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 for a model that cannot be converted, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument(
        "--ignore-setting", action="append", default=[], metavar="NAME", help="of config.json, without effect here"
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        found = open_folder(arguments.hf, arguments)
        run(found, arguments, source=arguments.hf, tokenizer=arguments.hf)
    except (ConvertError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(found, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
