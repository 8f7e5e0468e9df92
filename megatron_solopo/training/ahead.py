"""What the next step computes is made and sent to the device while this one runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch


class Ahead[Work]:
    """Work numbered 0, 1, ..., made in order by one thread that is never more than one number ahead.

    Same numbers, same work: the thread decides nothing. What `make` raises for a number is raised by `take` of that
    number, so an error stops a run at the step that it belongs to.

    Args:
        make: makes the work of a number; in the thread, with ``device`` as current GPU where it is one.
        end: the first number that is not to be made.
    """

    def __init__(self, make: Callable[[int], Work], end: int, device: torch.device) -> None:
        self._make, self._end = make, end
        on_gpu = device.type == "cuda"  # every thread starts with GPU 0 as its own
        self._thread = ThreadPoolExecutor(
            1, "packs", **({"initializer": torch.cuda.set_device, "initargs": (device,)} if on_gpu else {})
        )
        self._next: tuple[int, Future[Work]] | None = None

    def take(self, number: int) -> Work:
        """The work of a number; that of the following one is begun."""
        ready = self._next
        made = ready[1] if ready is not None and ready[0] == number else self._thread.submit(self._make, number)
        self._next = None
        work = made.result()
        if number + 1 < self._end:
            self._next = number + 1, self._thread.submit(self._make, number + 1)
        return work

    def settle(self) -> None:
        """Waits until the thread is idle: a process that forks must not have another thread at work."""
        if self._next is not None:
            wait([self._next[1]])

    def close(self) -> None:
        """Ends the thread; what it makes at the moment is finished and dropped."""
        self._next = None  # nobody would ever finish what is cancelled
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Ahead[Work]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
