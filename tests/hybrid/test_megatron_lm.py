"""The specs for Megatron-LM's `--spec`, resolved and built as its gpt_builders.py does (core_v0.16.1)."""

import pytest
import torch

from megatron_gdn.config import parse_config
from tests.hybrid import plain
from tests.ranks import RankError, pool

VOCABULARY, TOKENS, LAYERS = 64, 72, 6
WIDTHS = dict(hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2)
GDN = dict(
    linear_num_key_heads=3, linear_num_value_heads=6, linear_key_head_dim=8, linear_value_head_dim=12
)  # no rank count divides 3
MAMBA = dict(mamba_num_heads=3, mamba_head_dim=8, mamba_state_dim=12, mamba_num_groups=1)


def host_config(**overrides):
    """What core_transformer_config_from_args makes of the command in megatron_gdn/hybrid/README.md, at these widths."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.nn import functional as F

    settings = dict(
        num_layers=LAYERS,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        window_size=(19, 0),
        transformer_impl="local",
        persist_layer_norm=False,
        use_cpu_initialization=True,
        init_method_std=0.1,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
    )
    return TransformerConfig(**(settings | WIDTHS | GDN | MAMBA | overrides))


def build(name: str, **overrides):
    """The lines of gpt_builders.gpt_builder for `--spec megatron_gdn.hybrid.layer_specs NAME`."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import import_module

    config = host_config(**overrides)
    transformer_layer_spec = import_module(["megatron_gdn.hybrid.layer_specs", name])
    return GPTModel(
        config=config,
        transformer_layer_spec=transformer_layer_spec,
        vocab_size=VOCABULARY,
        max_sequence_length=TOKENS,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        fp16_lm_cross_entropy=False,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=10000,
        rope_scaling=False,
        mtp_block_spec=None,
        vp_stage=None,
        pg_collection=None,
    )


def text() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(4))


def run(name: str):
    """Logits of all ranks' rows of the vocabulary, and the weights by key on disk; the stages in turn."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from tests.gdn_layer import whole
    from tests.training.test_engine import stored_weights

    model = build(name)
    x, stages = None, parallel_state.get_pipeline_model_parallel_world_size()
    with torch.no_grad():
        for stage in range(stages):
            mine = stage == parallel_state.get_pipeline_model_parallel_rank()
            if mine:
                if x is not None:
                    model.set_input_tensor(x)
                x = model(text(), torch.arange(TOKENS).expand(2, -1), None)
            parts = [x if mine else None]
            dist.broadcast_object_list(parts, src=stage * dist.get_world_size() // stages)
            x = parts[0] if stages > 1 else x
    logits = whole(x, 2) if stages == 1 else x
    return logits, stored_weights(model)


PATTERNS = {"gdn": "G-", "gdn_h1": "G-S-", "gdn_h2": "M-G-S-"}


@pytest.mark.parametrize(
    "name, layout",
    [
        ("gdn", {}),
        ("gdn_h1", {}),
        ("gdn_h2", {}),
        ("gdn_h2", dict(tensor_model_parallel_size=2)),
        ("gdn_h1", dict(pipeline_model_parallel_size=2)),  # the second stage starts inside the pattern
    ],
)
def test_models_of_the_specs_are_the_plain_ones(name, layout):
    symbols = PATTERNS[name]
    model = parse_config(
        {
            "run": {"output_dir": "unused"},
            "data": {"train": ["unused"]},
            "model": {
                "pattern": f"({symbols})x{LAYERS // len(symbols.replace('-', ''))}",
                "sliding_attention": {"window": 20},
                **WIDTHS,
                **GDN,
                **MAMBA,
            },
            "optimizer": {"lr": 1.0},
            "training": {"sequence_length": TOKENS, "global_batch_size": 1, "train_tokens": TOKENS},
        }
    ).model
    size = 2 if layout else 1
    for logits, weights in pool(size).run(run, name, groups=layout):
        expected = plain.logits(model, {key: x.double() for key, x in weights.items()}, text())
        assert expected.std() > 0.1
        # float32 against float64 over six layers.
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


def windows(name: str):
    return [layer.self_attention.config.window_size for layer in build(name, window_size=None).decoder.layers]


def test_without_a_window_it_is_the_papers():
    [found] = pool(1).run(windows, "gdn_h1", groups={})
    assert found == [None, (2047, 0)] * (LAYERS // 2)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(normalization="LayerNorm"), r"normalization \(LayerNorm\) must be RMSNorm: add --normalization RMSNorm"),
        (dict(qk_layernorm=True), r"qk_layernorm \(True\) must not be set for all layers"),
        (
            dict(transformer_impl="transformer_engine"),
            r"transformer_engine is needed for provider 'te' and is not inst",
        ),
        (dict(attention_dropout=0.1), r"attention_dropout \(0.1\) must be 0.0"),
    ],
)
def test_wrong_settings(overrides, message):
    with pytest.raises(RankError, match=message):
        pool(1).run(build, "gdn_h1", groups={}, **overrides)
