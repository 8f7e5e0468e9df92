"""Ratios of a table's cases, each from the rounds of one invocation, and their comparison with a baseline."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_solopo.atomic import write_text
from megatron_solopo.benchmark.cases import LONG, LONGEST, SFT, SHORT, SOLO, SOLOPO, TRL
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import loads

Figures = Mapping[str, Any]

HIGHER, LOWER = "higher", "lower"
OUTSIDE_PAIRS = 8
"""Pairs a step from which on the time outside forward and backward is a ratio; below, the update is much of it."""


@dataclass(frozen=True)
class Ratio:
    """A quotient of two figures of a table.

    Attributes:
        name: with the table's in front.
        value: the median of the rounds; low, high: the smallest and the largest.
        better: `HIGHER` or `LOWER`.
        aim: what this project wants to reach, or None.
    """

    name: str
    value: float
    low: float
    high: float
    better: str
    aim: float | None = None

    @property
    def reaches(self) -> bool:
        """Whether the value reaches the aim, if there is one."""
        return self.aim is None or (self.value >= self.aim if self.better == HIGHER else self.value <= self.aim)


def ratios_of(record: Figures, clock: str) -> list[Ratio]:
    """Returns the ratios of a table.

    Args:
        record: see `measure.measured`.
        clock: ``seconds`` or ``cpu``.
    """
    name = record["table"]["name"]
    judged = record["table"]["judged"]
    if record["table"]["kind"] == LONGEST:
        return [_named(name, ratio, judged) for ratio in _of_lengths(record["cases"])]
    cases = {case["name"]: _Timed(case, clock) for case in record["cases"]}
    each = [*_over_trl(cases), *_over_floor(cases), *_sharing(cases), *_solo_over_long(cases)]
    if record["table"]["setting"]["pairs"] >= OUTSIDE_PAIRS:
        each += _outside(cases)
    return [_named(name, ratio, judged) for ratio in each]


def _named(table: str, ratio: Ratio, judged: bool) -> Ratio:
    return replace(ratio, name=f"{table}: {ratio.name}", aim=ratio.aim if judged else None)


class _Timed:
    """A case of a table, and its times by round."""

    def __init__(self, figures: Figures, clock: str) -> None:
        self.name, self.case, self.rounds, self.clock = figures["name"], figures["case"], figures["rounds"], clock
        self.steps = [statistics.median(one[clock]) for one in self.rounds]

    def phase(self, number: int, *names: str) -> float:
        """Returns the seconds of phases in a step of a round."""
        return sum(self.rounds[number]["phases"][self.clock][name] for name in names)

    def flops(self, number: int) -> list[float]:
        return self.rounds[number]["flops"]

    def like(self, **fields: Any) -> dict[str, Any]:
        """Returns the case with other fields."""
        return self.case | fields


def _ratio(name: str, of_rounds: Sequence[float], better: str, aim: float | None = None) -> Ratio:
    return Ratio(name, statistics.median(of_rounds), min(of_rounds), max(of_rounds), better, aim)


def _where(cases: Mapping[str, _Timed], wanted: Mapping[str, Any]) -> _Timed | None:
    return next((timed for timed in cases.values() if timed.case == wanted), None)


def _faster(name: str, case: _Timed, other: _Timed, aim: float | None = None) -> Ratio:
    """Pairs a second of a case over another's."""
    return _ratio(name, [b / a for a, b in zip(case.steps, other.steps, strict=True)], HIGHER, aim)


def _over_trl(cases: Mapping[str, _Timed]) -> Iterator[Ratio]:
    """Pairs a second of long-DPO over TRL's; as shipped each side has its own recomputation, and no aim is set."""
    for trl in (timed for timed in cases.values() if timed.case["side"] == TRL):
        for case in cases.values():
            of_case = case.case
            kind = of_case["side"], of_case["mode"], of_case["loss"], of_case["as_shipped"]
            if kind != (SOLOPO, LONG, trl.case["loss"], trl.case["as_shipped"]):
                continue
            if of_case["as_shipped"] or of_case["recompute"] == trl.case["recompute"]:
                aim = None if of_case["as_shipped"] else 1.7 if of_case["share"] else 1.0
                yield _faster(f"{case.name}, over TRL", case, trl, aim)


def _over_floor(cases: Mapping[str, _Timed]) -> Iterator[Ratio]:
    """Forward and backward over their floor: each operation takes as long as in plain training on one sequence.

    Products and attention have rates of their own, which follow from two lengths: t = a products + b attention.
    """
    plain = [timed for timed in cases.values() if timed.case["mode"] == SFT and not timed.case["recompute"]]
    long = next((timed for timed in plain if not timed.case["on_short"]), None)
    short = next((timed for timed in plain if timed.case["on_short"]), None)
    if long is None or short is None:
        return
    for case in cases.values():
        if case.case["mode"] == SFT or case.case["side"] == TRL or case.case["recompute"]:
            continue
        of_rounds = []
        for number in range(len(case.rounds)):
            floor = _floor(number, long, short)
            if floor is not None:
                of_rounds.append(case.phase(number, "forward", "backward") / floor(*case.flops(number)))
        if of_rounds:
            yield _ratio(f"{case.name}, over its floor", of_rounds, LOWER, 1.05)


def _floor(number: int, long: _Timed, short: _Timed) -> Callable[[float, float], float] | None:
    """Returns the seconds of so many operations of products and of attention, by a round of the plain cases; None
    where their times contradict each other."""
    (p1, a1), (p2, a2) = long.flops(number), short.flops(number)
    t1, t2 = (timed.phase(number, "forward", "backward") for timed in (long, short))
    determinant = p1 * a2 - p2 * a1
    if not determinant:
        return None
    product, attention = (t1 * a2 - t2 * a1) / determinant, (p1 * t2 - p2 * t1) / determinant
    if product <= 0 or attention <= 0:
        return None
    return lambda products, attended: product * products + attention * attended


def _sharing(cases: Mapping[str, _Timed]) -> Iterator[Ratio]:
    """Pairs a second with shared prompts over those with separate ones."""
    for case in cases.values():
        if case.case["share"] and (other := _where(cases, case.like(share=False))) and case.case["mode"] != SFT:
            yield _faster(f"{case.name}, over separate", case, other)


def _solo_over_long(cases: Mapping[str, _Timed]) -> Iterator[Ratio]:
    """Pairs a second of SoLoPO over those of long-PO in the same layout."""
    for case in cases.values():
        if case.case["mode"] == SOLO and (other := _where(cases, case.like(mode=LONG))):
            yield _faster(f"{case.name}, over {LONG}", case, other)


def _outside(cases: Mapping[str, _Timed]) -> Iterator[Ratio]:
    """The share of a step's time outside forward and backward."""
    for case in cases.values():
        if case.case["side"] == SOLOPO and case.case["mode"] in (SOLO, LONG, SHORT):
            shares = [outside(one, case.clock) for one in case.rounds]
            yield _ratio(f"{case.name}, outside forward and backward", shares, LOWER, 0.03)


def outside(figures: Figures, clock: str) -> float:
    """Returns the share of a process's steps outside forward and backward."""
    phases = figures["phases"][clock]
    total = statistics.mean(figures[clock])
    return 1 - (phases["forward"] + phases["backward"]) / total


def _of_lengths(cases: Sequence[Figures]) -> Iterator[Ratio]:
    """The longest context of each case over TRL's; its range is that of what was not tried."""
    trl = next((case for case in cases if case["case"]["side"] == TRL), None)
    for case in cases:
        if trl is not None and case is not trl and case["case"]["recompute"] == trl["case"]["recompute"]:
            low, high = case["longest"] / (trl["too_long"] or trl["longest"]), case["too_long"] / trl["longest"]
            value = case["longest"] / trl["longest"]
            aim = 1.8 if case["case"]["share"] else None
            yield Ratio(f"{case['name']}, over TRL", value, low, max(high, value), HIGHER, aim)


def write_baseline(path: Path, kind: str, clock: str, ratios: Sequence[Ratio]) -> None:
    """Writes ratios that later runs on machines of the same kind are compared with."""
    document = {"machine": kind, "clock": clock, "ratios": [asdict(ratio) for ratio in ratios]}
    write_text(path, json.dumps(document, indent=1) + "\n")


def read_baseline(path: Path, kind: str, clock: str) -> dict[str, Ratio]:
    """Returns the ratios that `write_baseline` wrote, by name.

    Raises:
        UserError: it is no baseline, or of another kind of machine or clock.
    """
    try:
        document = loads(path.read_text(encoding="utf-8"))
        ratios = {each["name"]: Ratio(**each) for each in document["ratios"]}
        of_baseline = document["machine"], document["clock"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "baseline-unreadable", f"--baseline {path}: no baseline of solopo benchmark ({error}); see --write-baseline"
        ) from None
    if of_baseline != (kind, clock):
        raise UserError(
            "baseline-other-machine",
            f"--baseline {path}: is of {' and '.join(map(repr, of_baseline))}, this run of {kind!r} and {clock!r}; "
            "compare with one of this kind of machine and --clock",
        )
    return ratios


def compared(baseline: Mapping[str, Ratio], ratios: Sequence[Ratio], tolerance: float) -> tuple[list[str], bool]:
    """Compares ratios with a baseline's.

    A ratio has regressed where all its rounds are worse than all rounds of the baseline by more than the tolerance:
    what the spread of either explains is none.

    Returns:
        a line for each ratio of the baseline that was measured, and whether any has regressed.

    Raises:
        UserError: the baseline has other ratios.
    """
    lines, failed = [], False
    for ratio in ratios:
        before = baseline.get(ratio.name)
        if before is None:
            continue
        if ratio.better == HIGHER:
            worse = ratio.high < before.low * (1 - tolerance)
        else:
            worse = ratio.low > before.high * (1 + tolerance)
        failed = failed or worse
        verdict = "regressed" if worse else "ok"
        lines.append(
            f"{verdict:<9} {ratio.name}: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), "
            f"baseline {before.value:.3f} ({before.low:.3f} to {before.high:.3f}), {ratio.better} is better"
        )
    if not lines:
        raise UserError("baseline-other-ratios", "--baseline: has none of the ratios of this run; run the same tables")
    return lines, failed
