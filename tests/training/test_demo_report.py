"""The end of `make demo` on files that are not those of a run: a message and exit code 2."""

import pytest
import yaml

from tests.training import runs

LOSSES = '{"step": 1, "train/loss": 5.0, "validation/loss": %s}\n'


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return runs.write_dataset(tmp_path_factory.mktemp("data"))


def report(monkeypatch, recipe) -> int:
    from examples import demo_report

    monkeypatch.setattr("sys.argv", ["demo_report.py", "--config", str(recipe)])
    return demo_report.main()


@pytest.mark.parametrize(
    "metrics, message",
    [
        (None, "No such file or directory: '{run}/metrics.jsonl'"),
        ("no rows\n", "{run}/metrics.jsonl has no rows: the run has not logged a step yet."),
        ('{"step": 1, "train/loss": 5.0}\n', "metrics.jsonl has no validation/loss: train with training.validation_"),
        (LOSSES % '"x"', "could not convert string to float: 'x'"),
    ],
)
def test_metrics_of_no_run(prefix, tmp_path, monkeypatch, capsys, metrics, message):
    run = tmp_path / "run"
    run.mkdir()
    if metrics is not None:
        (run / "metrics.jsonl").write_text(metrics)
    values = runs.settings(prefix, run, data={"validation": [str(prefix)], "split": None})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert report(monkeypatch, tmp_path / "recipe.yaml") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message.format(run=run) in printed


def test_wrong_configuration_and_data(tmp_path, monkeypatch, capsys):
    assert report(monkeypatch, tmp_path / "no.yaml") == 2
    assert (
        capsys.readouterr().err
        == f"error: --config ({tmp_path / 'no.yaml'}) cannot be read: No such file or directory.\n"
    )
    (tmp_path / "metrics.jsonl").write_text(LOSSES % 5.0)
    values = runs.settings(tmp_path / "no", tmp_path, data={"validation": [str(tmp_path / "no")], "split": None})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert report(monkeypatch, tmp_path / "recipe.yaml") == 2
    assert f"error: {tmp_path / 'no'}.bin does not exist: build it with" in capsys.readouterr().err
