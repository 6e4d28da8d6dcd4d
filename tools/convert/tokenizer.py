"""Files of a tokenizer, and the settings of generation, that go along with a model."""

import json
import shutil
from pathlib import Path

from tools.convert.errors import ConvertError

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a tokenizer that a folder has; nothing that could be code."""
    return [folder / name for name in _FILES if (folder / name).is_file()]


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise ConvertError when a tokenizer has ids that a model has not."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())
        ids = [entry["id"] for entry in found.get("added_tokens") or []]
        vocabulary = found["model"].get("vocab") or {}
        ids += vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        largest = max(ids, default=-1)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConvertError(f"{path} is not a tokenizer ({error!r}).") from error
    if largest >= vocab_size:
        raise ConvertError(
            f"{path} has ids up to {largest} and the model {vocab_size} tokens: give the tokenizer that made its data."
        )


def copy_tokenizer(source: Path, target: Path, *, vocab_size: int) -> None:
    """Copy a tokenizer and the settings of generation; nothing happens where there are none.

    Args:
        source, target: folders.
        vocab_size: tokens of the model.

    Raises:
        ConvertError: the tokenizer has ids that the model has not.
    """
    check_tokenizer(source, vocab_size)
    for path in tokenizer_files(source):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.name)
