"""Stops a run before its last step, by signals or by time; all ranks agree on the step."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_solopo.parallel.platform import max_over_processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of clusters before a kill: SIGTERM (Kubernetes, Slurm's preemption, torchrun), SIGUSR1 (Slurm --signal)."""

_CLOCK = 1000
"""Above every signal's number."""

_STOP = "solopo/stop"
"""Key of the rendezvous store."""

STOPPED_FILE = "SOLOPO_STOPPED_FILE"
"""Environment variable of examples/launch with the name of a file of each node: empty, or why the run stopped before
its last step. An exit status cannot carry it: torchrun treats any but 0 as a failure and restarts the processes."""


def report_to_launcher(why: str) -> None:
    """Writes `STOPPED_FILE` on the first process of each node; an empty text means that the run has not stopped."""
    path = os.environ.get(STOPPED_FILE)
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(why, encoding="utf-8")


@contextlib.contextmanager
def note_sudden_death(save: str, timeout_minutes: float) -> Iterator[None]:
    """Keeps a note in the process's error file inside the block, for a death that no Python code can report.

    torchrun prints the error file of a failed process (torch/distributed/elastic/multiprocessing/errors,
    `ProcessFailure`). NCCL's watchdog aborts a process from a separate thread when a collective fails or times out, and
    the kernel kills one when memory runs out. Where Python code raises an error instead, the note is removed.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        yield
        return
    text = (
        f"rank {os.environ.get('RANK', '0')} was killed by a signal: SIGABRT (-6) from NCCL's watchdog, when another "
        "process is gone or did not come to a collective within --distributed-timeout-minutes "
        f"{timeout_minutes:g} (NCCL's message, above, starts with [rank); SIGKILL (-9) where memory ran out. "
        f"The same command with --auto-resume resumes from the last checkpoint in {save}"
    )
    with contextlib.suppress(OSError):  # a note that cannot be written must not end the run
        Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)


class StopRequests:
    """Records requests to stop the run; the training loop reads them after each step.

    Args:
        on_signal: --exit-signal-handler; `SIGNALS` no longer end the process.
        after_minutes: --exit-duration-in-mins, counted from now, or None.
    """

    def __init__(self, on_signal: bool, after_minutes: float | None) -> None:
        self._active = on_signal or after_minutes is not None
        self._deadline = None if after_minutes is None else time.monotonic() + after_minutes * 60
        self._received, self._received_at = 0, math.inf
        self._before = {number: signal.signal(number, self._record) for number in SIGNALS} if on_signal else {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received, self._received_at = number, min(self._received_at, time.monotonic())

    def agreed(self, device: torch.device) -> str | None:
        """Returns why all ranks stop after this step, or None; collective.

        A signal reaches processes at different steps, or only part of them, so they exchange their requests.
        """
        if not self._active:
            return None
        code = torch.tensor(self.on_this_rank(), device=device)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return self.reason(int(code.item()))

    @staticmethod
    def reason(code: int) -> str | None:
        """Returns the reason for the largest `on_this_rank` of all ranks, or None for 0."""
        if not code:
            return None
        return "--exit-duration-in-mins" if code == _CLOCK else signal.Signals(code).name

    def requested(self) -> bool:
        """Whether any rank should stop, without waiting for the others; for work that they do independently.

        Once true it stays true, and `agreed` returns the reason.
        """
        if not self._active:
            return False
        store = dist.distributed_c10d._get_default_store()
        if self.on_this_rank():
            store.set(_STOP, "stop")
        return store.check([_STOP])

    def on_this_rank(self) -> int:
        """Returns this process's request: a signal's number, `_CLOCK`, or 0; `train_step` exchanges it."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._received or (_CLOCK if late else 0)

    def seconds_since(self, device: torch.device) -> float | None:
        """Returns the seconds since the first signal to any rank, None without one; collective."""
        longest = max_over_processes(time.monotonic() - self._received_at, device)
        return longest if math.isfinite(longest) else None

    def close(self) -> None:
        """Restores the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
