"""A folder of fla's with the shape of the public 360M model, imported, trained 2 steps, exported and loaded again:

    python -m tests.bench.fla_360m --save

The folder is of random weights, norms and gates too, in a temporary directory that needs 12 GB; training in float32
takes 15 GB of memory. Each command runs in a process of its own, whose largest resident size counts Python, libraries
and mapped files. Then, at each end, the training model gets the same tokens as the plain model of fla's folder
(tools/convert/fla_model.py) and, where fla is installed, the first of them as fla's own in Triton's interpreter
(tests/tools/flas_model.py), which takes minutes for some tokens of this model.
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from tests.bench.process import timed
from tests.bench.run import append, commit, machine

RECIPE = Path("examples/recipes/fla_360m.yaml")
TOKENS, FLA_TOKENS = 160, 6
SHAPES = {
    "360m": {},
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_heads=2, head_dim=16, vocab_size=500),
}
PUBLIC = dict(
    hidden_size=1024,
    intermediate_size=None,  # the rule of hidden_ratio gives 2816
    hidden_ratio=4,
    num_hidden_layers=21,
    num_heads=4,
    head_dim=256,
    expand_v=1,
    conv_size=4,
    norm_eps=1e-6,
    vocab_size=32000,
)


def fla_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every weight of a pure model without grouped values, by fla's names."""
    H, I, heads, K = (config[name] for name in ("hidden_size", "intermediate_size", "num_heads", "head_dim"))
    I, vocabulary, rows = I or 2816, config["vocab_size"], heads * K
    layer = {f"attn.{name}_proj.weight": (rows, H) for name in "qkvg"}
    layer |= {f"attn.{name}_conv1d.weight": (rows, 1, config["conv_size"]) for name in "qkv"}
    layer |= {f"attn.{name}_proj.weight": (heads, H) for name in "ab"}
    layer |= {"attn.A_log": (heads,), "attn.dt_bias": (heads,), "attn.o_norm.weight": (K,)}
    layer |= {"attn.o_proj.weight": (H, rows), "attn_norm.weight": (H,), "mlp_norm.weight": (H,)}
    layer |= {"mlp.gate_proj.weight": (I, H), "mlp.up_proj.weight": (I, H), "mlp.down_proj.weight": (H, I)}
    shapes = {"model.embeddings.weight": (vocabulary, H)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (H,), "lm_head.weight": (vocabulary, H)}


def write_fla_folder(folder: Path, config: dict) -> int:
    """A folder of random weights, as fla's `save_pretrained` lays it out.

    Returns:
        Parameters.
    """
    import torch

    from tools.convert.safetensors_io import Planned, write_shard

    shapes, generator = fla_shapes(config), torch.Generator().manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        noise = torch.randn(shapes[name], generator=generator)
        if name.endswith("norm.weight"):
            return 1 + 0.2 * noise
        if name.endswith(("A_log", "dt_bias")):
            return 0.5 * noise - 0.5
        return noise * (0.4 if "conv1d" in name else noise.shape[-1] ** -0.5)

    folder.mkdir()
    planned = [Planned(name=name, shape=shape, dtype=torch.float32) for name, shape in shapes.items()]
    write_shard(folder / "model.safetensors", planned, draw)
    settings = dict(model_type="gated_deltanet", architectures=["GatedDeltaNetForCausalLM"], torch_dtype="float32")
    settings |= dict(use_gate=True, use_short_conv=True, hidden_act="swish", attn=None, tie_word_embeddings=False)
    (folder / "config.json").write_text(json.dumps(settings | config | dict(bos_token_id=1, eos_token_id=2)))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def commands(root: Path, config: dict) -> dict[str, list[str]]:
    """What a user would run, in order."""
    convert, tokens = [sys.executable, "-m"], 64
    overrides = dict(
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"] or 2816,
        pattern=f"(G-)x{config['num_hidden_layers']}",
        vocab_size=config["vocab_size"],
        linear_num_key_heads=config["num_heads"],
        linear_num_value_heads=config["num_heads"],
        linear_key_head_dim=config["head_dim"],
        linear_value_head_dim=config["head_dim"],
    )
    train = [sys.executable, "examples/pretrain.py", "--config", str(RECIPE)]
    train += [f"run.device=cpu run.output_dir={root}/run data.train=[{root}/text] data.validation=[]"]
    train += ["data.split=90,10,0 data.num_workers=0 training.precision=fp32 training.micro_batch_size=1"]
    train += [f"training.global_batch_size=1 training.sequence_length={tokens} training.train_tokens={2 * tokens}"]
    train += ["training.validation_samples=0 training.validation_interval=null optimizer.warmup_tokens=0"]
    train += [f"checkpoint.initial_weights={root}/imported checkpoint.interval=null"]
    if config != PUBLIC:
        train += [" ".join(f"model.{name}={value}" for name, value in overrides.items())]
    return {
        "import": [*convert, "tools.convert.hf_to_megatron", "--hf", f"{root}/hf", "--output", f"{root}/imported"],
        "train": [*train[:4], *" ".join(train[4:]).split()],
        "export": [*convert, "tools.convert.megatron_to_hf", "--checkpoint", f"{root}/run", "--output", f"{root}/back"],
        "again": [*convert, "tools.convert.hf_to_megatron", "--hf", f"{root}/back", "--output", f"{root}/again"],
    }


def compare(root: Path) -> dict:
    """What the commands left: logits at both ends, and which weights are equal."""
    import torch

    from tests.ranks import close_pools, pool
    from tests.tools import flas_model
    from tools.convert import fla_model, verify
    from tools.convert.safetensors_io import SafetensorsFolder

    found: dict = {"tokens": TOKENS}
    if importlib.util.find_spec("fla") is not None:
        found |= {"tokens_of_fla": FLA_TOKENS, "versions": flas_model.versions()}
    vocabulary = json.loads((root / "hf" / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    for name, ours, folder in (("imported", "imported", "hf"), ("exported", "run", "back")):
        [logits] = pool(1).run(flas_model.training_logits, root / ours, tokens, groups={})
        with torch.no_grad():
            config = json.loads((root / folder / "config.json").read_text())
            plain = fla_model.logits(config, SafetensorsFolder(root / folder).read, tokens)
        found[name] = dict(std=float(plain.std()), difference=float((logits - plain).abs().max()))
        if "versions" in found:
            own = flas_model.folder_logits(root / folder, tokens[:, :FLA_TOKENS])
            found[name]["difference_from_fla"] = float((logits[:, :FLA_TOKENS] - own).abs().max())
    close_pools()
    before, after = SafetensorsFolder(root / "hf"), SafetensorsFolder(root / "back")
    assert before.keys() == after.keys()
    changes = [float((before.read(key) - after.read(key)).abs().max()) for key in before.keys()]
    found["weights"], found["changed_by_training"] = len(changes), sum(change > 0 for change in changes)
    found["largest_change"] = max(changes)  # two steps of AdamW: about twice the learning rate
    sides = (verify.open_side(root / "run"), verify.open_side(root / "again"))
    found["differ_when_loaded_again"] = verify.compare_weights(*sides)
    return found


def measure(shape_name: str) -> dict:
    """The whole way of one shape."""
    config = PUBLIC | SHAPES[shape_name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stage = [sys.executable, "-m", "tests.bench.fla_360m", "--root", folder, "--shape", shape_name, "--stage"]
        parameters = json.loads(subprocess.run([*stage, "write"], check=True, capture_output=True, text=True).stdout)
        entry: dict = dict(shape=shape_name, parameters=parameters, commands={})
        for name, command in commands(root, config).items():
            seconds, peak, _ = timed(command)
            entry["commands"][name] = dict(seconds=round(seconds, 1), peak_mib=round(peak / 2**20))
            print(name, entry["commands"][name], flush=True)
        rows = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
        entry["losses"] = [round(row["train/loss"], 4) for row in rows if "train/loss" in row]
        found = subprocess.run([*stage, "compare"], check=True, capture_output=True, text=True).stdout
        return entry | json.loads(found.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="360m")
    parser.add_argument("--save", action="store_true", help="append to tests/bench/results/")
    parser.add_argument("--stage", choices=["write", "compare"], help="one part, in this process")
    parser.add_argument("--root", type=Path, help="folder for --stage")
    arguments = parser.parse_args()
    if arguments.stage == "write":
        from tests.training.runs import write_dataset

        write_dataset(arguments.root)
        print(write_fla_folder(arguments.root / "hf", PUBLIC | SHAPES[arguments.shape]))
        return
    if arguments.stage == "compare":
        print(json.dumps(compare(arguments.root)))
        return
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    entry = dict(date=date, commit=commit(), machine=machine(int(os.environ.get("OMP_NUM_THREADS", 1))))
    entry |= measure(arguments.shape)
    print(json.dumps(entry, indent=1))
    if arguments.save:
        append("fla_360m", [entry])


if __name__ == "__main__":
    main()
