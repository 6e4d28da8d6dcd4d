"""Samples whose documents stay apart: positions restart with each, and nothing is predicted from one into the next.

Where a document starts comes from the sample index, which knows the pieces a sample was made of, and never from
end-of-document ids: text may hold such an id, and a corpus may be built without.
"""

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import Tensor

Batch = dict[str, Tensor]


class DocumentDataset(GPTDataset):
    """GPTDataset in the same order with the same tokens, and with bounds of documents.

    `position_ids` start at 0 with each document, and `loss_mask` is 0 where the label is another document's first
    token. A sample may start inside a document; its positions start at 0 there too.
    """

    def __getitem__(self, idx: int) -> Batch:
        """One sample; as GPTDataset's, except for `position_ids` and `loss_mask`."""
        return keep_apart(super().__getitem__(idx), self._part_lengths(idx))

    def _part_lengths(self, idx: int) -> np.ndarray:
        """Tokens of each part of a sample with the token that follows it, padding being the last part."""
        index = self.shuffle_index[idx]
        (first, start), (last, end) = self.sample_index[index : index + 2].astype(np.int64)
        documents = np.asarray(self.document_index[first : last + 1])
        lengths = self.dataset.sequence_lengths[documents].astype(np.int64)
        lengths[-1] = end + 1
        lengths[0] -= start
        missing = self.config.sequence_length + 1 - lengths.sum()
        return np.append(lengths, missing) if missing else lengths


def keep_apart(sample: Batch, lengths: np.ndarray) -> Batch:
    """A sample whose documents stay apart.

    Args:
        sample: `[s]` tensors, which stay as they are: Megatron caches its masks.
        lengths: `[n]` int64, tokens of each part of the s tokens and the one after them, s + 1 together.

    Returns:
        The sample with other `position_ids` and `loss_mask`.
    """
    starts = np.cumsum(lengths) - lengths
    positions = torch.from_numpy(np.arange(lengths.sum()) - np.repeat(starts, lengths))
    # The label of token i is token i + 1.
    mask = sample["loss_mask"] * (positions[1:] != 0)
    return sample | {"position_ids": positions[:-1].contiguous(), "loss_mask": mask}


def pack(batch: Batch) -> tuple[Batch, Tensor]:
    """Lay the rows of a micro-batch end to end.

    Args:
        batch: `[b, s]` tensors on the CPU; a document starts where `position_ids` are 0, and so with every row.

    Returns:
        `[1, b s]` tensors, and the bounds of their documents, `[N + 1]` int64; all on the CPU.
    """
    batch = {name: value.flatten().unsqueeze(0) for name, value in batch.items()}
    starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    return batch, torch.cat([starts, starts.new_tensor([batch["position_ids"].numel()])])
