"""Kernels of Gated DeltaNet and Mamba2. Importing them needs torch only."""

from megatron_gdn.kernels.causal_conv1d import causal_conv1d
from megatron_gdn.kernels.gated_delta_rule.api import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from megatron_gdn.kernels.gated_delta_rule.gate import gated_delta_gate
from megatron_gdn.kernels.gated_delta_rule.mixer import gated_delta_mixer
from megatron_gdn.kernels.gated_rms_norm import rms_norm_gated
from megatron_gdn.kernels.l2norm import l2norm
from megatron_gdn.kernels.ssd.api import ssd
from megatron_gdn.kernels.varlen import ChunkTable, prepare_chunk_table

__all__ = [
    "ChunkTable",
    "causal_conv1d",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_gate",
    "gated_delta_mixer",
    "l2norm",
    "prepare_chunk_table",
    "rms_norm_gated",
    "ssd",
]
