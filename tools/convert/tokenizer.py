"""Files of a tokenizer, and the settings of generation, that go along with a model."""

import json
import shutil
from pathlib import Path

from megatron_gdn.training.tokenizer import tokenizer_files
from tools.convert.errors import ConvertError


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
