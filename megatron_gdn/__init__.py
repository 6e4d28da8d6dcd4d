"""Gated DeltaNet (arXiv 2412.06464) and its hybrids on Megatron-Core.

Importing this package needs no GPU and no Triton, and does not import Megatron-Core: the names below load on first use.
It does arrange that optional packages which are installed but broken are hidden from Megatron-Core.
"""

import importlib

from megatron_gdn.optional import hide_broken_packages
from megatron_gdn.version import __version__

hide_broken_packages()

_LAZY = {
    "GatedDeltaNet": "megatron_gdn.gated_delta_net",
    "GatedDeltaNetSubmodules": "megatron_gdn.gated_delta_net",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
