"""One conversion: links applied to a source, tensor by tensor, with what it will take known before it starts."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from tools.convert.errors import ConvertError
from tools.convert.mapping import Link
from tools.convert.safetensors_io import Planned

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# Beyond the tensors: buffers of files, Python's objects for some ten thousand names.
_OVERHEAD_BYTES = 100 * 2**20


class Source(Protocol):
    """Tensors by name, none of them read before it is asked for."""

    @property
    def fingerprint(self) -> list: ...
    def keys(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...


class Conversion:
    """Links in one direction.

    Args:
        links: of the model.
        source: of the side that is read.
        to: the side that is written.
        dtype: of the weights; None keeps each one's. A_log, dt_bias and the norm of Gated DeltaNet's output are written
            in float32, other norms never in less than they have.
        vocab_size: rows of embedding and output; further ones of the source are left out.

    Raises:
        ConvertError: weights whose shapes do not fit, or that are no floating-point numbers.
    """

    def __init__(
        self,
        links: Iterable[Link],
        source: Source,
        *,
        to: Literal["ours", "theirs"],
        dtype: torch.dtype | None,
        vocab_size: int | None = None,
    ):
        self.source, self.to, self.dtype, self.vocab_size = source, to, dtype, vocab_size
        self._links: dict[str, Link] = {}
        self._waiting: dict[str, Tensor] = {}
        self.tensors: list[Planned] = []
        self.peak_bytes = 0
        """Most that the tensors of a link take while it is converted."""
        for link in links:
            planned = self._plan(link)
            self.tensors += planned
            self._links |= {tensor.name: link for tensor in planned}

    @property
    def num_bytes(self) -> int:
        """Of all tensors that will be written."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def _sides(self, link: Link) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (link.ours, link.theirs) if self.to == "theirs" else (link.theirs, link.ours)

    def _apply(self, link: Link, sources: list[Tensor]) -> tuple[Tensor, ...]:
        return (link.to_theirs if self.to == "theirs" else link.to_ours)(*sources)

    def _plan(self, link: Link) -> list[Planned]:
        """From an empty run of the conversion: tensors without contents."""
        inputs, outputs = self._sides(link)
        stored = [self.source.dtype(name) for name in inputs]
        if not all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in stored):
            raise ConvertError(
                f"{inputs[0]} ({stored[0]}) must hold float32, bfloat16 or float16: no rule scales others."
            )
        sources = [
            torch.empty(self._shape(name), dtype=d, device="meta") for name, d in zip(inputs, stored, strict=True)
        ]
        try:
            found = self._apply(link, sources)
        except RuntimeError as error:
            raise ConvertError(f"{', '.join(inputs)} have not the shapes of their configuration: {error}") from error
        dtype = self._target_dtype(link, stored)
        planned = [
            Planned(name=name, shape=tuple(x.shape), dtype=dtype) for name, x in zip(outputs, found, strict=True)
        ]
        read = sum(x.numel() * x.dtype.itemsize for x in sources)
        self.peak_bytes = max(self.peak_bytes, read + (0 if len(inputs) == 1 else sum(p.num_bytes for p in planned)))
        return planned

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.source.shape(name)
        if self.vocab_size is None or name not in _VOCABULARY:
            return shape
        if shape[0] < self.vocab_size:
            raise ConvertError(f"{name} has {shape[0]} rows, and the vocabulary {self.vocab_size} tokens.")
        return (self.vocab_size, *shape[1:])

    def _target_dtype(self, link: Link, stored: list[torch.dtype]) -> torch.dtype:
        if link.keep_float32:
            return torch.float32
        widest = stored[0]
        for dtype in stored[1:]:
            widest = torch.promote_types(widest, dtype)
        if self.dtype is None:
            return widest
        return torch.promote_types(widest, self.dtype) if link.is_norm else self.dtype

    def read(self, name: str) -> Tensor:
        """A tensor that is written, in the dtype of its source; those that come with it wait until they are asked for.

        Raises:
            ConvertError: the gates are not finite.
        """
        if name not in self._waiting:
            link = self._links[name]
            inputs, outputs = self._sides(link)
            sources = [self.source.read(key)[: self._shape(key)[0]] for key in inputs]
            if link.keep_float32:
                sources = [x.float() for x in sources]
                for key, x in zip(inputs, sources, strict=True):
                    # transformers 5 with fla before 2026-02 wrote log(A_log).
                    if not x.isfinite().all():
                        raise ConvertError(f"{key} holds values that are not finite: the checkpoint is damaged.")
            self._waiting |= dict(zip(outputs, self._apply(link, sources), strict=True))
        return self._waiting.pop(name)

    def describe(self) -> list[str]:
        """A line for each link: what is read, how, what is written."""
        planned = {tensor.name: tensor for tensor in self.tensors}
        lines = []
        for link in dict.fromkeys(self._links.values()):
            inputs, outputs = self._sides(link)
            written = ", ".join(str(planned[name]) for name in outputs)
            lines.append(f"{', '.join(inputs)}  ->  {written}  ({link.rule})")
        return lines


class Progress:
    """A bar of bytes with rate and time left, and the tensors behind it.

    Args:
        conversion: whose tensors are written.
        quiet: no bar.
        done: bytes that an earlier start has written.
    """

    def __init__(self, conversion: Conversion, *, done: int = 0):
        options = dict(unit="B", unit_scale=True, smoothing=0.05, disable=None)  # None: where nobody watches
        self._conversion, self._bar = conversion, tqdm(total=conversion.num_bytes, initial=done, **options)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()

    def read(self, name: str) -> Tensor:
        """As `Conversion.read`."""
        found = self._conversion.read(name)
        self._bar.update(found.nbytes)
        return found


def print_plan(conversion: Conversion, output: Path) -> None:
    """Everything that a conversion will do: the map, bytes, disk, memory."""
    print("\n".join(conversion.describe()))
    free = free_bytes(output)
    print(
        f"writes {conversion.num_bytes:,} bytes ({free / 1e6:.0f} MB are free), reads one group of tensors at a time: "
        f"at most about {(conversion.peak_bytes + _OVERHEAD_BYTES) / 1e6:.0f} MB of memory beyond Python's"
    )


def check_space(conversion: Conversion, aside: Path, *, written: int) -> None:
    """Raise ConvertError when the disk has not the space for what is still to be written.

    Args:
        conversion: what is to be written.
        aside: folder that it is written to; removed on an error when nothing in it is whole.
        written: bytes that are there already.
    """
    needed, free = conversion.num_bytes - written, free_bytes(aside)
    if needed > free:
        if written == 0:
            shutil.rmtree(aside)
        raise ConvertError(
            f"{aside} needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB: free some, or name a folder "
            "on another disk."
        )


def free_bytes(path: Path) -> int:
    """Of the disk that the path is or will be on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


# What a folder holds that a conversion has written, or training.
_REPLACEABLE = ("config.json", "step_*", "iter_*", "release", ".metadata")


def check_output(output: Path, *, source: Path, overwrite: bool) -> None:
    """Raise ConvertError when the folder is there and not to be replaced, or is no folder.

    Args:
        output: to be written.
        source: what is read; never replaced.
        overwrite: the user wants a model or checkpoint that is there to go.
    """
    if output.name in ("", ".."):
        raise ConvertError(f"--output ({output}) must be the name of a folder to make.")
    if output.exists() and not output.is_dir():
        raise ConvertError(f"--output ({output}) must be a folder: name another.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ConvertError(f"--output ({output}) is not empty: name another folder, or --overwrite replaces it.")
    if source.resolve().is_relative_to(output.resolve()):
        raise ConvertError(f"--output ({output}) holds what is converted ({source}): name another folder.")
    if not any(found for pattern in _REPLACEABLE for found in output.glob(pattern)):
        raise ConvertError(
            f"--output ({output}) holds neither a model nor a checkpoint, and --overwrite replaces nothing else: name "
            "another folder."
        )


def replace_folder(aside: Path, output: Path) -> None:
    """Give a complete folder its name; what had it goes first."""
    if output.exists():
        shutil.rmtree(output)
    aside.replace(output)
