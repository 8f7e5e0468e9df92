"""SIGKILL at a chosen change of the files in a folder: one helper for all that must survive it."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

import fork_server

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile"}
"""Audit events of Python that precede a change of files."""


def kill_at(moment: int, folder: Path) -> list[int]:
    """Sends SIGKILL to this process before its change of that number, from 1, of files in a folder (0: never).

    What goes into a jobs file and its streams counts twice: before it is written, and when half of it is.

    Returns:
        The count so far.
    """
    from megatron_solopo.data.files.jobs import Jobs

    count = [0]

    def changed() -> None:
        count[0] += 1
        if count[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if os.fsdecode(arguments[0]).startswith(str(folder)):
            changed()

    append = Jobs._append

    def append_in_halves(jobs: Jobs, file: BinaryIO, data: bytes) -> None:
        changed()
        append(jobs, file, data[: len(data) // 2])
        changed()
        append(jobs, file, data[len(data) // 2 :])

    sys.addaudithook(see)
    Jobs._append = append_in_halves
    return count


def command_killed_at(moment: int, folder: Path, module: str, argv: list[str], report: Path) -> int:
    """Runs a command in a separate process that is killed at a change in the folder (see `kill_at`).

    Args:
        module: of the command's ``main``.
        report: a file for what it prints, and for the count of changes where it ends by itself.

    Returns:
        Its exit status; -9 where it was killed.
    """
    child = fork_server.process(_work, moment, folder, module, argv, report)
    child.start()
    child.join(200)
    status = child.exitcode
    child.kill()
    return status


def _work(moment: int, folder: Path, module: str, argv: list[str], report: Path) -> None:
    os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    os.environ["OMP_NUM_THREADS"] = "1"
    main = importlib.import_module(module).main
    for name, value in SMALL.get(module, {}).items():
        owner, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(owner), attribute, value)
    count = kill_at(moment, folder)
    status = main(argv)
    print("changes:", count[0], flush=True)
    os._exit(status)


SMALL: dict[str, dict[str, int]] = {
    "megatron_solopo.data.building.prepare_data": {"megatron_solopo.data.building.second_pass._BATCH": 2},
    "megatron_solopo.data.tokenized.tokenize_data": {"megatron_solopo.data.files.records.PART_BYTES": 500},
}
"""Smaller jobs than the commands have, so that a small input has several."""
