"""Reading datasets: broken ones are refused, samples come in one order at every layout, caches never go stale."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gdn.training import data
from megatron_gdn.training.data import DatasetError, TrainingBatches
from tests.ranks import pool
from tests.training import runs

OPTIONS = dict(sequence_length=16, seed=3, vocab_size=runs.VOCABULARY, eod_id=0)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return runs.write_dataset(tmp_path_factory.mktemp("data"))


def copy(prefix, folder: Path) -> Path:
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", folder / f"copy.{suffix}")
    return folder / "copy"


def build(prefix, cache, num_train=40, num_validation=8, **options):
    return data.build_datasets(
        train=[str(prefix)],
        validation=[],
        split="80,20,0",
        cache_dir=cache,
        num_train_samples=num_train,
        num_validation_samples=num_validation,
        **(OPTIONS | options),
    )


def test_samples_are_the_corpus(prefix, tmp_path):
    """Labels are the next token of the same text, and every sample is a piece of shuffled documents joined up."""
    train, validation = build(prefix, tmp_path)
    counts = np.zeros(runs.VOCABULARY, dtype=int)
    for i in range(len(train)):
        sample = train[i]
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        counts += np.bincount(sample["tokens"].numpy(), minlength=runs.VOCABULARY)
    assert len(validation) >= 8
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    share = np.bincount(tokens, minlength=runs.VOCABULARY) / len(tokens)
    # 640 tokens drawn from the corpus: 5 standard deviations of a share
    assert np.all(np.abs(counts / counts.sum() - share) < 5 * np.sqrt(share / counts.sum()) + 1e-9)


def test_end_of_document_mask(prefix, tmp_path):
    masked, _ = build(prefix, tmp_path, eod_mask_loss=True)
    plain, _ = build(prefix, tmp_path)
    for i in range(10):
        assert torch.equal(masked[i]["tokens"], plain[i]["tokens"])
        assert torch.equal(masked[i]["loss_mask"], (plain[i]["tokens"] != 0).float())
        assert plain[i]["loss_mask"].min() == 1.0


def take(batches) -> list[torch.Tensor]:
    return [batch["tokens"] for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_order_of_samples_is_that_of_one_rank(prefix, tmp_path, num_workers):
    dataset, _ = build(prefix, tmp_path)
    in_order = torch.stack([dataset[i]["tokens"] for i in range(len(dataset))])
    for ranks in (1, 2, 4):
        parts = [
            take(
                TrainingBatches(
                    dataset,
                    consumed_samples=8,
                    micro_batch_size=2,
                    data_parallel_rank=rank,
                    data_parallel_size=ranks,
                    num_workers=num_workers if ranks == 2 else 0,
                )
            )
            for rank in range(ranks)
        ]
        # Micro-batch m of all ranks, rank after rank, are the next samples.
        together = torch.cat([batch for micro_batches in zip(*parts, strict=True) for batch in micro_batches])
        assert torch.equal(together, in_order[8 : 8 + len(together)]) and len(together) > len(dataset) - 16


def test_token_outside_the_vocabulary_is_an_error(prefix, tmp_path):
    dataset, _ = build(prefix, tmp_path)
    options = dict(consumed_samples=0, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1)
    with pytest.raises(DatasetError, match=r"token id \d+ in the data is outside the vocabulary of 10"):
        take(TrainingBatches(dataset, **options, vocab_size=10))
    assert take(TrainingBatches(dataset, **options, vocab_size=runs.VOCABULARY))


def cut(path: Path, size: int):
    os.truncate(path, size)


def flip_first_byte(path: Path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "suffix, damage, message",
    [
        ("bin", os.unlink, r"copy.bin does not exist: build it with"),
        ("idx", os.unlink, r"copy.idx does not exist"),
        ("bin", lambda path: cut(path, 0), r"copy.bin has 0 bytes and its index says \d+"),
        ("bin", lambda path: cut(path, path.stat().st_size - 1), r"copy.bin has \d+ bytes and its index says \d+"),
        ("idx", lambda path: cut(path, 20), r"copy.idx is not an index of Megatron's"),
        ("idx", lambda path: cut(path, path.stat().st_size - 8), r"copy.idx has \d+ bytes and its header says \d+"),
        ("idx", flip_first_byte, r"copy.idx is not an index of Megatron's"),
    ],
)
def test_broken_dataset_is_refused_at_open(prefix, tmp_path, suffix, damage, message):
    broken = copy(prefix, tmp_path)
    assert data.check_dataset(str(broken)).manifest == {}
    damage(tmp_path / f"copy.{suffix}")
    with pytest.raises(DatasetError, match=message):
        data.read_vocabulary([str(broken)], vocab_size=runs.VOCABULARY)


def test_vocabulary(prefix, tmp_path):
    largest = int(np.fromfile(f"{prefix}.bin", dtype=np.uint16).max())
    assert data.read_vocabulary([str(prefix)], vocab_size=largest + 1).size == largest + 1
    with pytest.raises(DatasetError, match=rf"\({largest}\) must exceed every token id, and .* has id {largest}"):
        data.read_vocabulary([str(prefix)], vocab_size=largest)
    with pytest.raises(DatasetError, match="has no manifest to tell the vocabulary's size: set model.vocab_size"):
        data.read_vocabulary([str(prefix)], vocab_size=None)
    described = copy(prefix, tmp_path)
    files = {s: {"bytes": Path(f"{described}.{s}").stat().st_size, "sha256": ""} for s in ("bin", "idx")}
    manifest = {"files": files, "max_token_id": largest, "vocab_size": 77, "eod_id": 0}
    manifest |= {"skipped": 0, "sources": [], "tokenizer_sha256": "a"}
    Path(f"{described}.json").write_text(json.dumps(manifest))
    assert data.read_vocabulary([str(described)], vocab_size=None) == data.Vocabulary(size=77, eod_id=0)
    manifest["files"]["idx"]["bytes"] += 1
    Path(f"{described}.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="and its manifest says"):
        data.read_vocabulary([str(described)], vocab_size=None)


def test_replaced_dataset_is_not_read_with_the_old_index(prefix, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    replaced = copy(prefix, folder)
    first, _ = build(replaced, tmp_path / "cache")
    # The same path, fewer documents.
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    old = IndexedDataset(str(prefix))
    builder = IndexedDatasetBuilder(str(folder / "new.bin"), dtype=np.uint16)
    for i in range(0, 100):
        builder.add_document(torch.from_numpy(old[i].astype(np.int64)), [len(old[i])])
    builder.finalize(str(folder / "new.idx"))
    for suffix in ("bin", "idx"):
        (folder / f"new.{suffix}").replace(f"{replaced}.{suffix}")
    again, _ = build(replaced, tmp_path / "cache")
    fresh, _ = build(replaced, tmp_path / "other-cache")
    for i in range(40):
        assert torch.equal(again[i]["tokens"], fresh[i]["tokens"])
    assert any(not torch.equal(first[i]["tokens"], again[i]["tokens"]) for i in range(40))


def first_tokens_of_blend(folder, validation):
    train, _ = data.build_datasets(
        train=[f"0.75 {folder / 'a'}", f"0.25 {folder / 'b'}"],
        validation=[str(validation)],
        split=None,
        cache_dir=folder / "cache",
        num_train_samples=100,
        num_validation_samples=4,
        **OPTIONS,
    )
    return [int(train[i]["tokens"][0]) for i in range(100)]


def test_blend_takes_documents_by_weight(prefix, tmp_path):
    """Two datasets with disjoint tokens: the share of each in the samples is its weight."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name, token in (("a", 5), ("b", 7)):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for _ in range(300):
            builder.add_document(torch.full((20,), token), [20])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    # Megatron's blends need a process group.
    [firsts] = pool(1).run(first_tokens_of_blend, tmp_path, prefix, groups={})
    assert (firsts.count(5), firsts.count(7)) == (75, 25)


def test_too_few_documents(prefix, tmp_path):
    with pytest.raises(DatasetError, match="the validation split of .* has 0 samples .* and 8 are needed"):
        data.build_datasets(
            train=[str(prefix)],
            validation=[],
            split="100,0,0",
            cache_dir=tmp_path,
            num_train_samples=4,
            num_validation_samples=8,
            **OPTIONS,
        )


class Payload:
    """Makes the canary folder when a pickle of it is executed."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def poison(cache: Path, canary: Path) -> None:
    paths = sorted(cache.rglob("*.npy"))
    assert paths
    for path in paths:
        path.write_bytes(pickle.dumps(Payload(canary)))


def test_pickles_in_the_cache_are_built_again_and_never_run(prefix, tmp_path, monkeypatch):
    cache, canary = tmp_path / "cache", tmp_path / "canary"
    first, _ = build(prefix, cache)
    poison(cache, canary)
    again, _ = build(prefix, cache)
    assert all(torch.equal(first[i]["tokens"], again[i]["tokens"]) for i in range(40))
    # After its check, too, an index may be replaced.
    monkeypatch.setattr(data, "drop_broken_indices", lambda path: poison(path, canary))
    with pytest.raises(ValueError, match="contains pickled"):
        build(prefix, cache)
    assert not canary.exists()
    array = np.array([1])
    np.save(tmp_path / "object.npy", array.astype(object))
    assert np.load(tmp_path / "object.npy", allow_pickle=True) == array  # elsewhere NumPy is as it was


def first_samples(prefix, cache):
    train, _ = build(prefix, cache)
    return torch.stack([train[i]["tokens"] for i in range(8)])


def test_all_ranks_see_the_same_samples(prefix, tmp_path):
    alone = first_samples(prefix, tmp_path / "alone")
    for samples in pool(2).run(first_samples, prefix, tmp_path / "together", groups={}):
        assert torch.equal(samples, alone)


def test_unigram_loss_equals_a_direct_count(prefix):
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16).tolist()
    size = max(tokens) + 1
    probability = {t: (tokens.count(t) + 1) / (len(tokens) + size) for t in set(tokens)}
    expected = -sum(np.log(probability[t]) for t in tokens) / len(tokens)
    assert data.unigram_cross_entropy([str(prefix)], [str(prefix)]) == pytest.approx(expected, rel=1e-12)
