"""Merging, de-duplicating, shuffling, splitting and blending datasets: against Megatron's builder and plain Python."""

import collections
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_gdn.training.indexed import DatasetError, check_dataset
from tests.tools.test_tokenize_corpus import changed_tokenizer
from tests.tools.texts import TEXTS, dataset_bytes, json_lines, manifest_of, tokenize
from tools.preprocess import blend_datasets, inspect_dataset, merge_datasets, split_dataset
from tools.preprocess.documents import first_of_each
from tools.preprocess.indexed import IndexedWriter
from tools.preprocess.sources import ArgumentError


def documents(prefix) -> list[bytes]:
    files = check_dataset(str(prefix))
    starts = [*files.starts().tolist(), files.num_tokens * files.dtype.itemsize]
    data = Path(f"{prefix}.bin").read_bytes()
    return [data[begin:end] for begin, end in zip(starts, starts[1:], strict=False)]


@pytest.fixture(scope="module")
def parts(tokenizer, tmp_path_factory) -> list[str]:
    """Three datasets with documents in common."""
    folder = tmp_path_factory.mktemp("parts")
    for i, texts in enumerate((TEXTS[:120], TEXTS[50:200], TEXTS[150:] + TEXTS[:3])):
        (folder / f"{i}.jsonl").write_bytes(json_lines(texts))
        assert tokenize(folder / f"{i}.jsonl", tokenizer, folder / f"part{i}") == 0
    return [str(folder / f"part{i}") for i in range(3)]


def merge(parts, output, *options) -> int:
    return merge_datasets.main([*parts, "--output-prefix", str(output), *options])


def test_merge_equals_megatrons_builder(parts, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for part in parts:
        builder.add_index(part)
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert merge(parts, tmp_path / "ours") == 0
    assert dataset_bytes(tmp_path / "ours") == dataset_bytes(tmp_path / "theirs")
    assert inspect_dataset.main([str(tmp_path / "ours"), "--verify"]) == 0
    manifest = manifest_of(tmp_path / "ours")
    assert [source["name"] for source in manifest["sources"]] == ["0.jsonl", "1.jsonl", "2.jsonl"]


def test_largest_id_is_that_of_all_tokens(parts, tokenizer, tmp_path):
    (tmp_path / "tiny.jsonl").write_bytes(json_lines(["!"]))
    assert tokenize(tmp_path / "tiny.jsonl", tokenizer, tmp_path / "tiny") == 0
    for i, names in enumerate(([str(tmp_path / "tiny"), parts[0]], [parts[0], str(tmp_path / "tiny")])):
        for how in ([], ["--deduplicate"]):
            output = tmp_path / f"{i}{len(how)}"
            assert merge(names, output, *how) == 0
            largest = int(np.fromfile(f"{output}.bin", np.uint16).max())
            assert manifest_of(output)["max_token_id"] == largest > manifest_of(tmp_path / "tiny")["max_token_id"]


def test_multimodal_datasets_are_refused(parts, tmp_path, capsys):
    for suffix in ("bin", "idx"):
        (tmp_path / f"modes.{suffix}").write_bytes(Path(f"{parts[0]}.{suffix}").read_bytes())
    with (tmp_path / "modes.idx").open("ab") as file:
        file.write(bytes(check_dataset(parts[0]).num_sequences))
    assert merge([str(tmp_path / "modes")], tmp_path / "out") == 1
    assert "modes is multimodal (it has a mode per sequence)" in capsys.readouterr().err


def test_datasets_of_several_sequences_per_document(tmp_path):
    """Megatron's own, without manifests."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    names = [str(tmp_path / name) for name in ("a", "b")]
    for name in names:
        builder = IndexedDatasetBuilder(f"{name}.bin", dtype=np.int32)
        for _ in range(20):
            lengths = generator.integers(1, 9, generator.integers(1, 5))
            builder.add_document(generator.integers(0, 70000, lengths.sum()), lengths.tolist())
        builder.finalize(f"{name}.idx")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for name in names:
        builder.add_index(name)
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert merge(names, tmp_path / "ours") == 0
    assert dataset_bytes(tmp_path / "ours") == dataset_bytes(tmp_path / "theirs")
    assert not (tmp_path / "ours.json").exists()


def test_copying_between_file_systems(parts, tmp_path, monkeypatch):
    """Where the kernel cannot copy, after it has begun."""
    copy, calls = os.copy_file_range, []

    def sometimes(*arguments):
        calls.append(arguments)
        if len(calls) % 3 == 0:
            raise OSError(18, "Invalid cross-device link")
        return copy(arguments[0], arguments[1], 1000)

    assert merge(parts, tmp_path / "kernel") == 0
    monkeypatch.setattr(os, "copy_file_range", sometimes)
    assert merge(parts, tmp_path / "plain") == 0
    assert len(calls) >= 3 and dataset_bytes(tmp_path / "plain") == dataset_bytes(tmp_path / "kernel")


class Killed(BaseException):
    """Ends a merge as SIGKILL does."""


@pytest.mark.parametrize("num_names", [0, 1, 2])
def test_a_kill_between_the_names_leaves_no_mixture(parts, tmp_path, monkeypatch, num_names):
    """The same documents in another order, so that the sizes of old and new files agree."""
    output, replace, given = tmp_path / "out", os.replace, []
    assert merge(parts[::-1], tmp_path / "new") == 0 and merge(parts, output) == 0

    def dying(source, target):
        if len(given) == num_names:
            raise Killed
        given.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dying)
        merge(parts[::-1], output)
    if num_names < 2:
        with pytest.raises(DatasetError, match="out.idx does not exist"):
            check_dataset(str(output))
    else:  # whole, without its manifest
        assert dataset_bytes(output) == dataset_bytes(tmp_path / "new") and check_dataset(str(output)).manifest == {}


def test_deduplication_keeps_the_first(parts, tmp_path, capsys):
    assert merge(parts, tmp_path / "out", "--deduplicate") == 0
    everything = [document for part in parts for document in documents(part)]
    assert documents(tmp_path / "out") == list(dict.fromkeys(everything))
    repeated = len(everything) - len(set(everything))
    assert f"{repeated} documents are repeated and left out" in capsys.readouterr().out
    assert manifest_of(tmp_path / "out")["repeated_documents_left_out"] == repeated > 50
    assert inspect_dataset.main([str(tmp_path / "out"), "--verify"]) == 0


def test_hashes_that_differ_in_one_half_are_of_different_documents():
    hashes = np.array([(1, 2), (1, 3), (2, 2), (1, 2)], np.uint64).view("V16").ravel()
    assert first_of_each(hashes).tolist() == [0, 1, 2]


def test_checksums_are_of_parts_of_their_size(tmp_path):
    """Ten bytes each; documents end inside of them."""
    tokens = [np.array([9, 1, 2], np.uint16), np.arange(8, dtype=np.uint16)]
    writer = IndexedWriter(tmp_path / "x.bin", tmp_path / "x.idx", np.uint16, part_bytes=10)
    for ids, lengths in zip(tokens, ([2, 1], [8]), strict=True):
        writer.add(ids, np.array(lengths))
    facts, data = writer.finish(), np.concatenate(tokens).tobytes()
    parts = [data[i : i + 10] for i in range(0, len(data), 10)]
    assert facts["files"]["bin"]["parts"] == [[len(part), hashlib.sha256(part).hexdigest()] for part in parts]
    assert (facts["max_token_id"], facts["documents"], facts["tokens"]) == (9, 3, 11)
    assert documents(tmp_path / "x") == [data[:4], data[4:6], data[6:]]


def test_shuffle_is_a_permutation_by_its_seed(parts, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert merge(parts, tmp_path / name, "--shuffle-seed", seed) == 0
    everything = [document for part in parts for document in documents(part)]
    shuffled = {name: documents(tmp_path / name) for name in "abc"}
    assert dataset_bytes(tmp_path / "a") == dataset_bytes(tmp_path / "b")
    assert shuffled["a"] != shuffled["c"] != everything
    order = np.arange(len(everything))
    np.random.default_rng(1).shuffle(order)
    assert shuffled["a"] == [everything[i] for i in order]
    assert inspect_dataset.main([str(tmp_path / "a"), "--verify"]) == 0


def test_shuffled_and_deduplicated(parts, tmp_path):
    assert merge(parts, tmp_path / "out", "--shuffle-seed", "3", "--deduplicate") == 0
    counts = collections.Counter(documents(tmp_path / "out"))
    assert set(counts) == {document for part in parts for document in documents(part)} and max(counts.values()) == 1


def test_split_loses_nothing_and_keeps_copies_together(parts, tmp_path):
    assert merge(parts, tmp_path / "all") == 0
    assert split_dataset.main([str(tmp_path / "all"), "--shares", "70,20,10", "--output-dir", str(tmp_path)]) == 0
    pieces = {name: documents(tmp_path / name) for name in ("train", "validation", "test")}
    everything = documents(tmp_path / "all")
    assert collections.Counter(sum(pieces.values(), [])) == collections.Counter(everything)
    sets = {name: set(piece) for name, piece in pieces.items()}
    assert not sets["train"] & sets["validation"] | sets["train"] & sets["test"] | sets["validation"] & sets["test"]
    for name, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        # Independent documents: 4 standard deviations.
        distinct = len(set(everything))
        assert abs(len(sets[name]) - share * distinct) < 4 * (share * (1 - share) * distinct) ** 0.5
        positions = iter(everything)
        assert all(document in positions for document in pieces[name]), "in the order of the dataset"
        assert inspect_dataset.main([str(tmp_path / name), "--verify"]) == 0
        assert manifest_of(tmp_path / name)["split"] == {"part": name, "shares": [0.7, 0.2, 0.1]}
    # What the parts do not agree on is left out where they are merged again.
    assert merge([str(tmp_path / "train"), str(tmp_path / "test")], tmp_path / "two") == 0
    assert "split" not in manifest_of(tmp_path / "two")


def test_split_of_a_document_depends_on_nothing_else(parts, tmp_path):
    """Alone, in another order, in another corpus: the same part."""
    part_of = {}
    for i, options in enumerate(([parts[0]], parts, [*reversed(parts), "--shuffle-seed", "5"])):
        folder = tmp_path / str(i)
        assert merge(options, folder / "all") == 0
        assert split_dataset.main([str(folder / "all"), "--shares", "60,40", "--output-dir", str(folder)]) == 0
        for name in ("train", "validation"):
            for document in documents(folder / name):
                assert part_of.setdefault(document, name) == name
        assert not (folder / "test.bin").exists()


@pytest.mark.parametrize("text", ["", "1", "1,0", "0,0,1", "1,-1", "1,x", "1,1,1,1", "1,nan", "inf,1"])
def test_wrong_shares(text):
    with pytest.raises(ArgumentError, match=rf"--shares \({text}\) must"):
        split_dataset.parse_shares(text)


def test_split_without_a_document_for_a_part(parts, tmp_path, capsys):
    arguments = [parts[0], "--shares", "1000000,1", "--output-dir", str(tmp_path)]
    assert split_dataset.main(arguments) == 1
    assert "validation would have no documents of 120: give it a larger share" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_split_onto_itself(dataset, tmp_path, capsys):
    prefix = tmp_path / "train"
    for suffix in ("bin", "idx", "json"):
        Path(f"{prefix}.{suffix}").write_bytes(Path(f"{dataset}.{suffix}").read_bytes())
    assert split_dataset.main([str(dataset), "--shares", "9,1", "--output-dir", f"{prefix}.bin"]) == 2
    assert "train.bin) must be a folder: name another" in capsys.readouterr().err
    assert split_dataset.main([str(prefix), "--shares", "9,1", "--output-dir", str(tmp_path)]) == 2
    assert "would replace" in capsys.readouterr().err and dataset_bytes(prefix) == dataset_bytes(dataset)


def test_datasets_that_do_not_belong_together(parts, corpus, tokenizer, tmp_path, capsys):
    def rename_token(settings):
        settings["added_tokens"][1]["content"] = "<|padding|>"
        settings["model"]["vocab"]["<|padding|>"] = settings["model"]["vocab"].pop("<|pad|>")

    def wide(settings):
        settings["model"]["vocab"]["<far>"] = 70000

    for name, change, message in (
        ("other", rename_token, "were made with different tokenizers (tokenizer_sha256"),
        ("wide", wide, "has uint16 tokens and"),
    ):
        other = changed_tokenizer(tokenizer, tmp_path / f"{name}_tokenizer", change)
        assert tokenize(corpus, other, tmp_path / name) == 0
        assert merge([parts[0], str(tmp_path / name)], tmp_path / "out") == 1
        assert message in capsys.readouterr().err
        assert blend_datasets.main([parts[0], str(tmp_path / name), "--output", str(tmp_path / "blend")]) == 1
    assert tokenize(corpus, tokenizer, tmp_path / "end", "--eod-token", "<|pad|>") == 0
    assert merge([parts[0], str(tmp_path / "end")], tmp_path / "out") == 1
    assert "end their documents with different ids (eod_id 0 and 1)" in capsys.readouterr().err
    Path(tmp_path / "end.json").unlink()
    assert merge([parts[0], str(tmp_path / "end")], tmp_path / "out") == 1
    assert "end has no manifest and another has" in capsys.readouterr().err
    assert not (tmp_path / "out.bin").exists() and not list(tmp_path.glob(".*"))


def test_wrong_arguments_of_merge(parts, tmp_path, capsys):
    assert merge([parts[0], parts[0] + ".bin"], tmp_path / "out") == 2
    assert "a dataset is named twice" in capsys.readouterr().err
    assert merge(parts, parts[0]) == 2
    assert "must not be one of the inputs" in capsys.readouterr().err
    assert merge(parts, tmp_path / "out", "--shuffle-seed", "-1") == 2
    assert "--shuffle-seed (-1) must be at least 0" in capsys.readouterr().err
    assert merge([str(tmp_path / "nothing")], tmp_path / "out") == 1
    assert "nothing.bin does not exist" in capsys.readouterr().err


def test_blend_by_weights_and_by_tokens(parts, tmp_path, capsys):
    output = tmp_path / "blend.txt"
    assert blend_datasets.main([f"{parts[0]}=3", f"{parts[1]}=1", "--output", str(output)]) == 0
    assert output.read_text().split() == ["0.75", parts[0], "0.25", parts[1]]
    assert blend_datasets.main([*parts, "--output", str(output)]) == 0
    tokens = [manifest_of(part)["tokens"] for part in parts]
    entries = [line.split() for line in output.read_text().splitlines()]
    assert [prefix for _, prefix in entries] == parts
    assert [float(weight) for weight, _ in entries] == pytest.approx([n / sum(tokens) for n in tokens], rel=1e-5)
    printed = re.search(r"data\.train=(.*)", capsys.readouterr().out.splitlines()[-1]).group(1)
    from megatron_gdn.training.data import split_weights

    prefixes, weights = split_weights(json.loads(printed))
    assert prefixes == parts and sum(weights) == pytest.approx(1, abs=1e-5)
    for entries, message in (
        ([f"{parts[0]}=0"], "must be numbers above 0"),
        ([f"{parts[0]}=1", parts[1]], "must all be"),
    ):
        assert blend_datasets.main([*entries, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
