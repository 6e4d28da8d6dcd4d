"""Bad input: each kind fails or is skipped as told, named with file and line, and counted."""

import gzip
import io
import json
import lzma
import re
import tarfile

import pytest

from tests.tools.texts import dataset_bytes, json_lines, manifest_of, summary_of, tokenize
from tests.tools.wds import write_shard

LONG = 50 * 10**6
BAD_LINES = {
    "not json": ("malformed", b'{"text": "cut', r"not JSON .*: every line must be one whole JSON object"),
    "a control character": ("malformed", b'{"text": "a\x00b"}', r"not JSON \(Invalid control character"),
    "nested too deep": ("malformed", b'{"text": ' + b"[" * 100000, r"not JSON \(maximum recursion depth"),
    "half a character": ("not_utf8", b'{"text": "a\\ud83d"}', r"half a character \(\\ud83d\)"),
    "wrong key": ("wrong_key", b'{"body": "x"}', r"no text under --text-key \(text\); the record has: body"),
    "null": ("wrong_key", b'{"text": null}', r"no text under --text-key"),
    "not an object": ("wrong_key", b"[1]", r"no text under --text-key \(text\); the record has: list"),
    "not utf-8": ("not_utf8", b'{"text": "\xff"}', r"not UTF-8 \(invalid start byte at byte 10\): convert it to UTF-8"),
    "empty": ("empty", b'{"text": " "}', r"empty text"),
    "special": ("special_token", b'{"text": "a <|endoftext|> b"}', r"the text contains the special token <\|endoftext"),
    "50 MB": ("too_long", b'{"text": "' + b"x" * LONG + b'"}', r"a line longer than --max-document-mb \(8\): cut it"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_fails_or_is_skipped(name, tokenizer, tmp_path, capsys):
    kind, line, message = BAD_LINES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
    assert tokenize(path, tokenizer, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert re.search(f"^error: {re.escape(str(path))} line 2: {message}", errors) and "--on-error skip leaves" in errors
    assert not (tmp_path / "out.bin").exists() and not (tmp_path / "out.idx").exists()
    assert tokenize(path, tokenizer, tmp_path / "out", "--on-error", "skip") == 0
    manifest, summary = manifest_of(tmp_path / "out"), summary_of(tmp_path / "out")
    assert (manifest["documents"], manifest["skipped"], manifest["skipped_kinds"]) == (2, 1, {kind: 1})
    assert summary["skipped"] == {kind: 1} and len(summary["skipped_places"]) == 1
    assert re.match(f"{re.escape(str(path))} line 2: {message}", summary["skipped_places"][0])
    path.write_bytes(b'{"text": "first"}\n{"text": "last"}\n')
    assert tokenize(path, tokenizer, tmp_path / "clean") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(tmp_path / "clean")


@pytest.mark.parametrize("unit_bytes", [40, 1000, 10**9])
def test_lines_are_numbered_from_the_beginning_of_the_file(tokenizer, tmp_path, capsys, unit_bytes):
    """Units know neither the lines before them nor of each other."""
    lines = json_lines(f"text {i}" for i in range(100)).splitlines()
    bad = [7, 60, 61, 99]
    for i in bad:
        lines[i - 1] = b"{"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    options = ["--unit-mb", str(unit_bytes / 1e6)]
    assert tokenize(path, tokenizer, tmp_path / "out", *options) == 1
    assert f"{path} line 7: not JSON" in capsys.readouterr().err
    assert tokenize(path, tokenizer, tmp_path / "out", "--on-error", "skip", *options) == 0
    places = summary_of(tmp_path / "out")["skipped_places"]
    assert [int(re.search(r" line (\d+): ", place).group(1)) for place in places] == bad
    # As a shard that starts inside the file.
    if unit_bytes < 10**9:
        places = []
        for i in "01":
            shard = [*options, "--num-shards", "2", "--shard-index", i]
            assert tokenize(path, tokenizer, tmp_path / "shard", "--on-error", "skip", *shard) == 0
            places += summary_of(tmp_path / f"shard-0000{i}-of-00002")["skipped_places"]
        assert [int(re.search(r" line (\d+): ", place).group(1)) for place in places] == bad


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def middle_flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


@pytest.fixture
def good(tmp_path):
    """A whole file, so that a run with a broken one can have documents."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(f"good text {i}" for i in range(20)))
    return folder


def assert_fails_or_leaves_the_file_out(folder, broken, tokenizer, tmp_path, capsys):
    assert tokenize(folder / "*", tokenizer, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert re.search(rf"error: {re.escape(str(broken))}( after record \d+)?: .*: the file is cut or broken", error)
    assert not (tmp_path / "out.bin").exists()
    assert tokenize(folder / "*", tokenizer, tmp_path / "out", "--on-error", "skip") == 0
    manifest, summary = manifest_of(tmp_path / "out"), summary_of(tmp_path / "out")
    assert manifest["skipped_kinds"] == summary["skipped"] == {"damaged_file": 1}
    assert summary["skipped_places"][0].startswith(str(broken))
    entry = next(source for source in manifest["sources"] if source["name"] == broken.name)
    assert entry["left_out"] == "cut or broken"
    broken.unlink()
    assert tokenize(folder / "*", tokenizer, tmp_path / "clean") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(tmp_path / "clean")


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
@pytest.mark.parametrize("damage", [cut, middle_flipped])
def test_broken_compression(good, corpus, tokenizer, tmp_path, capsys, suffix, compress, damage):
    path = good / f"broken.jsonl{suffix}"
    path.write_bytes(damage(compress(corpus.read_bytes())))
    assert_fails_or_leaves_the_file_out(good, path, tokenizer, tmp_path, capsys)


@pytest.mark.parametrize("damage", [cut, lambda data: data[:-1], lambda data: data[:100]])
def test_cut_parquet(good, tokenizer, tmp_path, capsys, damage):
    import pyarrow
    from pyarrow import parquet

    path = good / "broken.parquet"
    parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(300)]}), path)
    path.write_bytes(damage(path.read_bytes()))
    assert_fails_or_leaves_the_file_out(good, path, tokenizer, tmp_path, capsys)


@pytest.mark.parametrize("place", ["header", "data", "between members"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_cut_tar(good, tokenizer, tmp_path, capsys, place, suffix):
    """Between two members too, which tarfile and webdataset take for a whole archive."""
    path = good / f"broken.tar{suffix}"
    write_shard(path.with_suffix(".tar") if suffix else path, [{"__key__": f"{i}", "txt": f"{i}"} for i in range(20)])
    whole = path.with_suffix(".tar") if suffix else path
    data = whole.read_bytes()
    members = tarfile.open(whole).getmembers()
    at = {"header": members[9].offset + 100, "data": members[9].offset_data + 1, "between members": members[9].offset}
    whole.unlink()
    data = data[: at[place]]
    path.write_bytes(gzip.compress(data) if suffix else data)
    assert_fails_or_leaves_the_file_out(good, path, tokenizer, tmp_path, capsys)


def test_member_that_is_twice_in_a_sample(tokenizer, tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for text in (b"one", b"two"):
            member = tarfile.TarInfo("a.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    assert tokenize(tmp_path / "a.tar", tokenizer, tmp_path / "out") == 1
    assert "member a.txt is there twice in a sample" in capsys.readouterr().err


def test_bad_rows_of_parquet(tokenizer, tmp_path, capsys):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    values = pyarrow.array([b"one", None, b"\xff", b" ", b"x" * 9000, b"six"])
    parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=2)
    options = ["--max-document-mb", "0.008"]
    assert tokenize(path, tokenizer, tmp_path / "out", *options) == 1
    assert f"{path} row 2: no text under --text-key (text)" in capsys.readouterr().err
    assert tokenize(path, tokenizer, tmp_path / "out", "--on-error", "skip", *options) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["documents"] == 2
    assert summary["skipped"] == {"empty": 1, "not_utf8": 1, "too_long": 1, "wrong_key": 1}
    assert [place.split(":")[0][-5:] for place in summary["skipped_places"]] == [f"row {i}" for i in (2, 3, 4, 5)]
    assert tokenize(path, tokenizer, tmp_path / "out", "--text-key", "body") == 1
    assert f"{path}: no column of --text-key (body); the file has: text" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.tar", "a.jsonl.gz"])
def test_empty_file_is_a_bad_record(tokenizer, tmp_path, capsys, name):
    """No byte, or for formats with a frame around nothing, no record."""
    if name == "a.parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / name)
    elif name == "a.tar":
        write_shard(tmp_path / name, [])
    else:
        (tmp_path / name).write_bytes(gzip.compress(b"\n \n") if name.endswith("gz") else b"")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "some text"}\n')
    assert tokenize(tmp_path / "*.*", tokenizer, tmp_path / "out/text") == 1
    assert f"{tmp_path / name}: no record: remove the file" in capsys.readouterr().err
    assert tokenize(tmp_path / "*.*", tokenizer, tmp_path / "out/text", "--on-error", "skip") == 0
    manifest = manifest_of(tmp_path / "out/text")
    assert (manifest["documents"], manifest["skipped_kinds"]) == (1, {"empty_file": 1})


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_file_of_no_byte_is_named(good, tokenizer, tmp_path, capsys, name):
    (good / name).write_bytes(b"")
    assert tokenize(good / "*", tokenizer, tmp_path / "out") == 1
    assert str(good / name) in capsys.readouterr().err
    assert tokenize(good / "*", tokenizer, tmp_path / "out", "--on-error", "skip") == 0
    assert manifest_of(tmp_path / "out")["documents"] == 20 and manifest_of(tmp_path / "out")["skipped"] == 1


def test_long_text_file(tokenizer, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"word " * 1000)
    options = ["--max-document-mb", "0.004"]
    assert tokenize(tmp_path / "a.txt", tokenizer, tmp_path / "out", *options) == 1
    assert f"{tmp_path / 'a.txt'}: a text longer than --max-document-mb (0.004)" in capsys.readouterr().err


def test_no_document_left_is_an_error(tokenizer, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    assert tokenize(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", "--on-error", "skip") == 1
    assert "out would have no documents: check --input" in capsys.readouterr().err


def test_disk_that_fails_is_not_a_broken_file(good, tokenizer, tmp_path, capsys, monkeypatch):
    """A disk or a network that fails under --on-error skip must not leave out a good file."""
    from tools.preprocess import readers
    from tools.preprocess.sources import open_source

    (good / "b.jsonl").write_bytes(json_lines(["on the part of the disk that fails"]))

    def failing(path):
        if path.endswith("b.jsonl"):
            raise OSError(5, "Input/output error", path)
        return open_source(path)

    monkeypatch.setattr(readers, "open_source", failing)
    assert tokenize(good / "*", tokenizer, tmp_path / "out", "--on-error", "skip") == 1
    assert "Input/output error" in capsys.readouterr().err
    assert not (tmp_path / "out.bin").exists()


def test_counts_of_many_bad_lines(tokenizer, tmp_path):
    """All are counted, and the first of each unit listed."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {i}"}) if i % 3 else "{" for i in range(900)]
    path.write_text("\n".join(lines))
    assert tokenize(path, tokenizer, tmp_path / "out", "--on-error", "skip") == 0
    assert summary_of(tmp_path / "out")["skipped"] == {"malformed": 300}
    assert len(summary_of(tmp_path / "out")["skipped_places"]) == 100
    assert manifest_of(tmp_path / "out")["documents"] == 600
