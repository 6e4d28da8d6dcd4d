"""A tiny H1 that trains on the bytes of the demo's corpus: what the benchmarks of loss curves share."""

import json
import lzma
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import trange

from megatron_gdn.config import Config, parse_config
from megatron_gdn.parallel import cpu

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"
TOKENS, SAMPLES = 128, 8


def tiny_h1(pattern: str, steps: int, *, precision: str, optimizer: dict, **sections: dict) -> Config:
    """A run of `steps` steps of TOKENS x SAMPLES bytes; `sections` are further ones of the configuration."""
    return parse_config(
        {
            "run": {"output_dir": "unused", "device": "cpu"},
            "data": {"train": ["unused"]},
            "model": {
                "pattern": pattern,
                "hidden_size": 64,
                "ffn_hidden_size": 160,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 32,
                "linear_value_head_dim": 64,
                "num_attention_heads": 2,
                "sliding_attention": {"window": 32},
                "initialization": "paper",
            },
            "optimizer": optimizer,
            "training": {
                "sequence_length": TOKENS,
                "micro_batch_size": SAMPLES,
                "global_batch_size": SAMPLES,
                "train_tokens": TOKENS * SAMPLES * steps,
                "precision": precision,
            },
            **sections,
        }
    )


def corpus() -> torch.Tensor:
    """Bytes of the demo's documents, one after the other, uint8."""
    with lzma.open(ROOT / "examples" / "data" / "corpus.jsonl.xz", "rt") as lines:
        text = "\0".join(json.loads(line)["text"] for line in lines)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def join_alone() -> None:
    """Megatron's process groups of a process that is alone."""
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def losses(config: Config, text: torch.Tensor, name: str) -> list[float]:
    """Training loss of every step, nats per byte; the same samples for every configuration."""
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=256, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in trange(config.training.train_steps, desc=name):
        starts = torch.randint(len(text) - TOKENS - 1, (SAMPLES,), generator=generator)
        rows = torch.stack([text[i : i + TOKENS + 1] for i in starts]).long()
        positions = torch.arange(TOKENS).expand(SAMPLES, -1)
        batch = dict(
            tokens=rows[:, :-1], labels=rows[:, 1:], loss_mask=torch.ones(SAMPLES, TOKENS), position_ids=positions
        )
        total = engine.forward_backward(iter([batch]), 1)
        engine.update()
        found.append(engine.mean_loss(total))
    return found
