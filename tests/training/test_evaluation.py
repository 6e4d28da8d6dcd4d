"""Loss at several lengths against a plain model; needles against a search and against greedy decoding."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron_gdn.training.evaluation import NeedleSample, finds_needle, loss_at_length, needle_samples
from tests.training import runs

TEXT = ". ".join(f"Sentence {i} tells of nothing at all" for i in range(400)) + "."


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


@pytest.mark.parametrize("task", [1, 2, 3])
@pytest.mark.parametrize("length", [700, 1500])
def test_prompts_hide_one_needle(task, length):
    samples = list(needle_samples(task, length, 20, encode=encode, text=TEXT, seed=3))
    places, values = [], set()
    for sample in samples:
        prompt, value = decode(sample.prompt), decode(sample.needle)
        needle = f"is:{value}."
        assert prompt.count(needle) == 1 and value.startswith(" ") and not prompt.endswith(value)
        values.add(value)
        assert len(value) == (37 if task == 3 else 8)
        # As full as whole sentences allow: the longest has 44 letters.
        assert length - 50 < len(sample.prompt) + len(sample.needle) <= length
        head, question = prompt.index("\n"), prompt.rindex("\n")
        places.append((prompt.index(needle) - head) / (question - head))
    assert len(values) == 20 and min(places) < 0.3 and max(places) > 0.7
    again = list(needle_samples(task, length, 20, encode=encode, text=TEXT, seed=3))
    assert samples == again and samples != list(needle_samples(task, length, 20, encode=encode, text=TEXT, seed=4))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(task=4), r"task \(4\) must be one of 1, 2, 3"),
        (dict(task=2, text=None), r"task 2 needs a text"),
        (dict(length=100), r"length \(100\) holds no haystack beside needle and question"),
        (dict(task=3, text="Short. Text.", length=3000), r"the text has 2 sentences, too few for 3000 tokens"),
    ],
)
def test_needles_that_cannot_be(arguments, message):
    task, length = arguments.get("task", 1), arguments.get("length", 900)
    with pytest.raises(ValueError, match=message):
        list(needle_samples(task, length, 1, encode=encode, text=arguments.get("text", TEXT), seed=0))


class Follows(torch.nn.Module):
    """A model that says after each token what a table says."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens, positions, mask):
        return F.one_hot(self.table[tokens], 12).float()


def greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor(tokens)[None], None, None)[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_one_pass_agrees_with_greedy_decoding():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(300):
        model = Follows(torch.randint(3, (12,), generator=generator))
        prompt, needle = (torch.randint(3, (n,), generator=generator).tolist() for n in (5, 3))
        found = finds_needle(model, NeedleSample(prompt=prompt, needle=needle), device=torch.device("cpu"))
        assert found == (greedy(model, prompt, 3) == needle)
        hits += found
    assert 3 < hits < 60  # of 300 times 1/27


def test_loss_needs_a_whole_stretch():
    with pytest.raises(ValueError, match=r"the text has 8 tokens and a length of 8 needs 9"):
        loss_at_length(torch.nn.Identity(), np.arange(8), 8, batch_size=1, device=torch.device("cpu"))


LETTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:-?'"


def write_tokenizer(folder, extra: int = 0):
    from tokenizers import Tokenizer, models, normalizers

    vocabulary = {letter: i for i, letter in enumerate([*LETTERS, "[unk]", *(f"[{i}]" for i in range(extra))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[unk]"))
    tokenizer.normalizer = normalizers.Lowercase()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def evaluate(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "examples/evaluate.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_script_measures_a_run(tmp_path):
    from megatron_gdn.config import parse_config
    from megatron_gdn.training.indexed import check_dataset
    from tests.hybrid import plain
    from tools.convert.checkpoint import MegatronCheckpoint

    prefix, output = runs.write_dataset(tmp_path), tmp_path / "numbers.json"
    runs.run(runs.settings(prefix, tmp_path / "run", training={"train_tokens": 5 * runs.SEQUENCE * runs.BATCH}))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    base = ["--checkpoint", tmp_path / "run", "--device", "cpu"]
    needles = ["--niah", "1", "--tokenizer", tokenizer, "--samples", 2]
    done = evaluate(*base, "--data", prefix, "--lengths", "32,480", "--tokens", 1000, "--batch-size", 3, *needles)
    assert done.returncode == 2 and "length (32) holds no haystack beside needle and question" in done.stderr
    done = evaluate(
        *base,
        "--data",
        prefix,
        "--lengths",
        "450,600",
        "--tokens",
        1200,
        "--batch-size",
        3,
        "--output",
        output,
        *needles,
    )
    assert done.returncode == 0, done.stderr
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff")
    haystack = ["--niah", "2", "--tokenizer", tokenizer, "--haystack", binary]
    failed = evaluate(*base, *haystack)
    assert failed.returncode == 2 and f"--haystack ({binary}) must be a text in UTF-8" in failed.stderr
    found = json.loads(output.read_text())
    assert found["s-niah-1"].keys() == {"450", "600"} and set(found["s-niah-1"].values()) <= {0.0, 0.5, 1.0}
    checkpoint = MegatronCheckpoint(tmp_path / "run")
    weights = {key: checkpoint.read(key).double() for key in checkpoint.keys()}
    model = parse_config(checkpoint.info["config"]).model
    tokens = torch.from_numpy(check_dataset(str(prefix)).tokens()[:1201].astype(np.int64))
    for length in (450, 600):
        count = 1200 // length
        x = tokens[: count * length].view(count, length)
        y = tokens[1 : count * length + 1].view(count, length)
        # Without the rows that fill up the vocabulary on disk, as the exported model has it.
        logits = plain.logits(model, weights, x)[..., : checkpoint.vocab_size]
        assert logits.shape[-1] < len(weights["embedding.word_embeddings.weight"])
        expected = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        assert found["loss"][str(length)] == pytest.approx(expected.item(), rel=1e-5)  # float32 against float64
    assert f"{found['loss']['600']:.4f}" in done.stdout


def test_checkpoints_of_transformer_engine_are_read_on_a_cpu(tmp_path):
    """Written by a run whose modules a CPU has no kernels for: the loss is that of the run with the others."""
    prefix = runs.write_dataset(tmp_path)
    runs.run(runs.settings(prefix, tmp_path / "run", training={"exit_after_steps": 1, "train_tokens": 640}))
    base = ["--checkpoint", tmp_path / "run", "--device", "cpu", "--data", prefix, "--lengths", 32, "--tokens", 100]
    expected = evaluate(*base)
    (path,) = (tmp_path / "run").glob("checkpoints/*/info.json")
    info = json.loads(path.read_text())
    info["config"]["model"] |= {"provider": "te", "attention_backend": "te"}
    path.write_text(json.dumps(info))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"]["info.json"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    found = evaluate(*base)
    assert expected.returncode == found.returncode == 0, found.stderr
    assert "32" in found.stdout and found.stdout == expected.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to evaluate: give --data, --niah, or both"),
        (["--niah", "1"], "--niah needs --tokenizer"),
        (["--niah", "1,4", "--tokenizer", "x"], "--niah (4) must be tasks among 1, 2, 3"),
        (["--niah", "1,2", "--tokenizer", "x"], "--niah 2 needs --haystack, a text to hide needles in"),
        (["--data", "x", "--output", "no_folder/x.json"], "--output (no_folder/x.json) must be a file in a folder"),
        (["--data", "x", "--lengths", "1,a"], "('1,a') must be positive numbers such as 1024,2048"),
        (["--data", "x", "--samples", "0"], "--tokens, --batch-size and --samples must be at least 1"),
        (["--data", "x"], "no_run does not exist: name a step_... or iter_... folder, or the folder of a run"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, message):
    from examples.evaluate import main

    try:
        code = main(["--checkpoint", str(tmp_path / "no_run"), *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
