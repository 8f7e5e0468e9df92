"""Work in several processes, its results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from megatron_solopo.errors import UserError


def map_in_order(
    work: Callable[..., Any],
    items: Iterable[tuple[Any, ...]],
    workers: int,
    start: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[Any]:
    """Yields ``work(*item)`` of each item, from processes that have called ``start(*arguments)`` once.

    Few results wait at a time, so that memory does not grow with the items. A worker ends with its parent, however that
    ends, and leaves Ctrl-C to it.

    Raises:
        UserError: a worker was killed, or what ``work`` raised.
    """
    # Forking this process, whose tokenizer has started threads, could hang; a fork server has none, and imports the
    # module once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([start.__module__])
    pool = ProcessPoolExecutor(workers, context, _begin, (start, arguments))
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, *item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: a worker was killed (out of memory?); what is done is kept: repeat the command, "
            "with fewer workers if need be"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and waits for what is begun
    start(*arguments)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
