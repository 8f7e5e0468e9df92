"""Distributions as bars: a row of block characters on a terminal, a figure of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from markupsafe import Markup
from rich.text import Text

from megatron_solopo.data.inspection.blocks import Table, table, visible
from megatron_solopo.data.inspection.statistics import Distribution, Statistics, number

_BARS = 24
_FEWEST_BARS = 6
_TAIL = 0.02
"""Share of the values on either side that the last bar gathers, where they would stretch the axis by half or more."""
_FARTHEST = 1e300
"""Where an axis ends; differences of larger numbers are not finite."""
_EIGHTHS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten of which at most ``most`` cover ``span``."""
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class Histogram:
    """One or more distributions over one axis.

    Attributes:
        series: (name, style, values); the style "signed" is that of the values' sign.
        unit: what a value is.
        limits: the axis, where it is known (a share: 0 to 1); else that of the values.
    """

    title: str
    series: Sequence[tuple[str, str, Distribution]]
    unit: str
    limits: tuple[float, float] | None = None
    note: str = ""

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return max(one.step for _, _, one in self.series) >= 1

    @cached_property
    def bins(self) -> tuple[float, float, list[list[int]]]:
        """(start, width of a bin, counts of each series); every value is in a bin, long tails in the first and last."""
        values = [np.clip(one.values, -_FARTHEST, _FARTHEST) for _, _, one in self.series]
        low, high = self.limits or _axis(np.concatenate(values))
        width = nice_step(max(high - low, max(one.step for _, _, one in self.series)), _BARS)
        if self.whole:  # bins of one width hold as many whole numbers
            width = max(1.0, math.ceil(width))
        start = math.floor(low / width + 1e-9) * width
        # The last bin of a share holds its upper limit too.
        most = max(round((high - start) / width) if self.limits else math.floor((high - start) / width + 1e-9) + 1, 1)
        if most < _FEWEST_BARS and not self.limits:
            start -= (_FEWEST_BARS - most) // 2 * width
            most = _FEWEST_BARS
        places = [np.clip(np.floor((one - start) / width + 1e-9), 0, most - 1).astype(int) for one in values]
        return start, width, [np.bincount(one, minlength=most).tolist() for one in places]

    def ends(self, place: int) -> tuple[float, float]:
        """The smallest and the largest value of a bin; -1: the last."""
        start, width, counts = self.bins
        place %= len(counts[0])
        return start + place * width, start + (place + 1) * width - (1 if self.whole else 0)

    def bars(self, index: int) -> Text:
        """A series in block characters."""
        counts, (_, style, _) = self.bins[2], self.series[index]
        most, made = max(map(max, counts)), Text(no_wrap=True)
        for place, count in enumerate(counts[index]):
            made.append(_EIGHTHS[math.ceil(8 * count / most)], _shade(style, *self.ends(place)))
        return made

    def _columns(self) -> Iterator[Markup]:
        _, _, counts = self.bins
        most, bar = max(map(max, counts)), Markup('<i class="{}" style="height: {:.1f}%" title="{}"></i>')
        for place, column in enumerate(zip(*counts, strict=True)):
            low, high = self.ends(place)
            made = []
            for (name, style, one), count in zip(self.series, column, strict=True):
                span = short(low) if low == high else f"{short(low)} to {short(high)}"
                if place == 0 and one.values.min() < low:
                    span = f"{short(high)} or less"
                if place == len(counts[0]) - 1 and one.values.max() > high:
                    span = f"{short(low)} or more"
                title = f"{name}, {span} {self.unit}: {count:,} ({count / one.total:.1%})"
                made.append(bar.format(_shade(style, low, high), 100 * count / most, title))
            yield Markup("<span>{}</span>").format(Markup("").join(made))

    def _ticks(self) -> Iterator[Markup]:
        start, width, counts = self.bins
        bars = len(counts[0])
        step = max(1, math.ceil(nice_step(bars, 5)))
        half = 0.5 if self.whole and width == 1 else 0  # a bar of one whole number: below its middle
        first = -math.floor(start / width + 0.5) % step  # ticks are multiples of their distance
        for place in range(first, bars + (0 if half else 1), step):
            tick = Markup('<span style="left: {:.1f}%">{}</span>')
            yield tick.format(100 * (place + half) / bars, short(start + place * width))

    def __html__(self) -> str:
        lines = (
            Markup('<div><span class="key {}"></span>{}{}</div>').format(
                style, f"{name}: " if len(self.series) > 1 else "", one.words()
            )
            for name, style, one in self.series
        )
        low, high = self.ends(0)[0], self.ends(-1)[1]
        beyond = any(one.values.min() < low or one.values.max() > high for _, _, one in self.series)
        return Markup(
            '<figure><h3>{}</h3><div class="chart" role="img" aria-label="Histogram of {}"><sup>{:,}</sup>'
            '<div class="bars">{}</div><div class="axis">{}</div></div>'
            "<figcaption>{}{} {}</figcaption></figure>"
        ).format(
            self.title,
            self.unit or self.title,
            max(map(max, self.bins[2])),
            Markup("").join(self._columns()),
            Markup("").join(self._ticks()),
            Markup("").join(lines),
            self.note,
            "The outer bars gather what lies beyond." if beyond else "",
        )


def _axis(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value, or where the bulk ends if a few values are far from it."""
    low, first, last, high = np.quantile(values, (0, _TAIL, 1 - _TAIL, 1), method="inverted_cdf").tolist()
    return (first, last) if high - low > 1.5 * (last - first) > 0 else (low, high)


def _shade(style: str, low: float, high: float) -> str:
    if style != "signed":
        return style
    return "neutral" if low == high == 0 else "chosen" if low >= 0 else "rejected"


def short(value: float) -> str:
    """A number for a person: at most four decimals."""
    text = number(value, 0 if value == round(value) else 4)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def histograms(statistics: Statistics) -> list[Histogram]:
    """The charts for which there are numbers."""
    tokens, made = statistics.tokens, []
    contexts = [name for name in ("short", "long") if name in tokens]
    for name in contexts:
        title = f"Tokens of the {name} context"
        made.append(Histogram(title, [(name, name, tokens[name])], "tokens", note="Chat template included."))
    if statistics.ratio.total:
        series = [("ratio", "neutral", statistics.ratio)]
        made.append(Histogram("Compression ratio short / long", series, "of the long context's tokens"))
    for name, depths in statistics.depths.items():
        if depths.total:
            unit = "of the way from the first document to the last"
            note = "0: as the first document, 1: as the last. Where documents are few, more stand at the ends."
            title = f"Evidence depth, {name} context"
            made.append(Histogram(title, [("depth", "gold", depths)], unit, (0, 1), note))
    both = [(name, name, tokens[name]) for name in ("chosen", "rejected") if name in tokens]
    if both:
        made.append(Histogram("Tokens of the responses", both, "tokens", note="The end of turn counts."))
        series = [("chosen - rejected", "signed", statistics.difference)]
        made.append(Histogram("Chosen minus rejected", series, "tokens", note="Right of 0, chosen is longer."))
    for name, documents in statistics.documents.items():
        if documents.total:
            made.append(Histogram(f"Documents of the {name} context", [(name, name, documents)], "documents"))
    for name, values in sorted(statistics.scores.items()):
        if len(set(values.values)) > 1:
            title = "Share of right answers" if name == "share_right" else f"Score: {name}"
            shares = values.values.min() >= 0 and values.values.max() <= 1
            made.append(Histogram(title, [(name, "neutral", values)], "", (0, 1) if shares else None))
    return made


def distribution_table(charts: Sequence[Histogram]) -> Table:
    """The charts as rows of a table for a terminal."""
    made = table("what", ">from", "", "to", ">median", ">mean", "middle 90 %")
    for chart in charts:
        low, high = short(chart.ends(0)[0]), short(chart.ends(-1)[1])
        for index, (name, _, values) in enumerate(chart.series):
            title = visible(chart.title + (f", {name}" if len(chart.series) > 1 else ""))
            made.add_row(Text(title), low, chart.bars(index), high, *values.figures())
    return made
