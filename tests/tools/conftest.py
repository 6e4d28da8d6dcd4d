"""A small corpus, its tokenizer and its dataset, made once."""

from pathlib import Path

import pytest

from tests.tools.texts import TEXTS, json_lines, tokenize
from tools.preprocess import train_tokenizer
from tools.preprocess.sources import find_sources


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_bytes(json_lines(TEXTS))
    return path


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_tokenizer.train(find_sources([str(corpus)]), text_key="text", vocab_size=400)
    train_tokenizer.save(trained, folder)
    return folder


@pytest.fixture(scope="session")
def dataset(corpus, tokenizer, tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("dataset") / "text"
    assert tokenize(corpus, tokenizer, prefix) == 0
    return prefix
