"""What the fork server of `tests.training.runs` imports before it forks."""

import os

os.environ.update(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", CUDA_VISIBLE_DEVICES="")

import megatron_gdn.training.loop  # noqa: F401
