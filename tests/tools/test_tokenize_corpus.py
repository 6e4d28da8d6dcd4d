"""Text to indexed binaries and back: against Megatron's builder, at any number of workers, with bad input, killed."""

import gzip
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_gdn.training.indexed import DatasetError, check_dataset
from tests.tools.texts import TEXTS, dataset_bytes, tokenize
from tools.preprocess import tokenize_corpus
from tools.preprocess.encode import load_tokenizer
from tools.preprocess.indexed import DatasetWriter

ROOT = Path(__file__).parents[2]


def test_output_equals_megatrons_builder(dataset, tokenizer, tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = load_tokenizer(tokenizer)
    builder = IndexedDatasetBuilder(str(tmp_path / "direct.bin"), dtype=DType.optimal_dtype(encoder.get_vocab_size()))
    for text in TEXTS:
        ids = [*encoder.encode(text).ids, encoder.token_to_id("<|endoftext|>")]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "direct.idx"))
    assert dataset_bytes(dataset) == dataset_bytes(tmp_path / "direct")


def test_documents_come_back(dataset, tokenizer):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    decoder = load_tokenizer(tokenizer)
    documents = IndexedDataset(str(dataset))
    assert [decoder.decode(documents[i][:-1].tolist()) for i in range(len(documents))] == TEXTS


def test_manifest_tells_the_truth(dataset, tokenizer, corpus):
    import hashlib

    manifest = json.loads(Path(f"{dataset}.json").read_text())
    tokens = np.fromfile(f"{dataset}.bin", dtype=manifest["dtype"])
    assert manifest["documents"] == len(TEXTS) and manifest["tokens"] == len(tokens)
    assert manifest["max_token_id"] == tokens.max()
    for data, suffix in zip(dataset_bytes(dataset), ("bin", "idx"), strict=True):
        assert manifest["files"][suffix] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["tokenizer_sha256"] == hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["sources"][0]["sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()


def test_workers_do_not_change_the_output(corpus, tokenizer, dataset, tmp_path):
    assert tokenize(corpus, tokenizer, tmp_path / "two", "--workers", "2") == 0
    assert dataset_bytes(tmp_path / "two") == dataset_bytes(dataset)


@pytest.mark.parametrize("suffix, opener", [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_input_equals_plain(corpus, tokenizer, dataset, tmp_path, suffix, opener):
    with opener(tmp_path / f"corpus.jsonl{suffix}", "wb") as file:
        file.write(corpus.read_bytes())
    assert tokenize(tmp_path / f"corpus.jsonl{suffix}", tokenizer, tmp_path / "out") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)


def test_text_files_are_documents(tokenizer, dataset, tmp_path):
    for i, text in enumerate(TEXTS[:3]):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    assert tokenize(tmp_path / "*.txt", tokenizer, tmp_path / "out") == 0
    expected = np.fromfile(f"{dataset}.bin", dtype=np.uint16)
    ours = np.fromfile(tmp_path / "out.bin", dtype=np.uint16)
    assert len(ours) > 30 and np.array_equal(ours, expected[: len(ours)])


def test_validation_documents_are_apart_and_none_is_lost(corpus, tokenizer, dataset, tmp_path):
    options = ["--validation-prefix", str(tmp_path / "validation"), "--validation-percent", "20"]
    assert tokenize(corpus, tokenizer, tmp_path / "train", *options) == 0
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    parts = [IndexedDataset(str(tmp_path / name)) for name in ("train", "validation")]
    whole = IndexedDataset(str(dataset))
    seen = sorted(part[i].tobytes() for part in parts for i in range(len(part)))
    assert seen == sorted(whole[i].tobytes() for i in range(len(whole)))
    # 303 documents, each with probability 0.2: 4 standard deviations
    assert abs(len(parts[1]) - 0.2 * len(TEXTS)) < 4 * (0.16 * len(TEXTS)) ** 0.5


BAD_LINES = {
    "not json": (b'{"text": "cut', r"line 2: not JSON .*: every line must be one whole JSON object"),
    "a control character": (b'{"text": "a\x00b"}', r"line 2: not JSON \(Invalid control character"),
    "nested too deep": (b'{"text": ' + b"[" * 100000, r"line 2: not JSON \(maximum recursion depth"),
    "half a character": (b'{"text": "a\\ud83d"}', r"line 2: half a character \(\\ud83d\)"),
    "wrong key": (b'{"body": "x"}', r"line 2: no text under --text-key \(text\); the line has: body"),
    "null": (b'{"text": null}', r"line 2: no text under --text-key"),
    "not an object": (b"[1]", r"line 2: no text under --text-key"),
    "not utf-8": (b'{"text": "\xff"}', r"line 2: not UTF-8 \(invalid start byte at byte 10\): convert it to UTF-8"),
    "empty": (b'{"text": " "}', r"line 2: empty text"),
    "special": (b'{"text": "a <|endoftext|> b"}', r"line 2: the text contains the special token <\|endoftext\|>"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_fails_or_is_skipped(name, tokenizer, tmp_path, capsys):
    line, message = BAD_LINES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
    assert tokenize(path, tokenizer, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert re.search(f"^error: {re.escape(str(path))} {message}", errors) and "--on-error skip leaves" in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl"]
    assert tokenize(path, tokenizer, tmp_path / "out", "--on-error", "skip") == 0
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert (manifest["documents"], manifest["skipped"]) == (2, 1)
    path.write_bytes(b'{"text": "first"}\n{"text": "last"}\n')
    assert tokenize(path, tokenizer, tmp_path / "clean") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(tmp_path / "clean")


def test_special_tokens_in_text_as_told(tokenizer, tmp_path):
    path = tmp_path / "special.jsonl"
    path.write_text(json.dumps({"text": "a <|endoftext|> b"}) + "\n")
    end = load_tokenizer(tokenizer).token_to_id("<|endoftext|>")
    for policy, ends in (("escape", 1), ("allow", 2)):
        assert tokenize(path, tokenizer, tmp_path / policy, "--special-in-text", policy) == 0
        ids = np.fromfile(tmp_path / f"{policy}.bin", dtype=np.uint16)
        assert (ids == end).sum() == ends
        assert load_tokenizer(tokenizer).decode(ids[:-1].tolist(), skip_special_tokens=False) == "a <|endoftext|> b"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--input", "nothing*.jsonl"], "--input (nothing*.jsonl) names no file"),
        (["--tokenizer", "nowhere"], "--tokenizer (nowhere) must be a folder with tokenizer.json"),
        (["--workers", "0"], "--workers (0) must be at least 1"),
        (["--validation-percent", "100"], "--validation-percent (100.0) must be"),
        (["--validation-percent", "3"], "--validation-prefix and --validation-percent go together"),
        (["--eod-token", "<end>"], "--eod-token (<end>) must be a token of"),
        (["--output-prefix", "/"], "--output-prefix (/) must not be a folder"),
    ],
)
def test_wrong_arguments(corpus, tokenizer, tmp_path, capsys, options, message):
    assert tokenize(corpus, tokenizer, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def middle_flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], middle_flipped], ids=["cut", "flipped"])
def test_broken_compression_fails_under_every_policy(corpus, tokenizer, tmp_path, capsys, suffix, compress, damage):
    path = tmp_path / f"broken.jsonl{suffix}"
    path.write_bytes(damage(compress(corpus.read_bytes())))
    assert tokenize(path, tokenizer, tmp_path / "out", "--on-error", "skip") == 1
    assert re.search(rf"{path.name}( after line \d+)?: .*: the file is cut or cannot be read", capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unknown_format(tokenizer, tmp_path, capsys):
    (tmp_path / "table.csv").write_text("a,b")
    assert tokenize(tmp_path / "table.csv", tokenizer, tmp_path / "out") == 2
    assert "must be one of .jsonl, .jsonl.gz" in capsys.readouterr().err


@pytest.mark.parametrize("name, content", [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.txt", b""), ("a.txt", b" \n")])
def test_empty_file_is_a_bad_record(tokenizer, tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "some text"}\n')
    assert tokenize(tmp_path / "*.*", tokenizer, tmp_path / "out/text") == 1
    assert f"{tmp_path / name}: empty text" in capsys.readouterr().err
    assert tokenize(tmp_path / "*.*", tokenizer, tmp_path / "out/text", "--on-error", "skip") == 0
    manifest = json.loads((tmp_path / "out/text.json").read_text())
    assert (manifest["documents"], manifest["skipped"]) == (1, 1)


def test_no_document_left_is_an_error(tokenizer, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    assert tokenize(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", "--on-error", "skip") == 1
    assert "out would have no documents: check --input" in capsys.readouterr().err


def test_line_ends_and_byte_order_mark_do_not_matter(corpus, tokenizer, dataset, tmp_path):
    lines = corpus.read_bytes().splitlines()
    (tmp_path / "other.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    assert tokenize(tmp_path / "other.jsonl", tokenizer, tmp_path / "out") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)


def changed_tokenizer(tokenizer: Path, folder: Path, change) -> Path:
    settings = json.loads((tokenizer / "tokenizer.json").read_text())
    change(settings)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    return folder


def test_tokenizer_never_truncates(corpus, tokenizer, dataset, tmp_path):
    """A tokenizer saved with truncation and padding would cut every document, and fill short ones."""

    def truncate_and_pad(settings):
        settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        settings["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
        settings["padding"] |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|pad|>"}

    other = changed_tokenizer(tokenizer, tmp_path / "tokenizer", truncate_and_pad)
    assert tokenize(corpus, other, tmp_path / "out") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)


def test_vocabulary_with_a_gap_is_stored_wide_enough(corpus, tokenizer, dataset, tmp_path):
    """400 tokens, and one of them has an id that 16 bits cannot hold."""

    def move_last_token(settings):
        vocabulary = settings["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 70000

    other = changed_tokenizer(tokenizer, tmp_path / "tokenizer", move_last_token)
    assert tokenize(corpus, other, tmp_path / "out") == 0
    ids, plain = np.fromfile(tmp_path / "out.bin", dtype=np.int32), np.fromfile(f"{dataset}.bin", dtype=np.uint16)
    assert np.array_equal(ids, np.where(plain == 399, 70000, plain.astype(np.int32))) and ids.max() == 70000
    assert json.loads((tmp_path / "out.json").read_text())["vocab_size"] == 70001


def test_unreadable_tokenizers(corpus, tokenizer, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenization_own.py").write_text("raise SystemExit('code of a tokenizer ran')")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "tokenization_own.Own"}}')
    assert tokenize(corpus, folder, tmp_path / "out") == 2
    assert "must be a folder with tokenizer.json (tokenizers that need code of their own are not run)" in (
        capsys.readouterr().err
    )
    (folder / "tokenizer.json").write_text("{}")
    assert tokenize(corpus, folder, tmp_path / "out") == 2
    assert "tokenizer.json cannot be read as a tokenizer" in capsys.readouterr().err
    shutil.copy(tokenizer / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text("[]")
    assert tokenize(corpus, folder, tmp_path / "out") == 2
    assert "tokenizer_config.json is not a JSON object" in capsys.readouterr().err


def test_second_writer_of_a_dataset_is_refused(corpus, tokenizer, dataset, tmp_path, capsys):
    with DatasetWriter(str(tmp_path / "out"), 400) as first:
        first.add(np.array([1, 2], dtype=np.uint16))
        assert tokenize(corpus, tokenizer, tmp_path / "out") == 1
        assert "out is being written by another process: wait for it" in capsys.readouterr().err
        assert first.finish({})["tokens"] == 2
    assert np.fromfile(tmp_path / "out.bin", dtype=np.uint16).tolist() == [1, 2]
    assert tokenize(corpus, tokenizer, tmp_path / "out") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_failure_between_renames_leaves_nothing_that_opens(corpus, tokenizer, dataset, tmp_path, monkeypatch, step):
    """Over an older dataset of the name: the reading side refuses what is there until a second run completes it."""
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "another text"}\n')
    prefix = tmp_path / "out"
    assert tokenize(small, tokenizer, prefix) == 0
    replace, calls = os.replace, []

    def fail_at_step(source, target):
        calls.append(target)
        if len(calls) == step:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_step)
    assert tokenize(corpus, tokenizer, prefix) == 1
    monkeypatch.undo()
    if step < 3:
        with pytest.raises(DatasetError, match="out.idx does not exist"):
            check_dataset(str(prefix))
    else:
        # The pair is the new one, and only its manifest is missing.
        assert dataset_bytes(prefix) == dataset_bytes(dataset) and not check_dataset(str(prefix)).manifest
    assert tokenize(corpus, tokenizer, prefix) == 0
    assert dataset_bytes(prefix) == dataset_bytes(dataset) and check_dataset(str(prefix)).manifest


def children(pid: int) -> list[int]:
    found = [status.read_text() for status in Path("/proc").glob("[0-9]*/status") if status.exists()]
    fields = [dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line) for text in found]
    return [int(field["Pid"]) for field in fields if int(field["PPid"]) == pid]


def test_kill_leaves_the_old_dataset_and_no_process(corpus, tokenizer, dataset, tmp_path):
    """SIGKILL in the middle: the dataset of that name is the old one; a second run completes the new one."""
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{dataset}.{suffix}", tmp_path / f"out.{suffix}")
    large = tmp_path / "large.jsonl"
    large.write_bytes(corpus.read_bytes() * 200)
    command = [sys.executable, "-m", "tools.preprocess.tokenize_corpus", "--input", str(large), "--append-eod"]
    command += ["--tokenizer", str(tokenizer), "--output-prefix", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    aside = tmp_path / ".out.bin.writing"
    deadline = time.monotonic() + 60
    while not (aside.exists() and aside.stat().st_size > 10000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)
    assert len(workers) >= 2
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert tokenize(large, tokenizer, tmp_path / "out") == 0
    assert Path(tmp_path / "out.bin").read_bytes() == Path(f"{dataset}.bin").read_bytes() * 200
    assert not list(tmp_path.glob(".*"))


def test_killed_worker_is_an_error(corpus, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "encode", os._exit)
    monkeypatch.setattr(tokenize_corpus, "_tasks", lambda records: [1])
    assert tokenize(corpus, tokenizer, tmp_path / "out") == 1
    assert "a worker process was killed, perhaps for its memory: use fewer --workers" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
