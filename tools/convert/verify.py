"""Whether two folders hold the same model: a checkpoint and what it was converted to, or any two that can be read.

    python -m tools.convert.verify runs/mine runs/mine/hf

First the weights under common names, by their hashes; then logits in float32 on the CPU at every position, and where
they differ the first layer whose output does. Each side is computed by code of its own: a checkpoint by the formulas of
this project, gated_deltanet by those of fla's model, the other formats by their models in transformers. Ends with 1
when the models differ or one cannot be read, 2 for wrong arguments.
"""

import argparse
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

import torch
from torch import Tensor

from megatron_gdn.training.restricted import UnsafeCheckpointError
from tools.convert import fla_model, forward, own
from tools.convert.architecture import Architecture
from tools.convert.checkpoint import MegatronCheckpoint
from tools.convert.conversion import Source
from tools.convert.errors import ConvertError
from tools.convert.formats import read_architecture, read_folder_config
from tools.convert.mapping import Link, some
from tools.convert.safetensors_io import SafetensorsFolder

ATOL = 1e-3
"""Two programs in float32 differ by about 1e-5 in logits of size 1, the smallest of known faults by 2e-2."""
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_KERNELS = ("causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule")
_NORM_ROUNDING = 2.0**-23
"""Largest relative error of a norm's weight that was stored less 1 and is near 1."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models.

    name: of its folder.
    architecture: of the model.
    vocab_size: tokens, without padding.
    keys: of its weights, by ours.
    weight: a weight by our key as it is stored, whether norms are stored less 1.
    hidden_states: what its own code computes, see `forward.hidden_states`.
    """

    name: str
    architecture: Architecture
    vocab_size: int
    keys: list[str]
    weight: Callable[[str], Tensor]
    hidden_states: Callable[[Tensor], Iterator[Tensor]]

    def center(self, key: str) -> float:
        """What the norm with this key adds to its weight."""
        if key.endswith("out_norm.weight"):
            return float(self.architecture.zero_centered_out_norm)
        return float(self.architecture.model.zero_centered_norm and key.endswith("norm.weight"))


def open_side(path: Path) -> Side:
    """The model of a folder.

    Raises:
        ConvertError: no checkpoint and no Hugging Face folder that can be read.
    """
    if (path / "config.json").is_file():
        return _open_hugging_face(path)
    checkpoint = MegatronCheckpoint(path)
    architecture, rows = checkpoint.architecture, checkpoint.vocab_size

    def weight(key: str) -> Tensor:
        return checkpoint.read(key)[:rows] if key in _VOCABULARY else checkpoint.read(key)

    return Side(
        name=str(path),
        architecture=architecture,
        vocab_size=rows,
        keys=checkpoint.keys(),
        weight=weight,
        hidden_states=lambda tokens: forward.hidden_states(architecture, weight, tokens),
    )


def _open_hugging_face(path: Path) -> Side:
    config = read_folder_config(path)
    found, architecture = read_architecture(config)
    source = SafetensorsFolder(path)
    links = {key: link for link in found.table(source.keys()).links(architecture) for key in link.ours}

    def states(tokens: Tensor) -> Iterator[Tensor]:
        if found.name == "gated_deltanet":
            return fla_model.hidden_states(config, source.read, tokens)
        return transformers_hidden_states(path, found.name, tokens)

    return Side(
        name=str(path),
        architecture=architecture,
        vocab_size=config["vocab_size"],
        keys=[key for key, link in links.items() if set(link.theirs) <= set(source.keys())],
        weight=lambda key: _ours(links[key], source, key),
        hidden_states=states,
    )


def _ours(link: Link, source: Source, key: str) -> Tensor:
    return dict(zip(link.ours, link.to_ours(*(source.read(name) for name in link.theirs)), strict=True))[key]


def transformers_hidden_states(folder: Path, model_type: str, tokens: Tensor) -> Iterator[Tensor]:
    """As `forward.hidden_states`, from transformers' model of a folder.

    Raises:
        ConvertError: transformers is not installed, or cannot load the folder.
    """
    package = model_type.removesuffix("_text")
    of_ours = model_type == own.MODEL_TYPE
    try:
        import transformers

        name = "megatron_gdn.hf" if of_ours else f"transformers.models.{package}.modeling_{package}"
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConvertError(
            f"transformers is needed to run {model_type} ({error}): pip install -e '.[convert]'"
        ) from None
    outputs: list[Tensor] = []
    with _plain_functions(module), torch.no_grad():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise ConvertError(f"transformers cannot load {folder}: {error}") from error
        for layer in model.decoder.layers if of_ours else model.model.layers:
            layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        embedded = model.get_input_embeddings()(tokens)
        logits = model(tokens, use_cache=False).logits
    yield from (embedded, *outputs, logits)


@contextmanager
def _plain_functions(module: ModuleType) -> Iterator[None]:
    """transformers binds fla's kernels at import where fla is installed, which do not run on a CPU."""
    kept = {name: getattr(module, name) for name in _KERNELS if hasattr(module, name)}
    for name, function in kept.items():
        setattr(module, name, getattr(function, "__wrapped__", function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


def compare_weights(a: Side, b: Side) -> list[str]:
    """Differences between the weights of two models, in words; none: they are equal.

    Numbers are compared in the narrower of the two dtypes that they are stored in. Norms stored in different ways (as
    they are, or less 1) may differ by the rounding of that.
    """
    found = []
    if missing := sorted(set(a.keys) ^ set(b.keys)):
        found.append(f"only one of them has {some(missing)}")
    for key in sorted(set(a.keys) & set(b.keys)):
        x, y = a.weight(key), b.weight(key)
        if x.shape != y.shape:
            found.append(f"{key}: {list(x.shape)} and {list(y.shape)}")
            continue
        if a.center(key) != b.center(key):
            x, y = (value.double() + side.center(key) for value, side in ((x, a), (y, b)))
            if not torch.allclose(x, y, rtol=_NORM_ROUNDING, atol=_NORM_ROUNDING):
                found.append(f"{key}: differs by up to {(x - y).abs().max():.2g}")
            continue
        narrow = min(x.dtype, y.dtype, key=lambda dtype: (dtype.itemsize, str(dtype)))
        if _hash(x.to(narrow)) != _hash(y.to(narrow)):
            found.append(f"{key}: differs by up to {(x.float() - y.float()).abs().max():.2g}")
    return found


def _hash(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How the outputs of two models differ.

    logits: largest difference, at any position.
    agreement: share of positions with the same most likely token.
    layer: number of the first layer whose output differs more than rounding lets it, from 0; -1: the embedding; None:
        no layer's.
    """

    logits: float
    agreement: float
    layer: int | None


@torch.no_grad()
def compare_outputs(a: Side, b: Side, *, num_tokens: int, atol: float) -> Difference:
    """Run both models on the same random tokens.

    Args:
        a, b: the models.
        num_tokens: of the text; more than one chunk of 64.
        atol: largest difference of two logits that counts as equal.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(a.vocab_size, b.vocab_size), (1, num_tokens), generator=generator)
    first, largest, agreement = None, 0.0, 1.0
    states = zip(a.hidden_states(tokens), b.hidden_states(tokens), strict=True)
    number = len(a.architecture.layers)
    for i, (x, y) in enumerate(states):
        if x.shape != y.shape:
            raise ConvertError(f"the outputs have the shapes {list(x.shape)} and {list(y.shape)}.")
        # A difference that is not a number is the largest.
        difference = float((x - y).abs().nan_to_num(torch.inf).max())
        if i <= number and first is None and difference > atol * max(1.0, float(x.std())):
            first = i - 1
        if i == number + 1:
            largest, agreement = difference, float((x.argmax(-1) == y.argmax(-1)).float().mean())
    return Difference(logits=largest, agreement=agreement, layer=first)


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 when the models differ or cannot be read, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("a", type=Path, help="checkpoint, or Hugging Face folder")
    add("b", type=Path, help="checkpoint, or Hugging Face folder")
    add("--tokens", type=int, default=160, help="length of the text, at least 65")
    add("--atol", type=float, default=ATOL, help="largest difference of two logits that counts as equal")
    add("--weights-only", action="store_true", help="compare no logits")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 65:
        parser.error(f"--tokens ({arguments.tokens}) must be at least 65: state is carried from chunk to chunk of 64.")
    try:
        a, b = open_side(arguments.a), open_side(arguments.b)
        if a.vocab_size != b.vocab_size:
            raise ConvertError(f"the vocabularies have {a.vocab_size} and {b.vocab_size} tokens.")
        problems = compare_weights(a, b)
        print(f"weights: {len(a.keys)} under common names, " + ("equal" if not problems else "different"))
        for problem in problems:
            print(f"  {problem}")
        if not arguments.weights_only:
            found = compare_outputs(a, b, num_tokens=arguments.tokens, atol=arguments.atol)
            text = f"logits: largest difference {found.logits:.2g} over {arguments.tokens} positions"
            print(f"{text}, the same most likely token at {found.agreement:.1%}")
            if found.logits > arguments.atol:
                where = {None: "the output layer", -1: "the embedding"}.get(found.layer, f"layer {found.layer}")
                problems.append(f"logits differ by more than {arguments.atol:g}, first at {where}")
                print(f"  {problems[-1]}")
    except (ConvertError, UnsafeCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("different" if problems else "the same model")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
