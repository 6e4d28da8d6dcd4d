"""A trained model in one process, for generation and evaluation."""

from pathlib import Path
from typing import Any

import torch

from megatron_gdn.config import Config, ConfigError, parse_config


def single_process(config: Config, device: str) -> Config:
    """The run's configuration for one process; changes it in place.

    On a CPU, where Transformer Engine has no kernels, the modules and the attention are those for it; the weights and
    their keys on disk are the same.

    Args:
        config: the run that wrote the checkpoint.
        device: "auto", "cpu" or "cuda".
    """
    defaults = type(config.parallel)()
    config.run.device, config.parallel = device, defaults
    if device == "cpu" or not torch.cuda.is_available():
        config.model.provider, config.model.attention_backend = "local", "auto"
    return config


def saved_config(info: dict[str, Any], path: Path) -> Config:
    """The configuration that a checkpoint was written with.

    Args:
        info: what lies beside the weights, empty for a checkpoint of Megatron-LM.
        path: folder of the checkpoint.

    Raises:
        ConfigError: there is none, or it does not hold.
    """
    if "config" not in info:
        raise ConfigError(f"{path} holds no configuration of a run: continue from it with training, or export it.")
    return parse_config(info["config"])


def load_model(path: Path, config: Config, *, vocab_size: int, device: torch.device) -> torch.nn.Module:
    """The model with a checkpoint's weights, ready to be evaluated; needs the process group of one process.

    Args:
        path: folder of the checkpoint.
        config: from `single_process`.
        vocab_size: tokens of the vocabulary, before padding.
        device: where the model goes.
    """
    from megatron_gdn.hybrid.model import build_model, padded_vocab_size, transformer_config
    from megatron_gdn.training import torch_dist
    from megatron_gdn.training.engine import DTYPES

    host = transformer_config(config.model, config.parallel, dtype=DTYPES[config.training.precision])
    model = build_model(
        host,
        config.model,
        vocab_size=padded_vocab_size(vocab_size, config.model.vocab_multiple),
        max_sequence_length=config.training.sequence_length,
        seed=None,
    ).to(device)
    model.load_state_dict(torch_dist.read({"model": model.sharded_state_dict()}, path)["model"])
    return model.eval()
