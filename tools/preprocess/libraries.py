"""Tokenizers of three libraries behind one class each: `tokenizers`, SentencePiece and tiktoken, the references.

`encode` and `encode_as_text` may be called by several threads: all three let go of Python's lock while they compute.
"""

import base64
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megatron_gdn.optional import require
from megatron_gdn.training.tokenizer_json import read_tokenizer, vocabulary_size
from tools.preprocess.sources import ArgumentError

# Token ids of a text, of any integer dtype or as a list.
Ids = np.ndarray | list[int]


class HuggingFaceTokenizer:
    """`tokenizer.json` of a Hugging Face folder; only that file is read, no code runs.

    special_tokens: id of each text that is read as a special token.
    added_tokens: texts that are found before the text is split, special or not.
    vocab_size: one more than the largest id, which a vocabulary with gaps has above its number of tokens.
    sha256: of the file that defines it.
    """

    library = "tokenizers"

    def __init__(self, folder: Path):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads are those of `tokenize_unit`
        self.model = load_tokenizer(folder)
        self.file = folder / "tokenizer.json"
        self.sha256 = hashlib.sha256(self.file.read_bytes()).hexdigest()
        decoder = self.model.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in decoder.items() if token.special}
        self.added_tokens = [token.content for token in decoder.values()]
        if getattr(self.model.model, "dropout", None):
            raise ArgumentError(
                f"{self.file} has dropout {self.model.model.dropout}, which makes ids random: set it to null."
            )
        self.vocab_size = vocabulary_size(self.model)
        self._eos = _eos_token(folder)

    def encode(self, texts: list[str]) -> list[Ids]:
        """Ids of each text, without the tokenizer's own beginning and end; special tokens in it become their ids."""
        return [e.ids for e in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_as_text(self, text: str) -> list[int]:
        """Ids of a text whose special tokens are plain text."""
        return self._as_text.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _as_text(self) -> Tokenizer:
        model = Tokenizer.from_str(self.model.to_str())  # its own: other threads encode with `model` meanwhile
        model.encode_special_tokens = True
        return model

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def end_of_document(self) -> str:
        """Text of the token that ends documents by default."""
        return self._eos or "<|endoftext|>"

    def gigatoken_source(self):
        """What gigatoken.Tokenizer takes."""
        return self.model

    def split_settings(self) -> dict | None:
        """Settings of a byte-level tokenizer, which splits by classes of characters; None for other kinds."""
        settings = json.loads(self.model.to_str())
        return None if settings["model"].get("byte_fallback") else settings


class SentencePieceTokenizer:
    """A SentencePiece model file, such as Llama 2's tokenizer.model. Attributes as in HuggingFaceTokenizer."""

    library = "sentencepiece"

    def __init__(self, file: Path):
        sentencepiece = require("sentencepiece", extra="preprocess", purpose=f"the tokenizer {file}")
        self.file, self.sha256 = file, hashlib.sha256(file.read_bytes()).hexdigest()
        self.added_tokens: list[str] = []
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ArgumentError(f"{file} cannot be read as a SentencePiece model ({error}): fetch it again.") from error
        self.vocab_size = self.model.vocab_size()
        control = [i for i in range(self.vocab_size) if self.model.is_control(i)]
        self.special_tokens = {self.model.id_to_piece(i): i for i in control}

    def encode(self, texts: list[str]) -> list[Ids]:
        """Ids of each text; SentencePiece never reads a control token from text."""
        return self.model.encode(texts, out_type=int, num_threads=1)

    def encode_as_text(self, text: str) -> list[int]:
        return self.model.encode(text, out_type=int)

    def decode(self, ids: list[int]) -> str:
        """Text, with the names of control tokens, which SentencePiece leaves out."""
        parts, plain = [], []
        names = {i: name for name, i in self.special_tokens.items()}
        for i in [*ids, None]:
            if i is None or i in names:
                parts += [self.model.decode(plain), names.get(i, "")]
                plain = []
            else:
                plain.append(i)
        return "".join(parts)

    def token_id(self, token: str) -> int | None:
        found = self.model.piece_to_id(token)
        return None if found == self.model.unk_id() and token != self.model.id_to_piece(found) else found

    def end_of_document(self) -> str:
        return self.model.id_to_piece(self.model.eos_id()) if self.model.eos_id() >= 0 else "</s>"

    def gigatoken_source(self):
        return str(self.file)

    def split_settings(self) -> None:
        """None: SentencePiece splits by its vocabulary alone."""
        return None


class TiktokenTokenizer:
    """An encoding of tiktoken: `tiktoken:NAME` of its registry, or a folder with tiktoken.json and a rank file.

    tiktoken.json: {"ranks": "x.tiktoken", "pattern": "...", "special_tokens": {"<|endoftext|>": 50256}}.
    """

    library = "tiktoken"

    def __init__(self, place: str, *, allow_special: bool = False):
        tiktoken = require("tiktoken", extra="preprocess", purpose=f"the tokenizer {place}")
        try:
            if place.startswith("tiktoken:"):
                self.model = tiktoken.get_encoding(place.removeprefix("tiktoken:"))
            else:
                self.model = self._from_folder(tiktoken, Path(place))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ArgumentError(f"--tokenizer ({place}) is no encoding of tiktoken ({error!r}).") from error
        self._allowed = "all" if allow_special else set()
        self.added_tokens: list[str] = []
        self.special_tokens = {name: self.model.encode_single_token(name) for name in self.model.special_tokens_set}
        self.vocab_size = self.model.n_vocab
        ranks = b"".join(b"%d %s\n" % (len(token), token) for token in self.model.token_byte_values())
        settings = json.dumps([self.model._pat_str, sorted(self.special_tokens.items())])
        self.sha256 = hashlib.sha256(ranks + settings.encode()).hexdigest()

    @staticmethod
    def _from_folder(tiktoken, folder: Path):
        settings = json.loads((folder / "tiktoken.json").read_text())
        ranks = {}
        for line in (folder / settings["ranks"]).read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        return tiktoken.Encoding(
            folder.name,
            pat_str=settings["pattern"],
            mergeable_ranks=ranks,
            special_tokens={str(name): int(i) for name, i in settings["special_tokens"].items()},
        )

    def encode(self, texts: list[str]) -> list[Ids]:
        return self.model.encode_batch(texts, num_threads=1, allowed_special=self._allowed, disallowed_special=())

    def encode_as_text(self, text: str) -> list[int]:
        return self.model.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def token_id(self, token: str) -> int | None:
        try:
            return self.model.encode_single_token(token)
        except KeyError:
            return None

    def end_of_document(self) -> str:
        return "<|endoftext|>"

    def gigatoken_source(self):
        """None: the same split pattern can only be named, not given, to gigatoken."""
        return None


def open_tokenizer(place: str, *, allow_special: bool = False):
    """The tokenizer at a place.

    Args:
        place: folder with tokenizer.json, tokenizer.model or tiktoken.json; a .model file; "tiktoken:NAME".
        allow_special: special tokens in texts become their ids.

    Raises:
        ArgumentError: nothing there that can be read, or a kind that cannot do `allow_special`.
    """
    path = Path(place)
    if place.startswith("tiktoken:") or ((path / "tiktoken.json").is_file() and not _has_json(path)):
        return TiktokenTokenizer(place, allow_special=allow_special)
    model = path / "tokenizer.model" if path.is_dir() else path
    if model.suffix == ".model" and model.is_file() and not _has_json(path):
        if allow_special:
            raise ArgumentError(
                f"--special-in-text allow does nothing with {model}: SentencePiece never reads special tokens from "
                "text, use escape."
            )
        return SentencePieceTokenizer(model)
    return HuggingFaceTokenizer(path)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder; only `tokenizer.json` is read, no code runs.

    It never truncates or pads, whatever the file says.

    Raises:
        ArgumentError: no `tokenizer.json`, or one that cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ArgumentError(
            f"--tokenizer ({folder}) must be a folder with tokenizer.json (tokenizers that need code of their own are "
            "not run): make one with python -m tools.preprocess.train_tokenizer, or save a fast tokenizer of "
            "Hugging Face."
        )
    try:
        return read_tokenizer(path)
    except ValueError as error:
        raise ArgumentError(f"{error}: save it again.") from error


def _has_json(path: Path) -> bool:
    return (path / "tokenizer.json").is_file()


def _eos_token(folder: Path) -> str | None:
    """`eos_token` of tokenizer_config.json."""
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return None
    try:
        token = json.loads(settings.read_text()).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ArgumentError(f"{settings} is not a JSON object ({error}): save the tokenizer again.") from error
    return token["content"] if isinstance(token, dict) else token
