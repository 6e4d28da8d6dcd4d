"""H1, H2, 3:1 gated attention and more: logits of a plain PyTorch model, and layouts that agree."""

import pytest
import torch

from tests.hybrid import plain
from tests.ranks import pool
from tests.training.test_engine import VOCABULARY, compare, run_config, sample, train_steps

MAMBA = dict(mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=12)
PATTERNS = {
    "H1": dict(pattern="G-S-", sliding_attention=dict(window=20)),
    "H2": dict(
        pattern="M-G-S-",
        sliding_attention=dict(window=20, rope=False),
        linear_conv_kernel_dim=3,
        norm_epsilon=1e-3,
        **MAMBA,
    ),
    "3:1": dict(
        pattern="G-G-G-*-",
        kv_channels=16,
        full_attention=dict(rotary_percent=0.5, qk_norm=True, output_gate=True),
        zero_centered_norm=True,
    ),
    "layers differ": dict(
        pattern="S-*S-S*-",
        sliding_attention=dict(window=20, num_query_groups=4),
        attention_layers={
            3: dict(window=5, output_gate=True),
            4: dict(rope=False, num_query_groups=1),
            5: dict(qk_norm=True),
        },
    ),
    "Transformer++": dict(pattern="*-*-", tie_embeddings=True),
    "DeltaNet": dict(pattern="G-", use_decay=False),
    "no gate, no norm of keys, beta to 2": dict(
        pattern="G-", allow_neg_eigval=True, use_output_gate=False, use_qk_l2norm=False
    ),
    "no MLP": dict(pattern="MG*", mamba_num_groups=2, **MAMBA),
}


def logits_and_weights(model: dict):
    """Logits of a model whose norms are random too, and its weights by key on disk."""
    from megatron_gdn.hybrid.model import build_model, padded_vocab_size, transformer_config
    from tests.training.test_engine import stored_weights

    config = run_config(**model)
    host = transformer_config(config.model, config.parallel)
    rows = padded_vocab_size(VOCABULARY, config.model.vocab_multiple)
    gpt = build_model(host, config.model, vocab_size=rows, max_sequence_length=72, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in gpt.named_parameters():
            if "norm" in name and param.dim() == 1:
                param.add_(torch.rand(param.shape, generator=generator) - 0.5)
        tokens = torch.stack([sample(i)["tokens"] for i in range(2)])
        logits = gpt.eval()(tokens, torch.arange(72).expand(2, -1), None)
    return config.model, tokens, logits, stored_weights(gpt)


@pytest.mark.parametrize("name", PATTERNS)
def test_logits_are_those_of_a_plain_model(name):
    [(model, tokens, logits, weights)] = pool(1).run(logits_and_weights, PATTERNS[name], groups={})
    widths = {weight.shape[-1] for key, weight in weights.items() if "conv1d.weight" in key}
    assert widths <= {model.linear_conv_kernel_dim}  # the plain model takes them as they are
    expected = plain.logits(model, {key: x.double() for key, x in weights.items()}, tokens)
    assert expected.std() > 0.1
    # float32 against float64 over a few layers, logits of size 1.
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "name, parallel",
    [
        ("H1", dict(pipeline=2)),
        ("H2", dict(pipeline=2)),
        ("H2", dict(pipeline=2, pipeline_layers=[1, 2])),
        ("layers differ", dict(tensor=2, sequence=True)),
        ("layers differ", dict(pipeline=2, pipeline_layers=[4, 1])),
        ("no MLP", dict(tensor=2)),
        ("Transformer++", dict(pipeline=2)),  # whose one embedding is on both stages
    ],
    ids=str,
)
def test_layouts_equal_one_process(name, parallel):
    """Losses, gradient norms and weights of three steps; stages are cut anywhere."""
    [reference] = pool(1).run(train_steps, run_config(**PATTERNS[name]), groups={})
    groups = dict(
        tensor_model_parallel_size=parallel.get("tensor", 1),
        pipeline_model_parallel_size=parallel.get("pipeline", 1),
    )
    for result in pool(2).run(train_steps, run_config(parallel=parallel, **PATTERNS[name]), groups=groups):
        compare(result, reference)
