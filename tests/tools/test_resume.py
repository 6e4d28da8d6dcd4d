"""Killed at random moments and started again: the same bytes, nothing done twice that was done, nothing left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools.texts import TEXTS, dataset_bytes, json_lines, manifest_of, specification_of, summary_of, tokenize
from tools.preprocess import executors, shards, tokenize_corpus

ROOT = Path(__file__).parents[2]
# Measured by hand with 20 (tests/bench/preprocess.py kills); here as many as take seconds.
KILLS = int(os.environ.get("PREPROCESS_KILLS", "4"))


def start(corpus, tokenizer, prefix, engine="auto", stderr=subprocess.DEVNULL, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.preprocess.tokenize_corpus", "--input", str(corpus), "--append-eod"]
    command += ["--tokenizer", str(tokenizer), "--output-prefix", str(prefix), "--workers", "2", "--unit-mb", "0.2"]
    command += ["--engine", engine]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, **options)


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:  # it ended meanwhile
            continue
        if int(fields["PPid"]) == pid:
            found.append(int(fields["Pid"]))
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer):
    """A corpus of some units, and its dataset made without interruption."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    path.write_bytes(json_lines(f"{text} {i}" for i in range(60) for text in TEXTS))
    assert tokenize(path, tokenizer, path.with_name("whole"), "--unit-mb", "0.2") == 0
    return path


def test_kills_at_random_moments_change_nothing(large, tokenizer, tmp_path):
    """SIGKILL to the main process, each time after another number of finished units."""
    generator = random.Random(0)
    work, kills = tmp_path / "out.work", 0
    deadline = time.monotonic() + 250
    while kills < KILLS:
        done = len(list(work.glob("*.json")))
        process = start(large, tokenizer, tmp_path / "out")
        while process.poll() is None and len(list(work.glob("*.json"))) < done + 1 + kills % 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(generator.random() * 0.1)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if (tmp_path / "out.json").exists():  # it was faster: again from nothing
            assert dataset_bytes(tmp_path / "out") == dataset_bytes(large.with_name("whole"))
            for path in tmp_path.glob("out.*"):
                path.unlink()
            continue
        assert not (tmp_path / "out.bin").exists() and not (tmp_path / "out.idx").exists()
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    done = len(list(work.glob("*.json")))
    assert tokenize(large, tokenizer, tmp_path / "out", "--unit-mb", "0.2") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(large.with_name("whole"))
    assert manifest_of(tmp_path / "out") == manifest_of(large.with_name("whole"))
    assert summary_of(tmp_path / "out")["units_resumed"] == done
    assert {path.name for path in tmp_path.iterdir()} == {"out.bin", "out.idx", "out.json", "out.summary.json"}


@pytest.mark.parametrize("moment", ["tokenized", "joined", "summary"])
def test_failure_at_the_end_keeps_the_work(large, tokenizer, tmp_path, monkeypatch, moment):
    """After the last unit, with the tokens joined, and just before the names are given."""

    class Stopped(BaseException):
        pass

    name = "write_json" if moment == "summary" else "concatenate_records"
    original = getattr(tokenize_corpus, name)

    def stop(*arguments):
        if moment == "joined":
            original(*arguments)
        raise Stopped

    monkeypatch.setattr(tokenize_corpus, name, stop)
    with pytest.raises(Stopped):
        tokenize(large, tokenizer, tmp_path / "out", "--unit-mb", "0.2")
    assert not list(tmp_path.glob("out.bin")) and not list(tmp_path.glob("out.idx"))
    monkeypatch.undo()
    assert tokenize(large, tokenizer, tmp_path / "out", "--unit-mb", "0.2") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(large.with_name("whole"))
    assert summary_of(tmp_path / "out")["units_resumed"] == summary_of(tmp_path / "out")["units"]


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "index", "record"])
def test_damaged_work_is_done_again(large, tokenizer, tmp_path, monkeypatch, damage):
    """A unit that a machine lost a part of when it fell is not taken for done."""
    monkeypatch.setattr(tokenize_corpus, "concatenate_records", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize(large, tokenizer, tmp_path / "out", "--unit-mb", "0.2")
    monkeypatch.undo()
    suffix = {"index": "idx", "record": "json"}.get(damage, "bin")
    victim = sorted((tmp_path / "out.work").glob(f"*.{suffix}"))[2]
    data = bytearray(victim.read_bytes())
    if damage == "cut":
        del data[-2:]
    elif damage == "longer":
        data += b"\0\0"
    else:
        data[len(data) // 2] ^= 1 if damage != "record" else 0x80
    victim.write_bytes(data)
    assert tokenize(large, tokenizer, tmp_path / "out", "--unit-mb", "0.2") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(large.with_name("whole"))
    summary = summary_of(tmp_path / "out")
    assert summary["units_resumed"] == summary["units"] - 1


def test_changed_input_or_option_is_not_resumed(corpus, tokenizer, tmp_path, monkeypatch):
    """Work of another input, tokenizer or option is never mixed in."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS))
    monkeypatch.setattr(tokenize_corpus, "concatenate_records", lambda *_: 1 / 0)
    for options in ([], ["--special-in-text", "allow"], ["--engine", "reference"], ["--max-document-mb", "1"]):
        with pytest.raises(ZeroDivisionError):
            tokenize(path, tokenizer, tmp_path / "out", *options)
    assert len(list((tmp_path / "out.work").glob("*.json"))) == 4
    path.write_bytes(json_lines(reversed(TEXTS)))  # of the same size, at another time
    monkeypatch.undo()
    assert tokenize(path, tokenizer, tmp_path / "out") == 0
    assert summary_of(tmp_path / "out")["units_resumed"] == 0
    assert tokenize(path, tokenizer, tmp_path / "fresh") == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(tmp_path / "fresh")


def test_complete_dataset_is_left_alone(corpus, tokenizer, tmp_path, capsys):
    assert tokenize(corpus, tokenizer, tmp_path / "out") == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert tokenize(corpus, tokenizer, tmp_path / "out") == 0
    assert "out is complete: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "out.bin").write_bytes((tmp_path / "out.bin").read_bytes()[:-2])
    assert tokenize(corpus, tokenizer, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert (
        "nothing to do" not in printed
        and "out is broken, or of another input, tokenizer or option: replaced" in printed
    )


def test_skipped_records_fail_when_fail_is_asked(tokenizer, tmp_path):
    """Work kept from a run that skipped does not hide what is bad from one that must fail, and the other way round."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{\n')
    assert tokenize(path, tokenizer, tmp_path / "out") == 1
    assert tokenize(path, tokenizer, tmp_path / "out", "--on-error", "skip") == 0
    assert summary_of(tmp_path / "out")["units_resumed"] == 1
    assert tokenize(path, tokenizer, tmp_path / "out") == 1


@pytest.mark.parametrize("moment, engine", [("importing", "auto"), ("tokenizing", "auto"), ("tokenizing", "reference")])
def test_interrupted_run_says_so_and_goes_on(large, tokenizer, tmp_path, moment, engine):
    """Control-C reaches the main process and its children: while the one imports that workers come from, and later.

    On the tokenizer's own library there are threads and no children.
    """
    process = start(large, tokenizer, tmp_path / "out", engine, subprocess.PIPE, start_new_session=True)
    # First the resource tracker of multiprocessing, then the server.
    while len(children(process.pid)) < 2 if moment == "importing" else not list(tmp_path.glob("out.work/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    if moment == "importing":
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and errors == b"stopped: the same command goes on from here\n", errors
    assert tokenize(large, tokenizer, tmp_path / "out", "--unit-mb", "0.2", "--engine", engine) == 0
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(large.with_name("whole"))
    assert moment == "importing" or summary_of(tmp_path / "out")["units_resumed"] > 0


def test_killed_worker_is_an_error(large, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(executors, "_start_worker", _end_at_once)
    assert tokenize(large, tokenizer, tmp_path / "out", "--unit-mb", "0.2", "--workers", "2") == 1
    assert "a worker process was killed, perhaps for its memory: use fewer --workers" in capsys.readouterr().err
    assert not (tmp_path / "out.bin").exists()


def _end_at_once() -> None:
    os._exit(1)


def test_same_unit_by_two_processes(corpus, tokenizer, tmp_path):
    """As a scheduler does that takes a task for lost: the second writes its own files and both give the same."""
    from tools.preprocess.sources import find_sources, plan_units

    specification = specification_of(tokenizer)
    (unit,) = plan_units(find_sources([str(corpus)]), 10**9)
    records = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        records.append(shards.tokenize_unit(unit, specification, tmp_path / name))
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) == 3
    assert json.loads(files[0][f"{records[0]['key']}.json"])["documents"] == len(TEXTS)
