"""Damaged and hostile folders: a clear error, nothing half-written, nothing executed."""

import argparse
import functools
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools import checkpoints
from tools.convert import hf_to_megatron, inspect_checkpoint, lit_gpt_to_megatron, megatron_to_hf, verify
from tools.convert.checkpoint import MegatronCheckpoint
from tools.convert.conversion import Progress
from tools.convert.torch_dist_writer import CheckpointWriter

MODEL = dict(pattern="G-G-", linear_num_key_heads=2, linear_num_value_heads=4)


class Call:
    """Unpickled without restriction, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def ours(tmp_path):
    return checkpoints.checkpoint(tmp_path / "ours", MODEL, max_file_bytes=20_000)


@pytest.fixture
def step(ours):
    return ours / "step_00000007"


def exported(ours: Path, output: Path, *arguments: str) -> int:
    return megatron_to_hf.main(["--checkpoint", str(ours), "--output", str(output), *arguments])


def metadata_with_call(step, trap):
    (step / ".metadata").write_bytes(pickle.dumps(Call(trap)))


def common_with_call(step, trap):
    (step / "info.json").unlink()
    torch.save({"args": argparse.Namespace(), "x": Call(trap)}, step / "common.pt")


def tensor_with_call(step, trap):
    """In place of the first tensor of the first file, in as many bytes."""
    path = step / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    torch.save(Call(trap), step / "call.pt")
    call = (step / "call.pt").read_bytes()
    content[: len(call)] = call
    # The archive's end must be where the index says that the tensor ends.
    metadata = pickle.loads((step / ".metadata").read_bytes())  # noqa: S301 - this test's own
    for index, info in metadata.storage_data.items():
        if info.relative_path == path.name and info.offset == 0:
            info.length = len(call)
            assert index.fqn
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    path.write_bytes(content)


def outside(step, trap):
    metadata = pickle.loads((step / ".metadata").read_bytes())  # noqa: S301 - this test's own
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def cut(step, trap):
    path = step / "__0_1.distcp"
    path.write_bytes(path.read_bytes()[:-500])


def damaged_info(step, trap):
    (step / "info.json").write_text('{"config": {}}')


def missing_file(step, trap):
    (step / "__0_1.distcp").unlink()


CHECKPOINTS = {
    "call in .metadata": (metadata_with_call, r"names (posix|nt).mkdir, which no checkpoint needs"),
    "call in common.pt": (common_with_call, r"names (posix|nt).mkdir, which no checkpoint needs"),
    "call in a tensor": (tensor_with_call, r"is refused: .*mkdir"),
    "path out of the folder": (outside, "is outside the folder"),
    "cut file": (cut, r"ends inside|cannot be read"),
    "missing file": (missing_file, r"__0_1.distcp"),
    "damaged info.json": (damaged_info, "is not what training writes"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_hostile_checkpoint(ours, step, tmp_path, capsys, case):
    damage, message = CHECKPOINTS[case]
    damage(step, tmp_path / "trap")
    assert exported(ours, tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "hf").exists() and not (tmp_path / "trap").exists()
    if "call in a tensor" not in case and case not in ("cut file", "missing file"):  # which inspect does not read
        assert inspect_checkpoint.main([str(ours)]) == 1
    assert not (tmp_path / "trap").exists()


def test_trap_works(tmp_path):
    """Without restriction the pickles of these tests do make the folder."""
    pickle.loads(pickle.dumps(Call(tmp_path / "trap")))  # noqa: S301 - this test's own
    assert (tmp_path / "trap").is_dir()


def test_hostile_file_of_lit_gpt(tmp_path, capsys):
    torch.save({"model": {"x": Call(tmp_path / "trap")}}, tmp_path / "bad.pth")
    command = ["--file", str(tmp_path / "bad.pth"), "--recipe", "examples/recipes/h1_0.4b.yaml"]
    assert lit_gpt_to_megatron.main([*command, "--output", str(tmp_path / "ours")]) == 1
    assert "mkdir" in capsys.readouterr().err and not (tmp_path / "trap").exists()
    torch.save([1, 2], tmp_path / "bad.pth")
    assert lit_gpt_to_megatron.main([*command, "--output", str(tmp_path / "ours")]) == 1
    assert "must hold 'model' with tensors by name" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def not_finite(state):
    state["model.layers.0.attn.A_log"][1] = torch.nan


def quantized(state):
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)


def other_rows(state):
    for name in ("model.embeddings.weight", "lm_head.weight"):
        state[name] = state[name][:40].clone()


@pytest.mark.parametrize(
    "change, message",
    [
        (not_finite, "A_log holds values that are not finite"),
        (quantized, "has the dtype I8: only"),
        (other_rows, r"the embedding has 40 rows, and the configuration says vocab_size 50"),
        (lambda state: state.pop("model.norm.weight"), "the checkpoint lacks model.norm.weight"),
    ],
)
def test_damaged_weights(ours, tmp_path, capsys, change, message):
    assert exported(ours, tmp_path / "hf") == 0
    state = load_file(tmp_path / "hf" / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert hf_to_megatron.main(["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "again")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not list((tmp_path / "again").glob("step*"))


def test_full_disk(ours, tmp_path, capsys, monkeypatch):
    """Before it starts, and on the way: what was being written goes, what is whole stays for --resume."""
    monkeypatch.setattr("tools.convert.conversion.free_bytes", lambda path: 10)
    assert exported(ours, tmp_path / "hf") == 1
    assert re.search(r"needs 0.\d MB and the disk has 0.0 MB", capsys.readouterr().err)
    assert not (tmp_path / "hf.partial").exists()
    monkeypatch.undo()

    read, done = Progress.read, []

    def full_after_ten(self, name):
        if len(done) == 10:
            raise OSError(28, "No space left on device")
        done.append(name)
        return read(self, name)

    monkeypatch.setattr(Progress, "read", full_after_ten)
    assert exported(ours, tmp_path / "hf", "--max-shard-size", "5KB") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    aside = tmp_path / "hf.partial"
    assert list(aside.glob("*.safetensors")) and not list(aside.glob("*.partial"))
    monkeypatch.undo()
    assert exported(ours, tmp_path / "hf", "--max-shard-size", "5KB", "--resume") == 0
    assert exported(ours, tmp_path / "whole", "--max-shard-size", "5KB") == 0
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "hf" / file.name).read_bytes()


def test_full_disk_of_an_import(ours, tmp_path, capsys, monkeypatch):
    assert exported(ours, tmp_path / "hf") == 0
    command = ["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "again")]
    monkeypatch.setattr("tools.convert.conversion.free_bytes", lambda path: 10)
    assert hf_to_megatron.main(command) == 1
    assert re.search(r"needs 0.\d MB and the disk has 0.0 MB", capsys.readouterr().err)
    monkeypatch.undo()
    read, done = Progress.read, []

    def full_after_ten(self, name):
        done.append(name)
        if len(done) == 11:
            raise OSError(28, "No space left on device")
        return read(self, name)

    monkeypatch.setattr(Progress, "read", full_after_ten)
    assert hf_to_megatron.main(command) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob("again.partial/*/*.distcp"))
    monkeypatch.undo()
    assert hf_to_megatron.main([*command, "--resume"]) == 0
    assert verify.main([str(ours), str(tmp_path / "again"), "--weights-only"]) == 0


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "[]", "null", '{"model_type": {}}'], ids=["deep", "cut", "list", "null", "no name"]
)
def test_configuration_that_is_none(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"")
    folder = str(tmp_path)
    assert hf_to_megatron.main(["--hf", folder, "--output", str(tmp_path / "out")]) == 1
    assert verify.main([folder, folder]) == inspect_checkpoint.main([folder]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all("config.json is not a model's configuration" in line for line in errors)


def test_killed_import_goes_on(ours, tmp_path, capsys, monkeypatch):
    small = functools.partial(CheckpointWriter, max_file_bytes=20_000)
    monkeypatch.setattr("tools.convert.importing.CheckpointWriter", small)
    assert exported(ours, tmp_path / "hf") == 0
    command = ["--hf", str(tmp_path / "hf"), "--output"]
    assert hf_to_megatron.main([*command, str(tmp_path / "whole")]) == 0
    read, names = Progress.read, []

    def count(self, name):
        names.append(name)
        if len(names) == 20:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(Progress, "read", count)
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron.main([*command, str(tmp_path / "killed")])
    assert not list((tmp_path / "killed").glob("step*"))
    assert hf_to_megatron.main([*command, str(tmp_path / "killed"), "--resume"]) == 0
    total = len(MegatronCheckpoint(tmp_path / "whole").keys())
    assert total < len(names) < 20 + total  # the whole files of the first start were not read again
    whole, killed = (tmp_path / name / "step_00000000" for name in ("whole", "killed"))
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == {
        file.name: file.read_bytes() for file in killed.iterdir()
    }


def test_master_weights_need_an_optimizer(ours, tmp_path, capsys):
    assert exported(ours, tmp_path / "hf", "--weights", "master") == 1
    assert re.search(r"has no float32 weights of decoder.* in its optimizer", capsys.readouterr().err)


def test_output_stays_until_another_is_whole(ours, tmp_path, capsys, monkeypatch):
    """--overwrite of an import that fails; one that does not leaves no other steps beside the imported one."""
    assert exported(ours, tmp_path / "hf") == 0
    command = ["--hf", str(tmp_path / "hf"), "--output", str(ours)]
    assert hf_to_megatron.main(command) == 1 and "is not empty" in capsys.readouterr().err

    def fail(self, name):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Progress, "read", fail)
    assert hf_to_megatron.main([*command, "--overwrite"]) == 1
    assert (ours / "step_00000007" / "manifest.json").is_file()
    monkeypatch.undo()
    assert hf_to_megatron.main([*command, "--overwrite"]) == 0
    assert sorted(path.name for path in ours.iterdir()) == ["step_00000000", "tokenizer"]


def test_resume_of_another_conversion_is_refused(ours, tmp_path, capsys, monkeypatch):
    assert exported(ours, tmp_path / "hf") == 0
    shutil.move(tmp_path / "hf", tmp_path / "hf.partial")
    (tmp_path / "hf.partial" / "plan.json").write_text("[]")
    assert exported(ours, tmp_path / "hf", "--resume") == 1
    assert "was begun with other settings: leave out --resume" in capsys.readouterr().err


def test_tokenizer_of_another_model_is_refused(ours, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    assert exported(ours, tmp_path / "hf", "--tokenizer", str(tmp_path / "tokenizer")) == 1
    assert "must be a folder with tokenizer.json" in capsys.readouterr().err
    words = {str(i): i for i in range(60)}
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    assert exported(ours, tmp_path / "hf", "--tokenizer", str(tmp_path / "tokenizer")) == 1
    assert "has ids up to 59 and the model 50 tokens" in capsys.readouterr().err


def test_tokenizer_and_settings_of_generation_go_along(ours, tmp_path):
    assert exported(ours, tmp_path / "hf") == 0
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "top_k": 20}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "hf" / "modeling.py").write_text("raise SystemExit")
    assert hf_to_megatron.main(["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "again")]) == 0
    assert exported(tmp_path / "again", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == generation
    assert (tmp_path / "back" / "tokenizer.json").read_text() == (tmp_path / "hf" / "tokenizer.json").read_text()
    assert not (tmp_path / "back" / "modeling.py").exists()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 3


def test_dry_run_tells_everything(ours, tmp_path, capsys):
    assert exported(ours, tmp_path / "hf", "--dry-run", "--format", "qwen3_next", "--dtype", "bf16") == 0
    output = capsys.readouterr().out
    rows = "decoder.layers.1.self_attention.in_proj.weight.beta, decoder.layers.1.self_attention.in_proj.weight.alpha"
    target = "model.layers.1.linear_attn.in_proj_ba.weight bfloat16 [8, 32]"
    assert f"{rows}  ->  {target}  (for each of 2 key heads, rows 2 + 2)" in output
    assert "decoder.final_layernorm.weight  ->  model.norm.weight float32 [32]  (theirs = ours - 1)" in output
    size = int(re.search(r"writes (\S+) bytes", output)[1].replace(",", ""))
    assert not (tmp_path / "hf").exists()
    assert exported(ours, tmp_path / "hf", "--format", "qwen3_next", "--dtype", "bf16") == 0
    header = (tmp_path / "hf" / "model.safetensors").read_bytes()[:8]
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size == 8 + int.from_bytes(header, "little") + size


def test_inspect_says_what_a_folder_is(ours, tmp_path, capsys):
    assert exported(ours, tmp_path / "hf", "--dtype", "bf16") == 0
    capsys.readouterr()
    found = {}
    for name in ("ours", "hf"):
        assert inspect_checkpoint.main([str(tmp_path / name), "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    whole = sum(tensor.numel() for tensor in load_file(tmp_path / "hf" / "model.safetensors").values())
    assert found["hf"]["parameters"] == whole
    assert found["ours"]["parameters"] == whole + 2 * 14 * 32  # rows that pad embedding and output
    assert found["ours"]["step"] == 7 and found["ours"]["vocabulary"] == 50
    assert found["ours"]["converts to"] == ["gated_deltanet", "qwen3_5_text", "qwen3_next", "megatron_gdn"]
    assert set(found["ours"]["dtypes"]) == {"float32"} and set(found["hf"]["dtypes"]) == {"float32", "bfloat16"}
    assert found["hf"]["layers"] == found["ours"]["layers"] == {"G": 2}
    assert inspect_checkpoint.main([str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


def test_verify_reads_no_hostile_folder(ours, step, tmp_path, capsys):
    metadata_with_call(step, tmp_path / "trap")
    assert verify.main([str(ours), str(ours)]) == 1
    assert "which no checkpoint needs" in capsys.readouterr().err and not (tmp_path / "trap").exists()
