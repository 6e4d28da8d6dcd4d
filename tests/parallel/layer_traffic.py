"""What one layer sends between context-parallel ranks, counted; runs on every rank of a pool."""

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module

from megatron_gdn.config import Config
from megatron_gdn.hybrid.layer_specs import mixer_spec
from megatron_gdn.hybrid.model import transformer_config
from megatron_gdn.parallel.exchange import heads_to_tokens, tokens_to_heads
from megatron_gdn.parallel.fragments import Fragments, prepare_fragments
from megatron_gdn.parallel.host import FragmentParams
from tests.parallel.traffic import counted_traffic


def _fragments(config: Config) -> Fragments:
    group = parallel_state.get_context_parallel_group()
    return prepare_fragments(config.training.sequence_length, layout=config.parallel.context_layout, group=group)


def sent_by_layer(config: Config, symbol: str) -> tuple[int, int]:
    """Bytes that this rank sends in the forward and the backward pass of one mixer, one sequence, tensor parallelism 1.

    Args:
        config: the run.
        symbol: of the mixer; the pattern has one layer of each and no MLPs.
    """
    host = transformer_config(config.model, config.parallel)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    number = config.model.pattern.index(symbol) + 1
    spec = mixer_spec(number, symbol, config.model, state_exchange=config.parallel.state_exchange)
    layer = build_module(spec, config=host, layer_number=number, pg_collection=groups, cp_comm_type=host.cp_comm_type)
    for param in layer.parameters():
        torch.nn.init.normal_(param, std=0.02)
    fragments = _fragments(config)
    x = torch.randn(fragments.num_local_tokens, 1, config.model.hidden_size, requires_grad=True)
    with counted_traffic() as forward:
        y, _ = layer(x, None, packed_seq_params=FragmentParams.of(fragments))
    with counted_traffic() as backward:
        y.sum().backward()
    return sum(forward.values()), sum(backward.values())


def sent_by_head_exchange(config: Config) -> tuple[int, int]:
    """The same for a Gated DeltaNet layer that exchanges heads for tokens, as Megatron-Core 0.18 does."""
    model, ranks = config.model, config.parallel.context
    keys = 2 * model.linear_num_key_heads * model.linear_key_head_dim
    outputs = model.linear_num_value_heads * model.linear_value_head_dim
    inputs = keys + 2 * outputs + 2 * model.linear_num_value_heads
    fragments = _fragments(config)
    x = torch.randn(fragments.num_local_tokens, 1, ranks, inputs // ranks, requires_grad=True)
    with counted_traffic() as forward:
        y = heads_to_tokens(tokens_to_heads(x, fragments)[..., : outputs // ranks], fragments)
    with counted_traffic() as backward:
        y.sum().backward()
    return sum(forward.values()), sum(backward.values())


def all_layers(configs: list[Config], symbols: str) -> list[dict[str, tuple[int, int]]]:
    """Counts of many runs in one call, by symbol; "heads" is the exchange of heads."""
    counts = []
    for config in configs:
        found = {symbol: sent_by_layer(config, symbol) for symbol in symbols}
        if "G" in symbols:
            found["heads"] = sent_by_head_exchange(config)
        counts.append(found)
    return counts
