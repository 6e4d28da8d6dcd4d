"""Weights of another format to a torch_dist checkpoint of this project, or of Megatron-LM."""

import argparse
import shutil
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_gdn.version import __version__
from tools.convert.architecture import Architecture, check_shapes, layer_key
from tools.convert.conversion import (
    DTYPES,
    Conversion,
    Progress,
    Source,
    check_output,
    check_space,
    print_plan,
    replace_folder,
)
from tools.convert.errors import ConvertError
from tools.convert.mapping import Table, check_complete, matching
from tools.convert.megatron_lm import args_of_architecture, name_in_megatron_lm, our_key
from tools.convert.tokenizer import copy_tokenizer
from tools.convert.torch_dist_writer import CheckpointWriter

TARGETS = ("megatron_gdn", "megatron_lm")
# Linear layers beside which Megatron keeps a state.
_MLP = ("mlp.linear_fc1", "mlp.linear_fc2")
_STATEFUL = {
    "G": ("self_attention.in_proj", "self_attention.in_proj_ba", "self_attention.out_proj"),
    "M": ("self_attention.in_proj", "self_attention.in_proj_dt", "self_attention.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "S": ("self_attention.linear_qkv", "self_attention.linear_proj"),
}


@dataclass(kw_only=True)
class Import:
    """One conversion to a checkpoint.

    source: tensors of the other side.
    table: of its names.
    architecture: of the model.
    target: an entry of TARGETS.
    dtype: of the weights; None keeps each one's.
    source_name: format of the source.
    sequence_length: longest text that the model was made for, tokens.
    special_tokens: ids of bos, eos and pad by their names in a Hugging Face configuration.
    drop: shell patterns of their names that may be left out.
    """

    source: Source
    table: Table
    architecture: Architecture
    target: str
    dtype: torch.dtype | None
    source_name: str
    sequence_length: int
    special_tokens: dict[str, Any] = field(default_factory=dict)
    drop: Collection[str] = ()

    def __post_init__(self):
        if self.target == "megatron_lm":
            zero_centered = self.architecture.model.zero_centered_norm
            self.architecture = replace(self.architecture, zero_centered_out_norm=zero_centered)
        elif self.architecture.experts is not None:
            raise ConvertError(
                "the model has experts, which this project's training has not: --for megatron_lm writes a checkpoint "
                "that Megatron-LM reads."
            )
        links = self.table.links(self.architecture)
        present = set(self.source.keys())
        self.left_out = {name: "--drop" for name in matching(present, self.drop)}
        for pattern, reason in self.table.ignored.items():
            self.left_out |= dict.fromkeys(matching(present, [pattern]), reason)
        if self.architecture.model.tie_embeddings:
            self._leave_out_copy(present)
        check_complete(links, theirs=present - set(self.left_out))
        self.conversion = Conversion(links, self.source, to="ours", dtype=self.dtype)
        shapes = {tensor.name: tensor.shape for tensor in self.conversion.tensors}
        check_shapes(self.architecture, shapes)
        rows, vocabulary = shapes["embedding.word_embeddings.weight"][0], self.architecture.model.vocab_size
        if rows != vocabulary:
            raise ConvertError(f"the embedding has {rows} rows, and the configuration says vocab_size {vocabulary}.")

    def _leave_out_copy(self, present: set[str]) -> None:
        """The output layer of a tied model is a copy of the embedding, or something is wrong."""
        embedding, output = self.table.model[0].theirs, self.table.output[0].theirs
        if output not in present:
            return
        if embedding in present and not torch.equal(self.source.read(embedding), self.source.read(output)):
            raise ConvertError(
                f"{output} differs from {embedding}, and the configuration says that they are one (tied): set "
                "tie_word_embeddings to false if the model has both."
            )
        self.left_out[output] = f"a copy of {embedding}"

    def writer(self, output: Path) -> CheckpointWriter:
        """Of the checkpoint's folder below a folder."""
        tensors, step = self.conversion.tensors, "step_00000000"
        common: dict[str, Any] = {}
        if self.target == "megatron_lm":
            tensors = [replace(tensor, name=name_in_megatron_lm(tensor.name, self.architecture)) for tensor in tensors]
            common = {
                "args": args_of_architecture(self.architecture, self.sequence_length),
                "iteration": 0,
                "checkpoint_version": 3.0,
            }
            step = "release"
        info = self._info() if self.target == "megatron_gdn" else None
        return CheckpointWriter(
            folder=output / step, tensors=tensors, objects=self._objects(), common=common, info=info
        )

    def read(self, progress: Progress, name: str) -> Tensor:
        """A tensor by its name in the checkpoint."""
        return progress.read(our_key(name))

    def _objects(self) -> list[str]:
        """Keys of the states that Megatron keeps beside linear layers."""
        keys = []
        for i, layer in enumerate(self.architecture.layers):
            names = list(_STATEFUL[layer.symbol])
            if self.target == "megatron_lm":
                names = [name for name in names if not name.endswith("in_proj_ba")]
            if layer.mlp and not self.architecture.has_experts(i):
                names += _MLP
            keys += [f"{layer_key(i, name)}._extra_state/shard_0_1" for name in names]
            if self.architecture.has_experts(i):
                E = self.architecture.experts.num_experts
                parts = [f"experts.experts.{fc}._extra_state/shard_{e}_{E}" for fc in _FC for e in range(E)]
                parts += [f"shared_experts.{fc}._extra_state/shard_0_1" for fc in _FC]
                keys += [layer_key(i, f"mlp.{part}") for part in parts]
        return keys

    def _info(self) -> dict[str, Any]:
        """What the checkpoint says of itself."""
        eod = self.special_tokens.get("eos_token_id")
        return {
            "version": __version__,
            "step": 0,
            "source": self.source_name,
            "vocabulary": {
                "size": self.architecture.model.vocab_size,
                "eod_id": eod[0] if isinstance(eod, list) else eod,
            },
            "special_tokens": self.special_tokens,
            "config": {
                "model": asdict(self.architecture.model),
                "training": {"sequence_length": self.sequence_length},
            },
        }


_FC = ("linear_fc1", "linear_fc2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that writes a checkpoint."""
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the checkpoint to write")
    add("--for", dest="target", choices=TARGETS, default="megatron_gdn", help="who will read it")
    add("--dtype", choices=list(DTYPES), default="keep", help="of the weights; gates and norms are not narrowed")
    add("--drop", action="append", default=[], metavar="PATTERN", help="weights that may be left out, such as 'mtp.*'")
    add("--dry-run", action="store_true", help="print the map, bytes, disk and memory; write nothing")
    add("--overwrite", action="store_true", help="replace the output folder")
    add("--resume", action="store_true", help="go on after a kill")


def run(found: Import, arguments: argparse.Namespace, *, source: Path, tokenizer: Path | None) -> None:
    """Carry out what the options of `add_arguments` say.

    Args:
        found: what to write.
        arguments: the options.
        source: what is read.
        tokenizer: folder whose tokenizer and generation settings go along; None: there is none.
    """
    output, conversion = arguments.output, found.conversion
    for name, reason in found.left_out.items():
        print(f"left out: {name} ({reason})")
    check_output(output, source=source, overwrite=arguments.overwrite)
    if arguments.dry_run:
        print_plan(conversion, output)
        return
    aside = output.with_name(output.name + ".partial")
    if not arguments.resume:
        shutil.rmtree(aside, ignore_errors=True)
    writer = found.writer(aside)
    done = writer.begin(found.source.fingerprint, resume=arguments.resume)
    check_space(conversion, aside, written=done)
    with Progress(conversion, done=done) as progress:
        writer.write(lambda name: found.read(progress, name))
    if arguments.target == "megatron_lm":
        (aside / "latest_checkpointed_iteration.txt").write_text("release")
    if tokenizer is not None:
        copy_tokenizer(tokenizer, aside / "tokenizer", vocab_size=found.architecture.model.vocab_size)
    replace_folder(aside, output)


def report(found: Import, arguments: argparse.Namespace) -> None:
    """The last line of a command."""
    verb = "would hold" if arguments.dry_run else "holds"
    tensors, size = len(found.conversion.tensors), found.conversion.num_bytes / 1e6
    print(f"{arguments.output} {verb} {tensors} tensors, {size:.1f} MB, from {found.source_name}", file=sys.stdout)
