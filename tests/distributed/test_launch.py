"""examples/launch run here: torchrun agents over loopback, and the Slurm file against stand-ins of Slurm's commands.

Every agent, process and signal is real. The stand-ins for Slurm's commands are in slurm_commands/.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked_runs import ForkedRun
from test_survival import LATEST, lines, timeless
from training_home import ENVIRONMENT, ROOT, Home, furnish

LAUNCH = ROOT / "examples" / "launch"
SLURM_COMMANDS = Path(__file__).with_name("slurm_commands")
WORK_REMAINS = 75


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


def arguments(home: Home, save: str, *flags: Any) -> list[str]:
    """One example in each pack, so that any number of processes up to four has its share."""
    return home.argv(save, "--micro-batch-size", 1, "--distributed-timeout-minutes", 1, *flags)


def environment(**settings: Any) -> dict[str, str]:
    """Of a node's shell. One test runs at a time, so a port that is free now stays free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "MASTER_PORT": port,
        "PYTHON": sys.executable,
        "PYTHONPATH": ROOT,
        "GLOO_SOCKET_IFNAME": "lo",
        **settings,
    }
    return ENVIRONMENT | {name: str(value) for name, value in variables.items()}


@dataclass(frozen=True)
class Started:
    """A shell that runs a launch script, and the output of it and its processes."""

    shell: subprocess.Popen
    output: Path

    def text(self) -> str:
        return self.output.read_text()

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.shell.pid).children(recursive=True)

    def training_processes(self) -> list[psutil.Process]:
        """Those that torchrun started."""
        agents = [process for process in self.processes() if "megatron_solopo.launch" in process.cmdline()]
        return [process for agent in agents for process in agent.children()]


@contextmanager
def started(command: list[str], output: Path, settings: dict[str, str], cwd: Path) -> Iterator[Started]:
    """Leaves no process behind."""
    with output.open("w") as file:
        shell = subprocess.Popen(command, env=settings, cwd=cwd, stdout=file, stderr=file, start_new_session=True)
    run = Started(shell, output)
    try:
        yield run
    finally:
        left = run.processes() if shell.poll() is None else []
        for process in [shell, *left]:
            process.kill()
        shell.wait()


@contextmanager
def two_nodes(home: Home, script: str, per_node: int, argv: list[str], **settings: Any) -> Iterator[list[Started]]:
    """The same command on two "nodes", as a user starts it on each."""
    shared = environment(NNODES=2, GPUS_PER_NODE=per_node, MASTER_ADDR="127.0.0.1", **settings)
    command = ["bash", str(LAUNCH / script), *argv]
    outputs = [home.folder / f"{script}-{node}.txt" for node in range(2)]
    with (
        started(command, outputs[0], shared | {"NODE_RANK": "0"}, home.folder) as first,
        started(command, outputs[1], shared | {"NODE_RANK": "1"}, home.folder) as second,
    ):
        yield [first, second]


def wait_for(moment: Callable[[], Any], runs: list[Started], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not moment():
        output = "\n".join(run.text()[-3000:] for run in runs)
        assert all(run.shell.poll() is None for run in runs) and time.monotonic() < deadline, output
        time.sleep(0.02)


def statuses(runs: list[Started], seconds: float = 200) -> list[int]:
    return [run.shell.wait(seconds) for run in runs]


def output_of(runs: list[Started]) -> str:
    return "\n".join(run.text() for run in runs)


def test_two_nodes_resume_by_themselves_after_a_kill(home: Home) -> None:
    """Both agents start their processes again, from the last checkpoint; bit for bit the unbroken run."""
    flags = ["--train-iters", 20, "--save-interval", 2]
    unbroken = ForkedRun(arguments(home, "unbroken", *flags), 4, home.folder / "unbroken.txt")
    assert unbroken.wait() == [0] * 4, unbroken.text()[-3000:]
    latest = home.folder / "killed" / LATEST
    argv = arguments(home, "killed", *flags)
    with two_nodes(home, "torchrun_c10d.sh", 2, argv, MAX_RESTARTS=1) as nodes:
        wait_for(latest.is_file, nodes)
        killed = [node.training_processes() for node in nodes]
        assert [len(processes) for processes in killed] == [2, 2]
        killed[1][0].kill()
        assert statuses(nodes) == [0, 0], output_of(nodes)
    assert "resuming after step" in output_of(nodes)
    assert timeless(home, "killed") == timeless(home, "unbroken")
    assert latest.read_text() == "20\n"


def test_a_stop_of_one_node_is_a_stop_of_all_and_work_remains(home: Home) -> None:
    """SIGTERM to the script of one node, as Kubernetes sends it to the pod that it drains."""
    argv = arguments(home, "drained", "--train-iters", 10000)
    with two_nodes(home, "torchrun_static.sh", 1, argv) as nodes:
        wait_for(lambda: lines(home.folder / "drained") >= 2, nodes)
        nodes[1].shell.send_signal(signal.SIGTERM)
        assert statuses(nodes) == [WORK_REMAINS] * 2, output_of(nodes)
    steps = len(timeless(home, "drained"))
    assert f"stopped by SIGUSR1 after step {steps} of 10000; saved in" in output_of(nodes)
    assert (home.folder / "drained" / LATEST).read_text() == f"{steps}\n"


@contextmanager
def job(home: Home, argv: list[str], **settings: Any) -> Iterator[Started]:
    """What Slurm does with a batch job of two nodes: it runs a copy of the file elsewhere, with these variables.

    The job's tasks are below `srun`, which is a child of the batch shell.
    """
    spool = home.folder / "spool"
    spool.mkdir(exist_ok=True)
    copy = shutil.copy(LAUNCH / "slurm.sbatch", spool / "slurm_script")
    slurm = {
        "SLURM_SUBMIT_DIR": ROOT,
        "SLURM_JOB_ID": 4000 + os.getpid() % 20000,
        "SLURM_NNODES": 2,
        "SLURM_JOB_NODELIST": "127.0.0.1,localhost",
        "SLURM_GPUS_ON_NODE": 1,
        "SLURM_CPUS_PER_TASK": 6,
        "SLURM_STAND_IN_LOG": home.folder / "slurm.txt",
        "PATH": f"{SLURM_COMMANDS}:{os.environ['PATH']}",
    }
    with started(["bash", str(copy), *argv], home.folder / "job.txt", environment(**slurm, **settings), spool) as batch:
        yield batch


def asked(home: Home) -> list[str]:
    """What Slurm's commands were asked so far."""
    path = home.folder / "slurm.txt"
    return path.read_text().splitlines() if path.is_file() else []


def test_a_slurm_job_queues_again_until_all_is_done(home: Home) -> None:
    """SIGUSR1 to every process of the step and to nobody else, as Slurm sends it without B:."""
    argv = arguments(home, "queued", "--train-iters", 40)
    with job(home, argv) as batch:
        wait_for(lambda: lines(home.folder / "queued") >= 2, [batch])
        (srun,) = psutil.Process(batch.shell.pid).children()
        step = srun.children(recursive=True)
        assert len(step) >= 2 * 3  # on each node the script, torchrun and a training process
        for process in step:
            process.send_signal(signal.SIGUSR1)
        assert batch.shell.wait(200) == 0, batch.text()
    steps = len(timeless(home, "queued"))
    assert f"stopped by SIGUSR1 after step {steps} of 40; saved in" in batch.text() and 2 <= steps < 40
    assert (home.folder / "queued" / LATEST).read_text() == f"{steps}\n"
    requeue = [line for line in asked(home) if line.startswith("scontrol requeue ")]
    assert len(requeue) == 1
    with job(home, argv, SLURM_RESTART_COUNT=1) as batch:
        assert batch.shell.wait(200) == 0, batch.text()
    assert f"resuming after step {steps} of 40" in batch.text()
    assert (home.folder / "queued" / LATEST).read_text() == "40\n"
    assert [line for line in asked(home) if line.startswith("scontrol ")] == requeue


def test_a_slurm_job_that_fails_does_not_queue_again(home: Home) -> None:
    before = len(asked(home))
    image = {"CONTAINER_IMAGE": "nvcr.io#nvidia/pytorch:25.10-py3", "CONTAINER_MOUNTS": "/data:/data"}
    with job(home, arguments(home, "failed", "--train-itres", 5), MAX_RESTARTS=0, **image) as batch:
        assert batch.shell.wait(200) == 2, batch.text()  # which the launcher passes on
    assert "--train-itres" in batch.text() and "error: " in batch.text()
    (srun,) = asked(home)[before:]
    assert "--cpus-per-task=6 " in srun  # which a step does not inherit
    assert "--container-image nvcr.io#nvidia/pytorch:25.10-py3 " in srun and "--container-mounts /data:/data " in srun


@pytest.mark.parametrize(
    ("script", "settings", "answer"),
    [
        ("torchrun_c10d.sh", {"NNODES": 2}, "error: NNODES=2: set MASTER_ADDR to the host of node 0"),
        ("torchrun_static.sh", {"MAX_RESTARTS": 1}, "error: MAX_RESTARTS=1: a static rendezvous cannot start again"),
    ],
)
def test_wrong_settings_are_one_line(script: str, settings: dict[str, Any], answer: str) -> None:
    done = subprocess.run(["bash", LAUNCH / script], env=environment(**settings), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(answer) and done.stderr.count("\n") == 1
