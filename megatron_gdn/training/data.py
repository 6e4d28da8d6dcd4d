"""Datasets for training: sampled by Megatron's GPTDataset, addressed by sample number, with the vocabulary checked.

The order of samples depends on the seed, the data and the number of samples, never on the layout, so one number, the
samples consumed, is the position in it.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset

from megatron_gdn.config.entries import split_shares, split_weights
from megatron_gdn.training.indexed import DatasetError, check_dataset
from megatron_gdn.training.packing import DocumentDataset
from megatron_gdn.training.streaming import TextShards
from megatron_gdn.training.tokenizer import tokenizer_sha256

logger = logging.getLogger(__name__)

_SCAN_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What training needs to know of the tokenizer.

    size: number of ids.
    eod_id: the id that ends a document, or None when no manifest tells.
    """

    size: int
    eod_id: int | None


def read_vocabulary(
    entries: list[str], *, vocab_size: int | None, shards: TextShards | None = None, tokenizer: str | None = None
) -> Vocabulary:
    """Vocabulary of the datasets, after checking every one of them.

    Args:
        entries: prefixes or "weight prefix", of training and validation together.
        vocab_size: as configured; None takes the manifests'.
        shards: text to train on, whose tokenizer counts as that of a dataset.
        tokenizer: folder of the tokenizer that goes with the run; None: none does.

    Raises:
        DatasetError: a broken dataset, datasets of different tokenizers, no tokenizer in its folder, a token id outside
            the vocabulary, or no size anywhere.
    """
    prefixes = _prefixes(entries)
    manifests = {prefix: check_dataset(prefix).manifest for prefix in prefixes}
    if shards is not None:
        facts = {"tokenizer_sha256": shards.tokenizer_sha256, "vocab_size": shards.vocab_size}
        manifests[shards.tokenizer] = facts | {"eod_id": shards.eod_id}
    tokenizers = {m["tokenizer_sha256"]: prefix for prefix, m in manifests.items() if m}
    if tokenizer is not None:
        sha256 = tokenizer_sha256(Path(tokenizer))
        if sha256 is None:
            raise DatasetError(f"data.tokenizer ({tokenizer}) must be a folder with tokenizer.json or tokenizer.model.")
        tokenizers.setdefault(sha256, f"what data.tokenizer ({tokenizer}) makes")
    if len(tokenizers) > 1:
        first, second, *_ = tokenizers.values()
        raise DatasetError(
            f"{first} and {second} were made with different tokenizers (tokenizer_sha256 in their manifests), so their "
            "ids mean different things: tokenize one of them again."
        )
    if vocab_size is None:
        missing = [prefix for prefix, manifest in manifests.items() if not manifest]
        if missing:
            raise DatasetError(f"{missing[0]} has no manifest to tell the vocabulary's size: set model.vocab_size.")
        vocab_size = max(manifest["vocab_size"] for manifest in manifests.values())
    largest = {prefix: _max_token_id(prefix) for prefix in prefixes}
    if shards is not None:
        largest[shards.tokenizer] = shards.vocab_size - 1
    for name, token_id in largest.items():
        if token_id >= vocab_size:
            raise DatasetError(
                f"model.vocab_size ({vocab_size}) must exceed every token id, and {name} has id {token_id}: "
                f"set it to at least {token_id + 1}."
            )
    eods = {manifest.get("eod_id") for manifest in manifests.values()}
    return Vocabulary(size=vocab_size, eod_id=eods.pop() if len(eods) == 1 else None)


def _prefixes(entries: list[str]) -> list[str]:
    """Prefixes of entries of several lists, of which each has weights or has not."""
    return [split_weights([entry])[0][0] for entry in entries]


def _max_token_id(prefix: str) -> int:
    files = check_dataset(prefix)
    if files.manifest:
        return files.manifest["max_token_id"]
    logger.info("%s has no manifest: reading its %d tokens for the largest id", prefix, files.num_tokens)
    return files.scan_max_token_id()


def build_datasets(
    *,
    train: list[str],
    validation: list[str],
    split: str | None,
    cache_dir: Path,
    sequence_length: int,
    num_train_samples: int,
    num_validation_samples: int,
    seed: int,
    vocab_size: int,
    eod_id: int | None,
    eod_mask_loss: bool = False,
    documents: str = "join",
) -> tuple[Dataset | None, Dataset | None]:
    """Datasets of samples for training and validation; collective where torch.distributed is initialised.

    The first rank builds the sample indices in `cache_dir`, which every rank must see, and the others load them.

    Args:
        train, validation: prefixes or "weight prefix"; train may be empty where validation is not.
        split: shares of train, validation and test documents; used when `validation` is empty.
        cache_dir: folder of the sample indices.
        sequence_length: tokens of a sample.
        num_train_samples, num_validation_samples: samples to provide, over as many epochs as they take; several
            prefixes without weights are read once. Part of what determines the order.
        seed: of the order of documents and samples.
        vocab_size: number of ids.
        eod_id: id that ends a document.
        eod_mask_loss: leave the prediction after `eod_id` out of the loss.
        documents: "join", or "separate" for samples of `DocumentDataset`; the tokens are the same.

    Returns:
        The datasets; None for one that nothing is wanted from.

    Raises:
        DatasetError: a broken dataset, a wrong split, eod_mask_loss without an eod_id, or too few documents.
    """
    if eod_mask_loss and eod_id is None:
        raise DatasetError(
            "data.eod_mask_loss needs the id that ends a document, and the manifests name no single one: "
            "tokenize with --append-eod."
        )
    train_blend = split_weights(train) if train else None
    prefixes = _prefixes(train + validation)
    if validation:
        blends: dict[str, Any] = {"blend_per_split": [train_blend, split_weights(validation), None]}
    else:
        blends = {"blend": train_blend, "split": split or "1,0,0"}
        split_shares(blends["split"])
    for prefix in prefixes:
        check_dataset(prefix)
    is_distributed = torch.distributed.is_initialized()
    cache = Path(cache_dir) / content_key(prefixes)
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_distributed or torch.distributed.get_rank() == 0:
        # The other ranks wait inside Megatron's builder until this one has built or found the indices.
        drop_broken_indices(cache)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        path_to_cache=str(cache),
        # pad is an id that no token has: GPTDataset takes it out of the loss wherever it meets it.
        tokenizer=SimpleNamespace(
            eod=-1 if eod_id is None else eod_id,
            pad=vocab_size,
            vocab_size=vocab_size,
            unique_identifiers={"vocab_size": vocab_size, "eod": eod_id},
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=False,
        **blends,
    )
    kind = {"join": GPTDataset, "separate": DocumentDataset}[documents]
    sizes = [num_train_samples, num_validation_samples, 0]
    with _no_pickles():
        datasets = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()
    for name, dataset, wanted in zip(("train", "validation"), datasets, sizes, strict=False):
        if wanted and (dataset is None or len(dataset) < wanted):
            raise DatasetError(
                f"the {name} split of {prefixes} has {0 if dataset is None else len(dataset)} samples of "
                f"{sequence_length} tokens and {wanted} are needed: give it more documents, or weights to several "
                "prefixes, which are then read again and again."
            )
    return datasets[0], datasets[1]


def content_key(prefixes: list[str]) -> str:
    """A name for the sample indices of these datasets: another file under the same path gets another name.

    Megatron keys its cache by the path alone, so a dataset that was replaced would silently be read with the old index.
    Sample indices depend on the documents' lengths and nothing else.
    """
    digest = hashlib.sha256()
    for prefix in prefixes:
        lengths = check_dataset(prefix).lengths()
        digest.update(len(lengths).to_bytes(8, "little"))
        digest.update(lengths)
    return digest.hexdigest()[:16]


def data_key(entries: list[str], shards: TextShards | None = None) -> str:
    """A name for the contents of the training data, for a run that continues.

    Args:
        entries: prefixes or "weight prefix"; tokens count by the hashes in the manifest, where there is one.
        shards: text in place of them; counts by the files' names and sizes.
    """
    digest = hashlib.sha256()
    if shards is not None:
        for path in shards.paths:
            digest.update(f"{Path(path).name} {Path(path).stat().st_size}\n".encode())
        return digest.hexdigest()[:16]
    for prefix in _prefixes(entries):
        manifest = check_dataset(prefix).manifest
        digest.update(content_key([prefix]).encode())
        digest.update(json.dumps(manifest["files"]["bin"], sort_keys=True).encode() if manifest else b"")
    return digest.hexdigest()[:16]


def drop_broken_indices(cache: Path) -> None:
    """Remove index files that are not whole arrays of plain numbers; Megatron then builds them again.

    Megatron writes them in place, so a killed run leaves half a file.
    """
    for path in sorted(cache.glob("*.npy")):
        try:
            whole = isinstance(np.load(path, mmap_mode="r", allow_pickle=False), np.memmap)
        except (ValueError, EOFError, OSError):
            whole = False
        if not whole:
            logger.warning("%s is not a whole array: it is removed and built again", path)
            path.unlink()


@contextmanager
def _no_pickles():
    """NumPy refuses pickles inside the block: Megatron loads its indices with allow_pickle, so one would run."""
    load = np.load
    np.load = lambda *args, **kwargs: load(*args, **kwargs | {"allow_pickle": False})
    try:
        yield
    finally:
        np.load = load


class TrainingBatches:
    """Micro-batches of one data-parallel rank, from a position in the order of samples.

    Micro-batch m holds the samples `consumed + (m * data_parallel_size + data_parallel_rank) * micro_batch_size + j`,
    so all ranks together take the samples in order at every layout.

    Args:
        dataset: from `build_datasets`.
        consumed_samples: samples used before.
        micro_batch_size: samples per micro-batch.
        data_parallel_rank, data_parallel_size: of this process.
        num_workers: processes that read ahead.
        pin_memory: for copies to a GPU that do not wait.
        vocab_size: bound of the ids; a larger one is an error before it reaches the embedding.

    Iterating gives `tokens`, `labels`, `position_ids` int64 and `loss_mask` float32, `[micro_batch_size, s]`, until the
    samples do not fill a micro-batch on every rank. It does not touch the global random generators.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        vocab_size: int | None = None,
    ):
        self._dataset, self._consumed, self._size = dataset, consumed_samples, micro_batch_size
        self._rank, self._world = data_parallel_rank, data_parallel_size
        self._vocab_size = vocab_size
        # DataLoader draws a number from its generator, by default the global one, each time it starts.
        self._options = dict(num_workers=num_workers, pin_memory=pin_memory, generator=torch.Generator())
        if num_workers:
            self._options |= dict(prefetch_factor=4)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in DataLoader(self._dataset, batch_sampler=self._indices(), **self._options):
            if self._vocab_size is not None and (largest := int(batch["tokens"].max())) >= self._vocab_size:
                raise DatasetError(f"token id {largest} in the data is outside the vocabulary of {self._vocab_size}.")
            yield batch

    def _indices(self) -> Iterator[range]:
        per_round = self._size * self._world
        for start in range(self._consumed, len(self._dataset) - per_round + 1, per_round):
            first = start + self._rank * self._size
            yield range(first, first + self._size)


def unigram_cross_entropy(train: list[str], validation: list[str], *, split: str | None = None) -> float:
    """Loss in nats per token of a unigram model, fitted with add-one smoothing on the training tokens.

    It is taken over all tokens of the validation documents, and knows the ids that occur in either part.

    Args:
        train, validation: prefixes or "weight prefix"; weights are not used.
        split: shares of the documents when `validation` is empty, as in `build_datasets`.

    Raises:
        DatasetError: a broken dataset, or no validation tokens.
    """
    train_shares, validation_shares = (0.0, 1.0), (0.0, 1.0)
    if not validation:
        shares = split_shares(split or "1,0,0")
        train_shares, validation_shares = (0.0, shares[0]), (shares[0], shares[0] + shares[1])
    fitted = _count_tokens(train, train_shares)
    seen = _count_tokens(validation or train, validation_shares)
    if seen.sum() == 0:
        raise DatasetError(f"data.validation is empty and data.split ({split}) leaves no document to validate on.")
    size = max(len(fitted), len(seen))
    fitted, seen = (np.pad(counts, (0, size - len(counts))) for counts in (fitted, seen))
    log_probability = np.log((fitted + 1) / (fitted + 1).sum())
    return float(-(seen * log_probability).sum() / seen.sum())


def _count_tokens(entries: list[str], shares: tuple[float, float]) -> np.ndarray:
    """How often each id occurs in a share of the documents, such as (0.9, 1.0); Megatron's split rounds so too."""
    total = np.zeros(1, dtype=np.int64)
    for prefix in _prefixes(entries):
        files = check_dataset(prefix)
        offsets = np.append(files.starts() // files.dtype.itemsize, files.num_tokens)
        first, last = (int(offsets[int(round(share * files.num_sequences))]) for share in shares)
        tokens = files.tokens()
        for start in range(first, last, _SCAN_TOKENS):
            counts = np.bincount(tokens[start : min(start + _SCAN_TOKENS, last)])
            size = max(len(total), len(counts))
            total = np.pad(total, (0, size - len(total))) + np.pad(counts, (0, size - len(counts)))
    return total
