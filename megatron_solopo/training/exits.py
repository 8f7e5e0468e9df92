"""When a run stops before its last step: signals and the clock, agreed on by all processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What clusters send before they kill: SIGTERM (Kubernetes, Slurm's preemption, torchrun), SIGUSR1 (Slurm --signal)."""

_CLOCK = 1000
"""Above every signal's number."""

_STOP = "solopo/stop"
"""Key of the rendezvous store."""

STOPPED_FILE = "SOLOPO_STOPPED_FILE"
"""Environment variable of examples/launch with the name of a file of each node: empty, or why the run stopped before
its last step. An exit status cannot tell: torchrun takes any but 0 for a failure, and starts the processes again."""


def tell_launcher(why: str) -> None:
    """Writes `STOPPED_FILE`, by the first process of each node; an empty text: the run has not stopped."""
    path = os.environ.get(STOPPED_FILE)
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(why, encoding="utf-8")


@contextlib.contextmanager
def note_sudden_death(save: str, timeout_minutes: float) -> Iterator[None]:
    """Leaves word, within it, for a death that no Python code sees: torchrun prints what stands in a failed process's
    error file (torch/distributed/elastic/multiprocessing/errors, `ProcessFailure`).

    NCCL's watchdog aborts a process from a thread of its own when a collective fails or comes too late, and the kernel
    kills one when memory runs out. Errors that Python sees speak for themselves, and take the word back.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        yield
        return
    text = (
        f"rank {os.environ.get('RANK', '0')} was ended by a signal: SIGABRT (-6) from NCCL's watchdog, when another "
        "process is gone or did not come to a collective within --distributed-timeout-minutes "
        f"{timeout_minutes:g} (its own message, above, begins with [rank); SIGKILL (-9) where memory ran out. "
        f"The same command with --auto-resume resumes from the last checkpoint in {save}"
    )
    with contextlib.suppress(OSError):  # a note that cannot be left must not end the run
        Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)


class StopRequests:
    """Remembers that a run should stop; the loop asks after each step.

    Args:
        on_signal: --exit-signal-handler: `SIGNALS` no longer end the process.
        after_minutes: --exit-duration-in-mins, counted from here, or None.
    """

    def __init__(self, on_signal: bool, after_minutes: float | None) -> None:
        self._active = on_signal or after_minutes is not None
        self._deadline = None if after_minutes is None else time.monotonic() + after_minutes * 60
        self._received = 0
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS} if on_signal else {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self, device: torch.device) -> str | None:
        """Why all processes stop after this step, or None; collective.

        A signal reaches processes at different steps, and some not at all: what one knows, all know.
        """
        if not self._active:
            return None
        code = torch.tensor(self.own(), device=device)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return self.reason(int(code.item()))

    @staticmethod
    def reason(code: int) -> str | None:
        """What the largest `own` of all processes says."""
        if not code:
            return None
        return "--exit-duration-in-mins" if code == _CLOCK else signal.Signals(code).name

    def heard(self) -> bool:
        """Whether any process should stop, without waiting for the others; for work that they do side by side.

        Once true it stays true, and `agreed` tells why.
        """
        if not self._active:
            return False
        store = dist.distributed_c10d._get_default_store()
        if self.own():
            store.set(_STOP, "stop")
        return store.check([_STOP])

    def own(self) -> int:
        """What this process knows: a signal's number, `_CLOCK`, or 0; for a step's own exchange (`train_step`)."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._received or (_CLOCK if late else 0)

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
