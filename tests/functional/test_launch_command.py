"""`solopo launch`, and torchrun: a mistake is reported once, for any number of processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from refusals import check_refusal
from training_home import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()

SCRIPT = """
import os, sys
from pathlib import Path
from megatron_solopo.cli import run
from megatron_solopo.errors import LostProcess, UserError

rank = os.environ["RANK"]
(Path(__file__).parent / f"started-{os.environ['TORCHELASTIC_RESTART_COUNT']}-{rank}").touch()

def main(argv):
"""


PLACE = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}


def command_line(folder: Path, body: str, launcher: str, *options: str) -> list[str]:
    """Starts two processes with that as their command, in a new folder."""
    script = folder / "command.py"
    script.write_text(SCRIPT + f"    {body}\n\nsys.exit(run(main))\n")
    return [sys.executable, "-m", launcher, "--standalone", "--nproc_per_node", "2", *options, str(script)]


def launched(folder: Path, body: str, launcher: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = command_line(folder, body, launcher, *options)
    return subprocess.run(command, env=PLACE, cwd=folder, capture_output=True, text=True, timeout=300)


def starts(folder: Path) -> set[str]:
    return {path.name.split("-")[1] for path in folder.glob("started-*")}


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_mistake_of_all_processes_is_one_line_and_is_not_retried(tmp_path: Path) -> None:
    done = launched(
        tmp_path, "raise UserError('option-value', '--lr: no')", "megatron_solopo.launch", "--max-restarts", "2"
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr in ("error: --lr: no [option-value]\n", f"error: rank 1 on {HOST}: --lr: no [option-value]\n")
    assert starts(tmp_path) == {"0"}


def test_under_torchrun_it_is_one_line_before_the_lines_of_torchrun(tmp_path: Path) -> None:
    done = launched(tmp_path, "raise UserError('option-value', '--lr: no')", "torch.distributed.run")
    assert done.returncode == 1 and len(errors(done)) == 1 and "ChildFailedError" in done.stderr


def test_each_process_reports_its_mistake(tmp_path: Path) -> None:
    body = "import time; time.sleep(3 * (rank == '0')); raise UserError('option-value', f'{rank} is wrong')"
    done = launched(tmp_path, body, "megatron_solopo.launch")
    assert done.returncode == 2 and errors(done)[0] == f"error: rank 1 on {HOST}: 1 is wrong [option-value]"


def test_the_loss_of_a_process_that_reported_a_mistake_is_not_retried(tmp_path: Path) -> None:
    reported = "next(Path(os.environ['TORCHELASTIC_ERROR_FILE']).parents[1].glob('solopo-reported-*'), None)"
    lost = f"while not {reported}: pass\n    raise LostProcess('process-lost', 'another process is gone')"
    body = f"if rank == '1': raise UserError('option-value', 'no')\n    {lost}"
    done = launched(tmp_path, body, "megatron_solopo.launch", "--max-restarts", "1")
    assert (
        done.returncode == 2
        and f"error: rank 1 on {HOST}: no [option-value]" in errors(done)
        and starts(tmp_path) == {"0"}
    )


@pytest.mark.parametrize("body", ["raise LostProcess('process-lost', 'another process is gone')", "sys.exit(3)"])
def test_a_temporary_failure_is_restarted(tmp_path: Path, body: str) -> None:
    done = launched(tmp_path, body, "megatron_solopo.launch", "--max-restarts", "1")
    assert done.returncode == 1 and "ChildFailedError" in done.stderr and starts(tmp_path) == {"0", "1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_launch_is_no_traceback(tmp_path: Path, number: int) -> None:
    body = "(Path(__file__).parent / f'ready-{rank}').touch(); __import__('time').sleep(600)"
    command = command_line(tmp_path, body, "megatron_solopo.launch")
    with subprocess.Popen(command, env=PLACE, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as launcher:
        while len(list(tmp_path.glob("ready-*"))) < 2 and launcher.poll() is None:
            time.sleep(0.1)
        launcher.send_signal(number)
        stderr = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 128 + number and "Traceback" not in stderr


def test_a_script_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    command = [*command_line(tmp_path, "return 0", "megatron_solopo.launch")[:-1], "pretrain.py", "--lr", "1"]
    done = subprocess.run(command, env=PLACE, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    check_refusal(done.stderr, "file-missing", "pretrain.py: ")


def test_a_launch_that_succeeds(tmp_path: Path) -> None:
    done = launched(tmp_path, "return 0", "megatron_solopo.launch")
    assert done.returncode == 0 and not done.stderr


def test_a_conversion_on_two_processes_reports_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_solopo.cli", "launch", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tools/convert_checkpoint.py"), "verify", "--hf-path", "nowhere"]
    done = subprocess.run(command, env=PLACE, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--hf-path nowhere: " in done.stderr and "[folder-missing]" in done.stderr


def test_a_node_that_falls_silent_is_left_behind(tmp_path: Path) -> None:
    """Its connections stay open, as after the loss of its network; torch alone would let the other node wait."""
    script = tmp_path / "command.py"
    waiting = "import time\n    while os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': time.sleep(0.1)\n    return 0"
    script.write_text(SCRIPT + f"    {waiting}\n\nsys.exit(run(main))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    conf = "keep_alive_interval=1,last_call_timeout=1,is_host={}"
    agents = []
    for node in range(2):
        command = [
            sys.executable,
            "-m",
            "megatron_solopo.launch",
            "--nnodes",
            "1:2",
            "--nproc-per-node",
            "1",
            "--max-restarts",
            "1",
        ]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", conf.format(1 - node)]
        agents.append(
            subprocess.Popen([*command, str(script)], env=PLACE, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        )
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("started-0-*"))) < 2:
            assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents)
            time.sleep(0.05)
        agents[1].send_signal(signal.SIGSTOP)
        stderr = agents[0].communicate(timeout=120)[1]
    finally:
        for agent in agents:
            for process in [*psutil.Process(agent.pid).children(), agent] if agent.poll() is None else []:
                process.kill()
            agent.wait()
    assert agents[0].returncode == 0, stderr
    assert "warning: 1 of 2 nodes gave no sign of life" in stderr
    assert {path.name for path in tmp_path.glob("started-1-*")} == {"started-1-0"}
