"""Fused weights in a distributed checkpoint: every section a tensor of its own, ghost heads left out.

Ranks may own different numbers of heads, so a checkpoint written at one tensor-parallel size is read at any other.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megatron_gdn.sections import Section, local_sizes, pad_ghosts


def split_on_disk(
    fused: ShardedTensor, key: str, sections: Sequence[Section], *, rank: int, size: int, dim: int = 0
) -> ShardedTensorFactory:
    """A factory that stores each section of a rank's fused weight under `<key>.<section>`, unnamed ones under `<key>`.

    Args:
        fused: the rank's weight as Megatron shards it, ghosts included; tells replicas and stacked layers.
        key: on disk.
        sections: in the order in which the weight holds them.
        rank, size: tensor-parallel rank and size.
        dim: along which sections lie.
    """
    template = fused.without_data()
    padded = local_sizes(sections, size)
    owned = [section.local_rows(rank, size) for section in sections]
    prepended = template.prepend_axis_num
    num_rows = fused.data.shape[dim]  # with what fills the weight up to a multiple that FP8 wants

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id, flattened_range) -> list[ShardedTensor]:
        assert flattened_range is None, "Megatron-Core 0.16 and later never flatten"
        parts, start = [], 0
        for section, rows, num_padded in zip(sections, owned, padded, strict=True):
            if rows.stop > rows.start:
                own = tensor.narrow(dim, start, rows.stop - rows.start)
                parts.append(part(key, section, rows.start, own, replica_id))
            else:
                # Megatron drops a weight without parts: a further copy of the first row, which is never written.
                parts.append(part(key, section, 0, tensor.narrow(dim, start, 1), _next_replica(replica_id)))
            start += num_padded
        return parts

    def part(key: str, section: Section, first_row: int, data: Tensor, replica_id) -> ShardedTensor:
        shape, offset = list(template.global_shape), list(template.global_offset)
        shape[prepended + dim], offset[prepended + dim] = section.num_rows, first_row
        even = section.num_heads // section.heads_per_unit % size == 0
        assert even or not prepended, "stacked layers need heads that tensor parallelism divides"
        return replace(
            template,
            key=f"{key}.{section.name}" if section.name else key,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_shape=tuple(shape),
            global_offset=tuple(offset),
            axis_fragmentations=template.axis_fragmentations if even else None,
            replica_id=replica_id,
        )

    @torch.no_grad()
    def merge(parts: list[Tensor]) -> Tensor:
        own = [x.narrow(dim, 0, rows.stop - rows.start) for x, rows in zip(parts, owned, strict=True)]
        sections = torch.cat([pad_ghosts(x, num_padded, dim) for x, num_padded in zip(own, padded, strict=True)], dim)
        return pad_ghosts(sections, num_rows, dim)

    return ShardedTensorFactory(key, fused.data, build, merge, fused.replica_id)


def _next_replica(replica_id):
    """A replica that is not the first, which alone is written."""
    return replica_id + 1 if isinstance(replica_id, int) else (*replica_id[:-1], replica_id[-1] + 1)
