"""Text from WebDataset shards: each document once an epoch, one order at every layout, broken shards refused."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_gdn.config import ConfigError, DataConfig, parse_config
from megatron_gdn.training import streaming
from megatron_gdn.training.data import TrainingBatches, read_vocabulary
from megatron_gdn.training.indexed import DatasetError
from megatron_gdn.training.metrics import read_metrics
from megatron_gdn.training.streaming import StreamedDataset, find_shards
from tests.training import runs

EOD = "<|endoftext|>"
LENGTH, NUM_SHARDS = 16, 5


def text_of(number: int) -> str:
    """A short text; some have only a word, one names the token that ends documents."""
    rng = np.random.default_rng(number)
    words = rng.choice(["state", "decay", "gate", "delta", "key", "value"], rng.integers(1, 30))
    return " ".join(words) + (f" {EOD} in the middle" if number == 7 else "")


def write_shard(path: Path, numbers) -> None:
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for number in numbers:
            writer.write({"__key__": f"{number:04d}", "txt": text_of(number).encode(), "cls": b"1"})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards of different numbers of documents, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    for shard, numbers in enumerate(np.split(np.arange(100), [13, 30, 60, 61])):
        write_shard(folder / f"{shard}.tar", numbers)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=runs.VOCABULARY + 250, special_tokens=[EOD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text_of(number) for number in range(100)], trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    return folder


def settings(folder: Path, train: str = "*.tar", **options) -> DataConfig:
    return DataConfig(**dict(train=[f"{folder}/{train}"], tokenizer=str(folder / "tokenizer")) | options)


def build(corpus, cache, lanes=2, **options) -> StreamedDataset:
    options = dict(num_samples=400, sequence_length=LENGTH, seed=3) | options
    return StreamedDataset(find_shards(settings(corpus)), num_lanes=lanes, cache_dir=cache, **options)


def documents_of(corpus: Path, shard: int) -> list[list[int]]:
    """Tokens of each document of a shard, by webdataset's own reader and plain calls of the tokenizer."""
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer/tokenizer.json"))
    tokenizer.encode_special_tokens = True
    samples = webdataset.WebDataset(f"file:{corpus}/{shard}.tar", shardshuffle=False)
    return [[*tokenizer.encode(sample["txt"].decode()).ids, 0] for sample in samples]


def text_of_lane(corpus, lane: int, lanes: int, epochs: int) -> list[list[int]]:
    """The documents of a lane, by the rule in the module's docstring."""
    found = []
    for epoch in range(epochs):
        order = np.random.default_rng([3, epoch]).permutation(NUM_SHARDS)
        if lanes <= NUM_SHARDS:
            found += [document for shard in order[lane::lanes] for document in documents_of(corpus, shard)]
        else:
            sharing = [other for other in range(lanes) if other % NUM_SHARDS == lane % NUM_SHARDS]
            found += documents_of(corpus, order[lane % NUM_SHARDS])[sharing.index(lane) :: len(sharing)]
    return found


@pytest.mark.parametrize("lanes", [2, 5, 12], ids=["fewer than shards", "as many", "more than shards"])
def test_samples_are_the_documents(corpus, tmp_path, lanes):
    joined = build(corpus, tmp_path, lanes)
    separate = build(corpus, tmp_path, lanes, documents="separate", eod_mask_loss=True)
    for lane in range(lanes):
        documents = text_of_lane(corpus, lane, lanes, epochs=20)
        text = torch.tensor([token for document in documents for token in document])
        place = torch.cat([torch.arange(len(document)) for document in documents])
        for i in range(400 // lanes // 4):
            sample, apart = joined[i * lanes + lane], separate[i * lanes + lane]
            start = i * LENGTH
            assert torch.equal(sample["tokens"], text[start : start + LENGTH])
            assert torch.equal(sample["labels"], text[start + 1 : start + LENGTH + 1])
            assert torch.equal(sample["position_ids"], torch.arange(LENGTH)) and sample["loss_mask"].min() == 1
            assert torch.equal(apart["tokens"], sample["tokens"])
            where = place[start : start + LENGTH + 1]
            first = torch.where(where == 0, torch.arange(LENGTH + 1), 0).cummax(0).values
            assert torch.equal(apart["position_ids"], (torch.arange(LENGTH + 1) - first)[:-1])
            kept = (where[1:] != 0) & (sample["tokens"] != 0)
            assert torch.equal(apart["loss_mask"], kept.float())


@pytest.mark.parametrize("lanes", [2, 12])
def test_an_epoch_has_every_document_once(corpus, lanes):
    everything = [document for lane in range(lanes) for document in text_of_lane(corpus, lane, lanes, epochs=1)]
    assert sorted(everything) == sorted(
        document for shard in range(NUM_SHARDS) for document in documents_of(corpus, shard)
    )


def test_a_reader_that_goes_on_opens_only_the_shard_it_is_in(corpus, tmp_path, monkeypatch):
    whole = build(corpus, tmp_path / "other", lanes=1)
    expected = [whole[i]["tokens"] for i in range(120)]
    first = build(corpus, tmp_path / "cache", lanes=1)
    for i in range(100):
        first[i]
    opened = []
    read_texts = streaming.read_texts
    monkeypatch.setattr(streaming, "read_texts", lambda path, field: opened.append(path) or read_texts(path, field))
    later = build(corpus, tmp_path / "cache", lanes=1)
    assert torch.equal(later[100]["tokens"], expected[100]) and len(opened) == 1
    # Backwards, and without what was kept, it is right too.
    assert torch.equal(later[3]["tokens"], expected[3])
    fresh = build(corpus, tmp_path / "empty", lanes=1)
    assert torch.equal(fresh[119]["tokens"], expected[119])


def test_another_file_under_the_same_path_is_counted_again(tmp_path, corpus):
    for folder in ("shards/tokenizer", "cache"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "shards/tokenizer/tokenizer.json").write_bytes((corpus / "tokenizer/tokenizer.json").read_bytes())
    write_shard(tmp_path / "shards/a.tar", range(5))
    before = build(tmp_path / "shards", tmp_path / "cache", lanes=1)
    for i in range(60):
        before[i]
    write_shard(tmp_path / "shards/a.tar", range(5, 20))
    now = build(tmp_path / "shards", tmp_path / "cache", lanes=1)
    plain = build(tmp_path / "shards", tmp_path / "nothing", lanes=1)
    assert torch.equal(now[50]["tokens"], plain[50]["tokens"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_of_samples_is_that_of_one_rank(corpus, tmp_path, num_workers):
    in_order = torch.stack([build(corpus, tmp_path, lanes=8)[i]["tokens"] for i in range(48)])
    for ranks in (1, 2):
        parts = []
        for rank in range(ranks):
            batches = TrainingBatches(
                build(corpus, tmp_path, lanes=8, num_samples=48),
                consumed_samples=8,
                micro_batch_size=2,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
                num_workers=num_workers,
            )
            parts.append([batch["tokens"] for batch in batches])
        together = torch.cat([batch for micro_batches in zip(*parts, strict=True) for batch in micro_batches])
        assert torch.equal(together, in_order[8:])


def test_text_of_a_special_token_ends_no_document(corpus):
    documents = list(build(corpus, corpus / "cache").encode(f"{corpus}/0.tar", 0, 1))
    assert EOD in text_of(7) and len(documents) == 13
    assert all((ids == 0).sum() == 1 and ids[-1] == 0 for ids in documents)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle ran')",))


def write_members(path: Path, **members: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_nothing_is_unpickled(tmp_path):
    bomb = pickle.dumps(Bomb())
    write_members(tmp_path / "a.tar", a_pkl=bomb, a_pyd=bomb, a_txt=b"text")
    assert list(streaming.read_texts(str(tmp_path / "a.tar"), "txt")) == ["text"]


BROKEN = {
    r"a.tar sample a has no field data.text_field \(txt\); it has b.txt, c.txt": dict(a_b_txt=b"1", a_c_txt=b"2"),
    r"a.tar sample b has no field data.text_field \(txt\); it has json": dict(a_txt=b"1", b_json=b"{}"),
    r"a.tar sample a is not UTF-8 \(invalid start byte at byte 1\)": dict(a_txt=b"x\xff"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_samples_are_errors(tmp_path, message):
    write_members(tmp_path / "a.tar", **BROKEN[message])
    with pytest.raises(DatasetError, match=message):
        list(streaming.read_texts(str(tmp_path / "a.tar"), "txt"))


def test_wrong_inputs_are_refused_at_the_start(corpus, tmp_path):
    for entry in (f"pipe:>{tmp_path}/ran.tar", "https://example.org/a.tar", f"{tmp_path}/none-*.tar"):
        with pytest.raises(DatasetError, match=r"data.train \(.*\) names no file: give local tar files"):
            find_shards(DataConfig(train=[entry], tokenizer="x"))
    assert not (tmp_path / "ran.tar").exists()
    content = (corpus / "0.tar").read_bytes()
    (tmp_path / "tokenizer").symlink_to(corpus / "tokenizer")
    # In the middle of a member, and where one ends.
    for size in (700, 1024, len(content) - 10240):
        (tmp_path / "cut.tar").write_bytes(content[:size])
        with pytest.raises(DatasetError, match="cut.tar is not a whole tar file"):
            find_shards(settings(tmp_path))
    with pytest.raises(DatasetError, match="tokenizer.json cannot be read as a tokenizer"):
        find_shards(settings(corpus, tokenizer=str(tmp_path)))
    with pytest.raises(DatasetError, match=r"data.eod_token \(</s>\) must be a token of"):
        find_shards(settings(corpus, eod_token="</s>"))
    shards = find_shards(settings(corpus))
    with pytest.raises(DatasetError, match=r"model.vocab_size \(100\) must exceed every token id, and .*tokenizer has"):
        read_vocabulary([], vocab_size=100, shards=shards)
    assert read_vocabulary([], vocab_size=None, shards=shards).size == shards.vocab_size


@pytest.mark.parametrize(
    "data, message",
    [
        (dict(train=["a.tar", "b"], tokenizer="t"), r"must be all prefixes or all .tar shards"),
        (dict(train=["a.tar"]), r"tokenizer \(None\) is required by .tar shards"),
        (dict(train=["a.tar"], tokenizer="t", split="9,1"), r"split \(9,1\) must be null with .tar shards"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data, message):
    values = runs.settings(Path("x"), Path("y"))
    with pytest.raises(ConfigError, match=message):
        parse_config(values | {"data": data})


def test_stop_and_resume_equals_one_go(corpus, tmp_path):
    """Resumed with micro-batches of another size."""
    losses = []
    for name, stops in (("one", [10]), ("two", [4, 10])):
        for i, stop in enumerate(stops):
            training = dict(exit_after_steps=stop, validation_samples=0, micro_batch_size=2 if name == "one" else 1)
            values = runs.settings(corpus, tmp_path / name, training=training, model=dict(vocab_size=None))
            values["data"] = dict(train=[f"{corpus}/*.tar"], tokenizer=str(corpus / "tokenizer"), num_workers=0)
            runs.run(values, resume=i > 0)
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append({row["step"]: row["train/loss"] for row in rows if "train/loss" in row})
    # Sums over micro-batches of another size.
    assert list(losses[0]) == list(losses[1]) == list(range(1, 11))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][10] < losses[0][1] - 0.2
