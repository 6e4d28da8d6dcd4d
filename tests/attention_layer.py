"""Functions that build and run an attention layer inside Megatron's TransformerLayer on the ranks of a pool."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from tests.gdn_layer import whole

SHAPE = dict(hidden_size=24, num_attention_heads=8, num_query_groups=4, kv_channels=6)
TOKENS, ROTARY_BASE = 40, 10000
# Weights that lie in parts on the ranks: name -> dimension.
SHARDED = {"linear_qkv.weight": 0, "linear_proj.weight": 1}


def layer_config(sequence_parallel: bool = False, **overrides) -> TransformerConfig:
    """Eight query heads over four key heads, at the pool's tensor-parallel size."""
    settings = dict(
        num_layers=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        use_cpu_initialization=True,
        init_method_std=0.3,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
    )
    return TransformerConfig(**(settings | SHAPE | overrides))


def build_layer(config: TransformerConfig, spec, layer_number: int = 1) -> TransformerLayer:
    """A layer without an MLP; the weights of its norms are no constants, which would hide a missing factor."""
    from megatron_gdn.norms import RMSNorm

    torch.manual_seed(11)  # of weights that Megatron makes whole and then cuts
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm, self_attention=spec, self_attn_bda=get_bias_dropout_add
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = TransformerLayer(config, submodules, layer_number=layer_number, pg_collection=groups)
    with torch.no_grad():
        for name, param in layer.named_parameters():
            if name.endswith("norm.weight"):
                param.add_(torch.linspace(-0.4, 0.6, len(param)))
    return layer


def build_attention(config: TransformerConfig | None = None, layer_number: int = 1, **options):
    """The attention layer alone."""
    from megatron_gdn.attention import attention_spec

    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = config or layer_config()
    return build_module(attention_spec(**options), config=config, layer_number=layer_number, pg_collection=groups)


def rotary(tokens: int = TOKENS, percent: float = 1.0):
    """The model's rotary embedding, as GPTModel makes it once for all layers."""
    embedding = RotaryEmbedding(SHAPE["kv_channels"], percent, rotary_base=ROTARY_BASE, use_cpu_initialization=True)
    return embedding(tokens)


def packed(*lengths: int, longest: int | None = None) -> PackedSeqParams:
    """Megatron's description of documents packed in one row."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def inputs(tokens: int = TOKENS, batch: int = 2, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[s, b, h]` and the weights of a scalar loss over the output."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, batch, SHAPE["hidden_size"])
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def run(layer: TransformerLayer, x: torch.Tensor, weights: torch.Tensor, **arguments) -> dict[str, torch.Tensor]:
    """Output, every gradient and every weight by name, put together over the ranks."""
    config = layer.config
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if config.sequence_parallel:
        x, weights = (t.chunk(tp)[rank].contiguous() for t in (x, weights))
    x = x.detach().requires_grad_()
    y = layer(x, attention_mask=None, **arguments)[0]
    (y * weights).sum().backward()
    result = {"output": y.detach(), "grad input": x.grad}
    if config.sequence_parallel:
        result = {name: whole(t, 0) for name, t in result.items()}
    for name, param in layer.named_parameters():
        short, grad = name.removeprefix("self_attention."), param.grad
        if config.sequence_parallel and getattr(param, "sequence_parallel", False):  # what the host does in its step
            dist.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        parts = (param.detach(), grad)
        if short in SHARDED:
            parts = tuple(whole(t, SHARDED[short]) for t in parts)
        result[short], result[f"grad {short}"] = parts
    return result


def results(
    sequence_parallel: bool = False, overrides: dict | None = None, lengths: tuple = (), **options
) -> dict[str, torch.Tensor]:
    """`run` of a layer of attention_spec(**options); `lengths` packs documents in one row."""
    from megatron_gdn.attention import attention_spec

    layer = build_layer(layer_config(sequence_parallel, **(overrides or {})), attention_spec(**options))
    x, weights = inputs(batch=1 if lengths else 2)
    arguments = dict(packed_seq_params=packed(*lengths)) if lengths else {}
    return run(layer, x, weights, rotary_pos_emb=rotary(max(lengths) if lengths else TOKENS), **arguments)
