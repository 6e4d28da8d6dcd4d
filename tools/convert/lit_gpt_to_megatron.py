"""A file of lit_gpt (NVlabs/GatedDeltaNet) to a checkpoint that training starts from, exactly.

    python -m tools.convert.lit_gpt_to_megatron --file iter-001000-model-ckpt.pth \\
        --recipe examples/recipes/h1_0.4b.yaml --output checkpoints/imported

The file does not say what its weights mean, so the recipe does: gdn_0.4b, gdn_1.3b, h1_0.4b and h1_1.3b are the models
that lit_gpt has. Nothing of the file is executed. Ends with 1 for a file that is not of the recipe's model, 2 for wrong
arguments.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

from megatron_gdn.config import ConfigError, load_config
from megatron_gdn.training.restricted import UnsafeCheckpointError
from tools.convert import fla
from tools.convert.architecture import Architecture
from tools.convert.conversion import DTYPES
from tools.convert.errors import ConvertError
from tools.convert.importing import Import, add_arguments, report, run
from tools.convert.lit_gpt import TABLE, LitGptFile
from tools.convert.mapping import matching


def open_file(arguments: argparse.Namespace) -> Import:
    """The conversion of a file.

    Raises:
        ConvertError: a model that lit_gpt has not, or weights that are not the recipe's.
    """
    for name in ("file", "recipe"):
        if not (path := getattr(arguments, name)).is_file():
            raise ConvertError(f"--{name} ({path}) must be a file, and there is none.")
    recipe = load_config(arguments.recipe)
    # lit_gpt has what fla's format has, less full attention.
    obstacles = fla.obstacles(Architecture(model=recipe.model))
    if not recipe.model.symbols <= {"G", "S"} or obstacles:
        reasons = "; ".join(["it has Gated DeltaNet and sliding windows only", *obstacles])
        raise ConvertError(f"--recipe ({arguments.recipe}) describes no model of lit_gpt: {reasons}.")
    source = LitGptFile(arguments.file, lambda name: bool(matching([name], arguments.drop)))
    rows = source.shape("transformer.wte.weight")[0] if "transformer.wte.weight" in source.keys() else None
    model = replace(recipe.model, vocab_size=recipe.model.vocab_size or rows)
    return Import(
        source=source,
        table=TABLE,
        architecture=Architecture(model=model),
        target=arguments.target,
        dtype=DTYPES[arguments.dtype],
        source_name="lit_gpt",
        sequence_length=recipe.training.sequence_length,
        drop=arguments.drop,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 for a file that cannot be converted, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="...-model-ckpt.pth")
    parser.add_argument("--recipe", type=Path, required=True, help="whose model the file holds")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        found = open_file(arguments)
        run(found, arguments, source=arguments.file, tokenizer=None)
    except (ConfigError, ConvertError, UnsafeCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(found, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
