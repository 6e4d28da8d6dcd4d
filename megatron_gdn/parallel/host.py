"""How the fragments of a batch reach the layers through Megatron's call chain.

GPTModel, TransformerBlock (recomputation included) and TransformerLayer hand `packed_seq_params` on as it is, so that
is where our trainer puts them:

    fragments = prepare_fragments(T, group=parallel_state.get_context_parallel_group(), cu_seqlens=...)
    model(fragments.local(tokens), ..., packed_seq_params=FragmentParams.of(fragments))

A host that knows nothing of fragments, such as Megatron-LM's own trainer, cuts batches in zigzag; then each layer
builds them itself.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_gdn.parallel.fragments import Fragments, prepare_fragments


@dataclass
class FragmentParams(PackedSeqParams):
    """Megatron's PackedSeqParams with the fragments of the batch; for the host's own code it is not packed."""

    fragments: Fragments | None = None

    @classmethod
    def of(cls, fragments: Fragments) -> "FragmentParams":
        """For a batch with these fragments; documents, if any, are theirs."""
        longest = fragments.num_tokens
        return cls(qkv_format="sbhd", max_seqlen_q=longest, max_seqlen_kv=longest, fragments=fragments)


def fragments_of(
    packed_seq_params: PackedSeqParams | None,
    num_local_tokens: int,
    group: dist.ProcessGroup | None,
    *,
    device: torch.device,
) -> Fragments | None:
    """The fragments of a layer's batch.

    Args:
        packed_seq_params: as the layer got it.
        num_local_tokens: of this context-parallel rank.
        group: context-parallel group of the layer; None: one rank.
        device: where the layer runs.

    Returns:
        Those of the caller; without, zigzag as Megatron cuts batches; None with one rank.

    Raises:
        ValueError: Megatron's packed documents under context parallelism; fragments of another number of ranks.
    """
    size = 1 if group is None else group.size()
    if isinstance(packed_seq_params, FragmentParams):
        fragments = packed_seq_params.fragments
        if fragments.size != size:
            raise ValueError(
                f"fragments (of {fragments.size} ranks) must be of the context-parallel group ({size} ranks): "
                "build them with prepare_fragments(..., group=parallel_state.get_context_parallel_group())."
            )
        return fragments
    if size == 1:
        return None
    if packed_seq_params is not None:
        raise ValueError(
            f"packed_seq_params (qkv_format {packed_seq_params.qkv_format}) must be None or FragmentParams with "
            f"context_parallel_size {size}: Megatron cuts each packed document by itself; pass "
            "FragmentParams.of(prepare_fragments(..., cu_seqlens=...)) and cut the batch with Fragments.local."
        )
    return prepare_fragments(num_local_tokens * size, layout="zigzag", group=group, device=device)
