"""DeepSpeed's configuration from a recipe, and a user's own ds_config.json checked against it."""

import json
from pathlib import Path
from typing import Any

from megatron_gdn.config import Config, ConfigError

_OWNED = {
    "optimizer": "the recipe's optimizer section",
    "scheduler": "the recipe's optimizer section",
    "fp16": "training.precision=bf16 or fp32",
}


def deepspeed_config(config: Config, data_parallel: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets.

    Args:
        config: the run, with engine deepspeed.
        data_parallel: processes that hold the same shard of the model, context parallelism included.

    Raises:
        ConfigError: engine.deepspeed_config cannot be read, or says something else than the recipe: every such key.
    """
    training, engine = config.training, config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    samples = training.micro_batch_size * (data_parallel // config.parallel.context)
    ours = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // samples,
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": zero,
        # AdamW of PyTorch, with groups of parameters as Megatron makes them; offloaded states are updated by it too, as
        # DeepSpeed's own CPU Adam is compiled for minutes when it is first used.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if engine.deepspeed_config is None:
        return ours
    path = Path(engine.deepspeed_config)
    try:
        users = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.deepspeed_config ({path}) cannot be read as JSON: {error}.") from error
    if not isinstance(users, dict):
        raise ConfigError(f"engine.deepspeed_config ({path}) must hold an object: see DeepSpeed's documentation.")
    problems = [
        f"{key}: leave it out, {instead} sets it"
        for key, instead in _OWNED.items()
        if key in users and not (key == "fp16" and isinstance(users[key], dict) and users[key].get("enabled") is False)
    ]
    total = users.pop("train_batch_size", "auto")
    if total not in ("auto", training.global_batch_size):
        problems.append(f"train_batch_size: {total} there, {training.global_batch_size} in the recipe")
    merged = _merge(ours, users, "", problems)
    if engine.offload_optimizer and merged["zero_force_ds_cpu_optimizer"]:
        problems.append(
            "zero_force_ds_cpu_optimizer: true there, and PyTorch's AdamW updates offloaded states: use false"
        )
    if problems:
        raise ConfigError(
            f"engine.deepspeed_config ({path}) disagrees with the recipe:\n  "
            + "\n  ".join(problems)
            + '\nuse the recipe\'s values, "auto", or change the recipe.'
        )
    return merged


def _merge(ours: dict, users: dict, prefix: str, problems: list[str]) -> dict:
    """The user's keys over ours; keys that both set must agree."""
    merged = dict(ours)
    for key, value in users.items():
        if value == "auto" and key in ours:
            continue
        if isinstance(ours.get(key), dict):
            if isinstance(value, dict):
                merged[key] = _merge(ours[key], value, f"{prefix}{key}.", problems)
            else:
                problems.append(f"{prefix}{key}: {json.dumps(value)} there, which must be an object")
        elif key in ours and value != ours[key] and not key.startswith("zero_"):
            problems.append(f"{prefix}{key}: {value} there, {ours[key]} in the recipe")
        else:
            merged[key] = value
    return merged
