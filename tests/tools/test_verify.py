"""`verify` finds equal models equal and catches every fault of a converter that is known to have happened."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools import checkpoints
from tools.convert import hf_to_megatron, megatron_to_hf, verify


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of each format: a checkpoint, and the folder that it was converted to."""
    root, found = tmp_path_factory.mktemp("verify"), {}
    for name, model, experts in (
        ("qwen3_next", checkpoints.QWEN, checkpoints.EXPERTS),
        ("qwen3_5_text", checkpoints.QWEN, None),
        ("gated_deltanet", checkpoints.FLA, None),
        ("megatron_gdn", checkpoints.H2, None),
    ):
        path = checkpoints.checkpoint(root / name / "ours", model, experts)
        folder = root / name / "hf"
        arguments = ["--checkpoint", str(path), "--output", str(folder), "--format", name]
        assert megatron_to_hf.main(arguments) == 0
        found[name] = (path, folder)
    return found


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "gated_deltanet", "megatron_gdn"])
def test_converted_model_is_the_same(exported, capsys, name):
    path, folder = exported[name]
    assert verify.main([str(path), str(folder)]) == 0
    output = capsys.readouterr().out
    found = re.search(r"largest difference (\S+) over 160 positions", output)
    assert float(found[1]) < 2e-4, output  # two programs in float32, logits of size 10
    assert "under common names, equal" in output and "the same model" in output


def swap(state, a, b):
    state[a], state[b] = state[b], state[a]


def layer(name):
    return f"model.layers.1.linear_attn.{name}"


def swap_beta_and_alpha(state, config):
    # Rows of each of two key heads: b of its two value heads, a of them.
    ba = state[layer("in_proj_ba.weight")].view(2, 2, 2, -1)
    state[layer("in_proj_ba.weight")] = ba.flip(1).reshape(8, -1).contiguous()


def not_interleaved(state, config):
    nk, dk, dv, H = 2, 8, 12, 32
    parts = state[layer("in_proj_qkvz.weight")].view(nk, 2 * dk + 4 * dv, H).split([dk, dk, 2 * dv, 2 * dv], 1)
    state[layer("in_proj_qkvz.weight")] = torch.cat([part.reshape(-1, H) for part in parts])


def out_norm_shifted(state, config):
    state[layer("norm.weight")] -= 1


def plain_concatenation(state, config):
    """As if Megatron's rows were all queries, all gates, all keys, all values."""
    q = state["model.layers.2.self_attn.q_proj.weight"].view(4, 2, 16, 32)
    state["model.layers.2.self_attn.q_proj.weight"] = q.transpose(0, 1).reshape(128, 32).contiguous()


def rounded_A_log(state, config):
    for key in state:
        if key.endswith("A_log"):
            state[key] = state[key].bfloat16().float()


def swapped_gate_and_up(state, config):
    swap(state, "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")


def reversed_taps(state, config):
    state[layer("conv1d.weight")] = state[layer("conv1d.weight")].flip(-1).contiguous()


def rope(**values):
    def change(state, config):
        config["rope_parameters"] |= values
        config |= {name: value for name, value in values.items() if name in config}

    return change


def epsilon(state, config):
    config["rms_norm_eps"] = 1e-3


FAULTS = {
    "beta and alpha swapped": (swap_beta_and_alpha, 1),
    "qkvz not interleaved": (not_interleaved, 1),
    "out_norm shifted": (out_norm_shifted, 1),
    "queries and gates not interleaved": (plain_concatenation, 2),
    "rotary_percent 1 for 0.25": (rope(partial_rotary_factor=1.0), 2),
    "another rotary base": (rope(rope_theta=500000.0), 2),
    "another epsilon": (epsilon, 0),
    "A_log rounded to bfloat16": (rounded_A_log, 0),
    "gate and up swapped": (swapped_gate_and_up, 1),
    "taps reversed": (reversed_taps, 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_logits_alone_catch_every_known_fault(exported, tmp_path, name):
    """Hashes read the folder by the converter's own table and would agree with its mistakes; logits do not."""
    fault, first = FAULTS[name]
    path, folder = exported["qwen3_next"]
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    fault(state, config)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = verify.compare_outputs(verify.open_side(path), verify.open_side(tmp_path), num_tokens=160, atol=verify.ATOL)
    assert found.logits > 2 * verify.ATOL
    assert found.layer == first


def test_command_reports_a_fault(exported, tmp_path, capsys):
    path, folder = exported["qwen3_5_text"]
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.linear_attn.A_log"] += 0.5
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert verify.main([str(path), str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "decoder.layers.1.self_attention.A_log: differs by up to 0.5" in output
    assert "logits differ by more than 0.001, first at layer 1" in output


def test_narrower_copy_and_shifted_norms_are_equal(exported, tmp_path, capsys):
    """A model with plain norms comes back from a Qwen format with norms less 1; a bf16 copy is the model rounded."""
    described = checkpoints.architecture(dict(pattern="G-G-", linear_num_key_heads=2, linear_num_value_heads=4))
    path = checkpoints.write(tmp_path / "ours", described, checkpoints.random_weights(described))
    for name, arguments in (("shifted", ["--format", "qwen3_5_text"]), ("narrow", ["--dtype", "bf16"])):
        assert megatron_to_hf.main(["--checkpoint", str(path), "--output", str(tmp_path / name), *arguments]) == 0
        assert verify.main([str(path), str(tmp_path / name), "--weights-only"]) == 0
    assert hf_to_megatron.main(["--hf", str(tmp_path / "shifted"), "--output", str(tmp_path / "again")]) == 0
    assert verify.main([str(path), str(tmp_path / "again")]) == 0
    assert "2 layers" not in capsys.readouterr().out


def test_short_text_is_refused(exported, capsys):
    path, folder = exported["gated_deltanet"]
    with pytest.raises(SystemExit) as caught:
        verify.main([str(path), str(folder), "--tokens", "64"])
    assert caught.value.code == 2 and "must be at least 65" in capsys.readouterr().err
