"""Progress of long work: tqdm's bar on a terminal, elsewhere (nohup, Slurm, CI) a plain line at least every 30 s."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from megatron_solopo.terminal import write_line

INTERVAL = 28.0
"""Seconds between lines. The timer looks once a second and may be late; 30 is what is promised."""

clock = time.monotonic


class ProgressBar(tqdm):
    """tqdm's interface, with lines on stderr where that is no terminal, and nothing on ranks other than 0.

    A line comes from a timer, so that a step of minutes is reported too. The time between lines runs on from one bar
    to the next: a command of many short parts reports, and work that ends sooner prints nothing.

    Args:
        iterable, desc, total, initial, unit: as tqdm has them.
        options: tqdm's others, for the terminal.
    """

    def __init__(
        self,
        iterable: Any = None,
        desc: str | None = None,
        total: float | None = None,
        initial: float = 0,
        unit: str = "it",
        **options: Any,
    ) -> None:
        first = os.environ.get("RANK", "0") == "0"
        terminal = _is_terminal()
        self._lines = first and not terminal and sys.stderr is not None
        super().__init__(iterable, desc, total, initial=initial, unit=unit, disable=not (first and terminal), **options)
        self._name, self._unit, self._first = desc or "progress", unit.strip(), initial
        self._begin, self.reported = clock(), False
        if self._lines:
            _timer.add(self)

    def __iter__(self) -> Iterator[Any]:
        if not self._lines:
            yield from super().__iter__()
            return
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, n: float | None = 1) -> bool | None:
        if self._lines:
            self.n += n
        return super().update(n)

    def close(self) -> None:
        if getattr(self, "_lines", False):  # not where __init__ failed
            self._lines = False
            _timer.remove(self)
        super().close()

    def line(self) -> str:
        """Name, counts, share, rate, and the time that has gone and that is left at the mean rate so far."""
        seconds = clock() - self._begin
        rate = (self.n - self._first) / seconds if seconds > 0 else 0.0
        parts = []
        if self.total:
            parts.append(f"{_number(self.n)}/{_number(self.total)} {self._unit} ({self.n / self.total:.1%})")
        elif self.n:
            parts.append(f"{_number(self.n)} {self._unit}")
        if rate:
            parts.append(f"{rate:,.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s/{self._unit}")
        parts.append(f"elapsed {self.format_interval(seconds)}")
        if rate and self.total:
            parts.append(f"remaining {self.format_interval(max(0, self.total - self.n) / rate)}")
        return f"{self._name}: {', '.join(parts)}"


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
    """Work that cannot be counted: only where stderr is no terminal, lines that say how long it has been at it."""
    if _is_terminal():
        yield
        return
    with ProgressBar(desc=what):
        yield


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # None where a shell closed it


def _number(value: float) -> str:
    return f"{int(value):,}"


class _Timer:
    """Prints the line of the innermost bar of this process when `INTERVAL` has gone since the last one.

    The lock is held while a line is printed and while the process forks, so that a child never inherits a stream that
    is being written; a child has neither the thread nor the bars.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._bars: list[ProgressBar] = []
        self._last = self._idle = 0.0
        self._thread: threading.Thread | None = None
        os.register_at_fork(before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._forget)

    def _forget(self) -> None:
        self._bars, self._thread = [], None
        self._lock.release()

    def add(self, bar: ProgressBar) -> None:
        with self._lock:
            if not self._bars and clock() - self._idle > INTERVAL:
                self._last = clock()  # other work, long after the last
            self._bars.append(bar)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
                self._thread.start()

    def remove(self, bar: ProgressBar) -> None:
        with self._lock:
            others = [other for other in self._bars if other is not bar]  # tqdm's == compares places on the screen
            known, self._bars, self._idle = len(others) < len(self._bars), others, clock()
            if known and bar.reported:  # not in a forked process
                self._print(bar)

    def tick(self) -> None:
        """Prints a line if one is due."""
        with self._lock:
            if self._bars and clock() - self._last >= INTERVAL:
                self._bars[-1].reported = True
                self._print(self._bars[-1])

    def _print(self, bar: ProgressBar) -> None:
        self._last = clock()
        with contextlib.suppress(OSError, ValueError):  # a log that cannot be written must not cost the work
            write_line(bar.line())

    def _run(self) -> None:
        while True:
            time.sleep(1)
            self.tick()
            with self._lock:
                if not self._bars:
                    self._thread = None
                    return


_timer = _Timer()
