"""Other people's files: historic and hybrid folders of fla, experts, Megatron-LM, settings nobody knows."""

import argparse
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gdn.config import load_config
from tests.ranks import pool
from tests.tools import checkpoints
from tests.training.test_engine import run_config
from tools.convert import hf_to_megatron, megatron_to_hf, own, verify
from tools.convert.architecture import Architecture, expected_shapes
from tools.convert.checkpoint import MegatronCheckpoint
from tools.convert.errors import ConvertError
from tools.convert.formats import REFUSED, choose_format, read_architecture
from tools.convert.megatron_lm import SPECS, architecture_of_args

PURE = dict(pattern="G-G-", linear_num_key_heads=2, linear_num_value_heads=4)


def export(checkpoint: Path, output: Path, *arguments: str) -> Path:
    assert megatron_to_hf.main(["--checkpoint", str(checkpoint), "--output", str(output), *arguments]) == 0
    return output


def load(folder: Path, output: Path, *arguments: str) -> Path:
    assert hf_to_megatron.main(["--hf", str(folder), "--output", str(output), *arguments]) == 0
    return output


def weights(path: Path) -> dict[str, torch.Tensor]:
    found = MegatronCheckpoint(path)
    return {key: found.read(key) for key in found.keys()}


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key


def unpadded(found: dict) -> dict:
    rows = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {key: value[: checkpoints.VOCABULARY] if key in rows else value for key, value in found.items()}


@pytest.mark.parametrize(
    "model, wanted",
    [
        (PURE, "gated_deltanet"),
        (PURE | dict(tie_embeddings=True, allow_neg_eigval=True), "gated_deltanet"),
        (checkpoints.FLA, "gated_deltanet"),
        # Two windows, and layers with other key heads: fla's list of attention.
        (
            dict(
                pattern="G-S-*-S-",
                linear_num_key_heads=2,
                linear_num_value_heads=2,
                sliding_attention=dict(window=20),
                attention_layers={3: dict(num_query_groups=4), 4: dict(window=30)},
            ),
            "gated_deltanet",
        ),
        (checkpoints.QWEN, "qwen3_5_text"),
        (checkpoints.QWEN, "qwen3_next"),
        (checkpoints.H2, "megatron_gdn"),
        (checkpoints.QWEN | dict(attention_layers={3: dict(rope=False)}), "megatron_gdn"),
    ],
)
def test_weights_come_back_bit_by_bit(tmp_path, model, wanted):
    """In bfloat16 too, through several files on both sides."""
    described = checkpoints.architecture(model)
    before = checkpoints.random_weights(described, torch.bfloat16)
    path = checkpoints.write(tmp_path / "ours", described, before, max_file_bytes=20_000)
    assert len(list(path.glob("*/*.distcp"))) > 2
    there = export(path, tmp_path / "hf", "--format", wanted, "--max-shard-size", "20KB")
    again = load(there, tmp_path / "again")
    assert_equal(unpadded(before), weights(again))
    back = export(again, tmp_path / "back", "--format", wanted, "--max-shard-size", "20KB")
    assert {file.name: file.read_bytes() for file in there.iterdir()} == {
        file.name: file.read_bytes() for file in back.iterdir()
    }
    options = MegatronCheckpoint(again).architecture
    assert options.attention_layers == described.attention_layers


@pytest.mark.parametrize("key_dim, value_dim", [(24, 10), (49, 34), (256, 341), (100, 29)])
def test_flas_ratio_gives_the_head_size_back(key_dim, value_dim):
    """fla computes int(head_dim * expand_v), which rounds down."""
    model = PURE | dict(linear_key_head_dim=key_dim, linear_value_head_dim=value_dim)
    found, _ = choose_format(checkpoints.architecture(model))
    config = found.write_config(checkpoints.architecture(model))
    assert int(config["head_dim"] * config["expand_v"]) == value_dim
    assert found.read_config(config)[0]["linear_value_head_dim"] == value_dim


def edit(folder: Path, change_state=None, **settings) -> None:
    if change_state is not None:
        state = load_file(folder / "model.safetensors")
        change_state(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | settings).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


def test_historic_folders_of_fla(tmp_path, capsys):
    """A D that nothing reads, gate and up in one weight, settings that did not exist yet."""
    path = checkpoints.checkpoint(tmp_path / "ours", PURE)
    new = export(path, tmp_path / "new")

    def to_old(state):
        for i in range(2):
            state[f"model.layers.{i}.attn.D"] = torch.ones(4)
            names = [f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up")]
            state[names[0]] = torch.cat([state[names[0]], state.pop(names[1])])

    old = export(path, tmp_path / "old")
    absent = dict.fromkeys(("allow_neg_eigval", "use_gate", "use_short_conv", "attn", "hidden_act"), "absent")
    edit(old, to_old, norm_first=False, **absent)
    assert_equal(weights(load(new, tmp_path / "a")), weights(load(old, tmp_path / "b")))
    assert "left out: model.layers.1.attn.D (no version of fla reads it" in capsys.readouterr().out

    edit(old, lambda state: [state.pop(f"model.layers.{i}.attn_norm.weight") for i in range(2)])
    assert hf_to_megatron.main(["--hf", str(old), "--output", str(tmp_path / "c")]) == 1
    assert "norms into the layers (norm_first)" in capsys.readouterr().err


def test_intermediate_size_of_the_public_360m_model():
    """intermediate_size null and hidden_ratio 4 give 2816 and 357,781,928 parameters, as the recipe has."""
    config = dict(
        model_type="gated_deltanet",
        hidden_size=1024,
        num_hidden_layers=21,
        num_heads=4,
        head_dim=256,
        expand_v=1,
        hidden_ratio=4,
        intermediate_size=None,
        vocab_size=32000,
        num_v_heads=None,
        tie_word_embeddings=False,
    )
    _, found = read_architecture(config)
    shapes = expected_shapes(found).values()
    assert sum(torch.Size([size or 32000 for size in shape]).numel() for shape in shapes) == 357_781_928
    recipe = load_config(Path("examples/recipes/fla_360m.yaml")).model
    assert expected_shapes(Architecture(model=recipe)) == expected_shapes(found)


SETTINGS = {
    "unknown": (dict(rotary_scaling=2), r"settings that no version of this format has: rotary_scaling \(2\)"),
    "no convolution": (dict(use_short_conv=False), r"use_short_conv \(False\) must be True"),
    "sigmoid gate": (dict(output_gate_activation="sigmoid"), r"output_gate_activation \(sigmoid\) must be swish"),
    "powlu": (dict(hidden_act="powlu"), r"hidden_act \(powlu\) must be swish"),
    "attention residuals": (dict(attnres_block_size=4), r"attnres_block_size \(4\) must be None"),
    "biases": (dict(attn=dict(layers=[1], num_heads=2, qkv_bias=True)), r"attn.qkv_bias \(true\) must be false"),
    "attention nobody knows": (dict(attn=dict(layers=[1], num_heads=2, alibi=1)), r"attn.alibi \(1\) is not known"),
    **{
        f"layers {layers} of attention": (
            dict(attn=dict(layers=layers, num_heads=2)),
            re.escape(f"attn.layers ({layers}) must name layers from 0 to 1, and each once"),
        )
        for layers in ([7], [-1], [1, 1], [1.0])
    },
    "a text": (dict(hidden_size="wide"), r"cannot be built: hidden_size \('wide'\): input should be a valid integer"),
    "no number": (dict(head_dim=float("nan")), "describes a model that cannot be built: cannot convert float NaN"),
    "endless": (dict(num_hidden_layers=10**9), r"num_hidden_layers \(1000000000\) must be a whole number from 1 to"),
    "null that is not false": (dict(use_short_conv=None), r"use_short_conv \(None\) must be True"),
    "length": (dict(max_position_embeddings="3"), r"max_position_embeddings \(3\) must be a positive whole number"),
    "no tokens": (dict(eos_token_id=[]), r"eos_token_id \(\[\]\) must be the id of a token, a list of some, or null"),
    "type that is no name": (dict(model_type=["kda"]), "is not a model's configuration .*model_type must be a name"),
    "fraction of a base": (dict(attn=dict(layers=[1], num_heads=2, rope_theta=0.5)), r"rope_theta \(0.5\) must be"),
    "quantized": (dict(quantization_config={"bits": 4}), "settings that no version of this format has: quantization"),
    **{name: (dict(model_type=name), re.escape(f"({name}) must be one of")) for name in ("kda", "olmo_hybrid")},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_without_an_equal_are_refused(tmp_path, capsys, case):
    settings, message = SETTINGS[case]
    folder = export(checkpoints.checkpoint(tmp_path / "ours", PURE), tmp_path / "hf")
    edit(folder, **settings)
    assert hf_to_megatron.main(["--hf", str(folder), "--output", str(tmp_path / "again")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    if isinstance(name := settings.get("model_type"), str) and name in REFUSED:
        assert REFUSED[name] in error
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), r"rope_type \(yarn\): .* without scaling"),
        (dict(attention_bias=True), r"attention_bias \(True\) must be False"),
        (dict(layer_types=["linear_attention"]), r"layer_types .* must be 3 of"),
        (dict(attn_output_gate=False), r"attn_output_gate \(False\) must be True"),
        (dict(vocab_size=49), r"the embedding has 50 rows, and the configuration says vocab_size 49"),
        (dict(rope_theta=7.0), r"rope_theta \(7.0\) and that of rope_parameters \(5000.0\) differ"),
    ],
)
def test_settings_of_qwen_without_an_equal_are_refused(tmp_path, capsys, settings, message):
    folder = export(checkpoints.checkpoint(tmp_path / "ours", checkpoints.QWEN), tmp_path / "hf")
    edit(folder, **settings)
    assert hf_to_megatron.main(["--hf", str(folder), "--output", str(tmp_path / "again")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_the_first_of_several_ends_is_that_of_documents(tmp_path):
    folder = export(checkpoints.checkpoint(tmp_path / "ours", PURE), tmp_path / "hf")
    edit(folder, eos_token_id=[5, 4])
    assert MegatronCheckpoint(load(folder, tmp_path / "again")).eod_id == 5


def test_unknown_setting_and_weight_can_be_left_out_by_name(tmp_path, capsys):
    folder = export(checkpoints.checkpoint(tmp_path / "ours", PURE), tmp_path / "hf")
    plain = weights(load(folder, tmp_path / "plain"))
    edit(folder, lambda state: state.update({"mtp.fc.weight": torch.ones(2, 2)}), rotary_scaling=2)
    command = ["--hf", str(folder), "--output", str(tmp_path / "again")]
    assert hf_to_megatron.main([*command, "--ignore-setting", "rotary_scaling"]) == 1
    assert "no rule converts mtp.fc.weight" in capsys.readouterr().err
    assert hf_to_megatron.main([*command, "--ignore-setting", "rotary_scaling", "--drop", "mtp.*"]) == 0
    assert "left out: mtp.fc.weight (--drop)" in capsys.readouterr().out
    assert_equal(plain, weights(tmp_path / "again"))


def test_copy_of_the_embedding_is_compared(tmp_path, capsys):
    path = checkpoints.checkpoint(tmp_path / "ours", PURE | dict(tie_embeddings=True))
    folder = export(path, tmp_path / "hf")
    edit(folder, lambda state: state.update({"lm_head.weight": state["model.embeddings.weight"].clone()}))
    load(folder, tmp_path / "equal")
    edit(folder, lambda state: state["lm_head.weight"].add_(1))
    assert hf_to_megatron.main(["--hf", str(folder), "--output", str(tmp_path / "other")]) == 1
    assert "lm_head.weight differs from model.embeddings.weight" in capsys.readouterr().err


def test_names_of_our_own_hold_every_mixer():
    """H2 with every option: all weights go to fused ones of the training model's names, and come back."""
    model = dict(
        pattern="M-G-S-*",
        mamba_num_heads=2,
        mamba_head_dim=8,
        mamba_state_dim=4,
        sliding_attention=dict(window=20, qk_norm=True),
        full_attention=dict(output_gate=True),
        zero_centered_norm=True,
    )
    described = checkpoints.architecture(model)
    before, after, fused = checkpoints.random_weights(described), {}, {}
    for link in own.TABLE.links(described):
        theirs = link.to_theirs(*(before[key] for key in link.ours))
        fused |= dict(zip(link.theirs, theirs, strict=True))
        after |= dict(zip(link.ours, link.to_ours(*theirs), strict=True))
    assert_equal(before, after)
    names = pool(1).run(names_and_shapes, model, groups={})[0]
    assert names == {name: tuple(value.shape) for name, value in fused.items()}


def names_and_shapes(model: dict) -> dict[str, tuple[int, ...]]:
    """Parameters of the training model."""
    from megatron_gdn.hybrid.model import build_model, transformer_config

    config = run_config(vocab_size=checkpoints.VOCABULARY, **model)
    host = transformer_config(config.model, config.parallel)
    gpt = build_model(host, config.model, vocab_size=checkpoints.PADDED, max_sequence_length=128, seed=1)
    return {name: tuple(param.shape) for name, param in gpt.named_parameters()}


# ---- experts, and Megatron-LM


def test_transformers_own_experts(tmp_path, capsys):
    """transformers' qwen3_next with experts -> Megatron-LM's checkpoint -> the same logits, and the same folder."""
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[convert]'")
    described = checkpoints.architecture(checkpoints.QWEN, checkpoints.EXPERTS)
    path = checkpoints.write(tmp_path / "ours", described, checkpoints.random_weights(described))
    model = transformers.AutoModelForCausalLM.from_pretrained(export(path, tmp_path / "made"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    assert hf_to_megatron.main(["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "no")]) == 1
    assert "has experts, which this project's training has not" in capsys.readouterr().err
    again = load(tmp_path / "hf", tmp_path / "megatron", "--for", "megatron_lm")
    assert (again / "release" / ".metadata").is_file()
    found = MegatronCheckpoint(again)
    same = dict(vocab_size=checkpoints.VOCABULARY, init_method_std=described.model.init_method_std)
    assert replace(found.architecture.model, **same) == described.model
    assert found.architecture.experts == checkpoints.EXPERTS and found.architecture.zero_centered_out_norm
    assert verify.main([str(again), str(tmp_path / "hf")]) == 0
    assert verify.main([str(again), str(path), "--weights-only"]) == 0
    back, made = (
        load_file(folder / "model.safetensors") for folder in (export(again, tmp_path / "back"), tmp_path / "made")
    )
    assert back.keys() == made.keys()
    for key, value in made.items():  # the norm of the output went through weight - 1
        assert (back[key] - value).abs().max() <= (2**-23 if key.endswith("linear_attn.norm.weight") else 0), key


@pytest.mark.parametrize("packed", [False, True], ids=["each by itself", "packed"])
def test_experts_of_qwen3_5(tmp_path, capsys, packed):
    """As transformers writes them, and as they are in memory and in releases; mtp.* is left out."""
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[convert]'")
    every = replace(checkpoints.EXPERTS, layers=(0, 1, 2))
    described = checkpoints.architecture(checkpoints.QWEN, every)
    path = checkpoints.write(tmp_path / "ours", described, checkpoints.random_weights(described))
    made = export(path, tmp_path / "made", "--format", "qwen3_5_moe_text")
    model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    if packed:
        shutil.copytree(made, tmp_path / "hf")
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        assert state["model.layers.0.mlp.experts.gate_up_proj"].shape == (6, 48, 32)
        state["mtp.layers.0.mlp.experts.gate_up_proj"] = torch.ones(6, 48, 32)
        save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
        command = ["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "no"), "--for", "megatron_lm"]
        assert hf_to_megatron.main(command) == 1
        assert "no rule converts mtp.layers.0.mlp.experts.gate_up_proj" in capsys.readouterr().err
    else:
        model.save_pretrained(tmp_path / "hf")
        assert "model.layers.0.mlp.experts.5.down_proj.weight" in load_file(tmp_path / "hf" / "model.safetensors")
    again = load(tmp_path / "hf", tmp_path / "megatron", "--for", "megatron_lm", "--drop", "mtp.*")
    assert MegatronCheckpoint(again).architecture.experts == every
    assert verify.main([str(again), str(made)]) == 0  # weights, then logits against transformers
    assert verify.main([str(again), str(path), "--weights-only"]) == 0


def args_of(described: Architecture, **changes) -> argparse.Namespace:
    from tools.convert.megatron_lm import args_of_architecture

    args = args_of_architecture(described, 128)
    vars(args).update(changes)
    return args


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(add_bias_linear=True), r"add_bias_linear \(True\) must be False"),
        (dict(experimental_attention_variant="gdn2"), r"experimental_attention_variant \(gdn2\) must be"),
        (dict(rotary_interleaved=True), r"rotary_interleaved \(True\) must be False"),
        (dict(normalization="LayerNorm"), r"normalization \(LayerNorm\) must be RMSNorm"),
        (dict(mtp_num_layers=1), r"mtp_num_layers \(1\) must be None"),
        (
            dict(spec=["mine", "gdn"]),
            r"spec \(mine gdn\) must be megatron_gdn.hybrid.layer_specs with one of gdn, gdn_h1",
        ),
        (dict(spec=["local"]), r"spec \(local \) must be"),
        (dict(window_size=(4, 4), window_attn_skip_freq=None, linear_attention_freq=2), r"window_size \(\(4, 4\)\)"),
    ],
)
def test_arguments_of_megatron_lm_without_an_equal_are_refused(change, message):
    described = checkpoints.architecture(checkpoints.QWEN)
    assert architecture_of_args(vars(args_of(described))).model.pattern == "G-G-*-"
    with pytest.raises(ConvertError, match=message):
        architecture_of_args(vars(args_of(described, **change)))


def windowed_layers(skips) -> list[list[bool]]:
    """Which of six layers have a window, by Megatron-Core."""
    from megatron.core.transformer.utils import is_layer_window_attention

    return [[is_layer_window_attention((4, 0), skip, number) for number in range(1, 7)] for skip in skips]


def test_arguments_that_megatron_lm_fills_in():
    """Left at their defaults, or numbers in the place of lists."""
    described = checkpoints.architecture(checkpoints.QWEN)
    heads = described.model.num_attention_heads
    plain = dict(kv_channels=None, group_query_attention=False, moe_router_pre_softmax=True)  # without experts
    found = architecture_of_args(vars(args_of(described, **plain)))
    assert found.attention_heads(2) == (heads, heads, described.model.hidden_size // heads)
    experts = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=None, moe_shared_expert_intermediate_size=8)
    found = architecture_of_args(vars(args_of(described, **experts)))
    assert found.experts.ffn_hidden_size == described.model.ffn_hidden_size and found.experts.layers == (0, 1, 2)
    # Attention in every layer, some with a window.
    skips = [2, 3, [1, 0, 0, 1, 1, 0], None]
    for skip, windowed in zip(skips, pool(1).run(windowed_layers, skips, groups={})[0], strict=True):
        changes = dict(num_layers=6, linear_attention_freq=[0] * 6, window_size=(4, 0), window_attn_skip_freq=skip)
        found = architecture_of_args(vars(args_of(described, **changes)))
        assert found.symbols == ["S" if window else "*" for window in windowed]


def patterns_of_specs() -> dict[str, str]:
    from megatron_gdn.hybrid import layer_specs

    return {name: getattr(layer_specs, name).params["pattern"] for name in SPECS}


def test_arguments_of_this_projects_specs():
    """tests/hybrid/test_pretrain_gpt.py does the same with Megatron-LM itself, where there is a checkout."""
    [patterns] = pool(1).run(patterns_of_specs, groups={})
    mamba = dict(mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=2)
    for name, pattern in patterns.items():
        described = checkpoints.architecture(checkpoints.FLA | dict(full_attention={}, zero_centered_norm=True))
        args = args_of(
            described, spec=["megatron_gdn.hybrid.layer_specs", name], window_size=None, num_layers=6, **mamba
        )
        found = architecture_of_args(vars(args))
        assert found.model.pattern == (pattern * 6)[: 2 * 6] and not found.zero_centered_out_norm
        assert "S" not in found.symbols or found.model.sliding_attention.window == 2048
        if "M" in found.symbols:
            assert {key: getattr(found.model, key) for key in mamba} == mamba
