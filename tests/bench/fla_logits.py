"""Logits of fla's own model and of this project's training model, in float32 on a CPU, over converted folders:

    pip install -e '.[fla]'
    python -m tests.bench.fla_logits --save

Weights are random, norms and gates too; value heads are not as many as key heads nor as wide, and attention has fewer
key heads than queries. Checkpoints are written by one process, by two tensor-parallel and by two pipeline-parallel
ones. tests/tools/test_fla_model.py asserts the same, and tests/tools/flas_model.py says what stands in for a GPU.
"""

import argparse
import datetime
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch

from tests.bench.run import append, commit, machine
from tests.ranks import close_pools, pool
from tests.tools import flas_model
from tests.tools.test_convert import VOCABULARY, randomized_checkpoint, text
from tools.convert import hf_to_megatron, megatron_to_hf

HYBRID = dict(
    pattern="G-S-G-*-",
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    sliding_attention=dict(window=20),
    num_query_groups=2,
)
PURE = dict(pattern="G-G-", linear_num_key_heads=2, linear_num_value_heads=4)
# Model and layout of the checkpoint.
EXPORTS = {
    "hybrid": (HYBRID, {}),
    "hybrid, tensor 2": (HYBRID, dict(tensor=2, sequence=True)),
    "hybrid, pipeline 2": (HYBRID, dict(pipeline=2)),
    "negative eigenvalues, tied": (PURE | dict(allow_neg_eigval=True, tie_embeddings=True), {}),
    "norms less 1, no gate": (PURE | dict(zero_centered_norm=True, use_output_gate=False), {}),
}
BASE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_heads=2,
    num_v_heads=4,
    head_dim=8,
    expand_v=1.5,
    norm_eps=1e-5,
    vocab_size=VOCABULARY,
)
ATTENTION = dict(num_heads=4, num_kv_heads=2, rope_theta=5000.0)
IMPORTS = {
    "pure": {},
    "negative eigenvalues, tied": dict(allow_neg_eigval=True, tie_word_embeddings=True),
    "window and full attention": dict(
        attn=[ATTENTION | dict(layers=[1], window_size=20), ATTENTION | dict(layers=[2])]
    ),
}


def _compared(theirs: torch.Tensor, ours: torch.Tensor) -> dict[str, float]:
    return dict(
        difference=float((theirs - ours).abs().max()), largest=float(theirs.abs().max()), std=float(theirs.std())
    )


def exported(name: str, folder: Path) -> dict[str, float]:
    """A checkpoint of this project, run by the training model, and by fla's model from its export.

    Returns:
        Largest difference of two logits, the largest logit of fla's and their standard deviation.
    """
    model, parallel = EXPORTS[name]
    groups = {f"{kind}_model_parallel_size": parallel.get(kind, 1) for kind in ("tensor", "pipeline")}
    parts = pool(2 if parallel else 1).run(randomized_checkpoint, folder / "ours", model, parallel, groups=groups)
    command = ["--checkpoint", str(folder / "ours"), "--output", str(folder / "hf"), "--format", "gated_deltanet"]
    assert megatron_to_hf.main(command) == 0
    if "pipeline" in parallel:  # whose logits no rank has all by itself
        parts = pool(1).run(flas_model.training_logits, folder / "ours", text(), groups={})
    return _compared(flas_model.folder_logits(folder / "hf", text()), torch.cat(parts, -1)[..., :VOCABULARY])


def imported(name: str, folder: Path) -> dict[str, float]:
    """A model of fla's, saved by its own `save_pretrained`, and the training model with its weights; see `exported`."""
    with flas_model.on_cpu() as models:
        model = flas_model.randomized(models, BASE | IMPORTS[name])
        theirs = model(text()).logits.float()
        model.save_pretrained(folder / "hf")
    assert hf_to_megatron.main(["--hf", str(folder / "hf"), "--output", str(folder / "ours")]) == 0
    [ours] = pool(1).run(flas_model.training_logits, folder / "ours", text(), groups={})
    return _compared(theirs, ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append to tests/bench/results/")
    arguments = parser.parse_args()
    results: dict[str, dict] = {}
    for direction, cases in ((exported, EXPORTS), (imported, IMPORTS)):
        for name in cases:
            with tempfile.TemporaryDirectory() as folder:
                found = direction(name, Path(folder))
            results.setdefault(direction.__name__, {})[name] = found
            print(direction.__name__, name, found, flush=True)
    close_pools()
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    entry = dict(date=date, commit=commit(), machine=machine(1), versions=flas_model.versions(), tokens=text().numel())
    if arguments.save:
        append("fla_logits", [entry | results])


if __name__ == "__main__":
    main()
