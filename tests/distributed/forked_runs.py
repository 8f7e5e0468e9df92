"""Processes of a run that start in a moment: forked from a server that has imported everything, and killable."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import fork_server


def train(argv: list[str]) -> int:
    """What pretrain_solopo.py does."""
    from megatron_solopo.cli import run
    from megatron_solopo.training.run import main

    return run(main, argv)


def _process(
    work: Callable[[list[str]], int], argv: list[str], rank: int, processes: int, port: int, stderr: str
) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.exit(work(argv))


class ForkedRun:
    """All processes of one start of a run, as torchrun starts them.

    Args:
        stderr: the file of their standard error.
        work: a function of a module: the arguments -> the exit status.
    """

    def __init__(self, argv: list[str], processes: int, stderr: Path, work: Callable[[list[str]], int] = train) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        stderr.unlink(missing_ok=True)
        self.stderr = stderr
        self.processes: list[BaseProcess] = [
            fork_server.process(_process, work, argv, rank, processes, port, str(stderr)) for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def send(self, number: signal.Signals, ranks: slice = slice(None)) -> None:
        for process in self.processes[ranks]:
            os.kill(process.pid, number)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 240) -> list[int | None]:
        """Exit statuses; None: still running after ``seconds``, or a minute after another failed, and killed now.

        A process may wait for a failed one without a time limit, as torchrun ends all that remain.
        """
        end = time.monotonic() + seconds
        while running := [process for process in self.processes if process.is_alive()]:
            if any(process.exitcode for process in self.processes):
                end = min(end, time.monotonic() + 60)
            if not wait([process.sentinel for process in running], max(0, end - time.monotonic())):
                break
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def text(self) -> str:
        """Standard error of the run."""
        return self.stderr.read_text() if self.stderr.exists() else ""
