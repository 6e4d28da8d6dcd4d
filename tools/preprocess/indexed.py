"""Writing `<prefix>.bin`, `<prefix>.idx` and the manifest `<prefix>.json`: complete under their names, or not there."""

import fcntl
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tools.preprocess.readers import InputError


def sha256_of(path: Path) -> str:
    """Hash of a file's contents, hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


class DatasetWriter:
    """Writes one dataset through Megatron's builder, aside, and renames it in `finish`; a context manager.

    Leaving the context without `finish` removes what was written aside; the dataset of this name, if any, stays as it
    was. A killed process leaves only the files aside, which the next writer of this name replaces.

    Args:
        prefix: path without suffix.
        vocab_size: chooses the dtype by Megatron's rule.

    Raises:
        InputError: another process writes the same dataset.
    """

    def __init__(self, prefix: str, vocab_size: int):
        # Imports torch: only the process that writes pays for it.
        import megatron_gdn  # noqa: F401 - hides broken optional packages from Megatron-Core

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that only training can use
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self._paths = {suffix: Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "json")}
        self._aside = {suffix: path.with_name(f".{path.name}.writing") for suffix, path in self._paths.items()}
        self._paths["bin"].parent.mkdir(parents=True, exist_ok=True)
        self._manifest = self._lock()
        self.dtype = DType.optimal_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(str(self._aside["bin"]), dtype=self.dtype)
        self.num_documents = self.num_tokens = 0
        self.max_token_id = -1

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *error) -> None:
        if self._manifest.closed:
            return
        self._builder.data_file.close()
        for path in self._aside.values():
            path.unlink(missing_ok=True)
        self._manifest.close()

    def add(self, ids: np.ndarray) -> None:
        """Append one document of at least one token."""
        self._builder.add_document(ids, [len(ids)])
        self.num_documents += 1
        self.num_tokens += len(ids)
        self.max_token_id = max(self.max_token_id, int(ids.max()))

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Complete the three files under their names, the manifest last.

        Args:
            facts: to go into the manifest.

        Returns:
            The manifest.
        """
        self._builder.finalize(str(self._aside["idx"]))
        files = {}
        for suffix in ("bin", "idx"):
            _sync(self._aside[suffix])
            files[suffix] = {"bytes": self._aside[suffix].stat().st_size, "sha256": sha256_of(self._aside[suffix])}
        manifest = {
            "format_version": 1,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "max_token_id": self.max_token_id,
            "dtype": np.dtype(self.dtype).name,
            "files": files,
            **facts,
        }
        self._manifest.truncate(0)
        self._manifest.write(json.dumps(manifest, indent=1) + "\n")
        self._manifest.flush()
        os.fsync(self._manifest.fileno())
        # Without its manifest and index, an older dataset of this name cannot be taken for a mixture of both.
        for suffix in ("json", "idx"):
            self._paths[suffix].unlink(missing_ok=True)
        for suffix in ("bin", "idx", "json"):
            os.replace(self._aside[suffix], self._paths[suffix])
        _sync(self._paths["bin"].parent)
        self._manifest.close()
        return manifest

    def _lock(self):
        """Open the manifest aside and lock it; the lock goes when the process does."""
        file = self._aside["json"].open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise InputError(
                f"{self.prefix} is being written by another process: wait for it or choose another prefix."
            ) from error
        return file


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
