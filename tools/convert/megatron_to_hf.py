"""A training checkpoint to a Hugging Face folder, exactly, one tensor in memory at a time.

    python -m tools.convert.megatron_to_hf --checkpoint runs/mine --output runs/mine/hf --tokenizer tokenizer

Reads checkpoints of this project and of Megatron-LM. No GPU and no Megatron is needed, and the layout that wrote the
checkpoint does not matter. The format follows from the model; one that cannot hold it is refused with the reasons. The
folder appears under its name when it is complete; after a kill, the same command with --resume keeps the files that
are. Ends with 1 for a checkpoint that cannot be converted, 2 for wrong arguments.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

import torch

from megatron_gdn.training.restricted import UnsafeCheckpointError
from megatron_gdn.training.tokenizer import tokenizer_beside, tokenizer_files
from tools.convert.architecture import check_shapes
from tools.convert.checkpoint import MegatronCheckpoint
from tools.convert.conversion import (
    DTYPES,
    Conversion,
    Progress,
    check_output,
    check_space,
    print_plan,
    replace_folder,
)
from tools.convert.errors import ConvertError
from tools.convert.formats import FORMATS, Format, choose_format, lines_of
from tools.convert.mapping import check_complete
from tools.convert.safetensors_io import Planned, parse_size, plan_shards, shard_names, write_index, write_shard
from tools.convert.tokenizer import check_tokenizer, copy_tokenizer


class Export:
    """One conversion.

    Args:
        checkpoint: what is converted.
        target: format.
        dtype: of the weights; None keeps each one's.
        tokenizer: folder of the tokenizer that goes along; None: the one beside the checkpoint, where there is one.

    Raises:
        ConvertError: weights that the format has no place for, or that are missing; a tokenizer of another model.
    """

    def __init__(
        self, checkpoint: MegatronCheckpoint, target: Format, dtype: torch.dtype | None, tokenizer: Path | None = None
    ):
        self.checkpoint, self.target, self.architecture = checkpoint, target, checkpoint.architecture
        links = target.table(()).links(self.architecture)
        check_complete(links, ours=checkpoint.keys())
        check_shapes(self.architecture, {key: checkpoint.shape(key) for key in checkpoint.keys()})
        self.conversion = Conversion(links, checkpoint, to="theirs", dtype=dtype, vocab_size=checkpoint.vocab_size)
        beside = tokenizer_beside(checkpoint.path)
        self.tokenizer = beside if tokenizer is None and beside.is_dir() else tokenizer
        if self.tokenizer is not None:
            if not tokenizer_files(self.tokenizer):
                raise ConvertError(f"--tokenizer ({self.tokenizer}) must be a folder with tokenizer.json.")
            check_tokenizer(self.tokenizer, checkpoint.vocab_size)

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        embedding = self.conversion.tensors[0].dtype
        return self.target.write_config(self.architecture) | {
            "vocab_size": self.checkpoint.vocab_size,
            "tie_word_embeddings": self.architecture.model.tie_embeddings,
            "max_position_embeddings": self.checkpoint.sequence_length,
            "torch_dtype": str(embedding).removeprefix("torch."),
            **self.special_tokens(),
        }

    def special_tokens(self) -> dict[str, Any]:
        """Ids of bos, eos and pad: of the model that was imported, or the end of a document."""
        tokens = {"bos_token_id": None, "eos_token_id": self.checkpoint.eod_id, "pad_token_id": None}
        return tokens | self.checkpoint.info.get("special_tokens", {})


def write(export: Export, output: Path, *, max_bytes: int, resume: bool) -> None:
    """Write the folder aside and rename it.

    Args:
        export: what to write.
        output: folder; replaced where it is there.
        max_bytes: of a file, unless one tensor is larger.
        resume: keep the whole files of an earlier start.

    Raises:
        ConvertError: no space, or the earlier start was of another conversion.
    """
    aside = output.with_name(output.name + ".partial")
    if aside.exists() and not resume:
        shutil.rmtree(aside)
    aside.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(export.conversion.tensors, max_bytes)
    names = shard_names(len(shards))
    _check_plan(export, aside, shards)
    missing = {name: shard for name, shard in zip(names, shards, strict=True) if not (aside / name).exists()}
    done = export.conversion.num_bytes - sum(tensor.num_bytes for shard in missing.values() for tensor in shard)
    check_space(export.conversion, aside, written=done)
    with Progress(export.conversion, done=done) as progress:
        for name, shard in missing.items():
            write_shard(aside / name, shard, progress.read)
    write_index(aside, shards, names)
    (aside / "config.json").write_text(json.dumps(export.config(), indent=2) + "\n")
    (aside / "generation_config.json").write_text(json.dumps(export.special_tokens(), indent=2) + "\n")
    if export.tokenizer is not None:
        copy_tokenizer(export.tokenizer, aside, vocab_size=export.checkpoint.vocab_size)
    (aside / "plan.json").unlink()
    replace_folder(aside, output)


def _check_plan(export: Export, aside: Path, shards: list[list[Planned]]) -> None:
    """Keep what is written, and from where; raise ConvertError when an earlier start's was something else."""
    path, files = aside / "plan.json", [[(t.name, t.shape, str(t.dtype)) for t in shard] for shard in shards]
    plan = json.dumps([export.target.name, export.checkpoint.fingerprint, files])
    if path.exists() and path.read_text() != plan:
        raise ConvertError(f"{aside} was begun with other settings: leave out --resume to start anew.")
    path.write_text(plan)


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 for a checkpoint that cannot be converted, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="step folder, checkpoints folder, or folder of a run")
    add("--output", type=Path, required=True, help="Hugging Face folder to write")
    add("--format", choices=["auto", *FORMATS], default="auto", help="model type; auto: the first that holds the model")
    add("--weights", choices=["model", "master"], default="model", help="master: the optimizer's, in float32")
    add("--dtype", choices=list(DTYPES), default="keep", help="of the weights; gates and norms are not narrowed")
    add("--tokenizer", type=Path, help="folder whose tokenizer goes along; default: the one beside the checkpoint")
    add("--max-shard-size", default="5GB", help="largest file, such as 5GB or 500MiB")
    add("--dry-run", action="store_true", help="print the map, bytes, disk and memory; write nothing")
    add("--overwrite", action="store_true", help="replace the output folder")
    add("--resume", action="store_true", help="go on after a kill")
    arguments = parser.parse_args(argv)
    try:
        max_bytes = parse_size(arguments.max_shard_size)
        check_output(arguments.output, source=arguments.checkpoint, overwrite=arguments.overwrite)
        checkpoint = MegatronCheckpoint(arguments.checkpoint, master=arguments.weights == "master")
        target, reasons = choose_format(checkpoint.architecture, arguments.format)
        for line in lines_of(reasons):
            print(f"not {line}")
        export = Export(checkpoint, target, DTYPES[arguments.dtype], arguments.tokenizer)
        if export.tokenizer is None:
            print("no tokenizer goes along: the checkpoint has none beside it, and --tokenizer names none")
        if arguments.dry_run:
            print_plan(export.conversion, arguments.output)
        else:
            write(export, arguments.output, max_bytes=max_bytes, resume=arguments.resume)
    except (ConvertError, UnsafeCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    verb = "would hold" if arguments.dry_run else "holds"
    tensors, size = len(export.conversion.tensors), export.conversion.num_bytes / 1e6
    print(f"{arguments.output} {verb} {tensors} tensors, {size:.1f} MB, as {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
