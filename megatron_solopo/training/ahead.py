"""Makes the next step's work and sends it to the device while the current step runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch


class Ahead[Work]:
    """Makes work numbered 0, 1, ... in order in one thread that is at most one number ahead.

    The work of a number does not depend on the thread. An error that `make` raises for a number is raised by `take` of
    that number, so it stops a run at the step that it belongs to.

    Args:
        make: makes the work of a number; called in the thread, with ``device`` as current GPU where it is one.
        end: the number after the last one.
    """

    def __init__(self, make: Callable[[int], Work], end: int, device: torch.device) -> None:
        self._make, self._end = make, end
        on_gpu = device.type == "cuda"  # every thread starts with GPU 0 as its current device
        self._thread = ThreadPoolExecutor(
            1, "packs", **({"initializer": torch.cuda.set_device, "initargs": (device,)} if on_gpu else {})
        )
        self._next: tuple[int, Future[Work]] | None = None

    def take(self, number: int) -> Work:
        """Returns the work of a number and starts to make that of the following one."""
        ready = self._next
        future = ready[1] if ready is not None and ready[0] == number else self._thread.submit(self._make, number)
        self._next = None
        work = future.result()
        if number + 1 < self._end:
            self._next = number + 1, self._thread.submit(self._make, number + 1)
        return work

    def settle(self) -> None:
        """Waits until the thread is idle: a process that forks must have no other thread running."""
        if self._next is not None:
            wait([self._next[1]])

    def close(self) -> None:
        """Ends the thread after its current work, which is discarded."""
        self._next = None  # its future may be cancelled
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Ahead[Work]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
