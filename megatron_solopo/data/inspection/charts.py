"""Histograms as inline SVG. Colours are classes of the page's style sheet and follow its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from megatron_solopo.data.inspection.statistics import Distribution
from megatron_solopo.data.inspection.view import ContextView

WIDTH, HEIGHT = 300, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 10, 10, 24
_BARS = 24
_FEWEST_BARS = 6
_TAIL = 0.02
"""Share of the values on either side that the last bar gathers, where they would stretch the axis by half or more."""


@dataclass(frozen=True)
class Series:
    """One distribution of a chart; ``style`` is a CSS class of the page, or "signed": by the sign of the values."""

    name: str
    style: str
    values: Distribution


def nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten of which at most ``most`` cover ``span``."""
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))


def bins(series: Sequence[Series], limits: tuple[float, float] | None) -> tuple[float, float, list[list[int]]]:
    """(start, width of a bin, counts of each series); every value is in one bin, long tails in the first and last.

    Args:
        limits: the axis, where it is known (a share: 0 to 1); else that of the values.
    """
    step = max(one.values.step for one in series)
    low, high = limits or _range(series)
    width = nice_step(max(high - low, step), _BARS)
    if step >= 1:  # whole numbers: bins of one width hold as many of them
        width = max(1.0, math.ceil(width))
    start = math.floor(low / width + 1e-9) * width
    number = max(round((high - start) / width) if limits else math.floor((high - start) / width + 1e-9) + 1, 1)
    if number < _FEWEST_BARS and not limits:
        start -= (_FEWEST_BARS - number) // 2 * width
        number = _FEWEST_BARS
    counts = [[0] * number for _ in series]
    for row, one in zip(counts, series, strict=True):
        for value, count in one.values.values:
            row[min(max(math.floor((value - start) / width + 1e-9), 0), number - 1)] += count
    return start, width, counts


def _range(series: Sequence[Series]) -> tuple[float, float]:
    """The smallest and the largest value, or where the bulk ends if a few values are far from it."""
    low = min(one.values.values[0][0] for one in series)
    high = max(one.values.values[-1][0] for one in series)
    bulk_low = min(one.values.quantile(_TAIL) for one in series)
    bulk_high = max(one.values.quantile(1 - _TAIL) for one in series)
    return (bulk_low, bulk_high) if high - low > 1.5 * (bulk_high - bulk_low) > 0 else (low, high)


def gathers(series: Sequence[Series], limits: tuple[float, float] | None) -> bool:
    """Whether the first or the last bar stands for values beyond the axis too."""
    start, width, counts = bins(series, limits)
    end = start + width * len(counts[0])
    return any(one.values.values[0][0] < start or one.values.values[-1][0] > end for one in series)


def histogram(series: Sequence[Series], unit: str, limits: tuple[float, float] | None = None) -> Markup:
    """A histogram of one or more distributions over each other, with a tooltip on every bar.

    Args:
        unit: what a value is, for the tooltips and for people who hear the page.
        limits: see `bins`.
    """
    start, width, counts = bins(series, limits)
    number, top = len(counts[0]), max(max(row) for row in counts)
    whole = max(one.values.step for one in series) >= 1
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    floor = HEIGHT - _BOTTOM
    tick = nice_step(max(top, 1), 3)
    tick = max(1.0, math.ceil(tick))
    ceiling = math.ceil(top / tick) * tick

    def x(value: float) -> float:
        return _LEFT + (value - start) / (number * width) * inner_width

    def y(count: float) -> float:
        return floor - count / ceiling * inner_height

    said = "; ".join(f"{one.name}: median {_number(one.values.quantile(0.5))}" for one in series)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Histogram of {escape(unit)}. {escape(said)}">'
    ]
    for line in range(round(ceiling / tick) + 1):
        at = y(line * tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{line * tick:,.0f}</text>')
    for one, row in zip(series, counts, strict=True):
        for place, count in enumerate(row):
            if not count:
                continue
            low = start + place * width
            high = low + width - 1 if whole else low + width
            span = _number(low) if whole and width == 1 else f"{_number(low)} to {_number(high)}"
            if place == 0 and one.values.values[0][0] < low:
                span = f"{_number(high)} or less"
            if place == number - 1 and one.values.values[-1][0] > low + width:
                span = f"{_number(low)} or more"
            bar = inner_width / number
            gap = min(1.0, bar / 8)
            parts.append(
                f'<rect class="{_style(one.style, low, high)}" x="{x(low) + gap / 2:.1f}" y="{y(count):.1f}" '
                f'width="{bar - gap:.1f}" height="{floor - y(count):.1f}"><title>{escape(one.name)}, '
                f"{span} {escape(unit)}: {count:,} ({count / one.values.total:.1%})</title></rect>"
            )
    for value in _ticks(start, start + number * width, whole):
        # A bar of whole numbers stands for its first value where it holds one only, so the tick is below its middle.
        at = x(value + (0.5 if whole and width == 1 else 0))
        anchor = "end" if at > WIDTH - _RIGHT - 12 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_number(value)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    if start < 0 < start + number * width:
        middle = x(0.5 if whole and width == 1 else 0)
        parts.append(f'<line class="zero" x1="{middle:.1f}" x2="{middle:.1f}" y1="{_TOP}" y2="{floor}"/>')
    return Markup("".join([*parts, "</svg>"]))


def strip(context: ContextView) -> Markup:
    """The documents of a context as a bar, as wide as their tokens, evidence in its colour."""
    total = sum(document.tokens for document in context.documents) or 1
    parts = [
        f'<svg class="strip" viewBox="0 0 1000 14" preserveAspectRatio="none" role="img" aria-label="'
        f"{len(context.documents)} documents, evidence at depth "
        f'{", ".join(f"{depth:.2f}" for depth in context.depths) or "unknown"}">'
    ]
    begun = 0
    for document in context.documents:
        left, width = 1000 * begun / total, 1000 * document.tokens / total
        begun += document.tokens
        kind = "evidence" if document.gold else "distractor"
        parts.append(
            f'<rect class="{kind}" x="{left:.1f}" y="0" width="{max(width - 1.2, 1.2):.1f}" height="14">'
            f"<title>document {document.number}, {kind}, {document.tokens:,} tokens</title></rect>"
        )
    return Markup("".join([*parts, "</svg>"]))


def _style(style: str, low: float, high: float) -> str:
    if style != "signed":
        return style
    return "neutral" if low == high == 0 else "chosen" if low >= 0 else "rejected"


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    step = nice_step(high - low, 5)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor((high - (1 if whole and high - low > 1 else 0)) / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.3f}".rstrip("0").rstrip(".")
