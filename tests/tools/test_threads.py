"""A tokenizer's own library on several threads: the same records and bytes as on one, whatever is wrong in between."""

import gzip
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.tools.texts import TEXTS, json_lines, specification_of
from tools.preprocess import readers, shards
from tools.preprocess.executors import Local, divide_workers
from tools.preprocess.libraries import HuggingFaceTokenizer, open_tokenizer
from tools.preprocess.readers import Batch, Problem
from tools.preprocess.shards import tokenize_unit
from tools.preprocess.sources import find_sources, plan_units


def lines_with_problems() -> bytes:
    good = json_lines([*TEXTS, "long " * 400, *TEXTS[::-1]]).splitlines(keepends=True)
    special = b'{"text": "before <|endoftext|> after"}\n'
    bad = [b"{\n", b'{"other": 1}\n', special, b'{"text": ""}\n', b'{"text": "%s"}\n' % (b"x" * 4000), b"\xff\n"]
    for i, line in enumerate(bad * 5):
        good.insert(17 * i + i % 3, line)
    return b"".join(good)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("special_in_text", ["error", "escape"])
def test_threads_do_not_change_a_unit(tokenizer, tmp_path, monkeypatch, suffix, special_in_text):
    monkeypatch.setattr(readers, "_BATCH_BYTES", 5000)
    monkeypatch.setattr(shards, "_THREADS_CHARACTERS", 300)
    data = lines_with_problems()
    path = tmp_path / f"in.{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    (unit,) = plan_units(find_sources([str(path)]), 10**9)
    results = {}
    for threads in (1, 2, 5):
        folder = tmp_path / str(threads)
        folder.mkdir()
        specification = specification_of(tokenizer, special_in_text=special_in_text)
        record = tokenize_unit(unit, specification, folder, threads)
        del record["rss_mb"]
        files = [(folder / f"{record['key']}.{suffix}").read_bytes() for suffix in ("bin", "idx")]
        results[threads] = (record, files)
    assert results[2] == results[1] and results[5] == results[1]
    assert len(results[1][0]["problems"]) == (6 if special_in_text == "error" else 5)
    if special_in_text == "error":  # as the problems were made above
        numbers = [number for _, number, _ in results[1][0]["examples"]]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("num_characters", [1, 50, 400, 10**6])
def test_parts_of_a_batch_are_the_batch(num_characters):
    """In its order, of the length asked for but for one text, every problem between the records that it was between."""
    draw = random.Random(0)
    numbers = sorted(draw.sample(range(200), 150))
    good, bad = numbers[::2], draw.sample(numbers[1::2], len(numbers[1::2]))
    texts = ["x" * draw.randint(1, 120) for _ in good]
    batch = Batch(texts=texts, numbers=good, problems=[Problem("bad", number, "") for number in bad])
    parts = list(batch.divide(num_characters))
    assert [text for part in parts for text in part.texts] == texts
    assert [number for part in parts for number in part.numbers] == good
    assert [problem.number for part in parts for problem in part.problems] == sorted(bad)
    for part, following in zip(parts, parts[1:], strict=False):
        assert sum(map(len, part.texts[:-1])) < num_characters <= sum(map(len, part.texts))
        assert all(problem.number < part.numbers[-1] for problem in part.problems)
        assert all(problem.number > part.numbers[-1] for problem in following.problems)


def test_batch_of_problems_alone_is_kept():
    (part,) = Batch(problems=[Problem("empty_file", 0, "")]).divide(100)
    assert part.problems and not part.texts


def test_parts_are_encoded_at_the_same_time(tokenizer, tmp_path, monkeypatch):
    """Three threads meet in the library; with fewer the barrier breaks."""
    barrier, encode = threading.Barrier(3, timeout=20), HuggingFaceTokenizer.encode

    def meet(self, texts):
        barrier.wait()
        return encode(self, texts)

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", meet)
    monkeypatch.setattr(shards, "_THREADS_CHARACTERS", 10)
    path = tmp_path / "in.jsonl"
    path.write_bytes(json_lines(TEXTS[:5]))  # six parts, the last of them empty
    (unit,) = plan_units(find_sources([str(path)]), 10**9)
    assert tokenize_unit(unit, specification_of(tokenizer), tmp_path, threads=3)["documents"] == 5


def test_error_ends_the_unit_soon(tokenizer, tmp_path, monkeypatch):
    """With most of its parts never begun: Control-C does not wait for them either."""
    monkeypatch.setattr(shards, "_THREADS_CHARACTERS", 10)
    begun = []

    def fail(self, texts):
        begun.append(texts)
        time.sleep(0.01)
        raise OSError(5, "the disk")

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", fail)
    path = tmp_path / "in.jsonl"
    path.write_bytes(json_lines(f"document {i:03d}" for i in range(300)))
    (unit,) = plan_units(find_sources([str(path)]), 10**9)
    with pytest.raises(OSError, match="the disk"):
        tokenize_unit(unit, specification_of(tokenizer), tmp_path, threads=2)
    assert len(begun) < 100


def test_plain_text_of_special_tokens_beside_other_threads(tokenizer):
    """One thread's text with special tokens as text does not change what the others see."""
    opened = open_tokenizer(str(tokenizer))
    special = opened.token_id("<|endoftext|>")
    text = "a <|endoftext|> b " * 20

    def as_token(_):
        return opened.encode([text])[0].count(special)

    def as_text(_):
        return opened.encode_as_text(text).count(special)

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(task, i) for i in range(300) for task in (as_token, as_text)]
        assert [future.result() for future in found] == [20, 0] * 300


@pytest.mark.parametrize(
    "workers, engine, num_units, expected",
    [
        (1, "gigatoken", 9, (1, 1)),
        (6, "gigatoken", 9, (6, 1)),
        (6, "gigatoken", 3, (3, 1)),
        (1, "tokenizers", 9, (1, 1)),
        (2, "tokenizers", 9, (1, 2)),
        (4, "tiktoken", 9, (1, 4)),
        (5, "sentencepiece", 9, (2, 3)),
        (64, "tokenizers", 99, (16, 4)),
        (64, "tokenizers", 1, (1, 4)),
    ],
)
def test_cores_become_processes_and_threads(workers, engine, num_units, expected):
    assert divide_workers(workers, engine, num_units) == expected


def test_processes_of_another_engine_are_ended():
    with Local(workers=2, num_units=5) as local:
        local.start("gigatoken")
        pool = local._pool
        assert pool._executor.submit(int, "7").result() == 7
        local.start("gigatoken")
        assert local._pool is pool
        local.start("tokenizers")
        assert local._pool is None
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool._executor.submit(int, "7")
