"""What all sections of a configuration are made of: numbers, errors, and the dataclass with checks."""

import re
from dataclasses import fields
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9.]+(?:[eE][+-]?\d+)?)\s*([kKMBT]?)")

section = dataclass(kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
"""Decorator of a section: a keyword-only dataclass that checks types and refuses unknown keys and infinite numbers."""


class ConfigError(ValueError):
    """A configuration that cannot be used: every wrong value with its rule and remedy."""


def _parse_count(value: Any) -> Any:
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip())):
        value = float(match[1]) * _UNITS[match[2]]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(_parse_count)]
"""An integer that may be written 4096, 1e9, 15B or 0.5M."""
Positive = Annotated[Count, Field(gt=0)]
NonNegative = Annotated[Count, Field(ge=0)]


def lower_first(message: str) -> str:
    """A sentence as the end of another one."""
    return f"{message[0].lower()}{message[1:]}"


def changed_fields(values: Any) -> str:
    """Fields of a section that differ from their defaults, which all of its fields must have, as in messages."""
    found = {field.name: (getattr(values, field.name), field.default) for field in fields(values)}
    changed = {name: value for name, (value, default) in found.items() if value != default}
    return ", ".join(f"{name} ({str(value).lower() if value is True else value})" for name, value in changed.items())
