"""Implementations of the gated delta rule and of what surrounds it, with one signature, where they can be imported.

What cannot run is reported in its own words and never hidden. Results of every one are compared with ours before a
clock runs.
"""

import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_gdn.kernels import (
    ChunkTable,
    causal_conv1d,
    chunk_gated_delta_rule,
    gated_delta_gate,
    rms_norm_gated,
    ssd,
)

# fla runs FlashQLA in its own name where that is installed; here each runs in its own.
os.environ.setdefault("FLA_FLASH_QLA", "0")

OURS = "ours"
RULES = (OURS, "fla", "FlashQLA", "FlashInfer")


class Refusal(Exception):
    """An implementation that cannot run: not installed, or what it says."""


def _import(module: str, name: str) -> Callable:
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise Refusal(f"not installed ({error.name})") from error
    except Exception as error:
        raise Refusal(f"refuses: {type(error).__name__}: {str(error)[:300]}") from error


def rule(name: str, backend: str) -> Callable[..., Tensor]:
    """A rule as a function (q, k, v, g, beta, table, cu_seqlens) -> o; q and k get their L2 norm.

    FlashQLA and FlashInfer have no norm inside: theirs runs in torch, outside the clock where `normalised` says so.

    Raises:
        Refusal: it is not installed, or breaks on import.
    """
    if name == OURS:

        def ours(q, k, v, g, beta, table, cu_seqlens):
            options = dict(use_qk_l2norm_in_kernel=True, cu_seqlens=table, backend=backend)
            return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, **options)[0]

        return ours
    if name == "fla":
        function = _import("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")

        def fla(q, k, v, g, beta, table, cu_seqlens):
            return function(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens)[0]

        return fla
    if name == "FlashQLA":
        function = _import("flash_qla", "chunk_gated_delta_rule")

        def flash_qla(q, k, v, g, beta, table, cu_seqlens):
            return function(q, k, v, g=g, beta=beta, cu_seqlens=cu_seqlens)[0]

        return flash_qla
    function = _import("flashinfer.gdn_prefill", "chunk_gated_delta_rule")

    def flashinfer(q, k, v, g, beta, table, cu_seqlens):
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, q.shape[1]], device=q.device)
        result = function(q=q[0], k=k[0], v=v[0], g=g[0].exp(), beta=beta[0], cu_seqlens=cu_seqlens.long())
        return (result[0] if isinstance(result, tuple) else result).unsqueeze(0)

    return flashinfer


NORMALISED_OUTSIDE = ("FlashQLA", "FlashInfer")
FORWARD_ONLY = ("FlashInfer",)


def convolution(name: str, backend: str) -> Callable[[Tensor, Tensor, ChunkTable | None, Tensor | None], Tensor]:
    """A convolution with SiLU as a function (x `[1, T, D]`, weight `[D, W]`) -> y."""
    if name in (OURS, "torch"):
        chosen = backend if name == OURS else "torch"
        return lambda x, weight: causal_conv1d(x, weight, backend=chosen)[0]
    if name == "fla":
        function = _import("fla.modules.convolution", "causal_conv1d")
        return lambda x, weight: function(x, weight=weight, activation="silu")[0]
    function = _import("causal_conv1d", "causal_conv1d_fn")
    return lambda x, weight: function(x.transpose(1, 2), weight, activation="silu").transpose(1, 2)


def gated_norm(name: str, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A gated RMSNorm as a function (x, weight, z) -> y."""
    if name in (OURS, "torch"):
        chosen = backend if name == OURS else "torch"
        return lambda x, weight, z: rms_norm_gated(x, weight, z, backend=chosen)
    function = _import("fla.modules.fused_norm_gate", "rms_norm_gated")
    return lambda x, weight, z: function(x, z, weight, None, activation="swish", eps=1e-5)


def gate(name: str, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The log-decay as a function (alpha, A_log, dt_bias) -> g."""
    if name in (OURS, "torch"):
        chosen = backend if name == OURS else "torch"
        return lambda alpha, A_log, dt_bias: gated_delta_gate(alpha, A_log, dt_bias, backend=chosen)
    return _import("fla.ops.gated_delta_rule.gate", "fused_gdn_gate")


def state_space(name: str, backend: str) -> Callable[..., Tensor]:
    """Mamba2's op as a function (x, dt, A, B, C, D) -> y."""
    if name in (OURS, "torch"):
        chosen = backend if name == OURS else "torch"
        return lambda x, dt, A, B, C, D: ssd(x, dt=dt, A=A, B=B, C=C, D=D, backend=chosen)[0]
    function = _import("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    # 256: what its layer passes.
    return lambda x, dt, A, B, C, D: function(x, dt, A, B, C, chunk_size=256, D=D)


OPERATORS = {
    "convolution": (convolution, (OURS, "torch", "fla", "causal_conv1d")),
    "gated norm": (gated_norm, (OURS, "torch", "fla")),
    "gate": (gate, (OURS, "torch", "fla")),
    "state-space op": (state_space, (OURS, "torch", "mamba_ssm")),
}
