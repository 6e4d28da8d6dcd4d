"""Training tokenizers: deterministic, exact, loadable in transformers, clear about wrong input."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.tools.texts import TEXTS
from tools.preprocess import train_tokenizer
from tools.preprocess.libraries import load_tokenizer

ROOT = Path(__file__).parents[2]


def test_trained_tokenizer_is_deterministic_and_loads_in_transformers(corpus, tmp_path):
    command = [sys.executable, "-m", "tools.preprocess.train_tokenizer", "--input", str(corpus), "--vocab-size", "300"]
    for name in ("a", "b"):
        subprocess.run([*command, "--output", str(tmp_path / name)], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    transformers = pytest.importorskip("transformers", reason="extra convert")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    ours = load_tokenizer(tmp_path / "a")
    for text in TEXTS[:3]:
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.eos_token_id == ours.token_to_id("<|endoftext|>")


def test_small_corpus_gives_fewer_ids(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("aaaa bbbb")
    arguments = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "tokenizer"), "--vocab-size", "5000"]
    assert train_tokenizer.main(arguments) == 0
    size = load_tokenizer(tmp_path / "tokenizer").get_vocab_size()
    assert f"{size} ids; the text has no more of the 5000 asked for" in capsys.readouterr().out and size < 300


def test_fields_of_tar_samples_are_those_of_lines(tmp_path):
    texts = ["aaaa bbbb", "abab abab"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, text in enumerate(texts):
            content = json.dumps({"body": text}).encode()
            member = tarfile.TarInfo(f"{i}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for name in ("a.jsonl", "a.tar"):
        to = ["--output", str(tmp_path / name[2:]), "--vocab-size", "262", "--text-key", "body", "--tar-field", "json"]
        assert train_tokenizer.main(["--input", str(tmp_path / name), *to]) == 0
    ours, theirs = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("tar", "jsonl"))
    assert ours == theirs


def test_too_long_a_line_names_no_option_of_another_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "_MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "aaaa " * 500}) + "\n")
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "tokenizer"), "--vocab-size", "300"]
    assert train_tokenizer.main(arguments) == 1
    expected = f"error: {tmp_path / 'a.jsonl'} line 1: longer than 0.001 MB: cut it into documents.\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--vocab-size", "257"], 2, "--vocab-size (257) must be at least 258"),
        (["--input", "nothing*.jsonl"], 2, "--input (nothing*.jsonl) names no file"),
        (["--text-key", "body"], 1, "corpus.jsonl line 1: no text under --text-key (body); the record has: text, id"),
        (["--output", __file__], 2, "test_train_tokenizer.py) must be a folder"),
        (["--output", f"{__file__}/x"], 2, f"cannot be made in {__file__}: name another folder"),
    ],
)
def test_wrong_arguments(corpus, tmp_path, capsys, options, code, message):
    arguments = ["--input", str(corpus), "--output", str(tmp_path / "tokenizer"), "--vocab-size", "300", *options]
    assert train_tokenizer.main(arguments) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
