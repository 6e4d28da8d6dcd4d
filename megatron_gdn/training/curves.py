"""Curves of a run as one PNG: loss, gradient norm, learning rate, speed, parts of a step.

python -m megatron_gdn.training.curves RUN_DIR [--output curves.png] [--unigram NATS] [--title TEXT]
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_gdn.training.metrics import read_metrics

_BLUE, _ORANGE, _GREEN, _RED, _GRAY, _INK = "#2f6db3", "#e07b39", "#3a9679", "#c0392b", "#8a8f98", "#2b2f36"
_PARTS = (("forward_backward", _BLUE), ("data", _ORANGE), ("optimizer", _GREEN))
_REST = ("other", "#c9cdd3")
_FEW_POINTS = 30  # up to here single points are marked
_SMOOTHED_SHARE = 40  # smoothed lines average over 1/40 of the run
_MOST_BANDS = 100  # points of the stacked parts


def plot_curves(
    metrics_path: Path,
    output: Path,
    *,
    unigram: float | None = None,
    title: str | None = None,
    markers: Sequence[int] | None = None,
) -> None:
    """Draw the curves of a run; the file appears complete or not at all.

    The horizontal axis is tokens where the rows have `progress/tokens`, else steps. Losses that are not finite are
    crosses at the top; a panel without values says so.

    Args:
        metrics_path: the run's `metrics.jsonl`.
        output: the picture; its suffix gives the format.
        unigram: loss of a unigram model of the same tokens, nats per token: a dashed line. None: no line.
        title: heading; None: the name of the run's folder.
        markers: steps at which the run was resumed: dotted lines. None: as the rows say.

    Raises:
        ValueError: the file has no rows.
        FileNotFoundError: there is no such file.
    """
    metrics_path, output = Path(metrics_path), Path(output)
    rows = read_metrics(metrics_path)
    if not rows:
        raise ValueError(f"{metrics_path} has no rows: the run has not logged a step yet.")
    run = _Run(rows)
    resumes = run.position([row["step"] for row in rows if row.get("resumed")] if markers is None else markers)

    figure = Figure(figsize=(14, 7.6), dpi=110, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    figure.suptitle(
        title or metrics_path.resolve().parent.name, x=0.012, ha="left", fontsize=15, weight="bold", color=_INK
    )
    grid = figure.add_gridspec(2, 3)
    panels = {
        "loss": (grid[0, :2], "Loss", "nats per token"),
        "grad_norm": (grid[0, 2], "Gradient norm", "L2, before clipping"),
        "lr": (grid[1, 0], "Learning rate", ""),
        "speed": (grid[1, 1], "Speed", "tokens/s, all ranks"),
        "parts": (grid[1, 2], "Time of a step", "seconds"),
    }
    axes = {}
    for name, (place, heading, unit) in panels.items():
        axes[name] = figure.add_subplot(place)
        _dress(axes[name], heading, unit, run, resumes)
    _draw_loss(axes["loss"], run, unigram)
    _draw_line(axes["grad_norm"], run, "train/grad_norm", _BLUE, smoothed=True)
    _draw_line(axes["lr"], run, "train/lr", _GREEN)
    _draw_line(axes["speed"], run, "perf/tokens_per_s", _BLUE, smoothed=True)
    _draw_parts(axes["parts"], run)
    if len(resumes):
        # One label is enough for all dotted lines of all panels.
        axes["loss"].plot([], [], color=_GRAY, linestyle=":", label="resumed")
    if axes["loss"].get_legend_handles_labels()[0]:
        # Above the panel, where no curve can run through it.
        place = dict(loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=6, borderaxespad=0.2, handletextpad=0.5)
        axes["loss"].legend(frameon=False, fontsize=9.5, labelcolor=_INK, **place)
    _save(figure, output)


class _Run:
    """Rows as columns, and where each step is on the horizontal axis."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows
        steps, tokens = self._column("progress/tokens")
        self.unit = "tokens" if len(tokens) else "step"
        # Rows without tokens (a validation before the first step, or between two logged ones) lie on the line through
        # the origin and the rows with tokens.
        self._steps = np.concatenate([[0], steps]) if len(steps) and steps[0] > 0 else steps
        self._tokens = np.concatenate([[0], tokens]) if len(steps) and steps[0] > 0 else tokens
        self.end = float(self.position([rows[-1]["step"]])[0]) or 1.0

    def _column(self, tag: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(row["step"], row[tag]) for row in self.rows if row.get(tag) is not None]
        return np.array([step for step, _ in pairs], float), np.array([value for _, value in pairs], float)

    def position(self, steps: Sequence[float] | np.ndarray) -> np.ndarray:
        """Steps on the horizontal axis."""
        steps = np.asarray(steps, float)
        return np.interp(steps, self._steps, self._tokens) if self.unit == "tokens" and len(steps) else steps

    def curve(self, tag: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions and values of a tag; both empty where no row has it."""
        steps, values = self._column(tag)
        return self.position(steps), values


def _draw_loss(axes: Axes, run: _Run, unigram: float | None) -> None:
    x, loss = run.curve("train/loss")
    x_validation, validation = run.curve("validation/loss")
    finite, known = np.isfinite(loss), np.isfinite(validation)
    gapped = np.where(finite, loss, np.nan)
    if len(loss) <= _FEW_POINTS and finite.any():
        axes.plot(x, gapped, "o-", color=_BLUE, markersize=5, linewidth=1.6, label="training")
    elif finite.any():
        axes.plot(x, gapped, color=_BLUE, linewidth=0.8, alpha=0.4, label="training")
        axes.plot(x, np.where(finite, _running_mean(gapped), np.nan), color=_BLUE, linewidth=2.0, label="smoothed")
    if known.any():
        form = "o-" if len(validation) <= _FEW_POINTS else "-"
        line = dict(linewidth=1.4, markersize=6, markeredgecolor="white", zorder=4)
        axes.plot(x_validation[known], validation[known], form, color=_ORANGE, label="validation", **line)
    if unigram is not None:
        axes.axhline(unigram, color=_GRAY, linestyle="--", linewidth=1.3, label=f"unigram model {unigram:.3f}")
    lost = np.concatenate([x[~finite], x_validation[~known]])
    if len(lost):
        # The height is in units of the panel, so that the crosses do not move the scale.
        cross = dict(markersize=7, markeredgewidth=2, clip_on=False, transform=axes.get_xaxis_transform())
        axes.plot(lost, np.full(len(lost), 0.97), "x", color=_RED, label=f"not finite ({len(lost)})", **cross)
    if not (finite.any() or known.any()):
        _say_empty(axes, "no finite loss" if len(lost) else "not logged")


def _draw_line(axes: Axes, run: _Run, tag: str, color: str, *, smoothed: bool = False) -> None:
    x, values = run.curve(tag)
    values = np.where(np.isfinite(values), values, np.nan)
    if np.isnan(values).all():
        _say_empty(axes, "not logged" if not len(values) else "no finite value")
        return
    if len(values) <= _FEW_POINTS:
        axes.plot(x, values, "o-", color=color, linewidth=1.4, markersize=4)
    elif smoothed:
        axes.plot(x, values, color=color, linewidth=0.8, alpha=0.4)
        axes.plot(x, np.where(np.isnan(values), np.nan, _running_mean(values)), color=color, linewidth=1.8)
    else:
        axes.plot(x, values, color=color, linewidth=1.6)
    peak = np.nanmax(values)
    if tag == "train/grad_norm" and peak > 20 * np.nanmedian(values) > 0:
        axes.set_yscale("log")  # a few spikes would flatten everything else
    else:
        axes.set_ylim(min(0.0, np.nanmin(values)), 1.15 * peak or 1)


def _draw_parts(axes: Axes, run: _Run) -> None:
    """Stacked parts of a step; in a long run medians over neighbours, so that a slow step does not hide the others."""
    x, step = run.curve("perf/step_s")
    logged = {name: dict(zip(*run.curve(f"perf/{name}_s"), strict=True)) for name, _ in _PARTS}
    parts = [(name, color, np.array([logged[name].get(place, 0.0) for place in x])) for name, color in _PARTS]
    parts = [part for part in parts if part[2].any()]
    if not len(step) or not np.isfinite(step).any():
        _say_empty(axes, "not logged")
        return
    rest = np.maximum(0, step - sum((seconds for _, _, seconds in parts), np.zeros_like(step)))
    layers = [(name, color, np.nan_to_num(seconds)) for name, color, seconds in [*parts, (*_REST, rest)]]
    shares = [np.median(seconds) / (np.nanmedian(step) or 1) for *_, seconds in layers]
    blocks = np.array_split(np.arange(len(x)), min(len(x), _MOST_BANDS))
    layers = [(name, color, np.array([np.median(s[block]) for block in blocks])) for name, color, s in layers]
    x = np.array([x[block].mean() for block in blocks])
    if len(x) == 1:
        x, layers = x + np.array([-0.1, 0.1]) * x, [(name, color, s.repeat(2)) for name, color, s in layers]
    axes.stackplot(x, [seconds for *_, seconds in layers], colors=[color for _, color, _ in layers], linewidth=0)
    peak = max(sum(seconds for *_, seconds in layers))
    axes.set_ylim(0, 1.3 * peak or 1)  # room for the names
    names = [f"{name.replace('_', '/')} {share:.0%}" for (name, *_), share in zip(layers, shares, strict=True)]
    handles = [Patch(color=color) for _, color, _ in layers]
    axes.legend(handles, names, loc="upper left", ncols=2, frameon=False, fontsize=9, labelcolor=_INK)
    _, checkpoint = run.curve("perf/checkpoint_s")
    if len(checkpoint):
        note = f"checkpoint {np.nanmedian(checkpoint):.2g} s"
        axes.set_title(note, loc="right", fontsize=9, color=_GRAY)


def _dress(axes: Axes, heading: str, unit: str, run: _Run, resumes: np.ndarray) -> None:
    axes.set_title(heading, loc="left", fontsize=11.5, weight="bold", color=_INK)
    axes.set_ylabel(unit, fontsize=9.5, color=_GRAY)
    axes.set_xlabel(run.unit, fontsize=9.5, color=_GRAY)
    axes.grid(True, color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c9cdd3")
    axes.tick_params(colors=_GRAY, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=run.unit == "step"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_xlim(-0.02 * run.end, 1.02 * run.end)
    for place in resumes:
        axes.axvline(place, color=_GRAY, linestyle=":", linewidth=1.2, zorder=1)


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GRAY, fontsize=10)
    axes.set_yticks([])


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over as many neighbours on either side, fewer at the ends; NaN is passed over."""
    i = np.arange(len(values))
    half = np.minimum(len(values) // (2 * _SMOOTHED_SHARE), np.minimum(i, i[::-1]))
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(known, values, 0.0), known))
    total, count = (each[i + half + 1] - each[i - half] for each in (sums, counts))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _short(value: float) -> str:
    """1234567 as 1.23M; B is 1e9, as for tokens."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _save(figure: Figure, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{os.getpid()}.{output.name}")
    try:
        figure.savefig(aside, format=output.suffix.lstrip(".") or "png")
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)


def main() -> int:
    """Run the command; 0 when the picture was written, 2 when there is nothing to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run, with metrics.jsonl")
    parser.add_argument("--output", type=Path, help="picture to write (default: RUN_DIR/curves.png)")
    parser.add_argument("--unigram", type=float, metavar="NATS", help="loss of a unigram model, drawn as a line")
    parser.add_argument("--title", help="heading (default: the name of the folder)")
    arguments = parser.parse_args()
    output = arguments.output or arguments.run_dir / "curves.png"
    try:
        plot_curves(arguments.run_dir / "metrics.jsonl", output, unigram=arguments.unigram, title=arguments.title)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
