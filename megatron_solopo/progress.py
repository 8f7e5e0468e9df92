"""Progress of long work: tqdm's bar on a terminal; elsewhere (nohup, Slurm, CI) a plain line at least every 30 s."""

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
"""Seconds between lines. The timer ticks once a second and may be late; the documentation promises 30."""

clock = time.monotonic


class ProgressBar(tqdm):
    """tqdm's interface, with lines instead of a bar if stderr is not a terminal; ranks other than 0 print nothing.

    A timer prints the lines, so that a step of minutes is reported too. The interval continues from one bar to the
    next: a command of many short parts reports its progress, and work that ends within one interval prints nothing.

    Args:
        iterable, desc, total, initial, unit: see tqdm.
        options: tqdm's other arguments, for the terminal.
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
        self._started, self.reported = clock(), False
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
        if getattr(self, "_lines", False):  # __init__ may have failed
            self._lines = False
            _timer.remove(self)
        super().close()

    def line(self) -> str:
        """Name, counts, fraction, rate, elapsed time, and the remaining time at the mean rate so far."""
        seconds = clock() - self._started
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
    """Lines with the elapsed time of work that cannot be counted; only if stderr is not a terminal."""
    if _is_terminal():
        yield
        return
    with ProgressBar(desc=what):
        yield


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # None if a shell closed it


def _number(value: float) -> str:
    return f"{int(value):,}"


class _Timer:
    """Prints the line of this process's innermost bar `INTERVAL` seconds after the last line.

    The lock is held while a line is printed and while the process forks, so that a child never inherits a stream
    during a write. A child has neither the thread nor the bars.
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
                self._last = clock()  # new work, long after the last
            self._bars.append(bar)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
                self._thread.start()

    def remove(self, bar: ProgressBar) -> None:
        with self._lock:
            others = [other for other in self._bars if other is not bar]  # tqdm's == compares places on the screen
            listed, self._bars, self._idle = len(others) < len(self._bars), others, clock()
            if listed and bar.reported:  # a forked process has no bars
                self._print(bar)

    def tick(self) -> None:
        """Prints a line if one is due."""
        with self._lock:
            if self._bars and clock() - self._last >= INTERVAL:
                self._bars[-1].reported = True
                self._print(self._bars[-1])

    def _print(self, bar: ProgressBar) -> None:
        self._last = clock()
        with contextlib.suppress(OSError, ValueError):  # a log that cannot be written must not stop the work
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
