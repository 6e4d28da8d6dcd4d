"""Difficult texts, and short names for what the tests of the preprocessing do often."""

import json
from pathlib import Path

from tools.preprocess import tokenize_corpus
from tools.preprocess.libraries import open_tokenizer
from tools.preprocess.shards import Specification

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🦊",
    " leading and trailing spaces, tabs\tand\n\nblank lines ",
    *(f"Document number {i} says {'very ' * (i % 7)}little." for i in range(300)),
]


def tokenize(corpus, tokenizer, prefix, *options) -> int:
    arguments = ["--input", str(corpus), "--tokenizer", str(tokenizer), "--output-prefix", str(prefix), *options]
    return tokenize_corpus.main(["--append-eod", "--workers", "1", *arguments])


def dataset_bytes(prefix) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def manifest_of(prefix) -> dict:
    return json.loads(Path(f"{prefix}.json").read_text())


def summary_of(prefix) -> dict:
    return json.loads(Path(f"{prefix}.summary.json").read_text())


def json_lines(texts) -> bytes:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def specification_of(tokenizer, **changes) -> Specification:
    """Of the library `tokenizers`, with changes of fields."""
    opened = open_tokenizer(str(tokenizer))
    facts = dict(
        tokenizer=str(tokenizer),
        tokenizer_sha256=opened.sha256,
        vocab_size=opened.vocab_size,
        engine="tokenizers",
        text_key="text",
        tar_field="txt",
        eod_id=0,
        special_in_text="error",
        max_document_bytes=3000,
    )
    return Specification(**facts | changes)
