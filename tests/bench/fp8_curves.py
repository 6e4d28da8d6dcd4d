"""Loss curves of a tiny H1 in emulated FP8 beside bf16: what each recipe costs in loss, not in time.

python -m tests.bench.fp8_curves [--steps 300]

Trains on the bytes of the demo's corpus with the same weights and order of samples for every recipe; writes
results/fp8_emulated.json and .png.
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

RECIPES = ["none", "delayed", "tensorwise", "blockwise", "mxfp8"]
LAST = 50
"""Steps at the end over which losses are averaged."""


def config(recipe: str, steps: int) -> Config:
    """H1 of six layers, the first and the last of them in bf16."""
    return tiny_h1(
        "(G-S-)x3",
        steps,
        precision="bf16",
        optimizer={"lr": 3e-3, "min_lr": 3e-4, "warmup_tokens": TOKENS * SAMPLES * 20},
        fp8={"recipe": recipe} | ({"backend": "emulated", "amax_history": 16} if recipe != "none" else {}),
    )


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Smoothed losses, and below them the differences from bf16."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 7), height_ratios=(2, 1))
    smooth = {name: torch.tensor(c).unfold(0, 20, 1).mean(1) for name, c in curves.items()}
    steps = range(20, 20 + len(smooth["none"]))
    for name, curve in smooth.items():
        label = "bf16" if name == "none" else f"{name}, emulated"
        style = dict(color="black", linewidth=2) if name == "none" else dict(linewidth=1)
        above.plot(steps, curve, label=label, **style)
        if name != "none":
            below.plot(steps, curve - smooth["none"], label=label, linewidth=1, color=above.lines[-1].get_color())
    above.set_ylabel("loss, nats per byte, mean of 20 steps")
    above.set_title("Tiny H1, linear layers of 4 of 6 layers in FP8 - emulated, not run on FP8 hardware")
    above.legend()
    below.axhline(0, color="black", linewidth=1)
    below.set_ylabel("difference from bf16")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train with every recipe and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    join_alone()
    text = corpus()
    curves = {recipe: losses(config(recipe, steps), text, recipe) for recipe in RECIPES}
    means = {name: sum(curve[-LAST:]) / LAST for name, curve in curves.items()}
    result = {
        "what": "training loss of a tiny H1 in emulated FP8; not run on FP8 hardware",
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "torch": str(torch.__version__),
        "steps": steps,
        "tokens_per_step": TOKENS * SAMPLES,
        f"mean_loss_of_last_{LAST}_steps": means,
        "difference_from_bf16": {name: mean - means["none"] for name, mean in means.items() if name != "none"},
        "losses": {name: [round(x, 4) for x in curve] for name, curve in curves.items()},
    }
    (RESULTS / "fp8_emulated.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(curves, RESULTS / "fp8_emulated.png")
    print(
        json.dumps({key: result[key] for key in ("difference_from_bf16", f"mean_loss_of_last_{LAST}_steps")}, indent=1)
    )


if __name__ == "__main__":
    main()
