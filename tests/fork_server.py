"""The one server that all processes of the tests are forked from; it has imported everything once (`preloaded`)."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

_context = multiprocessing.get_context("forkserver")
_started = False


def start() -> None:
    """Starts the server. Commands in this process then fork theirs from it too, as rehearsals do."""
    global _started
    if not _started:
        # A command under test may have started a server, which has fewer modules; there is one for each process.
        forkserver._forkserver._stop()
        _context.set_forkserver_preload(["preloaded"])
        # The server of Python 3.12.1 does not inherit sys.path (python/cpython 117378).
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            forkserver.ensure_running()
        _started = True


def process(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that will call ``work(*arguments)``, not started yet."""
    start()
    return _context.Process(target=_begin, args=(work, arguments))


def _begin(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    assert "preloaded" in sys.modules, "the server passes over what it cannot import"
    work(*arguments)
