"""The tokenizer goes with a run, and text comes from its checkpoints."""

import json

import pytest
import torch

from megatron_gdn.training.indexed import DatasetError
from tests.training import runs
from tests.training.test_pretrain import curve
from tools.convert import hf_to_megatron, megatron_to_hf
from tools.preprocess import tokenize_corpus, train_tokenizer

PROMPT = "the quick"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A tokenizer and a dataset of its tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the quick brown fox jumps over a lazy dog while seven wizards box".split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 40)) for i in range(1, 60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    source = ["--input", str(folder / "text.jsonl")]
    assert train_tokenizer.main([*source, "--output", str(folder / "tokenizer"), "--vocab-size", "300"]) == 0
    to = ["--tokenizer", str(folder / "tokenizer"), "--output-prefix", str(folder / "text"), "--append-eod"]
    assert tokenize_corpus.main([*source, *to, "--workers", "1"]) == 0
    return folder


def settings(corpus, output_dir, **data):
    model = runs.SETTINGS["model"] | {"vocab_size": None}
    training = runs.SETTINGS["training"] | {"validation_samples": 0, "validation_interval": None}
    sections = dict(model=model, training=training, data=dict(num_workers=0, split=None) | data)
    return runs.settings(corpus / "text", output_dir, **sections)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run") / "run"
    runs.run(settings(corpus, output_dir, tokenizer=str(corpus / "tokenizer")))
    return output_dir


def test_checkpoints_take_the_tokenizer_along(corpus, run, tmp_path):
    ours, theirs = run / "checkpoints/tokenizer", corpus / "tokenizer"
    assert {p.name: p.read_bytes() for p in ours.iterdir()} == {p.name: p.read_bytes() for p in theirs.iterdir()}
    # It changes nothing of the run, which goes on without it too.
    half = settings(corpus, tmp_path / "run", tokenizer=str(theirs))
    half["training"]["exit_after_steps"] = 5
    runs.run(half)
    runs.run(settings(corpus, tmp_path / "run"), resume=True)
    assert curve(tmp_path / "run") == curve(run)


def test_generated_text_is_what_transformers_generates(run, tmp_path, capsys):
    from examples import generate

    arguments = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "12", "--device", "cpu"]
    assert generate.main(["--checkpoint", str(run), *arguments]) == 0
    ours = capsys.readouterr().out.rstrip("\n")
    to = ["--output", str(tmp_path / "hf"), "--format", "megatron_gdn"]
    assert megatron_to_hf.main(["--checkpoint", str(run), *to]) == 0
    transformers = pytest.importorskip("transformers")
    import megatron_gdn.hf  # noqa: F401 - registers the model, whose decoding keeps states and keys

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    found = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=0)[0]
    assert ours == tokenizer.decode(found, skip_special_tokens=True)
    assert len(ours) > len(PROMPT)
    # The weights that come back, with the model alone in their configuration, give the same text.
    back = tmp_path / "back"
    assert hf_to_megatron.main(["--hf", str(tmp_path / "hf"), "--output", str(back)]) == 0
    capsys.readouterr()
    assert generate.main(["--checkpoint", str(back), *arguments]) == 0
    assert capsys.readouterr().out.rstrip("\n") == ours
    # Megatron-LM's has other keys.
    other = ["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "other"), "--for", "megatron_lm"]
    assert hf_to_megatron.main(other) == 0
    tokenizer = ["--tokenizer", str(run / "checkpoints/tokenizer")]
    assert generate.main(["--checkpoint", str(tmp_path / "other"), *arguments, *tokenizer]) == 2
    assert "has no info.json, so this project did not write it: export" in capsys.readouterr().err
    # A bit of the weights flips.
    weights = next(back.rglob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert generate.main(["--checkpoint", str(back), *arguments]) == 2
    assert "has other contents than were written (SHA-256 differs)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "nan"], "--temperature and --top-k must be at least 0"),
        (["--temperature", "inf"], "--temperature and --top-k must be at least 0"),
        (["--seed", str(2**64)], f"--seed ({2**64}) must be from 0 to 2**63 - 1"),
        (["--prompt", ""], "--prompt ('') must hold at least one token"),
    ],
)
def test_wrong_arguments_of_generation(run, capsys, arguments, message):
    from examples import generate

    assert generate.main(["--checkpoint", str(run), "--prompt", PROMPT, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_wrong_tokenizers(corpus, run, tmp_path, capsys):
    from megatron_gdn.training.data import read_vocabulary

    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(DatasetError, match=r"data.tokenizer \(.*other\) must be a folder with tokenizer.json or"):
        read_vocabulary([str(corpus / "text")], vocab_size=None, tokenizer=str(other))
    content = (corpus / "tokenizer/tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(content + " ")
    with pytest.raises(DatasetError, match=r"text and what data.tokenizer .* makes were made with different"):
        read_vocabulary([str(corpus / "text")], vocab_size=None, tokenizer=str(other))


def test_text_needs_a_tokenizer(corpus, tmp_path, capsys):
    from examples import generate

    values = settings(corpus, tmp_path / "run")
    values["training"]["exit_after_steps"] = 1
    runs.run(values)
    assert generate.main(["--checkpoint", str(tmp_path / "run"), "--prompt", PROMPT]) == 2
    assert "--tokenizer is required: there is none in" in capsys.readouterr().err
