"""Tokenizers of Hugging Face's library `tokenizers`, as preprocessing and streaming read them."""

from pathlib import Path

from tokenizers import Tokenizer


def read_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; it never truncates or pads, whatever the file says, and no code runs.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file} cannot be read as a tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which a vocabulary with gaps has above its number of tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
