"""Text to indexed binaries: against Megatron's builder, from every format, at any number of workers, with wrong
arguments and unusual tokenizers. Bad input and kills have files of their own."""

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_gdn.training.indexed import DatasetError, check_dataset
from tests.tools.texts import TEXTS, dataset_bytes, json_lines, manifest_of, summary_of, tokenize
from tools.preprocess import merge_datasets
from tools.preprocess.encode import Gigatoken
from tools.preprocess.indexed import Output, sha256_of
from tools.preprocess.libraries import load_tokenizer
from tools.preprocess.sources import Source, default_unit_bytes, find_sources, plan_units, units_of_shard

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


def test_training_knows_the_contents_by_the_manifest(dataset, tokenizer, tmp_path):
    from megatron_gdn.training.data import data_key

    for name, texts in (("same", TEXTS), ("other", [*TEXTS[:-1], TEXTS[-1][::-1]])):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(texts))
        assert tokenize(tmp_path / f"{name}.jsonl", tokenizer, tmp_path / name) == 0
    keys = [data_key([str(prefix)]) for prefix in (dataset, tmp_path / "same", tmp_path / "other")]
    assert keys[0] == keys[1] != keys[2]


def test_manifest_tells_the_truth(dataset, tokenizer, corpus):
    manifest = manifest_of(dataset)
    tokens = np.fromfile(f"{dataset}.bin", dtype=manifest["dtype"])
    assert manifest["documents"] == len(TEXTS) and manifest["tokens"] == len(tokens)
    assert manifest["max_token_id"] == tokens.max()
    bin_bytes, idx_bytes = dataset_bytes(dataset)
    parts = [[len(bin_bytes), hashlib.sha256(bin_bytes).hexdigest()]]
    assert manifest["files"]["bin"] == {"bytes": len(bin_bytes), "parts": parts}
    assert manifest["files"]["idx"] == {"bytes": len(idx_bytes), "sha256": hashlib.sha256(idx_bytes).hexdigest()}
    assert manifest["tokenizer_sha256"] == hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["sources"] == [
        {"name": corpus.name, "bytes": corpus.stat().st_size, "sha256": hashlib.sha256(corpus.read_bytes()).hexdigest()}
    ]


def test_summary_counts_what_was_read(dataset, corpus):
    summary = summary_of(dataset)
    assert summary["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert summary["input_bytes"] == corpus.stat().st_size and summary["documents"] == len(TEXTS)
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["seconds"], rel=0.1)


def test_progress_shows_rates_and_time_left(corpus, tokenizer, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert tokenize(corpus, tokenizer, tmp_path / "out", "--unit-mb", "0.005") == 0
    last = sys.stderr.getvalue().split("\r")[-1]
    assert re.search(r"100%\|.*\[\d\d:\d\d<00:00, .*B/s, [\d.e+]+ tokens/s, [\d.]+ MB/s of text\]", last), last


@pytest.mark.parametrize(
    "workers, unit_bytes, engine",
    [(1, 1, "auto"), (1, 61, "auto"), (1, 5000, "auto"), (2, 5000, "auto"), (4, 5000, "auto"), (5, 5000, "reference")],
)
def test_workers_and_units_do_not_change_the_output(corpus, tokenizer, tmp_path, workers, unit_bytes, engine):
    """Units of a byte, shorter than a line, and of many lines: every line is read once, wherever the cuts fall."""
    if unit_bytes < 5000:
        short = tmp_path / "short.jsonl"
        short.write_bytes(b"".join(corpus.read_bytes().splitlines(keepends=True)[:8]))
        corpus = short
    assert tokenize(corpus, tokenizer, tmp_path / "whole") == 0
    options = ["--workers", str(workers), "--unit-mb", str(unit_bytes / 1e6), "--engine", engine]
    assert tokenize(corpus, tokenizer, tmp_path / "cut", *options) == 0
    assert dataset_bytes(tmp_path / "cut") == dataset_bytes(tmp_path / "whole")
    for source in manifest_of(tmp_path / "cut")["sources"]:
        assert [(r["start"], r["end"]) for r in source["ranges"]] == [
            (i, min(i + unit_bytes, source["bytes"])) for i in range(0, source["bytes"], unit_bytes)
        ]
        for part in source["ranges"]:
            assert part["sha256"] == sha256_of(corpus, part["start"], part["end"] - part["start"])
    assert sorted(path.name for path in tmp_path.glob("cut*")) == ["cut.bin", "cut.idx", "cut.json", "cut.summary.json"]


def test_shards_merged_equal_one_run(corpus, tokenizer, tmp_path):
    """As a Slurm array would: each command takes a part, the files join to the same bytes and the same manifest."""
    for i in range(5):
        bad = [b'{"text": ""}\n', b"[]\n"][: i + 1]  # records that are skipped, of one or two kinds
        (tmp_path / f"{i}.jsonl").write_bytes(
            corpus.read_bytes()[: 3000 * i + 500].rpartition(b"\n")[0] + b"\n" + b"".join(bad)
        )
    options = ["--unit-mb", "0.002", "--on-error", "skip"]
    assert tokenize(tmp_path / "*.jsonl", tokenizer, tmp_path / "one", *options) == 0
    for i in range(3):
        shard = ["--num-shards", "3", "--shard-index", str(i)]
        assert tokenize(tmp_path / "*.jsonl", tokenizer, tmp_path / "part", *options, *shard) == 0
    parts = sorted(map(str, tmp_path.glob("part-*-of-00003.idx")))
    assert len(parts) == 3
    assert merge_datasets.main([*parts, "--output-prefix", str(tmp_path / "merged")]) == 0
    assert dataset_bytes(tmp_path / "merged") == dataset_bytes(tmp_path / "one")
    one = manifest_of(tmp_path / "one")
    del one["fingerprint"]
    assert manifest_of(tmp_path / "merged") == one


@pytest.mark.parametrize(
    "total, unit_bytes", [(0, 1_000_000), (32e6, 1_000_000), (128e6, 2_000_000), (4e9, 32_000_000)]
)
def test_units_are_a_64th_of_the_input(total, unit_bytes):
    """Of all files together, within bounds that a slow engine and a kill set."""
    part = Source(path="a.jsonl", kind="jsonl", compression="", num_bytes=int(total) // 4, version="")
    assert default_unit_bytes([part] * 4) == unit_bytes


def test_shards_have_about_the_same_size(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.jsonl").write_bytes(b"x" * (1000 + 370 * i))
    (tmp_path / "7.jsonl").touch()  # an empty file at the end has a place too
    units = plan_units(find_sources([str(tmp_path / "*.jsonl")]), 100)
    shards = [units_of_shard(units, 4, i) for i in range(4)]
    assert sum(shards, []) == units
    sizes = [sum(unit.end - unit.start for unit in shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 2 * 100


def test_ray_gives_the_same_bytes(corpus, tokenizer, dataset, tmp_path):
    pytest.importorskip("ray", reason="extra ray, 240 MB: pip install -e '.[ray]'")
    options = ["--executor", "ray", "--unit-mb", "0.005"]
    assert tokenize(corpus, tokenizer, tmp_path / "out", *options) == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)
    assert len(manifest_of(tmp_path / "out")["files"]["bin"]["parts"]) > 1


def test_missing_ray_is_named(corpus, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert tokenize(corpus, tokenizer, tmp_path / "out", "--executor", "ray") == 2
    assert "ray is needed for --executor ray and is not installed: run pip install -e '.[ray]'" in (
        capsys.readouterr().err
    )


def zstd(data: bytes) -> bytes:
    import zstandard

    middle = len(data) // 2  # two frames, as pzstd writes them
    return b"".join(zstandard.ZstdCompressor().compress(half) for half in (data[:middle], data[middle:]))


def gzip_members(data: bytes) -> bytes:
    return gzip.compress(data[:5000]) + gzip.compress(data[5000:])


COMPRESSORS = {".gz": gzip_members, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_input_equals_plain(corpus, tokenizer, dataset, tmp_path, suffix):
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](corpus.read_bytes()))
    assert tokenize(path, tokenizer, tmp_path / "out") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)
    assert manifest_of(tmp_path / "out")["sources"][0]["sha256"] == sha256_of(path)


@pytest.mark.parametrize("binary", [False, True])
def test_parquet_equals_json_lines(tokenizer, dataset, tmp_path, binary):
    import pyarrow
    from pyarrow import parquet

    values = [text.encode() for text in TEXTS] if binary else TEXTS
    table = pyarrow.table({"id": range(len(TEXTS)), "text": values})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    for name, options in (("whole", []), ("cut", ["--unit-mb", "0.0015"])):
        assert tokenize(tmp_path / "a.parquet", tokenizer, tmp_path / name, *options) == 0
        assert dataset_bytes(tmp_path / name) == dataset_bytes(dataset)
    assert len(manifest_of(tmp_path / "cut")["files"]["bin"]["parts"]) > 2


def test_text_files_are_documents(tokenizer, dataset, tmp_path):
    for i, text in enumerate(TEXTS[:3]):
        name, data = (f"{i}.txt.gz", gzip.compress(text.encode())) if i == 1 else (f"{i}.txt", text.encode())
        (tmp_path / name).write_bytes(data)
    assert tokenize(tmp_path / "*.txt*", tokenizer, tmp_path / "out") == 0
    expected = np.fromfile(f"{dataset}.bin", dtype=np.uint16)
    ours = np.fromfile(tmp_path / "out.bin", dtype=np.uint16)
    assert len(ours) > 30 and np.array_equal(ours, expected[: len(ours)])


@pytest.mark.parametrize("url", ["memory://corpus/*.jsonl", "file://{}/*.jsonl"])
def test_urls_equal_local_files(corpus, tokenizer, dataset, tmp_path, url):
    import fsspec

    (tmp_path / "a.jsonl").write_bytes(corpus.read_bytes())
    with fsspec.open("memory://corpus/a.jsonl", "wb") as file:
        file.write(corpus.read_bytes())
    options = ["--unit-mb", "0.004"]
    assert tokenize(url.format(tmp_path), tokenizer, tmp_path / "out", *options) == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)


def test_every_key_has_its_dataset(tokenizer, dataset, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": text, "title": f"Title of {text[:9]}"} for text in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tokenize(path, tokenizer, tmp_path / "out", "--text-key", "text", "title") == 0
    assert dataset_bytes(tmp_path / "out_text") == dataset_bytes(dataset)
    path.write_bytes(json_lines(row["title"] for row in rows))
    assert tokenize(path, tokenizer, tmp_path / "title") == 0
    assert dataset_bytes(tmp_path / "out_title") == dataset_bytes(tmp_path / "title")


def test_line_ends_and_byte_order_mark_do_not_matter(corpus, tokenizer, dataset, tmp_path):
    lines = corpus.read_bytes().splitlines()
    (tmp_path / "other.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    assert tokenize(tmp_path / "other.jsonl", tokenizer, tmp_path / "out") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)


def test_numbers_that_only_python_reads_are_no_error(tokenizer, dataset, tmp_path):
    """NaN, which Python's json writes and JSON has not, beside the text."""
    lines = (json.dumps({"text": text, "score": float("nan")}) for text in TEXTS)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert tokenize(tmp_path / "a.jsonl", tokenizer, tmp_path / "out") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)


@pytest.mark.parametrize("engine", ["gigatoken", "reference"])
def test_special_tokens_in_text_as_told(tokenizer, tmp_path, engine):
    path = tmp_path / "special.jsonl"
    path.write_bytes(json_lines(["first", "a <|endoftext|> b", "last <|endo"]))
    end = load_tokenizer(tokenizer).token_to_id("<|endoftext|>")
    for policy, ends in (("escape", 3), ("allow", 4)):
        options = ["--special-in-text", policy, "--engine", engine]
        assert tokenize(path, tokenizer, tmp_path / policy, *options) == 0
        ids = np.fromfile(tmp_path / f"{policy}.bin", dtype=np.uint16)
        assert (ids == end).sum() == ends
        text = load_tokenizer(tokenizer).decode(ids.tolist(), skip_special_tokens=False)
        assert text == "first<|endoftext|>a <|endoftext|> b<|endoftext|>last <|endo<|endoftext|>"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--input", "nothing*.jsonl"], "--input (nothing*.jsonl) names no file"),
        (["--input", "memory://nothing/*.jsonl"], "--input (memory://nothing/*.jsonl) names no file"),
        (["--input", "never://x/a.jsonl"], "--input (never://x/a.jsonl) cannot be opened"),
        (["--tokenizer", "nowhere"], "--tokenizer (nowhere) must be a folder with tokenizer.json"),
        (["--workers", "0"], "--workers (0) must be at least 1"),
        (["--unit-mb", "0"], "--unit-mb (0.0) must be a number of MB above 0"),
        (["--unit-mb", "inf"], "--unit-mb (inf) must be a number of MB above 0"),
        (["--max-document-mb", "-1"], "--max-document-mb (-1.0) must be a number of MB above 0"),
        (["--max-document-mb", "nan"], "--max-document-mb (nan) must be a number of MB above 0"),
        (["--num-shards", "2"], "--num-shards (2) needs --shard-index, or every command would do the same part"),
        (["--num-shards", "0"], "--num-shards (0) needs --shard-index"),
        (
            ["--shard-index", "2", "--num-shards", "2"],
            "--shard-index (2) must be at least 0 and below --num-shards (2)",
        ),
        (["--eod-token", "<end>"], "--eod-token (<end>) must be a token of"),
        (["--output-prefix", "/"], "--output-prefix (/) must not be a folder"),
        (["--output-prefix", "/proc/none/a"], "--output-prefix (/proc/none/a) cannot be written: name a folder that"),
        (["--text-key", "a", "a"], "--text-key (a a) must name every key once"),
    ],
)
def test_wrong_arguments(corpus, tokenizer, tmp_path, capsys, options, message):
    assert tokenize(corpus, tokenizer, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_format_and_repeated_file(corpus, tokenizer, tmp_path, capsys):
    (tmp_path / "table.csv").write_text("a,b")
    assert tokenize(tmp_path / "table.csv", tokenizer, tmp_path / "out") == 2
    assert "must be one of .jsonl, .txt, .tar, each also" in capsys.readouterr().err
    assert tokenize(corpus, tokenizer, tmp_path / "out", "--input", str(corpus), str(corpus)) == 2
    assert "corpus.jsonl twice: name every file once" in capsys.readouterr().err
    assert tokenize(corpus.parent, tokenizer, tmp_path / "out") == 2
    assert "must be a file: name files or a pattern" in capsys.readouterr().err


def test_more_shards_than_units(corpus, tokenizer, tmp_path, capsys):
    options = ["--num-shards", "2", "--shard-index", "1"]
    assert tokenize(corpus, tokenizer, tmp_path / "out", *options) == 1
    assert "has no part of the input: use fewer --num-shards, or a smaller --unit-mb" in capsys.readouterr().err


def test_commands_start_without_torch():
    """Tools that people call in loops and on login nodes: no torch, no Megatron, no package of a format."""
    names = ("tokenize_corpus", "train_tokenizer", "merge_datasets", "split_dataset", "inspect_dataset")
    code = f"import sys\nfor name in {names}: __import__('tools.preprocess.' + name)\n"
    code += "heavy = {'torch', 'megatron', 'pyarrow', 'ray', 'matplotlib', 'gigatoken', 'fsspec', 'transformers'}\n"
    code += "print(sorted(heavy & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_memory_does_not_grow_with_the_file(tokenizer, tmp_path):
    """One compressed file, so one unit, of 50 and of 200 MB, with new words for ever, which the engine's cache takes:
    at most what the engine may grow by until it is made anew, since the smaller file may end before that; and 400 MB,
    which is what a worker may take."""
    peaks, generator, known = [], np.random.default_rng(0), " ".join(TEXTS[3:123])
    for megabytes in (50, 200):
        path = tmp_path / f"{megabytes}.jsonl.gz"
        with gzip.open(path, "wb", compresslevel=0) as file:
            for _ in range(megabytes):
                words = generator.integers(97, 123, (200, 60, 9), dtype=np.uint8)
                words[:, :, 0] = 32
                file.write(json_lines(known + new.tobytes().decode() for new in words))
        command = [sys.executable, "-m", "tools.preprocess.tokenize_corpus", "--append-eod", "--workers", "1"]
        command += ["--input", str(path), "--tokenizer", str(tokenizer), "--output-prefix", str(tmp_path / "out")]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        peaks.append(summary_of(tmp_path / "out")["peak_rss_mb_of_a_worker"])
    assert peaks[1] < peaks[0] + Gigatoken.max_growth_mb and peaks[1] < 400, peaks


@pytest.mark.parametrize("step", [1, 2, 3])
def test_failure_between_renames_leaves_nothing_that_opens(corpus, tokenizer, dataset, tmp_path, monkeypatch, step):
    """Over an older dataset of the name: the reading side refuses what is there until a second run completes it."""
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "another text"}\n')
    prefix = tmp_path / "out"
    assert tokenize(small, tokenizer, prefix) == 0
    replace, calls = os.replace, []

    def fail_at_step(source, target):
        if Path(target).name in ("out.bin", "out.idx", "out.json"):
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


def test_second_writer_of_a_dataset_is_refused(corpus, tokenizer, dataset, tmp_path, capsys):
    with Output(str(tmp_path / "out")):
        assert tokenize(corpus, tokenizer, tmp_path / "out") == 1
        assert "out is being written by another process: wait for it" in capsys.readouterr().err
    assert tokenize(corpus, tokenizer, tmp_path / "out") == 0
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


@pytest.mark.parametrize("largest", [65499, 65500, 70000])
def test_vocabulary_with_a_gap_is_stored_wide_enough(corpus, tokenizer, dataset, tmp_path, largest):
    """400 tokens, and one of them has an id near or above what 16 bits hold: Megatron's rule, by the largest id."""

    def move_last_token(settings):
        vocabulary = settings["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = largest

    other = changed_tokenizer(tokenizer, tmp_path / "tokenizer", move_last_token)
    assert tokenize(corpus, other, tmp_path / "out") == 0
    ids, plain = np.fromfile(tmp_path / "out.bin", dtype=np.int32), np.fromfile(f"{dataset}.bin", dtype=np.uint16)
    assert np.array_equal(ids, np.where(plain == 399, largest, plain.astype(np.int32))) and ids.max() == largest
    assert manifest_of(tmp_path / "out")["vocab_size"] == largest + 1


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
    dropout = changed_tokenizer(tokenizer, tmp_path / "dropout", lambda settings: settings["model"].update(dropout=0.1))
    assert tokenize(corpus, dropout, tmp_path / "out") == 2
    assert "has dropout 0.1" in capsys.readouterr().err
