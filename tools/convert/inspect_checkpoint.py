"""What a folder or file is: architecture, parameters, dtypes, step, vocabulary. Executes nothing that is in it.

    python -m tools.convert.inspect_checkpoint runs/mine

Knows checkpoints of this project and of Megatron-LM, Hugging Face folders and files of lit_gpt. Ends with 1 for
anything else.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

import torch

from megatron_gdn.training.restricted import UnsafeCheckpointError, read_metadata
from megatron_gdn.training.tokenizer import tokenizer_files
from tools.convert.architecture import Architecture
from tools.convert.checkpoint import MegatronCheckpoint
from tools.convert.conversion import Source
from tools.convert.errors import ConvertError
from tools.convert.formats import FORMATS, choose_format, read_architecture, read_folder_config
from tools.convert.lit_gpt import LitGptFile
from tools.convert.safetensors_io import SafetensorsFolder


def inspect(path: Path) -> dict[str, Any]:
    """Facts by name, as JSON values.

    Raises:
        ConvertError: nothing that is known, or a damaged one.
        UnsafeCheckpointError: a pickle that names anything but plain values.
    """
    if path.is_file():
        return {"kind": "lit_gpt file", **_tensors(LitGptFile(path, lambda name: True))}
    if (path / "config.json").is_file():
        return _hugging_face(path)
    checkpoint = MegatronCheckpoint(path)
    found: dict[str, Any] = {
        "kind": "checkpoint of " + ("this project" if checkpoint.info else "Megatron-LM"),
        "folder": str(checkpoint.path),
        "step": checkpoint.step,
        **_tensors(checkpoint),
    }
    try:
        found |= _architecture(checkpoint.architecture) | {
            "vocabulary": checkpoint.vocab_size,
            "rows of the embedding": checkpoint.shape("embedding.word_embeddings.weight")[0],
            "converts to": _targets(checkpoint.architecture),
        }
    except ConvertError as error:
        found["architecture"] = f"not readable: {error}"
    keys = read_metadata(checkpoint.path / ".metadata").state_dict_metadata
    found["optimizer states"] = any(key.startswith(("optimizer.", "chained_")) for key in keys)
    layout = checkpoint.info.get("config", {}).get("parallel")
    if layout:
        found["written by"] = {name: layout[name] for name in ("tensor", "pipeline") if name in layout}
        found["written by"]["processes"] = checkpoint.info.get("world_size")
    return found


def _hugging_face(path: Path) -> dict[str, Any]:
    config = read_folder_config(path)
    found: dict[str, Any] = {"kind": "Hugging Face folder", "model_type": config["model_type"]}
    found |= _tensors(SafetensorsFolder(path))
    try:
        found |= _architecture(read_architecture(config)[1])
    except ConvertError as error:
        found["architecture"] = f"not readable: {error}"
    found["vocabulary"] = config.get("vocab_size")
    found["tokenizer"] = [file.name for file in tokenizer_files(path)]
    if code := sorted(file.name for file in path.glob("*.py")):
        found["code, not run"] = code
    return found


def _tensors(source: Source) -> dict[str, Any]:
    keys, dtypes, bytes_ = source.keys(), Counter(), 0
    for key in keys:
        count, dtype = math.prod(source.shape(key)), source.dtype(key)
        dtypes[str(dtype).removeprefix("torch.")] += count
        bytes_ += count * torch.empty((), dtype=dtype).element_size()
    return {"parameters": dtypes.total(), "dtypes": dict(dtypes), "tensors": len(keys), "bytes": bytes_}


def _architecture(architecture: Architecture) -> dict[str, Any]:
    model, experts = architecture.model, architecture.experts
    symbols = Counter(architecture.symbols)
    found: dict[str, Any] = {
        "layers": {symbol: symbols[symbol] for symbol in sorted(symbols)},
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "tied embeddings": model.tie_embeddings,
    }
    if "G" in symbols:
        heads = f"{model.linear_num_key_heads} of {model.linear_key_head_dim} (keys), "
        found["Gated DeltaNet heads"] = (
            heads + f"{model.linear_num_value_heads} of {model.linear_value_head_dim} (values)"
        )
    if architecture.attention_layers:
        heads, groups, channels = architecture.attention_heads(min(architecture.attention_layers))
        found["attention heads"] = f"{heads} of {channels}, {groups} for keys and values"
    if experts is not None:
        found["experts"] = f"{experts.num_experts} in {len(experts.layers)} layers, {experts.top_k} of each token"
    return found


def _targets(architecture: Architecture) -> list[str]:
    targets = []
    for name in FORMATS:
        try:
            choose_format(architecture, name)
        except ConvertError:
            continue
        targets.append(name)
    return targets


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 for what is not known or damaged, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="checkpoint, folder of a run, Hugging Face folder, lit_gpt file")
    parser.add_argument("--json", action="store_true", help="for scripts")
    arguments = parser.parse_args(argv)
    try:
        found = inspect(arguments.path)
    except (ConvertError, UnsafeCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        print(
            f"{name:<22}{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{name:<22}{value}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
