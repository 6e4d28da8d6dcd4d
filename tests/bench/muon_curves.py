"""Loss curves of a tiny H1 under Muon and under AdamW, each at several learning rates: steps, not time.

python -m tests.bench.muon_curves [--steps 200]

Trains on the bytes of the demo's corpus with the same weights, schedule and order of samples; writes results/muon.json
and .png.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_gdn.config import Config
from tests.bench.tiny_h1 import RESULTS, SAMPLES, TOKENS, corpus, join_alone, losses, tiny_h1

RATES = [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
LAST = 20
"""Steps at the end over which losses are averaged; the best learning rate is the one with the least."""


def config(optimizer: str, lr: float, steps: int) -> Config:
    """H1 of four layers in float32."""
    schedule = {"lr": lr, "min_lr": 0.1 * lr, "warmup_tokens": TOKENS * SAMPLES * 10}
    return tiny_h1(
        "(G-S-)x2",
        steps,
        precision="fp32",
        optimizer={"name": optimizer, **schedule},
        parallel={"distributed_optimizer": False},
    )


def compare(steps: int, rates: list[float], text: torch.Tensor) -> dict[str, dict[str, list[float]]]:
    """Losses of every step by optimizer and learning rate."""
    return {
        name: {f"{lr:g}": losses(config(name, lr, steps), text, f"{name} {lr:g}") for lr in rates}
        for name in ("adamw", "muon")
    }


def last_losses(curves: dict[str, list[float]]) -> dict[str, float]:
    """Mean loss of the last steps by learning rate."""
    return {lr: sum(curve[-LAST:]) / LAST for lr, curve in curves.items()}


def draw(result: dict, path: Path) -> None:
    """Smoothed losses at each optimizer's best learning rate, and the last losses over the learning rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 2))
    means = result[f"mean_loss_of_last_{LAST}_steps"]
    for name, label in (("adamw", "AdamW"), ("muon", "Muon beside AdamW")):
        smooth = torch.tensor(result["losses_at_best_lr"][name]).unfold(0, 10, 1).mean(1)
        left.plot(range(10, 10 + len(smooth)), smooth, label=f"{label}, lr {result['best_lr'][name]}")
        right.plot([float(lr) for lr in means[name]], list(means[name].values()), marker="o", label=label)
    left.set(xlabel="step", ylabel="loss, nats per byte, mean of 10 steps", title="Tiny H1, each at its best lr")
    right.set(xlabel="peak learning rate", ylabel=f"mean loss of the last {LAST} steps", xscale="log")
    right.set_xticks([float(lr) for lr in means["muon"]], list(means["muon"]))
    right.minorticks_off()
    right.set_title("Over the learning rate")
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train at every learning rate with both and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    join_alone()
    curves = compare(steps, RATES, corpus())
    means = {name: last_losses(of_rate) for name, of_rate in curves.items()}
    best = {name: min(of_rate, key=of_rate.get) for name, of_rate in means.items()}
    target = means["adamw"][best["adamw"]]
    smooth = torch.tensor(curves["muon"][best["muon"]]).unfold(0, LAST, 1).mean(1)
    reached = (smooth <= target).nonzero()
    result = {
        "what": "training loss of a tiny H1 in float32 on the demo's bytes, Muon beside AdamW and AdamW alone",
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "torch": str(torch.__version__),
        "steps": steps,
        "tokens_per_step": TOKENS * SAMPLES,
        f"mean_loss_of_last_{LAST}_steps": means,
        "best_lr": best,
        "steps_of_muon_to_the_last_loss_of_adamw": int(reached[0]) + LAST if len(reached) else None,
        "losses_at_best_lr": {name: [round(x, 4) for x in curves[name][lr]] for name, lr in best.items()},
    }
    (RESULTS / "muon.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, RESULTS / "muon.png")
    print(json.dumps({key: value for key, value in result.items() if key != "losses_at_best_lr"}, indent=1))


if __name__ == "__main__":
    main()
