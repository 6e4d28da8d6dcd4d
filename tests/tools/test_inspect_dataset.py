"""Inspecting datasets: the counts are the data's, any flipped bit is found, documents come back as text."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_gdn.training.indexed import check_dataset
from tests.tools.texts import TEXTS, json_lines, tokenize
from tools.preprocess import inspect_dataset
from tools.preprocess.indexed import write_index


def copy(dataset, folder: Path, suffixes=("bin", "idx", "json")) -> Path:
    for suffix in suffixes:
        shutil.copy(f"{dataset}.{suffix}", folder / f"copy.{suffix}")
    return folder / "copy"


def test_counts_are_those_of_the_data(dataset, capsys):
    assert inspect_dataset.main([str(dataset), "--verify"]) == 0
    printed = capsys.readouterr().out
    tokens = np.fromfile(f"{dataset}.bin", dtype=np.uint16)
    assert f"documents       {len(TEXTS)}" in printed
    assert f"tokens          {len(tokens)}, uint16, {len(tokens) / len(TEXTS):.1f} per document" in printed
    assert f"vocabulary      400, largest id {tokens.max()}" in printed
    assert "checked         sizes, index, SHA-256 of .bin and .idx, token ids" in printed


def test_documents_as_text(dataset, tokenizer, capsys):
    assert inspect_dataset.main([f"{dataset}.bin", "--tokenizer", str(tokenizer), "--documents", "3"]) == 0
    printed = capsys.readouterr().out
    for text in TEXTS[:3]:
        assert f"\n{text}<|endoftext|>\n" in printed
    assert TEXTS[3] not in printed


def test_last_documents_as_text(tokenizer, tmp_path, capsys):
    """Two documents, of which more are asked for."""
    (tmp_path / "two.jsonl").write_bytes(json_lines(["one text", "another"]))
    assert tokenize(tmp_path / "two.jsonl", tokenizer, tmp_path / "two") == 0
    capsys.readouterr()
    assert inspect_dataset.main([str(tmp_path / "two"), "--tokenizer", str(tokenizer), "--documents", "5"]) == 0
    shown = capsys.readouterr().out.partition("--- document 0, ")[2]
    assert re.fullmatch(r"\d+ tokens\none text<\|endoftext\|>\n--- document 1, \d+ tokens\nanother<\|endo.*>\n", shown)


def test_negative_length_is_found(tmp_path, capsys):
    """Pointers that follow from it do not show it."""
    np.arange(6, dtype=np.uint16).tofile(tmp_path / "broken.bin")
    write_index(
        tmp_path / "broken.idx",
        dtype=np.dtype(np.uint16),
        num_sequences=3,
        num_documents=3,
        lengths=lambda: [np.array([5, -3, 4])],
        documents=lambda: [np.arange(3)],
    )
    assert inspect_dataset.main([str(tmp_path / "broken"), "--verify"]) == 1
    assert "its sequences do not follow each other" in capsys.readouterr().err


def test_every_flipped_byte_is_found(dataset, tmp_path, capsys):
    """A byte in each part of both files; only some are seen without --verify."""
    rng = np.random.default_rng(0)
    for suffix in ("bin", "idx"):
        content = Path(f"{dataset}.{suffix}").read_bytes()
        for position in (0, len(content) - 1, *rng.integers(0, len(content), 6)):
            broken = bytearray(content)
            broken[position] ^= 4
            prefix = copy(dataset, tmp_path)
            Path(f"{prefix}.{suffix}").write_bytes(broken)
            assert inspect_dataset.main([str(prefix), "--verify"]) == 1, (suffix, position)
            assert f"copy.{suffix}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "offset, message",
    [
        (34 + 4 * 5, "its sequences do not follow each other"),  # a length
        (34 + 4 * len(TEXTS) + 8 * 5, "its sequences do not follow each other"),  # a pointer
        (34 + 12 * len(TEXTS), "its documents do not cover"),  # the first document's start
    ],
)
def test_broken_index_is_found_without_a_manifest(dataset, tmp_path, capsys, offset, message):
    prefix = copy(dataset, tmp_path, ("bin", "idx"))
    assert inspect_dataset.main([str(prefix), "--verify"]) == 0
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[offset] ^= 1
    Path(f"{prefix}.idx").write_bytes(content)
    assert inspect_dataset.main([str(prefix), "--verify"]) == 1
    assert message in capsys.readouterr().err


def test_id_outside_the_vocabulary_is_found(dataset, tmp_path, capsys):
    prefix = copy(dataset, tmp_path)
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    manifest["vocab_size"] = manifest["max_token_id"]
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    assert inspect_dataset.main([str(prefix), "--verify"]) == 1
    assert f"copy has token id {manifest['max_token_id']} and a vocabulary of" in capsys.readouterr().err


def test_wrong_arguments(corpus, dataset, tokenizer, tmp_path, capsys):
    assert inspect_dataset.main([str(tmp_path / "nothing")]) == 1
    assert "nothing.bin does not exist: build it with" in capsys.readouterr().err
    assert inspect_dataset.main([str(dataset), "--documents", "-1"]) == 2
    assert "--documents (-1) must be at least 1" in capsys.readouterr().err
    assert inspect_dataset.main([str(dataset), "--histogram", str(tmp_path / "no/x.png")]) == 2
    assert "no/x.png) must be in a folder that exists" in capsys.readouterr().err
    assert inspect_dataset.main([str(dataset), "--tokenizer", str(tmp_path)]) == 2
    assert "must be a folder with tokenizer.json" in capsys.readouterr().err
    settings = json.loads((tokenizer / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings, indent=3))
    assert inspect_dataset.main([str(dataset), "--tokenizer", str(tmp_path)]) == 2
    assert "is not the one that made" in capsys.readouterr().err
    assert tokenize(corpus, tmp_path, tmp_path / "out") == 0
    assert inspect_dataset.main([str(tmp_path / "out"), "--tokenizer", str(tmp_path)]) == 0


def test_histogram_counts_every_document(dataset, tmp_path, capsys):
    """Each document once, in the bin of its length; the picture is a PNG with something drawn."""
    from matplotlib import image

    files = check_dataset(str(dataset))
    edges, counts = inspect_dataset.length_counts(files)
    lengths = np.fromfile(f"{dataset}.idx", np.int32, count=len(TEXTS), offset=34)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        assert count == ((lengths >= low) & (lengths < high)).sum()
    assert counts.sum() == len(TEXTS) and (counts > 0).sum() > 1
    assert inspect_dataset.main([str(dataset), "--histogram", str(tmp_path / "lengths.png")]) == 0
    picture = image.imread(tmp_path / "lengths.png")
    assert picture.ndim == 3 and picture[..., :3].std() > 0.05
    assert inspect_dataset.main([str(dataset), "--histogram", str(tmp_path / "lengths.jpg")]) == 2
    assert "must be a .png, and of one dataset" in capsys.readouterr().err


def test_manifest_without_checksums_is_refused(dataset, tmp_path, capsys):
    prefix = copy(dataset, tmp_path)
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    for change in (lambda m: m["files"]["bin"].pop("parts"), lambda m: m["files"]["bin"].update(parts=[])):
        broken = json.loads(json.dumps(manifest))
        change(broken)
        Path(f"{prefix}.json").write_text(json.dumps(broken))
        assert inspect_dataset.main([str(prefix), "--verify"]) == 1
        assert "copy.json has" in capsys.readouterr().err
