"""The specs train under Megatron-LM's own pretrain_gpt.py, run from a checkout of core_v0.16.1:

git clone --branch core_v0.16.1 --depth 1 https://github.com/NVIDIA/Megatron-LM
MEGATRON_LM_CHECKOUT=Megatron-LM python -m pytest tests/hybrid/test_pretrain_gpt.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from megatron_gdn.config import parse_config
from tests.hybrid import plain
from tools.convert import forward, megatron_to_hf, verify
from tools.convert.checkpoint import MegatronCheckpoint

CHECKOUT, FIRST_STEP = "MEGATRON_LM_CHECKOUT", "MEGATRON_GDN_TEST_FIRST_STEP"
STEPS, LAYERS, TOKENS, VOCABULARY = 6, 6, 72, 128
PATTERNS = {"gdn": "G-", "gdn_h1": "G-S-", "gdn_h2": "M-G-S-"}
WIDTHS = dict(
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    linear_num_key_heads=3,
    linear_num_value_heads=3,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
)
MAMBA = dict(mamba_num_heads=4, mamba_head_dim=16, mamba_state_dim=12, mamba_num_groups=1)

# As in megatron_gdn/hybrid/README.md, and below what a CPU, mock data and no fused kernels need.
MODEL = """--num-layers {LAYERS} --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
    --attention-dropout 0 --hidden-dropout 0 --window-size 19,0 --seq-length {TOKENS}
    --max-position-embeddings {TOKENS} --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} --lr 1e-2
    --lr-decay-style constant --weight-decay 0.1 --clip-grad 1.0 --untie-embeddings-and-output-weights"""
HERE = """--transformer-impl local --no-persist-layer-norm --distributed-backend gloo --use-cpu-initialization
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion
    --no-create-attention-mask-in-dataloader --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --make-vocab-size-divisible-by 128 --num-workers 0 --log-interval 1 --eval-interval 1000 --eval-iters 0"""


@pytest.fixture
def checkout() -> Path:
    """Of Megatron-LM."""
    if CHECKOUT not in os.environ:
        pytest.skip(f"{CHECKOUT} names no checkout of Megatron-LM core_v0.16.1")
    path = Path(os.environ[CHECKOUT]).resolve()
    assert (path / "pretrain_gpt.py").is_file(), f"{CHECKOUT} ({path}) must be a checkout of Megatron-LM"
    return path


def options(name: str) -> list[str]:
    """Of pretrain_gpt.py."""
    sizes = WIDTHS | (MAMBA if name == "gdn_h2" else {})
    found = [part for key, value in sizes.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    text = (MODEL + " " + HERE).format(LAYERS=LAYERS, TOKENS=TOKENS, STEPS=STEPS)
    return ["--spec", "megatron_gdn.hybrid.layer_specs", name, *found, *text.split()]


def pretrain(checkout: Path, folder: Path, *arguments: str, processes: int) -> tuple[list[float], dict]:
    """Run the script; the losses that it prints, and what it computed in the first step."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, "-m", "tests.hybrid.megatron_lm_on_cpu", str(checkout), *arguments]
    environment = os.environ | {
        FIRST_STEP: str(folder / "first.pt"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    losses = [float(found) for found in re.findall(r"lm loss: (\S+) \|", done.stdout + done.stderr)]
    return losses, torch.load(folder / "first.pt", weights_only=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name, layout",
    [
        ("gdn", []),
        ("gdn_h1", []),
        ("gdn_h2", ["--tensor-model-parallel-size", "2"]),
        ("gdn_h1", ["--use-distributed-optimizer"]),  # on two data-parallel ranks
    ],
)
def test_pretrain_gpt_trains_the_specs(checkout, tmp_path, name, layout):
    """Losses fall, and the first is that of the plain float64 model on the same weights and tokens."""
    losses, first = pretrain(checkout, tmp_path, *options(name), *layout, processes=2 if layout else 1)
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5, losses
    model = parse_config(
        {
            "run": {"output_dir": "unused"},
            "data": {"train": ["unused"]},
            "model": dict(
                pattern=f"({PATTERNS[name]})x{LAYERS // len(PATTERNS[name].replace('-', ''))}",
                sliding_attention={"window": 20},
                vocab_size=VOCABULARY,
                **WIDTHS,
                **MAMBA,
            ),
            "optimizer": {"lr": 1.0},
            "training": {"sequence_length": TOKENS, "global_batch_size": 1, "train_tokens": TOKENS},
        }
    ).model
    weights, expected = {key: x.double() for key, x in first["weights"].items()}, []
    for tokens, positions, labels, found in first["batches"]:
        assert torch.equal(positions, torch.arange(TOKENS).expand(2, -1))
        reference = F.cross_entropy(
            plain.logits(model, weights, tokens).flatten(0, 1), labels.flatten(), reduction="none"
        )
        # float32 against float64 over six layers.
        assert (found.flatten() - reference).abs().max() < 2e-5 * reference.max()
        expected.append(reference)
    if "--use-distributed-optimizer" not in layout:  # whose other rank has other batches
        assert losses[0] == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["gdn_h1", "gdn_h2"])
def test_checkpoint_of_pretrain_gpt_is_exported(checkout, tmp_path, name):
    """Its arguments say what the model is; weights that do not move are those of the losses."""
    still = "--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0 --save-interval 1 --ckpt-format torch_dist".split()
    _, first = pretrain(checkout, tmp_path, *options(name), *still, "--save", str(tmp_path / "saved"), processes=1)
    found = MegatronCheckpoint(tmp_path / "saved")
    assert "".join(found.architecture.symbols) == (PATTERNS[name].replace("-", "") * LAYERS)[:LAYERS]
    for tokens, _, labels, losses in first["batches"]:
        *_, logits = forward.hidden_states(found.architecture, found.read, tokens)
        ours = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        assert (ours - losses.flatten()).abs().max() < 2e-5 * ours.max()  # two programs in float32
    command = ["--checkpoint", str(tmp_path / "saved"), "--output", str(tmp_path / "hf")]
    assert megatron_to_hf.main(command) == 0
    assert verify.main([str(tmp_path / "saved"), str(tmp_path / "hf")]) == 0


def test_command_of_the_readme_is_one_of_megatron_lms(checkout):
    """Its parser knows every option."""
    command = re.search(
        r"pretrain_gpt\.py (--spec .*?)\n```", Path("megatron_gdn/hybrid/README.md").read_text(), re.DOTALL
    )[1]
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from megatron.training.arguments import parse_args\n"
        "found = parse_args(); print(found.spec, found.num_layers, found.linear_key_head_dim, found.window_size)"
    )
    arguments = command.replace("\\\n", " ").split()
    done = subprocess.run([sys.executable, "-c", program, str(checkout), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "['megatron_gdn.hybrid.layer_specs', 'gdn_h1'] 12 128 (2047, 0)"
