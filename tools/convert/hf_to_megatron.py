"""A Hugging Face folder to a checkpoint that training starts from, exactly, one tensor in memory at a time.

    python -m tools.convert.hf_to_megatron --hf model --output checkpoints/imported

Reads gated_deltanet (fla), qwen3_5_text and qwen3_next (dense) as safetensors; nothing pickled, no code of the folder
runs. Training starts from the result with checkpoint.initial_weights=checkpoints/imported, at any layout. Ends with 1
for a model that this project has no equal of, 2 for wrong arguments.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from tqdm import tqdm

from megatron_gdn.config import ModelConfig
from megatron_gdn.hybrid.pattern import parse_pattern
from megatron_gdn.version import __version__
from tools.convert.errors import ConvertError
from tools.convert.formats import FORMATS
from tools.convert.layers import check_shapes, ours
from tools.convert.mapping import Link, check_complete
from tools.convert.megatron_to_hf import DTYPES, check_output
from tools.convert.safetensors_io import Planned, SafetensorsFolder
from tools.convert.torch_dist_writer import write_checkpoint

# Linear layers beside which Megatron keeps a state.
_STATEFUL = {
    "G": ("self_attention.in_proj", "self_attention.in_proj_ba", "self_attention.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "S": ("self_attention.linear_qkv", "self_attention.linear_proj"),
}


def read_model(folder: Path) -> tuple[ModelConfig, str, dict[str, Any]]:
    """The model of a folder, its format's name, and its `config.json`.

    Raises:
        ConvertError: no configuration, an unknown model type, or a setting that this project has no equal of.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        name = config["model_type"]
    except OSError as error:
        raise ConvertError(f"--hf ({folder}) must be a folder with config.json: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"{path} is not a model's configuration ({error!r}).") from error
    if name not in FORMATS:
        raise ConvertError(f"{path}: model_type ({name}) must be one of {', '.join(FORMATS)}.")
    try:
        fields = FORMATS[name].read_config(config)
        fields |= dict(
            vocab_size=config["vocab_size"], vocab_multiple=1, tie_embeddings=config.get("tie_word_embeddings", False)
        )
        model = TypeAdapter(ModelConfig).validate_python(fields)
    except KeyError as error:
        raise ConvertError(f"{path} lacks {error}: it is not a configuration of {name}.") from error
    except ValidationError as error:
        raise ConvertError(f"{path} describes a model that cannot be built: {error}") from error
    return model, name, config


class Import:
    """One conversion.

    Args:
        folder: what is converted.
        dtype: of the weights; None keeps each one's. A_log, dt_bias and the norm of Gated DeltaNet become float32.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None):
        self.model, self.format_name, self.config = read_model(folder)
        self.source, self.dtype = SafetensorsFolder(folder), dtype
        self.links = FORMATS[self.format_name].links(self.model)
        present = set(self.source.keys())
        if self.model.tie_embeddings:
            present.discard("lm_head.weight")  # a copy of the embedding
        check_complete(self.links, theirs=present)
        self._by_key = {key: link for link in self.links for key in link.ours}
        self._waiting: dict[str, Tensor] = {}
        self.tensors = [planned for link in self.links for planned in self._plan(link)]
        check_shapes(self.model, {tensor.name: tensor.shape for tensor in self.tensors})

    def _plan(self, link: Link) -> list[Planned]:
        sources = [torch.empty(self.source.shape(key), device="meta") for key in link.theirs]
        stored = self.source.read(link.theirs[0]).dtype if self.dtype is None else self.dtype
        dtype = torch.float32 if link.keep_float32 else stored
        try:
            found = link.to_ours(*sources)
        except RuntimeError as error:
            raise ConvertError(
                f"{', '.join(link.theirs)} have not the shapes of their configuration: {error}"
            ) from error
        return [Planned(name=name, shape=tuple(x.shape), dtype=dtype) for name, x in zip(link.ours, found, strict=True)]

    def read(self, key: str) -> Tensor:
        """One of our tensors; those that come with it wait until they are asked for."""
        if key not in self._waiting:
            link = self._by_key[key]
            sources = [self.source.read(name) for name in link.theirs]
            if link.keep_float32:
                sources = [x.float() for x in sources]
            self._waiting |= dict(zip(link.ours, link.to_ours(*sources), strict=True))
        dtype = torch.float32 if self._by_key[key].keep_float32 else self.dtype
        found = self._waiting.pop(key)
        return found if dtype is None else found.to(dtype)

    @property
    def objects(self) -> list[str]:
        """Keys of the states that Megatron keeps beside linear layers."""
        keys = []
        for i, layer in enumerate(parse_pattern(self.model.pattern)):
            names = _STATEFUL[layer.symbol] + (("mlp.linear_fc1", "mlp.linear_fc2") if layer.mlp else ())
            keys += [f"{ours(i, name)}._extra_state/shard_0_1" for name in names]
        return keys

    @property
    def info(self) -> dict[str, Any]:
        """What the checkpoint says of itself."""
        eod = self.config.get("eos_token_id")
        return {
            "version": __version__,
            "step": 0,
            "source": self.format_name,
            "vocabulary": {"size": self.model.vocab_size, "eod_id": eod[0] if isinstance(eod, list) else eod},
            "config": {
                "model": asdict(self.model),
                "training": {"sequence_length": self.config.get("max_position_embeddings", 2048)},
            },
        }


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 for a model that cannot be converted, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hf", type=Path, required=True, help="folder with config.json and safetensors")
    add("--output", type=Path, required=True, help="folder of the checkpoint to write")
    add("--dtype", choices=list(DTYPES), default="keep", help="of the weights; gates and their norm become float32")
    add("--dry-run", action="store_true", help="print what would be written")
    add("--overwrite", action="store_true", help="replace the output folder")
    arguments = parser.parse_args(argv)
    try:
        check_output(arguments.output, overwrite=arguments.overwrite)
        found = Import(arguments.hf, DTYPES[arguments.dtype])
        total = sum(tensor.num_bytes for tensor in found.tensors)
        if arguments.dry_run:
            for tensor in found.tensors:
                dtype = str(tensor.dtype).removeprefix("torch.")
                print(f"{tensor.name:<60} {dtype:<9} {list(tensor.shape)}")
        else:
            with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as progress:

                def read(key: str) -> Tensor:
                    tensor = found.read(key)
                    progress.update(tensor.nbytes)
                    return tensor

                folder = arguments.output / "step_00000000"
                write_checkpoint(folder, found.tensors, found.objects, read, found.info)
    except (ConvertError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    verb = "would hold" if arguments.dry_run else "holds"
    print(f"{arguments.output} {verb} {len(found.tensors)} tensors, {total / 1e6:.1f} MB, from {found.format_name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
