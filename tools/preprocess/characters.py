"""Which characters two tokenizer libraries take for letters, digits, spaces or symbols alike.

Split patterns of tokenizers are made of such classes, and libraries have tables of different versions of Unicode: for a
character that one of them does not know, they may split, and then tokenize, differently. Each character is tried when
it first appears, with a vocabulary that shows every split next to it.
"""

import json
from collections.abc import Callable

import numpy as np

# Tried together; only those of a group that shows a difference are tried one by one.
_GROUP = 64
# One of each class, whose splits from the character in question tell its class: letters, digit, symbol, spaces, mark.
_NEIGHBOURS = ("a", "A", "1", "!", " ", "\n", "\u0301")
_LEADING, _TRAILING = range(0xC2, 0xF5), range(0x80, 0xC0)  # bytes of UTF-8


class AlikeCharacters:
    """Remembers the characters of the texts that it has seen.

    Args:
        settings: of the tokenizer, as in tokenizer.json, with a byte-level pre-tokenizer.
        reference, engine: make what encodes a text to its ids from the settings of a tokenizer.

    Raises:
        ValueError: the two do not treat ASCII alike.
    """

    def __init__(self, settings: dict, reference: Callable, engine: Callable):
        text = json.dumps(_probe(settings))
        self._encoders = reference(text), engine(text)
        self._alike = np.zeros(0x110000, bool)  # by code point
        self._different: set[str] = set()
        self._try([chr(i) for i in range(128)])
        if self._different:
            raise ValueError(f"it splits text at {sorted(self._different)} in another way")

    def others(self, texts: list[str | bytes]) -> list[int]:
        """Positions of the texts with a character that is not treated alike.

        Args:
            texts: in UTF-8; or as they are, where they hold ASCII only.
        """
        doubtful, new = {}, set()
        for i, text in enumerate(texts):
            if isinstance(text, str):
                continue
            data = np.frombuffer(text, np.uint8)
            rest = data[data >= 0x80].tobytes().decode()  # all characters but those of ASCII
            points = np.frombuffer(rest.encode("utf-32-le"), np.uint32)
            unknown = points[~self._alike[points]]
            if len(unknown):
                doubtful[i] = set(map(chr, np.unique(unknown).tolist()))
                new |= doubtful[i]
        self._try(sorted(new - self._different))
        return [i for i, characters in doubtful.items() if not self._different.isdisjoint(characters)]

    def _try(self, characters: list[str]) -> None:
        for i in range(0, len(characters), _GROUP):
            group = characters[i : i + _GROUP]
            for part in [group] if self._are_alike(group) else [[c] for c in group]:
                if len(part) > 1 or self._are_alike(part):
                    self._alike[[ord(c) for c in part]] = True
                else:
                    self._different.update(part)

    def _are_alike(self, characters: list[str]) -> bool:
        """Whether each is split alike between every two neighbours of a class."""
        texts = (x + "".join(c + x for c in characters) for x in _NEIGHBOURS)
        return all(np.array_equal(*(encode(text) for encode in self._encoders)) for text in texts)


def _probe(settings: dict) -> dict:
    """Settings with the same splitting and a vocabulary of bytes and of pairs of bytes between two characters."""
    letters = byte_letters()
    firsts = sorted({x.encode()[0] for x in _NEIGHBOURS})
    lasts = sorted({x.encode()[-1] for x in _NEIGHBOURS})
    everything = [*firsts, *_LEADING]
    pairs = [(a, b) for a in [*lasts, *_TRAILING] for b in everything]
    merges = list(dict.fromkeys((letters[a], letters[b]) for a, b in pairs))
    vocabulary = {letter: i for i, letter in enumerate([*letters, *("".join(pair) for pair in merges)])}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model |= {"vocab": vocabulary, "merges": [list(pair) for pair in merges]}
    kept = {name: settings.get(name) for name in ("version", "normalizer", "pre_tokenizer", "decoder")}
    return kept | {"truncation": None, "padding": None, "added_tokens": [], "post_processor": None, "model": model}


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies. Source: GPT-2."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, others = [], 0
    for byte in range(256):
        letters.append(chr(byte) if byte in printable else chr(256 + others))
        others += byte not in printable
    return letters
