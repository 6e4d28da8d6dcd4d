"""Train a model from a recipe.

torchrun --nproc-per-node 2 examples/pretrain.py --config examples/recipes/demo.yaml [section.field=value ...]
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    # Before the first step; then it saves and ends, and a second one forces.
    end_in_one_line("error: stopped by Control-C: what no checkpoint has is lost")

from megatron_gdn.config import Config, ConfigError, DataConfig, check_world, dump_config, load_config
from megatron_gdn.config.entries import split_weights
from megatron_gdn.training.setup import ignore_host_warnings


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe, YAML")
    parser.add_argument("--resume", action="store_true", help="continue the run in run.output_dir, if there is one")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration, print its costs, start nothing"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print the costs as JSON only")
    parser.add_argument("--processes", type=int, help="with --dry-run: number of processes; default: one model replica")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings that replace the recipe's"
    )
    arguments = parser.parse_intermixed_args()  # settings may stand on both sides of --resume
    if not arguments.dry_run and (arguments.json or arguments.processes is not None):
        parser.error("--json and --processes need --dry-run")
    if arguments.processes is not None and arguments.processes < 1:
        parser.error(f"--processes ({arguments.processes}) must be at least 1")
    return arguments


def find_vocab_size(data: DataConfig) -> int:
    """Ids of the training data's tokenizer, without Megatron; raises ConfigError where it does not exist yet."""
    from megatron_gdn.training.tokenizer_json import read_tokenizer, vocabulary_size

    try:
        if data.streams:
            return vocabulary_size(read_tokenizer(Path(data.tokenizer) / "tokenizer.json"))
        prefixes, _ = split_weights(data.train)
        return max(json.loads(Path(f"{prefix}.json").read_text())["vocab_size"] for prefix in prefixes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.vocab_size (null) must be a number where data.train tells none: set it. ({error})"
        ) from error


def dry_run(config: Config, *, processes: int | None, as_json: bool) -> None:
    """Print what a run costs; raises ConfigError for a layout or a vocabulary that cannot work."""
    from megatron_gdn.cost import format_report, model_cost
    from megatron_gdn.fp8.alignment import check_alignment

    check_alignment(config)
    data_parallel = check_world(config, processes or config.parallel.ranks_per_replica)
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        vocab_size = find_vocab_size(config.data)
    report = model_cost(config, vocab_size=vocab_size, data_parallel=data_parallel).report()
    print(json.dumps(report, indent=1) if as_json else f"{dump_config(config)}\n{format_report(report)}")


def fail(error: Exception) -> int:
    """Print why nothing can be trained; the exit code, 2.

    torchrun ends with a traceback of its own and a table of its failures, where this puts the message.
    """
    print(f"error: {error}", file=sys.stderr)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": f"error: {error}", "timestamp": int(time.time())}))
    return 2


def main() -> int:
    """Run the script; 0 when training ended or was stopped, 2 for a setting that cannot work."""
    arguments = parse_arguments()
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            dry_run(config, processes=arguments.processes, as_json=arguments.json)
            return 0
        ignore_host_warnings()
        # Megatron-Core takes seconds to import; a wrong configuration has been reported before it.
        from megatron_gdn.optional import MissingPackageError
        from megatron_gdn.training.checkpoint import CheckpointError
        from megatron_gdn.training.data import DatasetError
        from megatron_gdn.training.faults import LockError
        from megatron_gdn.training.loop import pretrain
        from megatron_gdn.training.restricted import UnsafeCheckpointError
    except ConfigError as error:
        return fail(error)
    try:
        pretrain(config, resume=arguments.resume)
    except (
        ConfigError,
        DatasetError,
        CheckpointError,
        UnsafeCheckpointError,
        LockError,
        MissingPackageError,
    ) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
