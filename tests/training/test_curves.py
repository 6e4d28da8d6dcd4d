"""The picture shows what was logged: lines are compared with the rows, and odd runs still give a picture."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_gdn.training import curves
from megatron_gdn.training.curves import plot_curves

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib and numpy warn where they draw nothing

PER_STEP = 4096


def row(step: int, loss: float | str, **more) -> dict:
    """A row of the training loop."""
    return {
        "step": step,
        "train/loss": loss,
        "train/grad_norm": 0.5 + 3 / step,
        "train/lr": 1e-3 * step,
        "perf/tokens_per_s": 5000.0 + step,
        "perf/step_s": 1.0,
        "perf/forward_backward_s": 0.5,
        "perf/optimizer_s": 0.25,
        "progress/tokens": step * PER_STEP,
        **more,
    }


def write(folder, rows: list[dict]):
    """metrics.jsonl with these rows."""
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw rows; gives the panels by heading instead of writing the file."""

    def draw(rows, **options):
        figures = []
        monkeypatch.setattr(curves, "_save", lambda figure, output: figures.append(figure))
        plot_curves(write(tmp_path, rows), tmp_path / "curves.png", **options)
        return {axes.get_title(loc="left"): axes for axes in figures[0].axes}

    return draw


def line(axes, label: str):
    """(x, y) of the line with this label."""
    (found,) = (each for each in axes.lines if each.get_label() == label)
    return tuple(np.asarray(data, float) for data in found.get_data())


LOSSES = [8.0 - 0.1 * step + 0.3 * (step % 3) for step in range(1, 101)]


def test_lines_are_the_rows(drawn):
    rows = [{"step": 0, "validation/loss": 8.5}] + [row(step, loss) for step, loss in enumerate(LOSSES, 1)]
    rows[50]["validation/loss"] = 4.5
    panels = drawn(rows, unigram=6.25)
    tokens = PER_STEP * np.arange(1, 101)
    np.testing.assert_array_equal(line(panels["Loss"], "training"), [tokens, LOSSES])
    np.testing.assert_array_equal(line(panels["Loss"], "validation"), [[0, 50 * PER_STEP], [8.5, 4.5]])
    np.testing.assert_array_equal(line(panels["Loss"], "unigram model 6.250")[1], [6.25, 6.25])
    np.testing.assert_array_equal(line(panels["Loss"], "smoothed")[0], tokens)
    for heading, tag in (("Gradient norm", "train/grad_norm"), ("Learning rate", "train/lr"), ("Speed", "perf/tok")):
        values = [value for each in rows for name, value in each.items() if name.startswith(tag)]
        np.testing.assert_array_equal(panels[heading].lines[0].get_ydata(), values)
    parts = [text.get_text() for text in panels["Time of a step"].get_legend().get_texts()]
    assert parts == ["forward/backward 50%", "optimizer 25%", "other 25%"]
    assert all(axes.get_xlabel() == "tokens" and axes.get_xlim()[1] > tokens[-1] for axes in panels.values())


@pytest.mark.parametrize("length", [1, 39, 40, 200, 401])
def test_the_smoothed_line_is_the_mean_of_the_neighbours(length):
    values = np.random.default_rng(length).normal(3.0, 1.0, length)
    values[length // 2 :: 7] = np.nan
    expected = []
    for i in range(length):
        half = min(length // 80, i, length - 1 - i)
        known = [value for value in values[i - half : i + half + 1] if not math.isnan(value)]
        expected.append(sum(known) / len(known) if known else math.nan)
    # sums of up to 401 float64 values of size 3: 1e-12 is far above their rounding
    np.testing.assert_allclose(curves._running_mean(values), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("markers, expected", [(None, [10, 25]), ([7], [7]), ([], [])])
def test_resumes_are_dotted_lines_in_every_panel(drawn, markers, expected):
    rows = [row(step, loss) for step, loss in enumerate(LOSSES, 1)]
    rows[9]["resumed"] = rows[24]["resumed"] = True
    for axes in drawn(rows, markers=markers).values():
        dotted = [each.get_xdata()[0] for each in axes.lines if each.get_linestyle() == ":" and len(each.get_xdata())]
        assert dotted == [step * PER_STEP for step in expected]


def test_rows_without_tokens_lie_between_their_neighbours(drawn):
    rows = [row(10, 7.0), {"step": 15, "validation/loss": 6.5}, row(20, 6.0, **{"progress/tokens": 120_000})]
    rows.insert(0, {"step": 5, "validation/loss": 7.5})
    x, _ = line(drawn(rows)["Loss"], "validation")
    np.testing.assert_allclose(x, [5 * PER_STEP, (10 * PER_STEP + 120_000) / 2], rtol=1e-12)


def test_without_tokens_the_axis_is_steps(drawn):
    rows = [{"step": step, "train/loss": loss} for step, loss in enumerate(LOSSES, 1)]
    panels = drawn(rows)
    np.testing.assert_array_equal(line(panels["Loss"], "training")[0], range(1, 101))
    assert panels["Loss"].get_xlabel() == "step"
    assert [text.get_text() for text in panels["Speed"].texts] == ["not logged"]


def test_losses_that_are_not_finite_are_gaps_and_crosses(drawn):
    rows = [row(step, loss) for step, loss in enumerate(LOSSES, 1)]
    rows[40]["train/loss"], rows[60]["train/loss"], rows[70]["validation/loss"] = "NaN", "Infinity", "NaN"
    loss = drawn(rows)["Loss"]
    for label in ("training", "smoothed"):
        assert list(np.flatnonzero(np.isnan(line(loss, label)[1]))) == [40, 60]
    np.testing.assert_array_equal(line(loss, "not finite (3)")[0], [41 * PER_STEP, 61 * PER_STEP, 71 * PER_STEP])


def test_a_spike_of_the_gradient_norm_makes_its_axis_logarithmic(drawn):
    rows = [row(step, loss) for step, loss in enumerate(LOSSES, 1)]
    assert drawn(rows)["Gradient norm"].get_yscale() == "linear"
    rows[30]["train/grad_norm"] = 500.0
    assert drawn(rows)["Gradient norm"].get_yscale() == "log"


ODD_RUNS = {
    "one step, then resumed": [row(1, 8.0, resumed=True)],
    "only a validation before training": [{"step": 0, "validation/loss": 8.0}],
    "three steps": [row(step, 8.0 - step) for step in (1, 2, 3)],
    "constant zero": [{tag: 0 for tag in row(1, 0)} | {"step": step} for step in range(1, 50)],
    "no finite value": [
        {tag: "NaN" for tag in row(1, 0) if tag != "progress/tokens"} | {"step": step} for step in range(1, 50)
    ],
    "only the learning rate": [{"step": step, "train/lr": 1e-3} for step in range(1, 50)],
}


@pytest.mark.parametrize("name", ODD_RUNS)
def test_odd_runs_give_a_picture(tmp_path, name):
    plot_curves(write(tmp_path, ODD_RUNS[name]), tmp_path / "new" / "curves.png", unigram=6.0)
    picture = imread(tmp_path / "new" / "curves.png")
    assert picture.shape[:2] == (836, 1540) and picture[..., :3].std() > 0.01  # something is drawn


def test_the_file_is_complete_or_untouched(tmp_path, monkeypatch):
    output = tmp_path / "curves.png"
    output.write_text("the earlier picture")
    path = write(tmp_path, ODD_RUNS["three steps"])

    def full_disk(figure, path, **_):
        path.write_text("half of a pic")
        raise OSError("no space")

    with monkeypatch.context() as context, pytest.raises(OSError, match="no space"):
        context.setattr(Figure, "savefig", full_disk)
        plot_curves(path, output)
    assert output.read_text() == "the earlier picture"
    plot_curves(path, output)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_the_command(tmp_path, monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["curves", *map(str, arguments)])
        return curves.main(), "".join(capsys.readouterr())

    status, text = run(tmp_path)
    assert status == 2 and "metrics.jsonl" in text
    (tmp_path / "metrics.jsonl").touch()
    status, text = run(tmp_path)
    assert status == 2 and "has no rows: the run has not logged a step yet" in text
    write(tmp_path, ODD_RUNS["three steps"])
    assert run(tmp_path, "--output", tmp_path / "other.png", "--unigram", 6.3, "--title", "x")[0] == 0
    module = [sys.executable, "-m", "megatron_gdn.training.curves", str(tmp_path)]
    assert subprocess.run(module, capture_output=True, text=True).stdout == f"{tmp_path / 'curves.png'}\n"
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "other.png"))
