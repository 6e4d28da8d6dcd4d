"""WebDataset shards: the same samples and fields as the webdataset package gives, and nothing unpickled."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from tests.tools.texts import TEXTS, dataset_bytes, summary_of, tokenize
from tests.tools.wds import read_shard, write_shard
from tools.preprocess.readers import DamagedError, UnitReader
from tools.preprocess.sources import find_sources, plan_units


def read(path, field="txt"):
    (unit,) = plan_units(find_sources([str(path)]), 10**9)
    reader = UnitReader(unit, text_key="text", tar_field=field, max_document_bytes=10**6)
    batches = list(reader)
    texts = [text for batch in batches for text in batch.texts]
    return texts, [problem for batch in batches for problem in batch.problems], reader.num_records


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


NAMES = [
    # Folders in names, dots in folders, upper case, several fields, fields with dots, long names, neighbours that are
    # apart, hidden and meta members, no field at all.
    ["a/1.txt", "a/1.json", "a/2.TXT", "b.c/3.txt"],
    ["x.txt", "y.cls", "x.json", "x.txt.gz", "z.a.txt"],
    ["__meta__", "q.txt", "folder/__skip__", "q.id", "__a.b__", "folder/__a.txt__", "__dir__/a.txt", "__x.txt"],
    ["n" * 180 + "/" + "m" * 90 + ".txt", "noextension", "last.txt"],
    ["s1.txt", "s2.txt", "s3.jpg", "s4.txt"],
]


@pytest.mark.parametrize("names", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_are_those_of_webdataset(names, form, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for i, name in enumerate(names):
            add(archive, name, f"content {i}".encode())
        folder = tarfile.TarInfo("folder.txt")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    theirs = read_shard(path, "txt")
    texts, problems, num_samples = read(path)
    assert texts == [data.decode() for data in theirs if data is not None] and texts
    assert num_samples == len(theirs)
    assert len(problems) == sum(data is None for data in theirs)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_shards_of_webdatasets_writer(tokenizer, dataset, tmp_path, suffix):
    path = tmp_path / "a.tar"
    write_shard(path, [{"__key__": f"{i:06d}", "txt": text, "cls": "1"} for i, text in enumerate(TEXTS)])
    if suffix:
        from tests.tools.test_tokenize_corpus import COMPRESSORS

        (tmp_path / f"a.tar{suffix}").write_bytes(COMPRESSORS[suffix](path.read_bytes()))
        path.unlink()
    assert tokenize(tmp_path / "a.tar*", tokenizer, tmp_path / "out") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)


def test_text_inside_json_fields(tokenizer, dataset, tmp_path):
    samples = [{"__key__": f"{i}", "json": json.dumps({"text": text}, indent=1)} for i, text in enumerate(TEXTS)]
    write_shard(tmp_path / "a.tar", samples)
    assert tokenize(tmp_path / "a.tar", tokenizer, tmp_path / "out", "--tar-field", "json") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)


def test_missing_and_bad_fields(tokenizer, tmp_path, capsys):
    samples = [{"txt": "good"}, {"cls": "1"}, {"txt": b"\xff"}, {"txt": "last"}]
    write_shard(tmp_path / "a.tar", [{"__key__": f"k{i}", **sample} for i, sample in enumerate(samples)])
    assert tokenize(tmp_path / "a.tar", tokenizer, tmp_path / "out") == 1
    assert "a.tar sample 2: sample k1 has no field of --tar-field (txt); it has: cls" in capsys.readouterr().err
    assert tokenize(tmp_path / "a.tar", tokenizer, tmp_path / "out", "--on-error", "skip") == 0
    assert summary_of(tmp_path / "out")["skipped"] == {"not_utf8": 1, "wrong_key": 1}


def test_an_archive_without_members_has_the_whole_mark_of_its_end(tmp_path):
    """Two blocks of zeros; for tarfile one is enough."""
    path = tmp_path / "a.tar"
    tarfile.open(path, "w").close()
    texts, problems, _ = read(path)
    assert texts == [] and [problem.kind for problem in problems] == ["empty_file"]
    path.write_bytes(bytes(2 * tarfile.BLOCKSIZE))
    assert read(path)[0] == []
    path.write_bytes(bytes(tarfile.BLOCKSIZE))
    assert tarfile.open(path).getnames() == []
    with pytest.raises(DamagedError, match="after record 0: it ends without the mark of its end"):
        read(path)


def test_nothing_is_unpickled(tokenizer, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('a pickle ran')",))

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("a.pyd", pickle.dumps(Bomb())), ("a.pkl", pickle.dumps(Bomb())), ("a.txt", b"text")):
            add(archive, name, data)
    assert tokenize(tmp_path / "a.tar", tokenizer, tmp_path / "out") == 0
    assert len(np.fromfile(tmp_path / "out.bin", np.uint16)) > 1


def test_shell_urls_are_refused(tokenizer, tmp_path, capsys):
    assert tokenize(f"pipe:touch {tmp_path}/ran #.tar", tokenizer, tmp_path / "out") == 2
    assert "names no file" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
