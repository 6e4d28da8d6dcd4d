"""The tokenizer of a run: the one that made its data, copied beside the checkpoints for whoever reads these."""

import hashlib
import shutil
from pathlib import Path

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
_DEFINING = ("tokenizer.json", "tokenizer.model")


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a tokenizer that a folder has; nothing that could be code."""
    return [folder / name for name in _FILES if (folder / name).is_file()]


def tokenizer_sha256(folder: Path) -> str | None:
    """SHA-256 as manifests of datasets have it, of `tokenizer.json` or `tokenizer.model`; None without either."""
    files = [folder / name for name in _DEFINING if (folder / name).is_file()]
    return hashlib.sha256(files[0].read_bytes()).hexdigest() if files else None


def tokenizer_beside(checkpoint: Path) -> Path:
    """Where the tokenizer of a checkpoint lies, if it has one: in the folder of all checkpoints of the run."""
    return checkpoint.parent / "tokenizer"


def keep_tokenizer(source: Path, checkpoints: Path) -> None:
    """Copy a tokenizer beside the checkpoints of a run, whole or not at all; one that is there is replaced.

    Args:
        source: folder with `tokenizer.json` or `tokenizer.model`.
        checkpoints: folder of the run's checkpoints.
    """
    target = checkpoints / "tokenizer"
    if source.resolve() == target.resolve():
        return
    aside = checkpoints / ".writing-tokenizer"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for path in tokenizer_files(source):
        shutil.copyfile(path, aside / path.name)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
