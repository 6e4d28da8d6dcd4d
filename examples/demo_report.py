"""The end of `make demo`: curves, comparison with a unigram model, summary.json; fails if nothing was learned.

python examples/demo_report.py --config runs/demo/config.yaml
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

from megatron_gdn.config import Config, load_config
from megatron_gdn.training.curves import plot_curves
from megatron_gdn.training.metrics import read_metrics
from megatron_gdn.training.setup import ignore_host_warnings

LEAST_FALL_NATS = 2.0  # of the validation loss, from the untrained model to the last step


def summarize(rows: list[dict], unigram_nats: float, train_steps: int) -> dict:
    """Numbers of the run and the reasons, if any, for which it counts as failed.

    Args:
        rows: from `read_metrics`.
        unigram_nats: loss per token of a unigram model of the same tokens.
        train_steps: steps that the configuration asks for.

    Raises:
        ValueError: no row has a validation loss.
    """
    validations = [row["validation/loss"] for row in rows if "validation/loss" in row]
    if not validations:
        raise ValueError("metrics.jsonl has no validation/loss: train with training.validation_samples above 0.")
    steps = [row["step"] for row in rows if "train/loss" in row]
    speeds = sorted(row["perf/tokens_per_s"] for row in rows if "perf/tokens_per_s" in row)
    checks = {
        f"the last step is {train_steps}": bool(steps) and steps[-1] == train_steps,
        "every step was logged once, over the stop and the resume": steps == list(range(1, train_steps + 1)),
        "the run was resumed": any(row.get("resumed") for row in rows),
        f"the validation loss fell by {LEAST_FALL_NATS} nats": validations[0] - validations[-1] >= LEAST_FALL_NATS,
        "the model beats the unigram model": validations[-1] < unigram_nats,
    }
    return {
        "steps": steps[-1] if steps else 0,
        "tokens": rows[-1].get("progress/tokens"),
        "validation_loss_first_nats": validations[0],
        "validation_loss_last_nats": validations[-1],
        "unigram_loss_nats": unigram_nats,
        "tokens_per_s_median": speeds[len(speeds) // 2] if speeds else None,
        "failed_checks": [name for name, passed in checks.items() if not passed],
    }


def report(config: Config) -> dict:
    """Draw the curves of a run and write its summary.json; its contents.

    Raises:
        OSError, ValueError: the run's data or metrics are not there, or are no such files.
    """
    output_dir = Path(config.run.output_dir)
    ignore_host_warnings()
    from megatron_gdn.training.data import unigram_cross_entropy

    rows = read_metrics(output_dir / "metrics.jsonl")
    unigram_nats = unigram_cross_entropy(config.data.train, config.data.validation)
    plot_curves(output_dir / "metrics.jsonl", output_dir / "curves.png", unigram=unigram_nats, title="make demo")
    summary = summarize(rows, unigram_nats, config.training.train_steps)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> int:
    """Run the script; 0 when every check passed, 1 when one did not, 2 for files of no such run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration of the run")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config)
        summary = report(config)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output_dir = Path(config.run.output_dir)
    print(f"validation loss: {summary['validation_loss_first_nats']:.3f} nats/token before training,", end=" ")
    print(f"{summary['validation_loss_last_nats']:.3f} after {summary['steps']} steps")
    print(f"unigram model of the same tokens: {summary['unigram_loss_nats']:.3f} nats/token")
    print(f"curves: {output_dir / 'curves.png'}   summary: {output_dir / 'summary.json'}")
    for name in summary["failed_checks"]:
        print(f"error: not so: {name}", file=sys.stderr)
    return 1 if summary["failed_checks"] else 0


if __name__ == "__main__":
    sys.exit(main())
