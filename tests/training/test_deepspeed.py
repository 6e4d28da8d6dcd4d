"""The engine deepspeed against the engine megatron: losses, gradient norms, weights, and each other's checkpoints."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_gdn.config import ConfigError, parse_config
from megatron_gdn.training.deepspeed_config import deepspeed_config
from tests.ranks import pool
from tests.training import test_engine
from tests.training.test_engine import SAMPLES, STEPS, VOCABULARY, run_config, sample, stored_weights

needs_deepspeed = pytest.mark.skipif(not __import__("importlib").util.find_spec("deepspeed"), reason="extra deepspeed")
