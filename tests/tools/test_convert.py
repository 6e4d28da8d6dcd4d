"""Converted models against the other side's own code, in logits, and round trips in bytes."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_gdn.training.metrics import read_metrics
from tests.ranks import pool
from tests.tools.checkpoints import EXPERTS
from tests.training import runs
from tests.training.test_engine import run_config
from tools.convert import hf_to_megatron, megatron_to_hf, verify
from tools.convert.architecture import Architecture
from tools.convert.checkpoint import MegatronCheckpoint
from tools.convert.errors import ConvertError
from tools.convert.formats import FORMATS, choose_format, lines_of
from tools.convert.safetensors_io import Planned, SafetensorsFolder, parse_size, plan_shards

VOCABULARY, TOKENS = 250, 130  # no multiple of 128; more than two chunks


def randomized_checkpoint(path: Path, model: dict, parallel: dict):
    """A checkpoint of a model whose norms, gates and convolutions are random too, and its logits."""
    from megatron.core import parallel_state

    from megatron_gdn.hybrid.model import build_model, padded_vocab_size, transformer_config
    from megatron_gdn.training.checkpoint import CheckpointStore

    config = run_config(parallel=parallel, training=dict(sequence_length=TOKENS), **model)
    host = transformer_config(config.model, config.parallel)
    rows = padded_vocab_size(VOCABULARY, config.model.vocab_multiple)
    gpt = build_model(host, config.model, vocab_size=rows, max_sequence_length=TOKENS, seed=5)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    with torch.no_grad():
        for name, param in gpt.named_parameters():
            if param.dim() == 1:  # the same on all tensor-parallel ranks, as the norms have to be
                generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * stage)
                noise = torch.rand(param.shape, generator=generator)
                param.copy_(param + noise - 0.5 if name.endswith(("A_log", "dt_bias")) else 0.5 + noise)
    info = {"step": 1, "config": asdict(config), "vocabulary": {"size": VOCABULARY, "eod_id": 0}}
    CheckpointStore(path).save(1, {"model": gpt.sharded_state_dict()}, info=info)
    with torch.no_grad():
        # With tensor parallelism this rank's columns of them.
        return None if "pipeline" in parallel else gpt.eval()(text(), positions(), None)


def text() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def positions() -> torch.Tensor:
    return torch.arange(TOKENS).expand(2, -1)


def logits_of(path: Path, model: dict):
    """Logits of a checkpoint in a fresh model."""
    from megatron_gdn.hybrid.model import build_model, padded_vocab_size, transformer_config
    from megatron_gdn.training.checkpoint import CheckpointStore

    config = run_config(training=dict(sequence_length=TOKENS), **model)
    host = transformer_config(config.model, config.parallel)
    rows = padded_vocab_size(VOCABULARY, config.model.vocab_multiple)
    gpt = build_model(host, config.model, vocab_size=rows, max_sequence_length=TOKENS, seed=5)
    store = CheckpointStore(path)
    gpt.load_state_dict(store.load(store.latest(), {"model": gpt.sharded_state_dict()})["model"])
    with torch.no_grad():
        return gpt.eval()(text(), positions(), None)[..., :VOCABULARY]


def transformers_logits(folder: Path) -> torch.Tensor:
    pytest.importorskip("transformers", reason="pip install -e '.[convert]'")
    name = json.loads((folder / "config.json").read_text())["model_type"]
    *_, logits = verify.transformers_hidden_states(folder, name, text())
    return logits


PURE = dict(pattern="G-G-G-", linear_num_key_heads=2, linear_num_value_heads=4)
QWEN = dict(
    pattern="G-G-*-",
    kv_channels=16,
    full_attention=dict(rotary_percent=0.25, qk_norm=True, output_gate=True),
    zero_centered_norm=True,
)
MODELS = {
    "pure": PURE,
    "pure, tied": PURE | dict(tie_embeddings=True),
    "3:1": QWEN,
    "H1": dict(pattern="G-S-G-*-", sliding_attention=dict(window=20)),
}
FORMATS_OF = [
    ("pure", "qwen3_5_text"),
    ("pure", "qwen3_next"),
    ("pure, tied", "qwen3_5_text"),
    ("3:1", "qwen3_5_text"),
    ("3:1", "qwen3_next"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder and logits of each model."""
    root = tmp_path_factory.mktemp("converted")
    found = {}
    for i, (name, model) in enumerate(MODELS.items()):
        path = root / str(i)
        [logits] = pool(1).run(randomized_checkpoint, path, model, {}, groups={})
        found[name] = (path, logits[..., :VOCABULARY])
    return found


def export(checkpoint: Path, output: Path, *arguments: str) -> Path:
    assert megatron_to_hf.main(["--checkpoint", str(checkpoint), "--output", str(output), *arguments]) == 0
    return output


@pytest.mark.parametrize("name, wanted", FORMATS_OF)
def test_logits_are_those_of_transformers(checkpoints, tmp_path, name, wanted):
    path, logits = checkpoints[name]
    theirs = transformers_logits(export(path, tmp_path / "hf", "--format", wanted))
    assert theirs.shape == logits.shape and logits.std() > 0.1
    # Two programs in float32 over three layers: about 1e-5 of logits of size 1.
    assert (theirs - logits).abs().max() < 1e-4


@pytest.mark.parametrize("parallel", [dict(tensor=2, sequence=True), dict(pipeline=2)], ids=["tp 2", "pp 2"])
def test_layout_does_not_matter(checkpoints, tmp_path, parallel):
    groups = dict(
        tensor_model_parallel_size=parallel.get("tensor", 1),
        pipeline_model_parallel_size=parallel.get("pipeline", 1),
    )
    parts = pool(2).run(randomized_checkpoint, tmp_path / "checkpoint", MODELS["pure"], parallel, groups=groups)
    qwen = export(tmp_path / "checkpoint", tmp_path / "qwen", "--format", "qwen3_5_text")
    assert verify.main([str(tmp_path / "checkpoint"), str(qwen)]) == 0
    if "tensor" in parallel:  # the logits of the sharded model itself
        logits = torch.cat(parts, dim=-1)[..., :VOCABULARY]
        assert (transformers_logits(qwen) - logits).abs().max() < 1e-4
    sharded = SafetensorsFolder(export(tmp_path / "checkpoint", tmp_path / "hf"))
    whole = SafetensorsFolder(export(checkpoints["pure"][0], tmp_path / "whole"))
    assert sharded.keys() == whole.keys()
    for key in whole.keys():
        assert sharded.shape(key) == whole.shape(key)
        if sharded.read(key).dim() > 1:  # what the initialisation drew, which no layout changes
            assert torch.equal(sharded.read(key), whole.read(key)), key


@pytest.mark.parametrize("name, wanted", [*FORMATS_OF, ("pure", "gated_deltanet"), ("H1", "gated_deltanet")])
def test_round_trip_is_exact(checkpoints, tmp_path, name, wanted):
    path, logits = checkpoints[name]
    there = export(path, tmp_path / "there", "--format", wanted, "--max-shard-size", "10KB")
    assert len(list(there.glob("*.safetensors"))) > 3
    assert hf_to_megatron.main(["--hf", str(there), "--output", str(tmp_path / "ours")]) == 0
    back = export(tmp_path / "ours", tmp_path / "back", "--format", wanted, "--max-shard-size", "10KB")
    assert sorted(p.name for p in there.iterdir()) == sorted(p.name for p in back.iterdir())
    for file in there.iterdir():
        assert file.read_bytes() == (back / file.name).read_bytes(), file.name
    # A model with plain norms comes back from the Qwen formats with zero-centred ones, whose weights lose a last bit.
    model = MODELS[name] | (dict(zero_centered_norm=True) if wanted.startswith("qwen") else {})
    [again] = pool(1).run(logits_of, tmp_path / "ours", model, groups={})
    exact = wanted == "gated_deltanet" or name == "3:1"
    assert (again - logits).abs().max() <= (0 if exact else 1e-5)


def test_imported_model_trains_on(checkpoints, tmp_path):
    """fla's folder -> checkpoint -> two steps -> fla's folder; the first loss is that of the imported weights."""
    prefix = runs.write_dataset(tmp_path)
    # Rows that only pad the vocabulary take part in training's softmax, and no other format has them.
    base = {
        "model": {"pattern": "G-G-", "vocab_multiple": 4},
        "training": {"precision": "bf16", "train_tokens": 2 * 128},
    }
    base["optimizer"] = {"warmup_tokens": 0}
    values = runs.settings(prefix, tmp_path / "first", **base)
    runs.run(values)
    folder = export(tmp_path / "first", tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gated_deltanet"
    assert hf_to_megatron.main(["--hf", str(folder), "--output", str(tmp_path / "imported")]) == 0
    more = base | {"checkpoint": {"initial_weights": str(tmp_path / "imported")}}
    runs.run(runs.settings(prefix, tmp_path / "second", **more))
    before, after = (
        [row["validation/loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl") if "validation/loss" in row]
        for run in ("first", "second")
    )
    assert after[0] == pytest.approx(before[-1], rel=1e-6)
    assert after[-1] != after[0]
    export(tmp_path / "second", tmp_path / "hf2")


def test_optimizers_float32_weights_can_be_exported(tmp_path):
    """--weights master: the model's bfloat16 weights are their rounding, and something is lost in it."""
    prefix = runs.write_dataset(tmp_path)
    values = {
        "model": {"pattern": "G-G-", "vocab_multiple": 4},
        "training": {"precision": "bf16", "train_tokens": 2 * 128},
        "optimizer": {"warmup_tokens": 0},
    }
    runs.run(runs.settings(prefix, tmp_path / "run", **values))
    model = SafetensorsFolder(export(tmp_path / "run", tmp_path / "model"))
    master = SafetensorsFolder(export(tmp_path / "run", tmp_path / "master", "--weights", "master"))
    assert model.keys() == master.keys()
    lost = 0
    for key in model.keys():
        assert master.dtype(key) == torch.float32
        narrow = torch.float32 if key.endswith(("A_log", "dt_bias")) else torch.bfloat16
        assert torch.equal(master.read(key).to(narrow), model.read(key).to(narrow)), key
        lost += int((master.read(key) != model.read(key).float()).sum())
    assert lost > 1000


def test_gates_and_norms_stay_in_float32(checkpoints, tmp_path):
    folder = SafetensorsFolder(export(checkpoints["pure"][0], tmp_path / "hf", "--dtype", "bf16"))
    wide = {key.rsplit(".attn.", 1)[-1] for key in folder.keys() if folder.read(key).dtype == torch.float32}
    norms = {f"model.layers.{i}.{name}_norm.weight" for i in range(3) for name in ("attn", "mlp")}
    assert wide == {"A_log", "dt_bias", "o_norm.weight", "model.norm.weight"} | norms


def test_vocabulary_is_not_padded(checkpoints, tmp_path):
    path, _ = checkpoints["pure"]
    assert MegatronCheckpoint(path).shape("embedding.word_embeddings.weight")[0] == 256
    folder = export(path, tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCABULARY
    found = SafetensorsFolder(folder)
    assert found.shape("model.embeddings.weight")[0] == found.shape("lm_head.weight")[0] == VOCABULARY


@pytest.mark.parametrize(
    "model, reasons",
    [
        (dict(pattern="M-G-", mamba_num_heads=2), ["it has no Mamba2 layers"]),
        (dict(pattern="G-", allow_neg_eigval=True, use_output_gate=False), []),  # fla has both
        (dict(pattern="GG-"), ["every layer has an MLP there"]),
        (dict(pattern="G-", use_decay=False), ["its state always decays"]),
        (
            dict(pattern="G-*-", full_attention=dict(qk_norm=True)),
            ["gated_deltanet: its attention has full rotary", "qwen3_next: its attention has rotary embedding, norms"],
        ),
    ],
)
def test_formats_that_cannot_hold_a_model_are_passed_over_or_refused(model, reasons):
    described = Architecture(model=run_config(**model).model)
    found, against = choose_format(described)
    assert found.name == ("megatron_gdn" if reasons else "gated_deltanet")
    for reason in reasons:
        assert reason in "\n".join(lines_of(against))
    for name in against:
        with pytest.raises(ConvertError, match=f"no format holds this model exactly.\n  {name}: "):
            choose_format(described, name)


def test_killed_export_goes_on(checkpoints, tmp_path, monkeypatch):
    path, _ = checkpoints["pure"]
    whole = export(path, tmp_path / "whole", "--max-shard-size", "10KB")
    written = []

    def stop_after_three(file, *rest):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file.name)
        return original(file, *rest)

    original = megatron_to_hf.write_shard
    monkeypatch.setattr(megatron_to_hf, "write_shard", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        export(path, tmp_path / "hf", "--max-shard-size", "10KB")
    assert not (tmp_path / "hf").exists()
    written.clear()
    monkeypatch.setattr(megatron_to_hf, "write_shard", lambda *a: (written.append(a[0].name), original(*a)))
    export(path, tmp_path / "hf", "--max-shard-size", "10KB", "--resume")
    assert len(written) == len(list(whole.glob("*.safetensors"))) - 3
    for file in whole.iterdir():
        assert file.read_bytes() == (tmp_path / "hf" / file.name).read_bytes()


def cut(folder: Path):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])


def change(folder: Path, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def swap_files(folder: Path):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    a, b, *_ = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {key: {a: b, b: a}.get(name, name) for key, name in index["weight_map"].items()}
    path.write_text(json.dumps(index))


HOSTILE = {
    "wrong index": (swap_files, "and .*index.json says otherwise"),
    "index that is none": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": 5}}'),
        "is not an index of safetensors",
    ),
    "cut file": (cut, "cannot be read as safetensors"),
    "missing file": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "does not exist, and .* names it"),
    "unknown type": (lambda f: change(f, model_type="kda"), r"model_type \(kda\) must be one of"),
    "path out of the folder": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}'),
        "does not exist",
    ),
    "other shape": (
        lambda f: change(f, head_dim=4),
        r"would have the shape \[16, 32\], and the configuration says \[8, 32\]",
    ),
    "other depth": (lambda f: change(f, num_hidden_layers=2), "no rule converts model.layers.2"),
    "no equal": (lambda f: change(f, use_short_conv=False), r"use_short_conv \(False\) must be True"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "must be a folder with config.json"),
    "only pickles": (lambda f: [p.unlink() for p in f.glob("model*")], "pickled weights are not read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folder_is_refused_and_nothing_is_written(checkpoints, tmp_path, capsys, case):
    damage, message = HOSTILE[case]
    folder = export(checkpoints["pure"][0], tmp_path / "hf", "--max-shard-size", "10KB")
    damage(folder)
    assert hf_to_megatron.main(["--hf", str(folder), "--output", str(tmp_path / "ours")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not list(tmp_path.glob("ours/step*"))


def test_output_that_is_there_stays(checkpoints, tmp_path, capsys):
    folder = export(checkpoints["pure"][0], tmp_path / "hf")
    arguments = ["--checkpoint", str(checkpoints["pure"][0]), "--output", str(folder)]
    assert megatron_to_hf.main(arguments) == 1 and "is not empty" in capsys.readouterr().err
    assert megatron_to_hf.main([*arguments, "--overwrite"]) == 0
    shutil.rmtree(folder)
    assert megatron_to_hf.main([*arguments, "--dry-run"]) == 0 and not folder.exists()
    assert "model.layers.2.attn.q_proj.weight" in capsys.readouterr().out


def test_sizes_and_shards():
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5 MiB") == 1572864
    with pytest.raises(ConvertError, match=r"--max-shard-size \(5\) must be a size such as 5GB"):
        parse_size("5")
    tensors = [Planned(name=str(i), shape=(n,), dtype=torch.float32) for i, n in enumerate((10, 10, 100, 5))]
    assert [[t.name for t in shard] for shard in plan_shards(tensors, 80)] == [["0", "1"], ["2"], ["3"]]


def test_every_format_reads_what_it_writes():
    for found in FORMATS.values():
        model = run_config(**PURE).model
        experts = replace(EXPERTS, layers=(0, 1, 2)) if found.name == "qwen3_5_moe_text" else None
        again, experts_again = found.read_config(found.write_config(Architecture(model=model, experts=experts)))
        assert experts_again == experts
        written, names = asdict(model), ["linear_num_key_heads", "linear_value_head_dim", "hidden_size", "norm_epsilon"]
        for name in names if experts else [*names, "ffn_hidden_size"]:
            assert again[name] == written[name]
        assert again["pattern"] == "G-G-G-"
