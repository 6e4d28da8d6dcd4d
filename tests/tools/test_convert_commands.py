"""What a new user does wrong with the commands of conversion, and what they say."""

import json
import re
import shutil

import pytest

from tests.tools import checkpoints
from tools.convert import hf_to_megatron, inspect_checkpoint, lit_gpt_to_megatron, megatron_to_hf, verify

MODEL = dict(pattern="G-G-", linear_num_key_heads=2, linear_num_value_heads=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, its export, a folder of something else and an empty one, in the current folder of each test."""
    root = tmp_path_factory.mktemp("commands")
    ours = checkpoints.checkpoint(root / "run", MODEL)
    assert megatron_to_hf.main(["--checkpoint", str(ours), "--output", str(root / "hf")]) == 0
    (root / "letters").mkdir()
    (root / "letters" / "mother.txt").write_text("dear mother")
    (root / "empty").mkdir()
    return root


EXPORT, IMPORT = megatron_to_hf, hf_to_megatron
MISTAKES = {
    "no run": (
        EXPORT,
        "--checkpoint nowhere --output x",
        r"nowhere does not exist: name a step_... or iter_... folder",
    ),
    "other folder": (EXPORT, "--checkpoint letters --output x", r"letters holds no checkpoint: name a step_..."),
    "other side": (
        EXPORT,
        "--checkpoint hf --output x",
        r"Hugging Face folder, which tools.convert.hf_to_megatron reads",
    ),
    "no model": (
        IMPORT,
        "--hf nowhere --output x",
        r"nowhere must be a folder with config.json: there is no such folder",
    ),
    "no config": (IMPORT, "--hf letters --output x", r"letters must be a folder with config.json: No such file"),
    "a run": (IMPORT, "--hf run --output x", r"It is a checkpoint, which tools.convert.megatron_to_hf reads"),
    "full": (
        EXPORT,
        "--checkpoint run --output letters",
        r"letters\) is not empty: name another folder, or --overwrite",
    ),
    "full import": (IMPORT, "--hf hf --output letters", r"letters\) is not empty: name another folder, or --overwrite"),
    "letters": (
        EXPORT,
        "--checkpoint run --output letters --overwrite",
        r"letters\) holds neither a model nor a check",
    ),
    "itself": (
        EXPORT,
        "--checkpoint run --output run --overwrite",
        r"\(run\) holds what is converted \(run\): name anot",
    ),
    "below": (
        IMPORT,
        "--hf run/hf --output run --overwrite",
        r"\(run\) holds what is converted \(run/hf\): name another",
    ),
    "here": (EXPORT, "--checkpoint run --output .", r"--output \(.\) must be the name of a folder to make"),
    "a file": (EXPORT, "--checkpoint run --output letters/mother.txt", r"mother.txt\) must be a folder: name another"),
    "no tokenizer": (
        EXPORT,
        "--checkpoint run --output x --tokenizer nowhere",
        r"nowhere\) must be a folder with tokenizer",
    ),
    "no size": (
        EXPORT,
        "--checkpoint run --output x --max-shard-size 5",
        r"--max-shard-size \(5\) must be a size such as",
    ),
    "one folder": (verify, "run nowhere", r"nowhere does not exist"),
    "nothing": (inspect_checkpoint, "empty", r"empty holds no checkpoint"),
    "no file": (
        lit_gpt_to_megatron,
        "--file x.pth --recipe y.yaml --output x",
        r"--file \(x.pth\) must be a file, and",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_named_and_changes_nothing(folders, tmp_path, monkeypatch, capsys, case):
    command, arguments, message = MISTAKES[case]
    shutil.copytree(folders, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    if case == "below":
        shutil.copytree("hf", "run/hf")
    before = sorted(tmp_path.rglob("*"))
    assert command.main(arguments.split()) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        (EXPORT, "--checkpoint run --output x --format fla", "invalid choice: 'fla' (choose from"),
        (IMPORT, "--hf hf --output x --dtype bfloat16", "invalid choice: 'bfloat16' (choose from"),
        (IMPORT, "--hf hf", "the following arguments are required: --output"),
    ],
)
def test_wrong_option_ends_with_2(capsys, command, arguments, message):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments.split())
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_export_without_tokenizer_says_so(folders, tmp_path, capsys):
    command = ["--checkpoint", str(folders / "run"), "--output", str(tmp_path / "hf")]
    assert megatron_to_hf.main(command) == 0
    assert "no tokenizer goes along: the checkpoint has none beside it" in capsys.readouterr().out
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    assert megatron_to_hf.main([*command, "--overwrite", "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "no tokenizer" not in capsys.readouterr().out and (tmp_path / "hf" / "tokenizer.json").is_file()
