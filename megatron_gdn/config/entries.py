"""What the entries of `data.train` and `data.validation` say, and the shares of `data.split`."""

import math
import re


def split_weights(entries: list[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a list whose entries are all "prefix" or all "weight prefix".

    Raises:
        ValueError: a mixture of both, or a weight that is not a positive number.
    """
    parts = [entry.split(maxsplit=1) for entry in entries]
    if all(len(part) == 1 for part in parts):
        return [part[0] for part in parts], None
    try:
        weights = [float(part[0]) for part in parts]
        prefixes = [part[1] for part in parts]
    except (ValueError, IndexError):
        weights, prefixes = [], []
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"data entries {entries} must all be a prefix, or all 'weight prefix' with weights above 0.")
    return prefixes, weights


def split_shares(split: str) -> list[float]:
    """Shares of the documents for train, validation and test, with sum 1, from text such as "95,5,0" or "95,5".

    Raises:
        ValueError: not two or three numbers of at least 0, or nothing to train on.
    """
    parts = split.replace(" ", "").split(",")
    plain = len(parts) in (2, 3) and all(re.fullmatch(r"\d+\.?\d*|\.\d+", part) for part in parts)
    if not plain or float(parts[0]) == 0:
        raise ValueError(
            f'data.split ({split}) must be shares of train, validation and test, such as "95,5,0", and train above 0.'
        )
    shares = [float(part) for part in (*parts, "0")[:3]]
    return [share / sum(shares) for share in shares]
