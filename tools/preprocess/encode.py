"""Text to token ids: a faster engine than a tokenizer's own library, where it gives the same ids.

gigatoken computes the ids of most tokenizers many times faster; it is used only after it gave the reference's ids on a
sample and on texts made to be difficult.
"""

import ctypes
from importlib.metadata import version

import numpy as np
import psutil
from tokenizers import Tokenizer

from megatron_gdn.optional import MissingPackageError, require
from tools.preprocess.characters import AlikeCharacters
from tools.preprocess.difficult_texts import difficult_texts
from tools.preprocess.libraries import Ids
from tools.preprocess.sources import ArgumentError

ENGINES = ("auto", "gigatoken", "reference")


class Gigatoken:
    """gigatoken's engine for a tokenizer, on the calling thread.

    Texts with characters that it splits from others in another way than the reference are left to the reference. Its
    cache of words has no limit, so the engine is made anew when the process has grown.

    Raises:
        ValueError: gigatoken cannot take this tokenizer.
    """

    # Doubling its table takes three times as much for a moment.
    max_growth_mb = 80

    def __init__(self, reference):
        self._gigatoken = require("gigatoken", extra="preprocess", purpose="--engine gigatoken")
        self._reference, self._process = reference, psutil.Process()
        if reference.gigatoken_source() is None:
            raise ValueError(f"it cannot take encodings of {reference.library}")
        self._characters = None
        try:
            self._start()
            settings = reference.split_settings()
            if settings is not None:
                self._characters = AlikeCharacters(settings, _reference_probe, self._probe)
        except Exception as error:  # a RuntimeError, or what its converter raises
            raise ValueError(f"it refuses this tokenizer ({error})") from error

    def encode(self, texts: list[str]) -> list[Ids]:
        """Ids of each text."""
        # UTF-8 once, for the engine and for the characters; ASCII is that already.
        encoded = [text if text.isascii() else text.encode() for text in texts]
        # One by one: its batches come as arrays of a library that takes longer to import than a million tokens.
        ids = [self._encode(text) for text in encoded]
        if self._rss_mb() - self._rss_mb_at_start > self.max_growth_mb:
            self._start()
        for i in self._characters.others(encoded) if self._characters else ():
            ids[i] = self._reference.encode([texts[i]])[0]
        return ids

    def _start(self) -> None:
        self._encode = None  # first, or both would be in memory
        _return_freed_memory()
        self._encode = self._gigatoken.Tokenizer(self._reference.gigatoken_source()).encode
        self._encode("a")
        self._rss_mb_at_start = self._rss_mb()

    def _rss_mb(self) -> float:
        return self._process.memory_info().rss / 1e6

    def _probe(self, settings: str):
        return self._gigatoken.Tokenizer.from_json(settings).encode


def _return_freed_memory() -> None:
    """To the system, which glibc does unasked only from the end of its heap; other C libraries have no such call."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _reference_probe(settings: str):
    model = Tokenizer.from_str(settings)
    return lambda text: model.encode(text).ids


class SpecialTokens:
    """Finds special tokens in texts, fast where there are none."""

    def __init__(self, tokens: list[str]):
        # Searching for one character is many times faster than for two, and most texts have none of the rarer ones.
        common = set.intersection(*map(set, tokens)) if tokens else ()
        self._common = min(common, key=lambda c: "|<>[]".find(c) % 6, default="")
        self._by_start: dict[str, list[str]] = {}
        for token in tokens:
            self._by_start.setdefault(token[:2], []).append(token)

    def find(self, text: str) -> str | None:
        """A special token that the text contains."""
        if self._common not in text:
            return None
        for start, tokens in self._by_start.items():
            if start in text:
                for token in tokens:
                    if token in text:
                        return token
        return None


def choose_engine(reference, name: str, sample: list[str]) -> tuple[str, str]:
    """Which engine to use, and why.

    Args:
        reference: from `open_tokenizer`.
        name: one of ENGINES.
        sample: some texts of the corpus.

    Returns:
        "gigatoken" or the name of the reference's library, and the reason, for the log.

    Raises:
        ArgumentError: gigatoken was named and cannot be used, or gives other ids.
    """
    if name == "reference":
        return reference.library, "as --engine says"
    try:
        texts = sample + difficult_texts(reference.added_tokens)
        reason = _difference(reference, Gigatoken(reference), texts)
        if reason is None:
            return "gigatoken", f"the same ids as {reference.library} on {len(texts)} texts"
    except (ValueError, MissingPackageError) as error:
        reason = str(error)
    if name == "gigatoken":
        raise ArgumentError(f"--engine gigatoken: {reason}: use --engine reference.")
    return reference.library, f"gigatoken: {reason}"


def engine_version(engine: str) -> str:
    """Name and version of an engine's package."""
    return f"{engine} {version(engine)}"


def _difference(reference, engine, texts: list[str]) -> str | None:
    """Where an engine's ids differ from the reference's; None when they do not."""
    for text, expected, found in zip(texts, reference.encode(texts), engine.encode(texts), strict=True):
        if not np.array_equal(expected, found):
            return f"other ids than {reference.library} for {text[:40]!r}"
    return None
