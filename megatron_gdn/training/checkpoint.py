"""Checkpoints that a kill at any moment cannot break, and that are verified before they are used.

    root/step_00000120/     .metadata  *.distcp  common.pt  metadata.json      Megatron's torch_dist
                            info.json                                          configuration, position, versions
                            manifest.json                                      size and SHA-256 of every file above

A checkpoint is written under another name, brought to the disk, and renamed when it is complete. A folder counts only
if its manifest verifies.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_gdn.training import torch_dist

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_READ_BYTES = 2**22


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used."""


_passages: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Where tests kill the process: MEGATRON_GDN_FAILPOINT="name:n" ends it with SIGKILL at the n-th passage."""
    wanted, _, count = os.environ.get("MEGATRON_GDN_FAILPOINT", "").partition(":")
    if wanted == name:
        _passages[name] = _passages.get(name, 0) + 1
        if _passages[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


class CheckpointStore:
    """The checkpoints of a run. Methods marked collective are called by all ranks.

    Args:
        root: their folder.
        keep: newest checkpoints that stay; None keeps all.
    """

    def __init__(self, root: Path, *, keep: int | None = None):
        self.root, self.keep = Path(root), keep

    def save(self, step: int, sharded_state: dict[str, Any], *, info: dict[str, Any]) -> Path:
        """Write a checkpoint; collective.

        Args:
            step: names it; a whole checkpoint of the same step stays as it is.
            sharded_state: Megatron's sharded state dict; consumed.
            info: JSON values to go with it.

        Raises:
            CheckpointError: on every rank, when any rank could not write. The checkpoints before stay as they were.
        """
        final, aside = self.root / f"step_{step:08d}", self.root / f".writing-step_{step:08d}"
        together("prepare", lambda: self._prepare(aside), only_first=True)
        failpoint("prepared")
        digests = together(f"write {final}", lambda: torch_dist.write(sharded_state, aside), cleanup=aside)
        failpoint("shards")
        files = {name: digest for part in digests for name, digest in part.items()}
        together(
            f"complete {final}", lambda: self._complete(aside, final, step, files, info), only_first=True, cleanup=aside
        )
        together("prune", self._prune, only_first=True)
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint that verifies, or None when there is none at all; collective.

        Raises:
            CheckpointError: there are checkpoints and none verifies.
        """
        return together("find a checkpoint", self._find_latest, only_first=True)[0]

    def load(self, path: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
        """Read a checkpoint into the layout of `sharded_state`; collective.

        Args:
            path: from `latest`.
            sharded_state: Megatron's sharded state dict as a template.

        Returns:
            The state dict.

        Raises:
            UnsafeCheckpointError: it wants to run code.
        """
        return torch_dist.read(sharded_state, path)

    def info(self, path: Path) -> dict[str, Any]:
        """What `save` was given as `info`."""
        return json.loads((path / "info.json").read_text())

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising; not verified."""
        return sorted(int(path.parent.name.removeprefix("step_")) for path in self.root.glob("step_*/manifest.json"))

    def _prepare(self, aside: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for left_over in self.root.glob(".writing-*"):
            shutil.rmtree(left_over)
        aside.mkdir()

    def _complete(self, aside: Path, final: Path, step: int, files: dict[str, Any], info: dict[str, Any]) -> None:
        files["info.json"] = torch_dist.write_bytes(aside / "info.json", json.dumps(info, indent=1).encode())
        manifest = {"format_version": _FORMAT_VERSION, "step": step, "files": files}
        failpoint("manifest")
        torch_dist.write_bytes(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
        _sync_directory(aside)
        failpoint("rename")
        if final.exists() and verify(final) is None:
            logger.info("%s is there already and whole: it stays", final)
            shutil.rmtree(aside)
            return
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _sync_directory(self.root)
        failpoint("renamed")

    def _prune(self) -> None:
        if self.keep is None:
            return
        for step in self.steps()[: -self.keep]:
            _remove(self.root / f"step_{step:08d}")

    def _find_latest(self) -> Path | None:
        candidates = sorted(self.root.glob("step_*"), reverse=True)
        for path in candidates:
            problem = verify(path)
            if problem is None:
                return path
            logger.warning("%s is not used: %s", path, problem)
        if candidates:
            raise CheckpointError(
                f"{self.root} has {len(candidates)} checkpoints and none of them is whole: restore one from a copy, or "
                "start a new run in another folder."
            )
        return None


def verify(path: Path) -> str | None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        path: its folder.

    Returns:
        None when all is as it was written, else what is wrong with which file.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        version, step = manifest["format_version"], manifest["step"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({error!r})"
    if version != _FORMAT_VERSION:
        return f"manifest.json has format_version {version} and this version reads {_FORMAT_VERSION}"
    if path.name != f"step_{step:08d}":
        return f"manifest.json is that of step {step}"
    present = {entry.name for entry in path.iterdir()} - {"manifest.json"}
    if present != files.keys():
        return f"files missing {sorted(files.keys() - present)}, files too many {sorted(present - files.keys())}"
    for name, (num_bytes, sha256) in files.items():
        size = (path / name).stat().st_size
        if size != num_bytes:
            return f"{name} has {size} bytes instead of {num_bytes}"
        digest = hashlib.sha256()
        with (path / name).open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
        if digest.hexdigest() != sha256:
            return f"{name} has other contents than were written (SHA-256 differs)"
    return None


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves none that looks complete."""
    (path / "manifest.json").unlink(missing_ok=True)
    _sync_directory(path)
    failpoint("prune")
    shutil.rmtree(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def together(
    action: str, function: Callable[[], Any], *, only_first: bool = False, cleanup: Path | None = None
) -> list[Any]:
    """Run a function on all ranks (or the first) and fail on all when it fails on one; collective.

    Args:
        action: what it does, for the message: "cannot ...".
        function: its result must be small, as every rank gets those of all.
        only_first: on the first rank only.
        cleanup: folder that the first rank removes after a failure.

    Returns:
        The results of all ranks; of the first rank only, in a list of one, with `only_first`.

    Raises:
        CheckpointError: on every rank, with what went wrong on which.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    result, problem = None, None
    if rank == 0 or not only_first:
        try:
            result = function()
        # torch reports a full disk as RuntimeError, so every error of a write counts.
        except Exception as error:
            logger.debug("cannot %s", action, exc_info=True)
            problem = f"rank {rank}: {error!r}"
    outcomes = [(result, problem)]
    if dist.is_initialized():
        if only_first:
            dist.broadcast_object_list(outcomes, src=0)
        else:
            outcomes = [None] * dist.get_world_size()
            dist.all_gather_object(outcomes, (result, problem))
    problems = [problem for _, problem in outcomes if problem is not None]
    if problems:
        if cleanup is not None and rank == 0:
            shutil.rmtree(cleanup, ignore_errors=True)
        raise CheckpointError(f"cannot {action}: {'; '.join(problems)}")
    return [result for result, _ in outcomes]
