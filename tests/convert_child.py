"""`solopo convert-checkpoint` in a process that is killed at a chosen moment, or has a small disk.

It is forked from a server that has imported everything: gloo does not live on in a process forked from one that used
it.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path

import fork_server
from kills import kill_at

from megatron_solopo.cli import run


def convert(argv: list[str], report: Path, moment: int | None = None, disk: int | None = None) -> int | None:
    """Exit status of a command that writes into a separate folder; None: it ran for too long.

    Args:
        argv: of the command, the folder's option last but one.
        report: a file for its output, and a line with what is left in the folder around.
        moment: before which change of files there SIGKILL comes, counted from 1; 0: none, a line reports how many there
            were.
        disk: bytes of the disk around, see `_small_disk`.
    """
    child = fork_server.process(_work, argv, report, moment, disk)
    child.start()
    child.join(200)
    status = child.exitcode
    child.kill()
    return status


def _work(argv: list[str], report: Path, moment: int | None, disk: int | None) -> None:
    os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(argv[4]).parent
    if disk is not None:
        _small_disk(folder, disk)
    seen = kill_at(moment, folder) if moment is not None else [0]
    from megatron_solopo.training.convert import main

    status = run(main, argv)
    print("changes:", seen[0], flush=True)
    print("left:", os.listdir(folder), flush=True)  # a disk of this process ends with it
    os._exit(status)


def _small_disk(folder: Path, size: int) -> None:
    """A real disk of so many bytes, seen by this process alone; where no user may mount one, a limit on the size of a
    file."""
    user, group = os.getuid(), os.getgid()
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    except (OSError, subprocess.CalledProcessError):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 8, resource.RLIM_INFINITY))
