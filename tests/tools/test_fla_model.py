"""fla's own model against this project's training model and against the plain mirror of it, where fla is installed.

pip install -e '.[fla]' && python -m pytest tests/tools/test_fla_model.py
"""

import json

import pytest
import torch

from tests.bench import fla_logits
from tests.tools import flas_model
from tools.convert import fla_model
from tools.convert.safetensors_io import SafetensorsFolder

pytest.importorskip("fla", reason="fla's own model needs flash-linear-attention: pip install -e '.[fla]'")

TOKENS, VOCABULARY = 70, 50
BASE = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_heads=2,
    num_v_heads=4,
    head_dim=8,
    expand_v=1.5,
    vocab_size=VOCABULARY,
    norm_eps=1e-5,
)
MODELS = {
    "pure": {},
    "negative eigenvalues, tied": dict(allow_neg_eigval=True, tie_word_embeddings=True),
    "no gate": dict(use_gate=False),
    "window": dict(attn=dict(layers=[1], num_heads=3, num_kv_heads=1, window_size=20, rope_theta=5000.0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_mirror_is_flas_own_model(tmp_path, name):
    tokens = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with flas_model.on_cpu() as models:
        model = flas_model.randomized(models, BASE | MODELS[name])
        theirs = model(tokens).logits.float()
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ours = fla_model.logits(config, SafetensorsFolder(tmp_path).read, tokens)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()  # two programs in float32


@pytest.mark.parametrize("name", fla_logits.EXPORTS)
def test_fla_runs_what_is_exported(tmp_path, name):
    found = fla_logits.exported(name, tmp_path)
    assert found["std"] > 0.1 and found["difference"] < 1e-4 * found["largest"]


@pytest.mark.parametrize("name", fla_logits.IMPORTS)
def test_training_runs_what_fla_saved(tmp_path, name):
    found = fla_logits.imported(name, tmp_path)
    assert found["std"] > 0.1 and found["difference"] < 1e-4 * found["largest"]
