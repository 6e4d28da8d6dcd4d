"""A trained model in one process, for generation and evaluation."""

from dataclasses import asdict
from pathlib import Path

import torch

from megatron_gdn.config import Config, ModelConfig, parse_config


def inference_config(model: ModelConfig, *, sequence_length: int, dtype: torch.dtype, device: str) -> Config:
    """A configuration for one process that trains nothing, from what every checkpoint tells, imported ones too.

    On a CPU, where Transformer Engine has no kernels, the modules and the attention are those for it; the weights and
    their keys on disk are the same.

    Args:
        model: the checkpoint's.
        sequence_length: tokens of a sample.
        dtype: of the checkpoint's weights; bf16 is computed in bf16, others in float32.
        device: "auto", "cpu" or "cuda".
    """
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    nothing = dict(global_batch_size=1, train_tokens=sequence_length)
    config = parse_config(
        {
            "run": {"output_dir": "unused", "device": device},
            "data": {"train": ["unused"]},
            "model": asdict(model),
            "optimizer": {"lr": 1.0},
            "training": {"sequence_length": sequence_length, "precision": precision, **nothing},
        }
    )
    if device == "cpu" or not torch.cuda.is_available():
        config.model.provider, config.model.attention_backend = "local", "auto"
    return config


def load_model(path: Path, config: Config, *, vocab_size: int, device: torch.device) -> torch.nn.Module:
    """The model with a checkpoint's weights, ready to be evaluated; needs the process group of one process.

    Args:
        path: folder of the checkpoint.
        config: from `inference_config`.
        vocab_size: tokens of the vocabulary. Rows that fill it up on disk are not read: no text has them, and the loss
            is that of the exported model.
        device: where the model goes.

    Raises:
        CheckpointError: a checkpoint of another program, files that are not as they were written, other weights.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from megatron_gdn.hybrid.model import build_model, transformer_config
    from megatron_gdn.training import torch_dist
    from megatron_gdn.training.checkpoint import CheckpointError, verify
    from megatron_gdn.training.engine import DTYPES

    if not (path / "info.json").is_file():
        raise CheckpointError(
            f"{path} has no info.json, so this project did not write it: export Megatron-LM's checkpoint with "
            "tools.convert.megatron_to_hf, and read that with tools.convert.hf_to_megatron."
        )
    if problem := verify(path):
        raise CheckpointError(f"{path} is not as it was written: {problem}.")
    host = transformer_config(config.model, config.parallel, dtype=DTYPES[config.training.precision])
    model = build_model(
        host,
        config.model,
        vocab_size=vocab_size,
        max_sequence_length=config.training.sequence_length,
        seed=None,
    ).to(device)
    try:
        weights = torch_dist.read({"model": model.sharded_state_dict()}, path)["model"]
    except (CheckpointingException, KeyError) as error:
        raise CheckpointError(f"the weights in {path} are not those of such a model: {error}") from error
    model.load_state_dict(weights)
    return model.eval()
