"""The Hugging Face formats that hold these models, and which of them can hold a given one.

gated_deltanet    fla: Gated DeltaNet, with plain or sliding-window attention
qwen3_5_text      transformers: Gated DeltaNet, with gated attention
qwen3_next        transformers: the same, with fused projections, and with experts
qwen3_5_moe_text  transformers: qwen3_5_text with experts in every layer
megatron_gdn      this project's own model in transformers (`import megatron_gdn.hf`): everything else
"""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_gdn.config import ModelConfig
from megatron_gdn.config.load import explain
from tools.convert import fla, own, qwen
from tools.convert.architecture import MOST_EXPERTS, MOST_LAYERS, Architecture, Experts
from tools.convert.errors import ConvertError
from tools.convert.mapping import Table
from tools.convert.settings import HfConfig, Settings


@dataclass(frozen=True, kw_only=True)
class Format:
    """A model type of Hugging Face.

    name: `model_type`.
    table: weights, in the form that the names of a folder show; no names: the form that is written.
    obstacles: reasons why it cannot hold a model; none: it can.
    settings: what its configuration may hold.
    write_config: `config.json` of a model, without vocabulary, dtype and special tokens.
    read_config: fields of ModelConfig from their configuration, and experts; raises ConvertError for what has no equal
        here.
    """

    name: str
    table: Callable[[Iterable[str]], Table]
    obstacles: Callable[[Architecture], list[str]]
    settings: Settings
    write_config: Callable[[Architecture], HfConfig]
    read_config: Callable[[HfConfig], tuple[dict[str, Any], Experts | None]]


# The order in which they are tried.
FORMATS = {
    found.name: found
    for found in (
        Format(
            name="gated_deltanet",
            table=fla.table,
            obstacles=fla.obstacles,
            settings=fla.SETTINGS,
            write_config=fla.write_config,
            read_config=fla.read_config,
        ),
        Format(
            name="qwen3_5_text",
            table=qwen.qwen3_5_text_table,
            obstacles=qwen.qwen3_5_text_obstacles,
            settings=qwen.QWEN3_5_TEXT_SETTINGS,
            write_config=qwen.write_qwen3_5_text,
            read_config=qwen.read_config,
        ),
        Format(
            name="qwen3_next",
            table=qwen.qwen3_next_table,
            obstacles=qwen.obstacles,
            settings=qwen.QWEN3_NEXT_SETTINGS,
            write_config=qwen.write_qwen3_next,
            read_config=qwen.read_config,
        ),
        Format(
            name="qwen3_5_moe_text",
            table=qwen.qwen3_5_moe_text_table,
            obstacles=qwen.qwen3_5_moe_text_obstacles,
            settings=qwen.QWEN3_5_MOE_TEXT_SETTINGS,
            write_config=qwen.write_qwen3_5_moe_text,
            read_config=qwen.read_config,
        ),
        Format(
            name=own.MODEL_TYPE,
            table=own.table,
            obstacles=own.obstacles,
            settings=own.SETTINGS,
            write_config=own.write_config,
            read_config=own.read_config,
        ),
    )
}
# Model types that are close, and why none of their models can be read.
REFUSED = {
    "olmo_hybrid": "its attention has norms behind it instead of before it and norms over all heads of q and k, which "
    "Megatron-Core has not, and every model of it has attention",
    "qwen4_exp_text": "it has hyper-connections and tables of n-grams, which Megatron-Core has not",
    "qwen3_5": "it holds a vision model too: save its language_model with transformers, which is qwen3_5_text",
    "qwen3_5_moe": "it holds a vision model too: save its language_model with transformers, which is qwen3_5_moe_text",
    **dict.fromkeys(
        ("kimi_linear", "bailing_hybrid", "glm5_next", "kda"), "its decay is one of channels, not of heads"
    ),
    **dict.fromkeys(
        ("gated_deltaproduct", "comba", "mom", "precond_gated_deltanet", "log_linear_attention"),
        "its rule is another than the gated delta rule",
    ),
}


def choose_format(architecture: Architecture, wanted: str = "auto") -> tuple[Format, dict[str, list[str]]]:
    """The format to export to.

    Returns:
        The first that holds the model, or the wanted one, and the reasons against those that were tried before it.

    Raises:
        ConvertError: no format holds the model, or the wanted one does not, with the reasons.
    """
    candidates = list(FORMATS.values()) if wanted == "auto" else [FORMATS[wanted]]
    reasons: dict[str, list[str]] = {}
    for candidate in candidates:
        found = candidate.obstacles(architecture)
        if not found:
            return candidate, reasons
        reasons[candidate.name] = found
    raise ConvertError("no format holds this model exactly.\n  " + "\n  ".join(lines_of(reasons)))


def lines_of(reasons: dict[str, list[str]]) -> list[str]:
    """A line for each format that cannot hold a model."""
    return [f"{name}: {'; '.join(found)}" for name, found in reasons.items()]


def read_folder_config(folder: Path) -> HfConfig:
    """The `config.json` of a folder.

    Raises:
        ConvertError: there is none, or it does not name its model type.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config["model_type"], str):
            raise TypeError("model_type must be a name")
    except OSError as error:
        reason = error.strerror if folder.is_dir() else "there is no such folder"
        marks = (".metadata", "step_*", "checkpoints", "latest_checkpointed_iteration.txt")
        checkpoint = any(found for mark in marks for found in folder.glob(mark))
        hint = " It is a checkpoint, which tools.convert.megatron_to_hf reads." if checkpoint else ""
        raise ConvertError(f"{folder} must be a folder with config.json: {reason}.{hint}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConvertError(f"{path} is not a model's configuration ({error!r}).") from error
    return config


def read_architecture(config: HfConfig, ignored: Collection[str] = ()) -> tuple[Format, Architecture]:
    """The model of a `config.json`.

    Args:
        config: what it holds.
        ignored: settings that are left out although nobody knows them.

    Raises:
        ConvertError: an unknown model type, or a setting that this project has no equal of.
    """
    name = config["model_type"]
    if name not in FORMATS:
        reason = f": {REFUSED[name]}" if name in REFUSED else ""
        raise ConvertError(f"config.json: model_type ({name}) must be one of {', '.join(FORMATS)}{reason}.")
    found = FORMATS[name]
    found.settings.check(config, ignored)
    layers = config.get("num_hidden_layers", 1)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise ConvertError(f"num_hidden_layers ({layers}) must be a whole number from 1 to {MOST_LAYERS}.")
    try:
        fields, experts = found.read_config(config)
        if experts is not None and not 0 < experts.num_experts <= MOST_EXPERTS:
            raise ConvertError(f"num_experts ({experts.num_experts}) must be from 1 to {MOST_EXPERTS}.")
        fields |= dict(
            vocab_size=config["vocab_size"], vocab_multiple=1, tie_embeddings=config.get("tie_word_embeddings", False)
        )
        return found, Architecture(model=TypeAdapter(ModelConfig).validate_python(fields), experts=experts)
    except (KeyError, IndexError) as error:
        raise ConvertError(f"config.json lacks {error}: it is not a configuration of {name}.") from error
    except ConvertError:
        raise
    except ValidationError as error:
        problems = explain(error, ModelConfig)
        raise ConvertError(f"config.json describes a model that cannot be built: {problems}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ConvertError(f"config.json describes a model that cannot be built: {error}") from error
