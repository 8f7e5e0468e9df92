"""Distributions as bars, which a terminal shows as block characters and the page as columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from rich.table import Table
from rich.text import Text

from megatron_solopo.data.inspection.blocks import attributes, table, visible
from megatron_solopo.data.inspection.examples import CONTEXTS
from megatron_solopo.data.inspection.statistics import Statistics

_BARS = 24
_FEWEST_BARS = 6
_TAIL = 0.02
"""Share of the values on either side that the last bar gathers, where they would stretch the axis by half or more."""
_FARTHEST = 1e300
"""Where an axis ends; differences of larger numbers are not finite."""
_EIGHTHS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def nice_step(span: float, most: int) -> float:
    """Returns the smallest of 1, 2, 2.5, 5 times a power of ten of which at most ``most`` cover ``span``."""
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class Chart:
    """One or more distributions over one axis.

    Attributes:
        series: (name, style, [numbers] float64); the style "signed" is that of the values' sign.
        unit: what a value is.
        digits: decimals of the values; 0: they are whole numbers.
        limits: the axis, where it is known (a share: 0 to 1); else that of the values.
    """

    title: str
    series: Sequence[tuple[str, str, np.ndarray]]
    unit: str = ""
    digits: int = 0
    limits: tuple[float, float] | None = None
    note: str = ""

    @cached_property
    def bins(self) -> tuple[float, float, list[list[int]]]:
        """(start, width of a bin, counts of each series); every value is in a bin, long tails in the first and last."""
        values = [np.clip(one, -_FARTHEST, _FARTHEST) for _, _, one in self.series]
        low, high = self.limits or _axis(np.concatenate(values))
        width = nice_step(max(high - low, 10.0**-self.digits), _BARS)
        if not self.digits:  # bins of one width hold as many whole numbers
            width = max(1.0, math.ceil(width))
        start = math.floor(low / width + 1e-9) * width
        # The last bin of a share holds its upper limit too.
        most = max(round((high - start) / width) if self.limits else math.floor((high - start) / width + 1e-9) + 1, 1)
        if most < _FEWEST_BARS and not self.limits:
            start -= (_FEWEST_BARS - most) // 2 * width
            most = _FEWEST_BARS
        places = [np.clip(np.floor((one - start) / width + 1e-9), 0, most - 1).astype(int) for one in values]
        return start, width, [np.bincount(one, minlength=most).tolist() for one in places]

    @property
    def most(self) -> int:
        """The highest bar."""
        return max(map(max, self.bins[2]))

    def ends(self, place: int) -> tuple[float, float]:
        """Returns the smallest and the largest value of a bin; -1: the last."""
        start, width, counts = self.bins
        place %= len(counts[0])
        return start + place * width, start + (place + 1) * width - (0 if self.digits else 1)

    def bars(self, index: int) -> Text:
        """Returns a series in block characters; on the page, where each is a column, with what it counts."""
        counts, (name, style, values) = self.bins[2][index], self.series[index]
        bars = Text("", "bars", no_wrap=True)
        for place, count in enumerate(counts):
            low, high = self.ends(place)
            span = short(low) if low == high else f"{short(low)} to {short(high)}"
            if place == 0 and values.min() < low:
                span = f"{short(high)} or less"
            if place == len(counts) - 1 and values.max() > high:
                span = f"{short(low)} or more"
            title = f"{name}, {span} {self.unit}: {count:,} ({count / len(values):.1%})"
            sign = "neutral" if low == high == 0 else "chosen" if low >= 0 else "rejected"
            bars.append(_EIGHTHS[math.ceil(8 * count / self.most)], sign if style == "signed" else style)
            more = attributes(title=title, style=f"height: {100 * count / self.most:.1f}%")
            bars.stylize(more, place, place + 1)
        return bars

    def ticks(self) -> list[tuple[float, str]]:
        """Returns (per cent of the axis, value) of about five places."""
        start, width, counts = self.bins
        bars = len(counts[0])
        step = max(1, math.ceil(nice_step(bars, 5)))
        first = -math.floor(start / width + 0.5) % step  # values at ticks are multiples of their distance
        middle = 0.5 if not self.digits and width == 1 else 0  # a bar of one whole number
        places = range(first, bars + (not middle), step)
        return [(100 * (place + middle) / bars, short(start + place * width)) for place in places]

    def figures(self, index: int) -> tuple[str, str, str]:
        """Median, mean, and the middle 90 % of a series, in words."""
        values, digits = self.series[index][2], 3 if self.digits else 0
        shares = np.quantile(values, (0.05, 0.5, 0.95), method="inverted_cdf")
        low, median, high = (number(share, digits) for share in shares)
        mean = (values / len(values)).sum()  # the sum of large numbers may not be finite
        return median, number(mean, digits or 1), f"{low} to {high}"

    def words(self, index: int) -> str:
        """Its figures in a sentence."""
        return "median {}, mean {}, middle 90 % from {}".format(*self.figures(index))

    @property
    def beyond(self) -> bool:
        """Whether the outer bars gather values beyond them."""
        low, high = self.ends(0)[0], self.ends(-1)[1]
        return any(values.min() < low or values.max() > high for _, _, values in self.series)


def _axis(values: np.ndarray) -> tuple[float, float]:
    """Returns the smallest and the largest value, or where the bulk ends if a few values are far from it."""
    low, first, last, high = np.quantile(values, (0, _TAIL, 1 - _TAIL, 1), method="inverted_cdf").tolist()
    return (first, last) if high - low > 1.5 * (last - first) > 0 else (low, high)


def number(value: float, digits: int) -> str:
    """With so many decimals; large ones in powers of ten."""
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.4g}"


def short(value: float) -> str:
    """Returns a number for a person: at most four decimals."""
    text = number(value, 0 if value == round(value) else 4)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def charts(statistics: Statistics) -> list[Chart]:
    """Returns the charts for which there are numbers."""
    numbers, charts = statistics.numbers, []

    def add(
        title: str,
        styles: dict[str, str],
        unit: str = "",
        digits: int = 0,
        limits: tuple[float, float] | None = None,
        note: str = "",
    ) -> None:
        """A chart of the numbers of these names."""
        if all(numbers.get(name) for name in styles):
            named = [(n.removesuffix(" tokens"), style, np.array(numbers[n])) for n, style in styles.items()]
            charts.append(Chart(title, named, unit, digits, limits, note))

    for name in CONTEXTS:
        add(f"Tokens of the {name} context", {f"{name} tokens": name}, "tokens", note="Chat template included.")
    add("Compression ratio short / long", {"ratio": "neutral"}, "of the long context's tokens", digits=4)
    for name in CONTEXTS:
        unit = "of the way from the first document to the last"
        note = "0: as the first document, 1: as the last. Where documents are few, more are at the ends."
        add(f"Evidence depth, {name} context", {f"{name} depth": "gold"}, unit, 3, (0, 1), note)
    both = {"chosen tokens": "chosen", "rejected tokens": "rejected"}
    add("Tokens of the responses", both, "tokens", note="The end of turn counts.")
    add("Chosen minus rejected", {"difference": "signed"}, "tokens", note="Right of 0, chosen is longer.")
    for name in CONTEXTS:
        add(f"Documents of the {name} context", {f"{name} documents": name}, "documents")
    for key in sorted(name for name in numbers if name.startswith("score ")):
        low, high = min(numbers[key]), max(numbers[key])
        if low < high:
            name = key.removeprefix("score ")
            title = "Share of right answers" if name == "share_right" else f"Score: {name}"
            add(title, {key: "neutral"}, digits=3, limits=(0, 1) if low >= 0 and high <= 1 else None)
    return charts


def distribution_table(shown: Sequence[Chart]) -> Table:
    """Returns the charts as rows of a table for a terminal."""
    rows = table("what", ">from", "", "to", ">median", ">mean", "middle 90 %")
    for chart in shown:
        low, high = short(chart.ends(0)[0]), short(chart.ends(-1)[1])
        for index, (name, _, _) in enumerate(chart.series):
            title = visible(chart.title + (f", {name}" if len(chart.series) > 1 else ""))
            rows.add_row(Text(title), low, chart.bars(index), high, *chart.figures(index))
    return rows
