"""`solopo launch`: torchrun, except that a command's one-line error is printed once.

    solopo launch --nproc_per_node 8 pretrain_solopo.py --config run.yaml

accepts torchrun's arguments. After a process has reported a mistake that a user must correct, the launcher prints no
traceback, does not restart the processes (--max-restarts), and exits with the command's status, 2. After Ctrl-C or
SIGTERM it prints no traceback either and exits with 128 + the signal's number, as a shell does.

With a c10d rendezvous it notices a node that is gone without a word (power, network): torchrun would leave the other
nodes' processes waiting for it until --distributed-timeout-minutes.

Under torchrun itself the line is printed once too, followed by torchrun's report.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_solopo.errors import UserError
from megatron_solopo.terminal import write_line

REPORTED = 2
"""Exit status of a process that has reported its mistake; see `cli.run`."""

PATIENCE = 2.0
"""Seconds for which a node is missing before it counts as lost."""

_FINAL, _PASSING = "solopo-reported-", "solopo-passing-"
"""Prefixes of marker files in torchrun's log folder of this start of a node's processes."""


def first_to_report(message: str, passing: bool = False) -> bool:
    """Whether this process is the first of those that torchrun started on this machine to report a message.

    Args:
        passing: a restart may succeed, as after the loss of a process.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/LOCAL_RANK/error.json
    if not error_file:
        return True
    name = (_PASSING if passing else _FINAL) + hashlib.sha256(message.encode()).hexdigest()[:16]
    try:
        (Path(error_file).parents[1] / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # twice is better than never
    return True


def _reported(error_files: Iterable[str]) -> bool:
    """Whether a process with one of these error files has reported a mistake that a user must correct."""
    return any(any(folder.glob(f"{_FINAL}*")) for folder in {Path(file).parents[1] for file in error_files})


def lost_nodes(rendezvous: Any, nodes: int) -> int:
    """Returns how many of the nodes that met are gone by torch's heartbeats (every 5 s; 3 may be missing), which only
    a rendezvous that can restart has (torch 2.11, elastic/rendezvous/dynamic_rendezvous.py, `_sanitize`).

    A node that has ended by itself closes the rendezvous, and one that restarts waits to join again.
    """
    holder = getattr(rendezvous, "_state_holder", None)
    if holder is None or holder.state.closed or not holder.state.complete or holder.state.wait_list:
        return 0
    return max(0, nodes - len(holder.state.participants))


def main(argv: list[str] | None = None) -> int:
    """``solopo launch``; the arguments are torchrun's.

    Raises:
        UserError: there is no such script; otherwise each process and the launcher would report it.
    """
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    reported = False

    class Agent(LocalElasticAgent):
        """Does not restart after a reported mistake (torch 2.11, elastic/agent/server/api.py, `_invoke_run`), and ends
        its processes where they wait for a lost node, so that torch restarts them."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self._ended: Any = None
            self._missed: float | None = None
            # torch logs here which processes have ended, and that it terminates the others.
            logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
            logger.addFilter(lambda record: not self._has_reported())

        def _has_reported(self) -> bool:
            return self._pcontext is not None and _reported(self._pcontext.error_files.values())

        def _monitor_workers(self, worker_group: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
            nonlocal reported
            self._end_those_that_wait(worker_group)
            result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]  # wrapped without types
            reported = result.is_failed() and self._has_reported()
            if reported:
                self._remaining_restarts = 0
            return result

        def _end_those_that_wait(self, worker_group: Any) -> None:
            lost = lost_nodes(worker_group.spec.rdzv_handler, worker_group.group_world_size)
            self._missed = (self._missed or time.monotonic()) if lost else None
            if self._missed is None or self._pcontext is None or self._pcontext is self._ended:
                return
            if time.monotonic() - self._missed < PATIENCE:  # a node that restarts leaves and joins again
                return
            self._ended = self._pcontext
            write_line(
                f"warning: {lost} of {worker_group.group_world_size} nodes gave no sign of life for some seconds; the "
                "processes of this node would wait for theirs, and are ended"
            )
            for process in self._pcontext.pids().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    arguments = run.parse_args(argv)
    if not arguments.module and not arguments.no_python and not Path(arguments.training_script).exists():
        raise UserError(
            "file-missing",
            f"{arguments.training_script}: no such file; put the path of a Python script behind the options",
        )
    launcher: Any = api  # whose agent is replaced
    before, launcher.LocalElasticAgent = launcher.LocalElasticAgent, Agent
    try:
        run.main(argv)
    except ChildFailedError:
        if not reported:
            raise
        return REPORTED
    except SignalException as stopped:  # torch has terminated the processes and logged that
        return 128 + stopped.sigval
    finally:
        launcher.LocalElasticAgent = before
    return 0


if __name__ == "__main__":
    from megatron_solopo.cli import run

    sys.exit(run(main))
