"""Functions that run a layer on the context-parallel ranks of a pool and put its results together again."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_gdn.attention import attention_spec
from megatron_gdn.parallel.fragments import prepare_fragments
from megatron_gdn.parallel.host import FragmentParams
from tests import attention_layer, gdn_layer, mamba2_layer

TOKENS = 72
MIXERS = {"G": gdn_layer, "M": mamba2_layer}


def mixer_results(symbol, x, weights, sequence_parallel, overrides, params, **options):
    """Output, gradient of the input and of every weight of a Gated DeltaNet or Mamba2 layer, whole over TP."""
    helpers = MIXERS[symbol]
    layer = helpers.build_layer(helpers.layer_config(sequence_parallel, **overrides), **options)
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if sequence_parallel:
        x, weights = (t.chunk(tp)[rank].contiguous() for t in (x, weights))
    x = x.detach().requires_grad_()
    y, _ = layer(x, packed_seq_params=params)
    (y * weights).sum().backward()
    result = {"output": y.detach(), "grad input": x.grad}
    if sequence_parallel:
        result = {name: gdn_layer.whole(t, 0) for name, t in result.items()}
    grads = helpers.whole_parameters(layer, lambda param: param.grad)
    return result | {f"grad {name}": grad for name, grad in grads.items()}


def attention_results(x, weights, sequence_parallel, overrides, params, given=False, **options):
    """The same of an attention layer inside Megatron's TransformerLayer; given: the model's rotary embedding."""
    config = attention_layer.layer_config(sequence_parallel, **overrides)
    layer = attention_layer.build_layer(config, attention_spec(**options))
    arguments = dict(rotary_pos_emb=attention_layer.rotary(TOKENS)) if given else {}
    found = attention_layer.run(layer, x, weights, packed_seq_params=params, **arguments)
    return {name: t for name, t in found.items() if name in ("output", "grad input") or name.startswith("grad ")}


def results(symbol, layout, bounds, sequence_parallel=False, overrides=None, **options):
    """A layer on this layout; every rank returns the whole.

    Args:
        symbol: "G", "M" or "*".
        layout: "contiguous", "zigzag", or "host": a zigzag batch of which the layer is told nothing.
        bounds: of packed documents; None: two rows without.
        overrides: of the configuration.
        options: of the layer.
    """
    group = parallel_state.get_context_parallel_group()
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    x, weights = gdn_layer.inputs(TOKENS, batch=2 if bounds is None else 1)
    fragments = prepare_fragments(
        TOKENS, layout="zigzag" if layout == "host" else layout, group=group, cu_seqlens=cu_seqlens
    )
    params = None
    if group.size() > 1 and layout != "host":
        params = FragmentParams.of(fragments)
    elif bounds is not None:
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    overrides = (overrides or {}) | dict(context_parallel_size=group.size())
    run = attention_results if symbol == "*" else lambda *args, **kw: mixer_results(symbol, *args, **kw)
    local = (fragments.local(t, dim=0) for t in (x, weights))
    found = run(*local, sequence_parallel, overrides, params, **options)
    for name, value in found.items():
        if name in ("output", "grad input"):
            found[name] = fragments.gather(value, dim=0)
        else:
            dist.all_reduce(value, group=group)
    return found


def all_results(cases, sequence_parallel=False):
    """`results` of many cases in one call."""
    return [results(*args, sequence_parallel=sequence_parallel, **options) for args, options in cases]


def refusal(symbol, layout, bounds, **options):
    """The message of the ValueError that a layer raises on this rank."""
    try:
        results(symbol, layout, bounds, **options)
    except ValueError as error:
        return str(error)


def packed_by_megatron():
    """The message for Megatron's packed documents under context parallelism."""
    layer = gdn_layer.build_layer(gdn_layer.layer_config(context_parallel_size=2))
    try:
        layer(gdn_layer.inputs(batch=1)[0], packed_seq_params=attention_layer.packed(30, 42))
    except ValueError as error:
        return str(error)


def fragments_of_other_ranks():
    """The message for fragments that were made for another group."""
    layer = gdn_layer.build_layer(gdn_layer.layer_config(context_parallel_size=2))
    try:
        layer(gdn_layer.inputs()[0], packed_seq_params=FragmentParams.of(prepare_fragments(72)))
    except ValueError as error:
        return str(error)
