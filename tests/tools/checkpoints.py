"""Checkpoints of random weights, written without Megatron: every number differs, norms and gates too."""

from dataclasses import asdict
from pathlib import Path

import torch

from tests.training.test_engine import run_config
from tools.convert.architecture import Architecture, Experts, expected_shapes
from tools.convert.safetensors_io import Planned
from tools.convert.torch_dist_writer import CheckpointWriter

VOCABULARY, PADDED = 50, 64
QWEN = dict(
    pattern="G-G-*-",
    linear_num_key_heads=2,
    linear_num_value_heads=4,  # two value heads to a key head, K != V
    kv_channels=16,
    rotary_base=5000,
    full_attention=dict(rotary_percent=0.25, qk_norm=True, output_gate=True),
    zero_centered_norm=True,
)
FLA = dict(
    pattern="G-S-G-*-",
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    sliding_attention=dict(window=20),
    rotary_base=5000,
)
H2 = dict(
    pattern="M-G-S-",
    mamba_num_heads=6,
    mamba_head_dim=8,
    mamba_state_dim=10,
    mamba_num_groups=2,
    sliding_attention=dict(window=20),
)
EXPERTS = Experts(num_experts=6, top_k=2, ffn_hidden_size=24, shared_ffn_hidden_size=20, layers=(0, 2))


def architecture(model: dict, experts: Experts | None = None, **fields) -> Architecture:
    """Of a tiny model."""
    return Architecture(model=run_config(vocab_size=VOCABULARY, **model).model, experts=experts, **fields)


def random_weights(described: Architecture, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Weights by our keys."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    center = float(described.model.zero_centered_norm)
    for key, shape in expected_shapes(described).items():
        noise = torch.randn([size or PADDED for size in shape], generator=generator)
        if key.endswith("norm.weight"):
            plain = key.endswith("out_norm.weight") and not described.zero_centered_out_norm
            weights[key] = 1.0 - (0 if plain else center) + 0.3 * noise
        elif key.endswith(("A_log", "dt_bias")):
            weights[key] = 0.5 * noise - 0.5
        else:
            weights[key] = noise * (0.5 if ".conv1d." in key else 0.2)
        keep = key.endswith(("A_log", "dt_bias", ".D", "out_norm.weight", "self_attention.norm.weight"))
        weights[key] = weights[key] if keep else weights[key].to(dtype)
    return weights


def write(folder: Path, described: Architecture, weights: dict, **options) -> Path:
    """A checkpoint of this project."""
    info = {
        "step": 7,
        "vocabulary": {"size": VOCABULARY, "eod_id": 3},
        "config": {"model": asdict(described.model), "training": {"sequence_length": 128}},
    }
    if described.experts is not None:
        info["experts"] = asdict(described.experts)
    tensors = [Planned(name=key, shape=tuple(x.shape), dtype=x.dtype) for key, x in weights.items()]
    writer = CheckpointWriter(
        folder=folder / "step_00000007", tensors=tensors, objects=[], common={}, info=info, **options
    )
    writer.begin([], resume=False)
    writer.write(lambda key: weights[key])
    return folder


def checkpoint(folder: Path, model: dict, experts: Experts | None = None, **options) -> Path:
    """A checkpoint of random weights."""
    described = architecture(model, experts)
    return write(folder, described, random_weights(described), **options)
