"""What the GPU suite computes from what it measures: kernels of a trace, verdicts, and the search for a length."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def figures(folder: Path) -> dict[str, tuple[Any, str]]:
    records = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {record["key"]: (record["value"], record["unit"]) for record in records}


def event(name: str, begin: float, microseconds: float, stream: int = 7) -> dict[str, Any]:
    return {"name": name, "ts": begin, "dur": microseconds, "pid": 0, "tid": stream, "cat": "kernel"}


EVENTS = [
    event("outer", 100, 50),
    event("inner", 110, 20),
    event("inner", 130, 10),
    event("copy", 120, 40, stream=8),  # beside the others
    event("outer", 180, 20),
]


def test_a_kernel_has_the_time_that_nothing_within_it_has() -> None:
    from gpu.traces import Kernel, by_self_time, idle

    assert by_self_time(EVENTS) == [Kernel("outer", 2, 40), Kernel("copy", 1, 40), Kernel("inner", 2, 30)]
    assert idle(EVENTS) == pytest.approx(20 / 100)  # 100 to 160 and 180 to 200 of 100 to 200
    assert idle(EVENTS[:1]) == 0


def test_the_ten_largest_kernels_have_time_share_and_calls_a_step(tmp_path: Path) -> None:
    from gpu.record import Recorder
    from gpu.traces import summary

    name = "x" * 200
    many = [
        event(f"k{number}|{name}", 1e5 * step + 1e3 * number, 10 * number) for step in (0, 1) for number in range(1, 13)
    ]
    summary(Recorder("profile", tmp_path, tmp_path, False), many, 2)
    values = figures(tmp_path)
    assert [key for key in values if key.startswith("kernels/")] == [f"kernels/{n:02}" for n in range(1, 11)]
    assert values["kernels/01"][0] == 0.12  # ms a step
    text = values["kernels/01"][1]
    assert text.startswith(f"ms a step, {120 / 780:.1%}, 1 calls: k12/xxx") and len(text) < 140
    assert values["launches"][0] == 12 and values["in_kernels"][0] == 0.78


@pytest.mark.parametrize(
    ("value", "bounds", "dry", "verdict"),
    [
        (0.45, {"at_least": 0.45, "aim": 0.5}, False, "pass (at least 0.45, aim 0.5)"),
        (0.4499, {"at_least": 0.45, "aim": 0.5}, False, "falls short (at least 0.45, aim 0.5)"),
        (0.05, {"at_most": 0.05}, False, "pass (at most 0.05)"),
        (0.0501, {"at_most": 0.05}, False, "falls short (at most 0.05)"),
        (math.nan, {"at_most": 0.05}, False, "falls short (at most 0.05)"),
        (math.nan, {"at_least": 1.0}, False, "falls short (at least 1)"),
        (0.0501, {"at_most": 0.05, "timed": False}, True, "falls short (at most 0.05)"),
        (2.0, {"at_least": 1.0}, True, "not judged (at least 1)"),
    ],
)
def test_a_bound_is_reached_or_not_and_neither_fails_the_cell(
    value: float, bounds: dict[str, Any], dry: bool, verdict: str, tmp_path: Path
) -> None:
    from gpu.record import Recorder

    out = Recorder("cell", tmp_path, tmp_path, dry)
    out.target("x", value, **bounds)
    assert figures(tmp_path)["x/verdict"][0] == verdict and not out.failures


def test_a_package_that_is_missing_skips_the_part_and_says_how_to_install_it(tmp_path: Path) -> None:
    from gpu.record import Recorder

    out = Recorder("cell", tmp_path, tmp_path, False)
    with out.part("missing"):
        out.need_package("no_such_package", "no-such-package==1.16")
    with out.part("present"):
        out.need_package("json", "json")
    expected = "skipped: no_such_package is not installed: pip install no-such-package==1.16"
    assert figures(tmp_path) == {"missing": (expected, "")} and not out.failures


@pytest.mark.parametrize(
    ("holds", "guess", "tries"),
    [
        (100, 100, [100, 112, 106]),  # an eighth above, and the half of it
        (100, 64, [64, 72, 88, 120, 104, 96, 100]),
        (100, 160, [160, 140, 100, 120, 110, 105]),
        (3, 40, [40, 35, 25, 5, 1, 3, 4]),
        (0, 8, [8, 7, 5, 1]),
        (5000, 900, [900, 1000]),  # no more than the most
    ],
)
def test_the_longest_length_is_found_around_the_guess(holds: int, guess: int, tries: list[int]) -> None:
    from gpu.context import search

    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= holds

    found = search(fits, guess, 1, 1000, lambda tokens: True)
    assert tried == tries
    assert found == max((tokens for tokens in tries if tokens <= holds), default=0)
    assert min(holds, 1000) - found <= max(1, holds // 16)
    assert search(lambda tokens: tokens <= holds, guess, 1, 1000, lambda tokens: True, finest=0) == min(holds, 1000)


def test_the_search_ends_with_what_fits_when_the_time_is_up() -> None:
    from gpu.context import Clock, search

    clock = Clock(end=math.inf)
    assert search(lambda tokens: tokens < 80, 64, 1, 1000, lambda tokens: tokens < 80) == 72
    assert clock.has_time(10**9)
    clock.took(100, 1.0)
    clock.end = time.monotonic() + 10
    assert clock.has_time(200) and not clock.has_time(400)  # 4 and 16 seconds


def test_the_estimate_of_the_longest_context_is_the_planners(tmp_path: Path) -> None:
    """The length fits by the closed form, and the next one does not."""
    from gpu.context import planned
    from gpu.models import QWEN_3B, hf_config_of
    from gpu.steps import SOLO

    from megatron_solopo import config_load
    from megatron_solopo.planning.estimate import peak
    from megatron_solopo.planning.process import Process, Shape, Work
    from megatron_solopo.planning.rehearse import example

    hf_config_of(QWEN_3B).save_pretrained(tmp_path)
    argv = ["--hf-path", str(tmp_path), "--train-data", "x", "--save", "y", "--train-iters", "3", "--bf16", *SOLO]
    config, _ = config_load.load([*argv, "--recompute-granularity", "full", "--random-init"])
    size = 137 * 2**30
    tokens = planned(config, QWEN_3B, (1024, 256), 1024, 2**19, size)
    assert tokens % 1024 == 0 and 2**16 < tokens < 2**19

    def bytes_at(long: int) -> float:
        group = example(config.method, 1024, long, 256)
        shape = Shape.of(hf_config_of(QWEN_3B), 128)
        return peak(Process(shape, config, Work.of(group, 1, 1, True, 1, 128), 1), 0).total

    assert bytes_at(tokens) <= size < bytes_at(tokens + 1024)
