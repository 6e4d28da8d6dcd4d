"""What sampling the layers' health costs a training step:

    python -m tests.bench.health --threads 2 --repeats 9 --save

One step of a small H2 with full attention behind it (all four mixers) on a CPU, with a sample and without, in turns in
one process; the sample includes its collection over ranks. Times are the process's CPU time, which what else the
machine does changes little. With --save an entry is appended to tests/bench/results/health_cpu.json.
"""

import argparse
import datetime
import statistics
import time
import warnings

import torch

from megatron_gdn.config import Config, parse_config
from megatron_gdn.training.setup import Launch, init_distributed, shutdown
from tests.bench.run import append, commit, machine

VOCABULARY = 1024
MODEL = dict(
    pattern="M-G-S-*-",
    hidden_size=256,
    ffn_hidden_size=768,
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    linear_key_head_dim=48,
    linear_value_head_dim=96,
    num_attention_heads=4,
    sliding_attention=dict(window=256),
    mamba_num_heads=8,
    mamba_head_dim=64,
    mamba_state_dim=64,
    vocab_size=VOCABULARY,
)
TRAINING = dict(
    sequence_length=256, micro_batch_size=2, global_batch_size=8, train_tokens=10**7, precision="fp32"
)  # four micro-batches a step, the first of which is sampled


def config() -> Config:
    """The run that is timed."""
    return parse_config(
        dict(
            run=dict(output_dir="unused", device="cpu"),
            data=dict(train=["unused"]),
            model=MODEL,
            optimizer=dict(lr=1e-3),
            training=TRAINING,
        )
    )


def measure(repeats: int) -> dict:
    """CPU seconds of steps with and without a sample, and the share of a step that sampling every N steps costs."""
    from megatron_gdn.training.engine import MegatronEngine
    from megatron_gdn.training.health import HealthMonitor

    settings = config()
    engine = MegatronEngine.build(settings, vocab_size=VOCABULARY, device=torch.device("cpu"))
    monitor = HealthMonitor(engine.model)
    training = settings.training
    shape = (training.micro_batch_size, training.sequence_length)
    text = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    batch = dict(
        tokens=text, labels=text, loss_mask=torch.ones(shape), position_ids=torch.arange(shape[1]).expand(shape)
    )
    count = training.global_batch_size // training.micro_batch_size

    def step(sampled: bool) -> float:
        start = time.process_time()
        if sampled:
            monitor.start()
        engine.forward_backward(iter([batch] * count), count)
        engine.update()
        if sampled:
            assert len(monitor.take()) > 20
        return time.process_time() - start

    taken = {True: [], False: []}
    for repeat in range(repeats + 2):
        for sampled in taken:
            seconds = step(sampled)
            if repeat >= 2:  # two rounds to warm up
                taken[sampled].append(seconds)
    # Of neighbours in time, so that what the machine does beside it weighs the same on both.
    extra = statistics.median(a - b for a, b in zip(taken[True], taken[False], strict=True))
    plain, interval = statistics.median(taken[False]), settings.logging.health_interval
    return dict(
        model=MODEL,
        training=TRAINING,
        step_cpu_ms=round(1e3 * plain, 1),
        sampled_step_cpu_ms=round(1e3 * statistics.median(taken[True]), 1),
        sample_cpu_ms=round(1e3 * extra, 1),
        sample_percent_of_a_step=round(100 * extra / plain, 2),
        interval_steps=interval,
        cost_percent=round(100 * extra / plain / interval, 4),
        repeats=repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="append to tests/bench/results/")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    init_distributed(config(), Launch.from_environment(), torch.device("cpu"))
    try:
        found = measure(arguments.repeats)
    finally:
        shutdown()
    print({name: value for name, value in found.items() if name not in ("model", "training")})
    if arguments.save:
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        append("health_cpu", [dict(date=date, commit=commit(), machine=machine(arguments.threads)) | found])


if __name__ == "__main__":
    main()
