"""The plain mirror of fla's model against fla's own, where fla is installed; its kernels are interpreted."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tools.convert import fla_model
from tools.convert.safetensors_io import SafetensorsFolder

TOKENS, VOCABULARY = 70, 50
BASE = dict(
    # The chunked kernel does not run in the interpreter.
    attn_mode="fused_recurrent",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_heads=2,
    num_v_heads=4,
    head_dim=8,
    expand_v=1.5,
    vocab_size=VOCABULARY,
    norm_eps=1e-5,
    fuse_norm=False,
    fuse_swiglu=False,
    fuse_cross_entropy=False,
)
MODELS = {
    "pure": {},
    "negative eigenvalues, tied": dict(allow_neg_eigval=True, tie_word_embeddings=True),
    "no gate": dict(use_gate=False),
    "window": dict(attn=dict(layers=[1], num_heads=3, num_kv_heads=1, window_size=20, rope_theta=5000.0)),
}


@pytest.fixture
def fla_models(monkeypatch):
    """fla's classes, with its attention kernel, which needs a GPU, replaced by PyTorch's."""
    pytest.importorskip("fla", reason="pip install -e '.[fla]'")
    from triton.runtime.autotuner import Autotuner

    # Measuring needs a driver: the first configuration does.
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, kwargs: self.configs[:1])
    import fla.layers.attn
    import fla.models

    def attention(q, k, v, causal, window_size):
        assert causal
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        t = torch.arange(q.shape[1])
        seen = t[None] <= t[:, None]
        if window_size[0] >= 0:
            seen &= t[:, None] - t[None] <= window_size[0]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

    monkeypatch.setattr(fla.layers.attn, "flash_attn_func", attention)
    return fla.models


@pytest.mark.parametrize("name", MODELS)
def test_mirror_is_flas_own_model(fla_models, tmp_path, name):
    config = fla_models.GatedDeltaNetConfig(**BASE | MODELS[name])
    torch.manual_seed(0)
    model = fla_models.GatedDeltaNetForCausalLM(config).float().eval()
    with torch.no_grad():
        for param in model.parameters():  # norms of ones and small gates would hide mistakes
            param.copy_(torch.rand_like(param) + 0.5 if param.dim() == 1 else torch.randn_like(param) * 0.2)
    tokens = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(tokens, use_cache=False).logits.float()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    read = json.loads((tmp_path / "config.json").read_text())
    ours = fla_model.logits(read, SafetensorsFolder(tmp_path).read, tokens)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()  # two programs in float32
