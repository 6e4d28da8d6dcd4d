"""A training checkpoint to a Hugging Face folder, exactly, one tensor in memory at a time.

    python -m tools.convert.megatron_to_hf --checkpoint runs/mine --output runs/mine/hf --tokenizer tokenizer

No GPU and no Megatron is needed, and the layout that wrote the checkpoint does not matter. The format follows from the
model; one that cannot hold it is refused with the reasons. The folder appears under its name when it is complete; after
a kill, the same command with --resume keeps the files that are. Ends with 1 for a checkpoint that cannot be converted,
2 for wrong arguments.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_gdn.training.restricted import UnsafeCheckpointError
from tools.convert.checkpoint import MegatronCheckpoint
from tools.convert.errors import ConvertError
from tools.convert.formats import FORMATS, Format, choose_format
from tools.convert.layers import check_shapes
from tools.convert.mapping import Link, check_complete
from tools.convert.safetensors_io import Planned, parse_size, plan_shards, shard_names, write_index, write_shard

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


class Export:
    """One conversion.

    Args:
        checkpoint: what is converted.
        target: format.
        dtype: of the weights; None keeps each one's. A_log, dt_bias and the norm of Gated DeltaNet stay in float32.

    Raises:
        ConvertError: weights that the format has no place for, or that are missing.
    """

    def __init__(self, checkpoint: MegatronCheckpoint, target: Format, dtype: torch.dtype | None):
        self.checkpoint, self.target, self.dtype = checkpoint, target, dtype
        self.model = checkpoint.model
        self.links = {link.theirs[0]: link for link in target.links(self.model)}
        check_complete(self.links.values(), ours=checkpoint.keys())
        check_shapes(self.model, {key: checkpoint.shape(key) for key in checkpoint.keys()})
        self.tensors = [planned for link in self.links.values() for planned in self._plan(link)]

    def _plan(self, link: Link) -> list[Planned]:
        # Shapes from an empty run of the conversion: tensors without contents.
        sources = [torch.empty(self._shape(key), dtype=self.checkpoint.dtype(key), device="meta") for key in link.ours]
        return [
            Planned(name=name, shape=tuple(x.shape), dtype=self._target_dtype(link, x.dtype))
            for name, x in zip(link.theirs, link.to_theirs(*sources), strict=True)
        ]

    def _shape(self, key: str) -> tuple[int, ...]:
        shape = self.checkpoint.shape(key)
        return (self.checkpoint.vocab_size, *shape[1:]) if key in _VOCABULARY else shape

    def _target_dtype(self, link: Link, stored: torch.dtype) -> torch.dtype:
        if link.keep_float32:
            return torch.float32
        return self.dtype or stored

    def read(self, link: Link) -> dict[str, Tensor]:
        """Tensors of a link by their names."""
        sources = []
        for key in link.ours:
            x = self.checkpoint.read(key)
            sources.append(x[: self.checkpoint.vocab_size] if key in _VOCABULARY else x)
        if link.keep_float32:
            sources = [x.float() for x in sources]
        found = link.to_theirs(*sources)
        return {name: x.to(self._target_dtype(link, x.dtype)) for name, x in zip(link.theirs, found, strict=True)}

    def config(self, tokenizer: Path | None) -> dict[str, Any]:
        """`config.json`."""
        dtypes = [planned.dtype for planned in self.tensors if planned.dtype != torch.float32]
        dtype = dtypes[0] if dtypes else torch.float32
        eod = self.checkpoint.info["vocabulary"]["eod_id"]
        return self.target.write_config(self.model) | {
            "vocab_size": self.checkpoint.vocab_size,
            "tie_word_embeddings": self.model.tie_embeddings,
            "max_position_embeddings": self.checkpoint.info["config"]["training"]["sequence_length"],
            "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": None,
            "eos_token_id": eod,
            "pad_token_id": None,
        }


def write(export: Export, output: Path, *, max_bytes: int, tokenizer: Path | None, resume: bool) -> None:
    """Write the folder aside and rename it."""
    aside = output.with_name(output.name + ".partial")
    if aside.exists() and not resume:
        shutil.rmtree(aside)
    aside.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(export.tensors, max_bytes)
    names = shard_names(len(shards))
    links = {name: link for link in export.links.values() for name in link.theirs}
    plan = json.dumps([export.target.name, [[(t.name, t.shape, str(t.dtype)) for t in shard] for shard in shards]])
    if (aside / "plan.json").exists() and (aside / "plan.json").read_text() != plan:
        raise ConvertError(f"{aside} was begun with other settings: leave out --resume to start anew.")
    (aside / "plan.json").write_text(plan)
    total = sum(tensor.num_bytes for tensor in export.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()) as progress:
        waiting: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name not in waiting:
                waiting.update(export.read(links[name]))
            found = waiting.pop(name)
            progress.update(found.nbytes)
            return found

        for name, shard in zip(names, shards, strict=True):
            if not (aside / name).exists():
                write_shard(aside / name, shard, read)
    write_index(aside, shards, names)
    config = export.config(tokenizer)
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (aside / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    if tokenizer is not None:
        for path in sorted(tokenizer.glob("*.json")) + sorted(tokenizer.glob("*.model")):
            if path.name not in ("config.json", "generation_config.json"):
                shutil.copy(path, aside / path.name)
    (aside / "plan.json").unlink()
    if output.exists():
        shutil.rmtree(output)
    os.replace(aside, output)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise ConvertError when the folder is there and not to be replaced, or is no folder."""
    if output.exists() and not output.is_dir():
        raise ConvertError(f"--output ({output}) must be a folder: name another.")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ConvertError(f"--output ({output}) is not empty: name another folder, or --overwrite replaces it.")


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 for a checkpoint that cannot be converted, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="step folder, checkpoints folder, or folder of a run")
    add("--output", type=Path, required=True, help="Hugging Face folder to write")
    add("--format", choices=["auto", *FORMATS], default="auto", help="model type; auto: the first that holds the model")
    add("--dtype", choices=list(DTYPES), default="keep", help="of the weights; gates and their norm stay in float32")
    add("--tokenizer", type=Path, help="folder whose tokenizer files are copied")
    add("--max-shard-size", default="5GB", help="largest file, such as 5GB or 500MiB")
    add("--dry-run", action="store_true", help="print what would be written")
    add("--overwrite", action="store_true", help="replace the output folder")
    add("--resume", action="store_true", help="go on after a kill")
    arguments = parser.parse_args(argv)
    try:
        max_bytes = parse_size(arguments.max_shard_size)
        check_output(arguments.output, overwrite=arguments.overwrite)
        if arguments.tokenizer is not None and not (arguments.tokenizer / "tokenizer.json").is_file():
            raise ConvertError(f"--tokenizer ({arguments.tokenizer}) must be a folder with tokenizer.json.")
        checkpoint = MegatronCheckpoint(arguments.checkpoint)
        target = choose_format(checkpoint.model, arguments.format)
        export = Export(checkpoint, target, DTYPES[arguments.dtype])
        total = sum(tensor.num_bytes for tensor in export.tensors)
        if arguments.dry_run:
            for tensor in export.tensors:
                dtype = str(tensor.dtype).removeprefix("torch.")
                print(f"{tensor.name:<60} {dtype:<9} {list(tensor.shape)}")
        else:
            write(export, arguments.output, max_bytes=max_bytes, tokenizer=arguments.tokenizer, resume=arguments.resume)
    except (ConvertError, UnsafeCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    verb = "would hold" if arguments.dry_run else "holds"
    print(f"{arguments.output} {verb} {len(export.tensors)} tensors, {total / 1e6:.1f} MB, as {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
