"""Names of this project's own transformers model, for what no other format holds: those of the training model's
parameters, with sections fused as in megatron_gdn/sections.py.

`megatron_gdn.hf` does not exist yet, so no format in `tools.convert.formats` has this table: the entry comes with the
model that can load it.
"""

from tools.convert.mapping import Row, Table

_ATTENTION = tuple(
    Row(f"self_attention.{name}.weight", f"self_attention.{name}.weight", transform)
    for name, transform in (
        ("linear_qkv", "same"),
        ("linear_proj", "same"),
        ("q_layernorm", "norm"),
        ("k_layernorm", "norm"),
    )
)
TABLE = Table(
    # Norms are stored as the checkpoint has them: `links` takes the model's own convention for both sides.
    norm_center=None,
    prefix="decoder.layers.{}.",
    model=(
        Row("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        Row("decoder.final_layernorm.weight", "decoder.final_layernorm.weight", "norm"),
    ),
    output=(Row("output_layer.weight", "output_layer.weight"),),
    layer=(Row("input_layernorm.weight", "input_layernorm.weight", "norm"),),
    mlp=(
        Row("pre_mlp_layernorm.weight", "pre_mlp_layernorm.weight", "norm"),
        Row("mlp.linear_fc1.weight", "mlp.linear_fc1.weight"),
        Row("mlp.linear_fc2.weight", "mlp.linear_fc2.weight"),
    ),
    mixers={
        "G": (
            Row("self_attention.in_proj.weight.{query,key,value,z}", "self_attention.in_proj.weight", "stacked"),
            Row("self_attention.in_proj.weight.{beta,alpha}", "self_attention.in_proj_ba.weight", "stacked"),
            Row("self_attention.conv1d.weight.{query,key,value}", "self_attention.conv1d.weight", "stacked"),
            Row("self_attention.A_log", "self_attention.A_log", "float32"),
            Row("self_attention.dt_bias", "self_attention.dt_bias", "float32"),
            Row("self_attention.out_norm.weight", "self_attention.out_norm.weight", "out norm"),
            Row("self_attention.out_proj.weight", "self_attention.out_proj.weight"),
        ),
        "M": (
            Row("self_attention.in_proj.weight.{z,x,B,C}", "self_attention.in_proj.weight", "stacked"),
            Row("self_attention.in_proj.weight.dt", "self_attention.in_proj_dt.weight"),
            Row("self_attention.conv1d.weight.{x,B,C}", "self_attention.conv1d.weight", "stacked"),
            Row("self_attention.conv1d.bias.{x,B,C}", "self_attention.conv1d.bias", "stacked"),
            Row("self_attention.A_log", "self_attention.A_log", "float32"),
            Row("self_attention.dt_bias", "self_attention.dt_bias", "float32"),
            Row("self_attention.D", "self_attention.D", "float32"),
            Row("self_attention.norm.weight", "self_attention.norm.weight", "out norm"),
            Row("self_attention.out_proj.weight", "self_attention.out_proj.weight"),
        ),
        "S": _ATTENTION,
        "*": _ATTENTION,
    },
)
