"""Documents that share a row: what tells every mixer where they start.

Megatron hands `packed_seq_params` from the model to each layer as it is (recomputation included), so that is the
carrier. Megatron's own has the bounds; ours also has the chunk table that kernels make from them, built once per batch.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_gdn.kernels import ChunkTable, prepare_chunk_table


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's PackedSeqParams, format thd, with the chunk table of the same documents."""

    table: ChunkTable | None = None

    @classmethod
    def of(cls, cu_seqlens: Tensor, *, device: torch.device) -> "PackedDocuments":
        """For one row of documents.

        Args:
            cu_seqlens: `[N + 1]` int32 or int64, their bounds; on the CPU, or reading them waits for the device.
            device: where the model runs.

        Raises:
            ValueError: see `prepare_chunk_table`.
        """
        table = prepare_chunk_table(cu_seqlens, device=device)
        bounds, longest = table.bounds.to(torch.int32), max(table.lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            table=table,
        )


def chunk_table_of(packed_seq_params: PackedSeqParams | None, *, device: torch.device) -> ChunkTable | None:
    """The chunk table of a layer's batch; None where documents are not packed.

    Args:
        packed_seq_params: as the layer got it. Another host's has no table: it is built from cu_seqlens_q_padded, else
            cu_seqlens_q, which waits for their device in every layer.
        device: where the layer runs.
    """
    if packed_seq_params is None:
        return None
    if isinstance(packed_seq_params, PackedDocuments):
        return packed_seq_params.table
    bounds = packed_seq_params.cu_seqlens_q_padded
    bounds = packed_seq_params.cu_seqlens_q if bounds is None else bounds
    return prepare_chunk_table(bounds, device=device)
