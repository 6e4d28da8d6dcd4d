"""The transformers model against a plain PyTorch model of the same weights, whole, cached and generating."""

from dataclasses import asdict

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, AutoModelForCausalLM

import megatron_gdn.hf
from megatron_gdn.config import ModelConfig
from megatron_gdn.sections import gated_delta_net_sections, mamba2_sections
from tests.hybrid import plain

VOCABULARY, TOKENS = 50, 71  # more than a chunk
SIZES = dict(
    hidden_size=24,
    ffn_hidden_size=40,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    mamba_num_heads=6,
    mamba_head_dim=8,
    mamba_state_dim=10,
    mamba_num_groups=2,
    num_attention_heads=4,
    num_query_groups=2,
    sliding_attention={"window": 9},
)
MODELS = {
    "H2": dict(pattern="M-G-S-"),
    "mixed windows": dict(pattern="S-S-G", attention_layers={2: {"window": 30, "rope": False}}),
    "gated": dict(
        pattern="G-*-",
        zero_centered_norm=True,
        allow_neg_eigval=False,
        full_attention={"output_gate": True, "qk_norm": True, "rotary_percent": 0.5},
        kv_channels=8,
    ),
    "DeltaNet": dict(pattern="G-G", use_decay=False),
}


def settings(name: str) -> ModelConfig:
    return TypeAdapter(ModelConfig).validate_python(SIZES | MODELS[name])


def make(name: str):
    """A model with random norms, gates and convolutions, in float32."""
    config = megatron_gdn.hf.MegatronGDNConfig(model=asdict(settings(name)), vocab_size=VOCABULARY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, param in model.named_parameters():
            if key.endswith(("norm.weight", "layernorm.weight", "dt_bias", "D", "conv1d.bias")):
                param.add_(torch.randn_like(param) * 0.3)
            elif param.ndim == 2:
                param.normal_(std=param.shape[1] ** -0.5)
    return model


def on_disk(model, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights under the keys of a training checkpoint: fused ones by section."""
    delta = gated_delta_net_sections(
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_head_dim=config.linear_key_head_dim,
        value_head_dim=config.linear_value_head_dim,
        decay=config.use_decay,
    )
    mamba = mamba2_sections(
        num_heads=config.mamba_num_heads,
        head_dim=config.mamba_head_dim,
        num_groups=config.mamba_num_groups,
        state_dim=config.mamba_state_dim,
    )
    weights, state = {}, model.state_dict()
    for key, value in state.items():
        *path, module, kind = key.split(".")
        is_mamba = ".".join([*path, "in_proj_dt", "weight"]) in state
        sections = (mamba if is_mamba else delta).get(module) if "self_attention" in key else None
        if sections is None or (len(sections) == 1 and not sections[0].name):
            weights[key] = value
            continue
        target = module.replace("in_proj_ba", "in_proj").replace("in_proj_dt", "in_proj")
        for section, part in zip(sections, value.split([s.num_rows for s in sections]), strict=True):
            weights[".".join([*path, target, kind, section.name])] = part
    return weights


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model, config = make(request.param), settings(request.param)
    tokens = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weights = {key: value.double() for key, value in on_disk(model, config).items()}
        return model, tokens, plain.logits(config, weights, tokens)


def assert_near(logits, expected) -> None:
    """float32 through a few layers of width 24: some 1e-6 of the largest logit."""
    assert (logits.double() - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
def test_logits_equal_the_plain_model(case):
    model, tokens, expected = case
    assert_near(model(tokens).logits, expected)
    assert_near(model(tokens, logits_to_keep=3).logits, expected[:, -3:])


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[40], [1, 2, 66, 67, 68], list(range(60, 71))])
def test_a_cache_goes_on_where_it_stopped(case, cuts):
    model, tokens, expected = case
    cache, parts = None, []
    for start, stop in zip([0, *cuts], [*cuts, TOKENS], strict=True):
        result = model(tokens[:, start:stop], cache=cache, use_cache=True)
        cache = result.cache
        parts.append(result.logits)
    assert_near(torch.cat(parts, 1), expected)
    assert cache.get_seq_length() == TOKENS


@torch.no_grad()
def test_generation_with_the_cache_equals_generation_without(case):
    model, tokens, _ = case
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    cached, whole = (model.generate(tokens[:, :20], use_cache=flag, **options) for flag in (True, False))
    assert torch.equal(cached, whole) and cached.shape == (2, 32)
    steps = model(cached[:, :-1]).logits[:, 19:].argmax(-1)
    assert torch.equal(steps, cached[:, 20:])


def test_saved_and_loaded_through_the_auto_classes(case, tmp_path):
    model, tokens, _ = case
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.settings == model.config.settings
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in loaded.state_dict().items():
        gate = key.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "D")
        assert value.dtype == (torch.float32 if gate else torch.bfloat16), key
    same = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in model.state_dict().items())


def test_loss_and_gradients():
    model = make("H2")
    tokens = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :30] = -100
    result = model(tokens, labels=labels)
    logits = result.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    counted = (labels[:, 1:] != -100).float()
    torch.testing.assert_close(result.loss, -(logits * counted).sum() / counted.sum())
    result.loss.backward()
    assert all(param.grad is not None and param.grad.any() for param in model.parameters())


def test_tied_embeddings_are_one_weight():
    values = asdict(settings("DeltaNet")) | {"tie_embeddings": True}
    model = AutoModelForCausalLM.from_config(megatron_gdn.hf.MegatronGDNConfig(model=values, vocab_size=VOCABULARY))
    assert model.output_layer.weight is model.embedding.word_embeddings.weight


def test_wrong_inputs():
    model = make("DeltaNet")
    tokens = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask has padding, and states would run through it"):
        model(tokens, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="model of config.json cannot be used: .*hiden_size"):
        megatron_gdn.hf.MegatronGDNConfig(model=asdict(settings("DeltaNet")) | {"hiden_size": 3}, vocab_size=5)
