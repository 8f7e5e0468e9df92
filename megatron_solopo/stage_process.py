"""The processes of a recipe: a stage that ends with the run, signals that reach it, and the locks of its folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import megatron_solopo
from megatron_solopo.errors import UserError
from megatron_solopo.terminal import write_line

STOPPED = {code: 128 + number for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number)}
"""Exit status of a stage that a signal stopped -> exit status of this command."""

STOPPED_FILE = "SOLOPO_STOPPED_FILE"
"""Environment variable of `training.exits`."""

_ENDS_WITH_PARENT = """\
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):
    libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, which exec keeps
if os.getppid() != int(sys.argv[1]):  # the parent has died already
    sys.exit(128 + signal.SIGTERM)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Runs a command that receives SIGTERM when its parent dies. Popen's preexec_fn can hang in a process with threads."""


def start(
    command: Sequence[str], environment: Mapping[str, str], locks: Locks, log: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a process in a session of its own, which ends with this process, however that ends, and holds a lock.

    Args:
        environment: all of its variables.
        log: takes what it prints; None: this process's streams.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _ENDS_WITH_PARENT, str(os.getpid()), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # so that this process alone forwards Ctrl-C
        pass_fds=[locks.stage],
    )


def call(command: list[str], environment: dict[str, str], processes: int, locks: Locks) -> tuple[int, bool]:
    """Runs a stage, and passes SIGTERM and Ctrl-C on to it.

    Returns:
        Its exit status (negative: the signal that killed it), and whether it saved its work and stopped early.
    """
    package = str(Path(megatron_solopo.__file__).parents[1])
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} if processes > 1 else {}
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    stopped = Path(".stages/stopped").absolute()
    stopped.write_text("")

    variables = threads | os.environ | environment | {"PYTHONPATH": paths, STOPPED_FILE: str(stopped)}
    process = start(command, variables, locks)
    handlers = {
        signal.SIGTERM: lambda number, frame: process.terminate(),
        signal.SIGINT: lambda number, frame: os.killpg(process.pid, signal.SIGINT),
    }
    # Signals that this process ignores (SIGINT behind nohup or &) are ignored in the stage too.
    handlers = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait(), bool(stopped.read_text())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Locks:
    """Locks of an output folder: one run at a time, and no stage beside one that a killed run left running.

    Raises:
        UserError: another run holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._run, self.stage = (os.open(folder / name, os.O_CREAT | os.O_RDWR) for name in ("run.lock", "stage.lock"))

    def __enter__(self) -> Locks:
        with contextlib.suppress(OSError):  # not every network file system has locks
            try:
                fcntl.flock(self._run, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    "folder-in-use",
                    f"{Path.cwd()}: another `solopo run` works there; wait for its end, or end it first",
                ) from None
            try:
                fcntl.flock(self.stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                write_line("waiting for the end of a stage that a killed run left")
                fcntl.flock(self.stage, fcntl.LOCK_EX)
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._run)
        os.close(self.stage)
