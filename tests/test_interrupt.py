"""Control-C before a command works: one line, exit code 130, and no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = "error: stopped by Control-C"
LINES = {
    "examples/pretrain.py": "error: stopped by Control-C: what no checkpoint has is lost",
    "tools/preprocess/tokenize_corpus.py": "stopped: the same command goes on from here",
}
COMMANDS = ["examples/pretrain.py", "examples/generate.py", "examples/evaluate.py", "examples/demo_report.py"]
COMMANDS += [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "tools").rglob("*.py"))
    if '\nif __name__ == "__main__":\n    sys.exit(main())' in path.read_text()
]


def run(command: str, *arguments: str, first_on_path: str = "") -> subprocess.CompletedProcess:
    by_name = ["-m", command.removesuffix(".py").replace("/", ".")]
    return subprocess.run(
        [sys.executable, *(by_name if command.startswith("tools") else [command]), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([first_on_path, str(ROOT), *sys.path])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_control_c_during_imports(command, tmp_path):
    """In place of the slow packages stands one that sends the signal and drops the exception, as torch's C++ does."""
    dropped = "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n"
    for name in ("numpy", "torch", "pydantic", "tokenizers", "tqdm"):
        (tmp_path / f"{name}.py").write_text(dropped)
    found = run(command, first_on_path=str(tmp_path))
    assert (found.returncode, found.stderr) == (130, LINES.get(command, LINE) + "\n")


@pytest.mark.parametrize("signal_ignored", [False, True])
def test_control_c_after_imports(tmp_path, signal_ignored):
    """While the command reads its input, a pipe that nobody fills; not where Control-C is to be ignored."""
    os.mkfifo(tmp_path / "config.json")
    command = [sys.executable, "-m", "tools.convert.hf_to_megatron", "--hf", str(tmp_path), "--output", "nothing"]
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if signal_ignored else signal.SIG_DFL),
    )
    with open(tmp_path / "config.json", "w"):  # waits for the reader
        started.send_signal(signal.SIGINT)
        if not signal_ignored:
            started.wait(100)
    _, printed = started.communicate(timeout=100)
    code, begin = (1, "error: ") if signal_ignored else (130, LINE + "\n")
    assert started.returncode == code and printed.startswith(begin) and "Traceback" not in printed
    assert signal_ignored or printed == begin


def test_other_errors_keep_their_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('broken')\n")
    found = run("tools/convert/verify.py", first_on_path=str(tmp_path))
    assert found.returncode == 1 and found.stderr.endswith("RuntimeError: broken\n") and "Traceback" in found.stderr
