"""A function mapped over items in several processes, with the results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import cast

from megatron_solopo.errors import UserError

type Work[T] = Callable[..., T]


def map_in_order[T](
    make: Callable[..., Work[T]],
    arguments: tuple[object, ...],
    items: Sequence[tuple[object, ...]],
    workers: int,
) -> Iterator[T]:
    """Yields ``work(*item)`` of each item; every process builds ``work = make(*arguments)`` once.

    Few results are pending at a time, so that memory does not grow with the items. A worker exits when its parent does,
    and ignores Ctrl-C, which its parent handles. With one worker the work is done in this process.

    Args:
        arguments: each is pickled for every worker. A tokenizer is unpickled three times as fast as it is read.

    Raises:
        UserError: a worker was killed, or ``work`` raised it.
    """
    workers = min(workers, len(items))
    if workers < 2:
        if items:
            work = make(*arguments)
            yield from (work(*item) for item in items)
        return
    # Forking this process, whose tokenizer has started threads, could hang; a fork server has none, and imports what
    # the workers need once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list({make.__module__, *(type(argument).__module__ for argument in arguments)}))
    pool = ProcessPoolExecutor(workers, context, _begin, (make, arguments))
    waiting: deque[Future[T]] = deque()
    do = cast(Callable[..., T], _do)  # calls what `make` made in that process
    try:
        for item in items:
            waiting.append(pool.submit(do, *item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "worker-killed",
            f"--workers {workers}: a worker was killed (out of memory?); finished work is kept: repeat the command, "
            "if necessary with fewer workers",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_work: Work[object]
"""The function of this worker process."""


def _begin(make: Callable[..., Work[object]], arguments: tuple[object, ...]) -> None:
    global _work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and waits for work in progress
    _work = make(*arguments)


def _do(*item: object) -> object:
    return _work(*item)


def _end_with_parent() -> None:
    """Exits when the parent process is gone; a worker would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
