"""Where the time of a training step goes: --profile's trace of two steps, its largest kernels, and what is idle."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import steps
from gpu.machine import start_platform
from gpu.models import QWEN_1_5B, TINY
from gpu.record import Recorder
from gpu.speed import ENGINE, PORTABLE, implementation_flags, lengths_of

FIRST, LAST = 3, 5
"""--profile-step-start and -end: steps 4 and 5."""

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace that run on the GPU."""

LARGEST = 10
NAME = 90
"""Characters of a kernel's name that are kept."""


@dataclass(frozen=True)
class Kernel:
    """Launches of one name: their number, and the microseconds in which they and nothing within them run."""

    name: str
    calls: int
    microseconds: float


def portable(out: Recorder) -> None:
    """Profile of a step of portable layers."""
    profiled(out, PORTABLE)


def engine(out: Recorder) -> None:
    """Profile of a step of Transformer Engine's layers."""
    profiled(out, ENGINE)


def profiled(out: Recorder, implementation: str) -> None:
    flags, lengths, shape = implementation_flags(out, implementation), lengths_of(out), TINY if out.dry else QWEN_1_5B
    flags += ("--profile", "--profile-step-start", str(FIRST), "--profile-step-end", str(LAST), "--nvtx")
    flags += () if out.dry else ("--use-pytorch-profiler",)
    platform = start_platform(out)
    config = steps.options(out, "run", shape, lengths, 1, *steps.SOLO, *flags)
    with steps.training(out, platform, config, steps.generated(config, shape, lengths, 1)) as run:
        run.steps(LAST)
        (trace,) = run.trace
    kept = out.folder / f"profile_{implementation}.json.gz"
    shutil.copyfile(trace, kept)
    out.value("trace", kept.name)
    events = json.loads(gzip.decompress(Path(trace).read_bytes()))["traceEvents"]
    device = [event for event in events if event.get("cat") in DEVICE]
    # Without a GPU the operators of the host take the place of kernels.
    summary(out, device or [event for event in events if event.get("cat") == "cpu_op"], LAST - FIRST)


def summary(out: Recorder, events: Sequence[dict[str, Any]], count: int) -> None:
    """Figures of ``count`` steps."""
    kernels = by_self_time(events)
    total = sum(kernel.microseconds for kernel in kernels)
    for number, kernel in enumerate(kernels[:LARGEST], 1):
        name = kernel.name.replace("|", "/")[:NAME]
        text = f"ms a step, {kernel.microseconds / total:.1%}, {kernel.calls // count} calls: {name}"
        out.value(f"kernels/{number:02}", kernel.microseconds / 1000 / count, text)
    out.value("launches", sum(kernel.calls for kernel in kernels) / count, "a step")
    out.value("in_kernels", total / 1000 / count, "ms a step")
    out.value("idle", idle(events), "of the time from the first to the last")


def by_self_time(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """Returns the kernels of complete events, the largest first. What runs within another event of its stream or thread
    is not counted as the outer one's."""
    streams: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        streams[event.get("pid"), event.get("tid")].append(event)
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for stream in streams.values():
        outer: list[dict[str, Any]] = []
        for event in sorted(stream, key=lambda event: (event["ts"], -event["dur"])):
            while outer and outer[-1]["ts"] + outer[-1]["dur"] <= event["ts"]:
                outer.pop()
            if outer:
                times[outer[-1]["name"]] -= event["dur"]
            calls[event["name"]] += 1
            times[event["name"]] += event["dur"]
            outer.append(event)
    return sorted((Kernel(name, calls[name], times[name]) for name in calls), key=lambda kernel: -kernel.microseconds)


def idle(events: Sequence[dict[str, Any]]) -> float:
    """Returns the share of the time from the first event to the last in which none runs."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    busy, end = 0.0, spans[0][0]
    for begin, until in spans:
        busy += max(0.0, until - max(begin, end))
        end = max(end, until)
    return 1 - busy / (end - spans[0][0])
