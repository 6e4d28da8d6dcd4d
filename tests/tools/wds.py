"""WebDataset shards as the webdataset package writes and reads them."""

from pathlib import Path

import webdataset


def write_shard(path: Path, samples: list[dict]) -> None:
    """A tar shard, written by webdataset's own writer."""
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(
                {name: value.encode() if name != "__key__" and isinstance(value, str) else value
                 for name, value in sample.items()}
            )  # fmt: skip


def read_shard(path: Path, field: str) -> list[bytes | None]:
    """The field of each sample, by webdataset's own reader, without decoding anything."""
    pipeline = webdataset.WebDataset(f"file:{path}", shardshuffle=False, empty_check=False)
    return [sample.get(field) for sample in pipeline]
