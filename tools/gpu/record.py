"""Figures of a cell, each appended to a file as soon as it is measured: a kill loses only the current one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"


class Skipped(Exception):
    """A cell, or a part of one, cannot run on this machine; the text has the reason."""


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a line and waits until it is on the disk; several processes may append to one file."""
    line = json.dumps(record, default=str) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file, without a last line that a kill cut."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class Recorder:
    """Where a cell writes its figures.

    Attributes:
        device: ``cuda``, or ``cpu`` in the dry run.
        dry: shapes are cut to what a CPU computes in a moment; times then mean nothing.
        work: an empty folder.
        failures: the parts that failed and the figures beyond their bounds.
    """

    def __init__(self, cell: str, folder: Path, work: Path, dry: bool) -> None:
        self.cell, self.folder, self.work, self.dry = cell, folder, work, dry
        self.device = "cpu" if dry else "cuda"
        self.failures: list[str] = []

    def value(self, key: str, value: Any, unit: str = "") -> None:
        """A figure; floats are kept to six digits, and those that JSON cannot hold become texts."""
        if isinstance(value, float):
            value = float(f"{value:.6g}") if math.isfinite(value) else str(value)
        append(
            self.folder / RESULTS,
            {"cell": self.cell, "key": key, "value": value, "unit": unit, "t": round(time.time(), 3)},
        )

    def check(self, key: str, value: float, bound: float) -> None:
        """A figure that must not be above its bound."""
        self.value(key, value)
        if not value <= bound:  # nan is not
            self.failures.append(f"{key}: {value:.2e}, bound {bound:.0e}")
            print(self.failures[-1], flush=True)

    def require(self, key: str, true: bool) -> None:
        """A yes or no that must be yes."""
        self.value(key, bool(true))
        if not true:
            self.failures.append(f"{key}: no")
            print(self.failures[-1], flush=True)

    def target(
        self,
        key: str,
        value: float,
        at_least: float | None = None,
        aim: float | None = None,
        at_most: float | None = None,
        timed: bool = True,
    ) -> None:
        """A figure with a bound that this project wants to reach, and the verdict as ``KEY/verdict``; what falls short
        of it is no failure of the machine.

        Args:
            aim: what is wanted beyond the bound.
            timed: it depends on times, which mean nothing in the dry run.
        """
        self.value(key, value)
        passes = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)  # nan does not
        verdict = "not judged" if self.dry and timed else "pass" if passes else "falls short"
        bounds = [("at least", at_least), ("aim", aim), ("at most", at_most)]
        wanted = ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        self.value(f"{key}/verdict", f"{verdict} ({wanted})")

    @contextlib.contextmanager
    def part(self, key: str) -> Iterator[None]:
        """Work whose failure does not end the cell: the error becomes a figure, and the cell counts as failed."""
        try:
            yield
        except Skipped as reason:
            self.value(key, f"skipped: {reason}")
        except Exception as error:  # any failure of a machine is a result of the suite
            traceback.print_exc()
            self.value(key, f"failed: {brief(error)}")
            self.failures.append(f"{key}: {brief(error)}")

    def need_cuda(self) -> None:
        if self.device != "cuda":
            raise Skipped("needs CUDA")

    def need_package(self, name: str, requirement: str) -> None:
        """For work with a package that is not one of the project's."""
        try:
            found = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):  # hidden, or without a spec
            found = False
        if not found:
            raise Skipped(f"{name} is not installed: pip install {requirement}")

    def need_size(self) -> None:
        """For work that a CPU can do, slowly."""
        if self.dry:
            raise Skipped("not in the dry run")


def brief(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], device: str, repeats: int = 5, warm: int = 2) -> float:
    """Returns the median time of ``work`` after ``warm`` calls: CUDA events, or the clock on the CPU."""
    import torch

    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]


def host_milliseconds(work: Callable[[], Any], device: str) -> float:
    """Returns the time of one call until its work is done, by the host's clock: what building a plan costs shows
    there."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return 1000 * (time.perf_counter() - started)


def memory(out: Recorder, key: str) -> None:
    """Peak of allocated and reserved device memory since `reset_memory`."""
    if out.device == "cuda":
        import torch

        out.value(f"{key}/allocated", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        out.value(f"{key}/reserved", torch.cuda.max_memory_reserved() / 2**30, "GiB")


def reset_memory(out: Recorder) -> None:
    if out.device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
