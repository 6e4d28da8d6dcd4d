"""The configuration of a run: one YAML recipe, overrides `section.field=value`, strict.

    config = load_config(Path("examples/recipes/demo.yaml"), ["optimizer.lr=1e-3"])

Each section is a small dataclass that checks its own fields; rules across sections are in `Config`. Nothing here needs
a GPU, Megatron or a process group, so a wrong value is reported before any of them exists.
"""

from megatron_gdn.config.engine import EngineConfig, FP8Config, ParallelConfig
from megatron_gdn.config.load import dump_config, load_config, parse_config
from megatron_gdn.config.model import AttentionConfig, ModelConfig
from megatron_gdn.config.run import Config, check_world
from megatron_gdn.config.training import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    MuonConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_gdn.config.types import ConfigError

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "FP8Config",
    "LoggingConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainingConfig",
    "check_world",
    "dump_config",
    "load_config",
    "parse_config",
]
