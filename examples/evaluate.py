"""Loss of a training checkpoint at several lengths, and needles that it finds (S-NIAH).

    python examples/evaluate.py --checkpoint runs/mine --data data/validation --lengths 2048,4096,8192
    python examples/evaluate.py --checkpoint runs/mine --tokenizer tokenizer --haystack essays.txt --niah 1,2,3 \\
        --lengths 1024,2048 --samples 100

All lengths are measured on the same tokens. --output writes the numbers as JSON. One process; ends with 2 for wrong
arguments.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

from megatron_gdn.config import ConfigError
from megatron_gdn.training.evaluation import TASKS, finds_needle, loss_at_length, needle_samples
from megatron_gdn.training.indexed import DatasetError, check_dataset
from megatron_gdn.training.inference import inference_config, load_model
from megatron_gdn.training.restricted import UnsafeCheckpointError
from megatron_gdn.training.setup import Launch, choose_device, ignore_host_warnings, init_distributed, shutdown
from tools.convert.checkpoint import MegatronCheckpoint
from tools.convert.errors import ConvertError
from tools.preprocess.libraries import load_tokenizer
from tools.preprocess.sources import ArgumentError


def parse_numbers(text: str) -> list[int]:
    """`1024,2048` as numbers, for argparse."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"({text!r}) must be positive numbers such as 1024,2048")
    return numbers


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="step folder, checkpoints folder, or folder of a run")
    add("--lengths", type=parse_numbers, help="tokens; default: half, once and twice the length of training")
    add("--data", help="prefix of a .bin/.idx pair to measure the loss on")
    add("--tokens", type=int, default=2**20, help="most tokens of --data to read")
    add("--batch-size", type=int, default=1, help="sequences of one pass over --data")
    add("--niah", type=parse_numbers, default=[], help="tasks of S-NIAH: 1, 2, 3")
    add("--tokenizer", type=Path, help="for --niah: folder with tokenizer.json")
    add("--haystack", type=Path, help="for --niah 2 and 3: text to hide needles in")
    add("--samples", type=int, default=100, help="needles per task and length")
    add("--seed", type=int, default=0)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--output", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args(argv)
    if not arguments.data and not arguments.niah:
        parser.error("nothing to evaluate: give --data, --niah, or both")
    if arguments.niah and not arguments.tokenizer:
        parser.error("--niah needs --tokenizer")
    if wrong := set(arguments.niah) - set(TASKS):
        parser.error(f"--niah ({min(wrong)}) must be tasks among {', '.join(map(str, TASKS))}")
    if set(arguments.niah) - {1} and not arguments.haystack:
        parser.error(f"--niah {max(arguments.niah)} needs --haystack, a text to hide needles in")
    if arguments.output and not arguments.output.parent.is_dir():
        parser.error(f"--output ({arguments.output}) must be a file in a folder that exists")
    if min(arguments.tokens, arguments.batch_size, arguments.samples) < 1:
        parser.error("--tokens, --batch-size and --samples must be at least 1")
    return arguments


def read_haystack(path: Path) -> str:
    """The text to hide needles in; raises ArgumentError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--haystack ({path}) must be a text in UTF-8: {error}.") from error


def main(argv: list[str] | None = None) -> int:
    """Run the script; 2 for arguments that cannot work."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        checkpoint = MegatronCheckpoint(arguments.checkpoint)
        length = checkpoint.sequence_length
        config = inference_config(
            checkpoint.model, sequence_length=length, dtype=checkpoint.weights_dtype, device=arguments.device
        )
        lengths = sorted(arguments.lengths or [length // 2, length, 2 * length])
        tokens = check_dataset(arguments.data).tokens() if arguments.data else None
        if tokens is not None:
            # The same tokens for every length: whole stretches of the longest.
            usable = min(len(tokens) - 1, arguments.tokens) // lengths[-1] * lengths[-1] + 1
            if usable == 1:
                raise ArgumentError(
                    f"--data ({arguments.data}) has {len(tokens)} tokens, of which --tokens reads {arguments.tokens}: "
                    f"the longest of --lengths ({lengths[-1]}) needs one more than itself."
                )
            tokens = tokens[:usable]
        text = read_haystack(arguments.haystack) if arguments.haystack else None
        samples = {}
        if arguments.niah:
            tokenizer = load_tokenizer(arguments.tokenizer)
            largest = max(tokenizer.get_vocab().values())
            if largest >= checkpoint.vocab_size:
                raise ArgumentError(
                    f"--tokenizer ({arguments.tokenizer}) has ids up to {largest} and the model "
                    f"{checkpoint.vocab_size}: give the one that made its data."
                )
            options = dict(encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids, text=text)
            for task in arguments.niah:
                for size in lengths:
                    samples[task, size] = list(
                        needle_samples(task, size, arguments.samples, seed=arguments.seed, **options)
                    )
        ignore_host_warnings()
        device = choose_device(config, Launch(rank=0, world_size=1, local_rank=0))
    except (
        ArgumentError,
        ConfigError,
        ConvertError,
        DatasetError,
        UnsafeCheckpointError,
        OSError,
        ValueError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from megatron_gdn.training.checkpoint import CheckpointError  # imports Megatron-Core, which takes seconds

    init_distributed(config, Launch(rank=0, world_size=1, local_rank=0), device)
    found: dict[str, dict[int, float]] = {}
    try:
        model = load_model(checkpoint.path, config, vocab_size=checkpoint.vocab_size, device=device)
        if tokens is not None:
            found["loss"] = {
                size: loss_at_length(model, tokens, size, batch_size=arguments.batch_size, device=device)
                for size in lengths
            }
        for (task, size), needles in samples.items():
            hits = [finds_needle(model, sample, device=device) for sample in needles]
            found.setdefault(f"s-niah-{task}", {})[size] = sum(hits) / len(hits)
    except (CheckpointError, UnsafeCheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutdown()
    print("length".ljust(12), *(f"{size:>9}" for size in lengths))
    for name, values in found.items():
        print(name.ljust(12), *(f"{values[size]:9.4f}" for size in lengths))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
