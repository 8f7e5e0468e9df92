"""The figures of a report. Colours are told apart by colour-blind readers too (Okabe and Ito), and markers differ."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_solopo.atomic import new_file
from megatron_solopo.evaluation.results import Point
from megatron_solopo.metrics import Metric

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
FONT_SIZE = 9
LABEL_WIDTH = 18  # characters of a label before it is broken into lines
STYLE = {
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE + 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "axes.axisbelow": True,
    "font.family": "sans-serif",
    "text.parse_math": False,  # labels are a user's, and two $ in them are no formula
}


def look(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour, marker and dash of every label, by its place in the list; dashes change when the colours are used up."""
    return {
        label: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        }
        for i, label in enumerate(labels)
    }


@matplotlib.rc_context(STYLE)
def draw_accuracy(
    path: Path,
    series: Mapping[str, Sequence[Point]],
    looks: Mapping[str, dict[str, str]],
    metric: str,
    unit: str,
    prompt_tokens: Mapping[int, float],
) -> None:
    """Accuracy by context length, one line a label, with error bars.

    Args:
        series: label -> points whose x is the context length.
        metric, unit: names on the axes.
        prompt_tokens: mean tokens of a prompt at each length, under the ticks.
    """
    figure, (axes,) = _figure(1, 1, width=6.4, height=4.0)
    lengths = sorted({point.x for points in series.values() for point in points})
    # Lines that agree would hide each other's error bars, so each label is moved by a few hundredths of an octave.
    step = min(0.05, 0.24 / len(series))
    ends = {}
    for index, (label, points) in enumerate(series.items()):
        shift = 2 ** (step * (index - (len(series) - 1) / 2))
        means = [point.mean for point in points]
        ends[label] = (points[-1].x * shift, means[-1])
        axes.errorbar(
            [point.x * shift for point in points],
            means,
            yerr=[
                [max(0.0, point.mean - point.low) for point in points],
                [max(0.0, point.high - point.mean) for point in points],
            ],
            **looks[label],
            linewidth=1.6,
            markersize=5.5,
            elinewidth=1.1,
            capsize=2.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            clip_on=False,
            zorder=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(lengths) / 1.2, max(lengths) * 1.2)
    axes.set_xticks(
        lengths,
        [f"{length:,.0f}" + (f"\n({prompt_tokens[length]:,.0f})" if unit != "tokens" else "") for length in lengths],
    )
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_xlabel(f"Context length in {unit}" + ("" if unit == "tokens" else " (mean prompt tokens)"))
    axes.set_ylabel(f"Accuracy ({metric})")
    _label_ends(figure, axes, ends, looks)
    _save(figure, path)


@matplotlib.rc_context(STYLE)
def draw_curves(
    path: Path,
    panels: Mapping[Metric, tuple[Mapping[str, Sequence[Point]], Mapping[str, Sequence[Point]]]],
    looks: Mapping[str, dict[str, str]],
    marks: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Training curves, one panel a metric.

    Args:
        panels: metric -> (label -> training points, label -> evaluation points).
        marks: name of a metric -> values of --clip-grad, at which a dotted line crosses the panel.

    A single panel has its labels at the ends of the lines; several share one legend above them.
    """
    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = (len(panels) + columns - 1) // columns
    figure, all_axes = _figure(len(panels), columns, width=(6.4, 7.4, 9.6)[columns - 1], height=0.4 + 2.4 * rows)
    series = [points for train, valid in panels.values() for points in (*train.values(), *valid.values())]
    steps = [point.x for points in series for point in points]
    room = 0.01 * (max(steps) - min(steps)) or 0.5
    ends_of_steps = min(steps) - room, max(steps) + room
    for axes, (metric, (train, valid)) in zip(all_axes, panels.items(), strict=True):
        ends = {}
        for label in dict.fromkeys([*train, *valid]):
            points = _smooth(train.get(label, ()))
            style = {key: looks[label][key] for key in ("color", "linestyle")}
            if points:
                x = [point.x for point in points]
                axes.plot(x, [point.mean for point in points], **style, linewidth=1.5, zorder=3)
                if max(point.seeds for point in points) > 1:
                    axes.fill_between(
                        x,
                        [point.low for point in points],
                        [point.high for point in points],
                        color=style["color"],
                        alpha=0.15,
                        linewidth=0,
                        zorder=2,
                    )
            checks = valid.get(label, ())
            if checks:
                axes.plot(
                    [point.x for point in checks],
                    [point.mean for point in checks],
                    color=style["color"],
                    linestyle=style["linestyle"],
                    linewidth=0.6,
                    marker=looks[label]["marker"],
                    markersize=5,
                    markeredgecolor="white",
                    markeredgewidth=0.7,
                    clip_on=False,
                    zorder=4,
                )
            last = (points or checks)[-1]
            ends[label] = (last.x, last.mean)
        axes.set_title(metric.title, loc="left", fontweight="bold")
        axes.set_ylabel(metric.unit)
        axes.set_xlabel("Step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        _limit(axes, metric, [point for points in (*map(_smooth, train.values()), *valid.values()) for point in points])
        axes.set_xlim(*ends_of_steps)
        for value in (marks or {}).get(metric.name, ()):
            axes.axhline(value, color="#555555", linestyle=":", linewidth=1.2, zorder=2)
            axes.annotate(f"clip {value:g}", (1.02, value), xycoords=("axes fraction", "data"), va="center")
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.85 * value), max(high, 1.15 * value))
        if len(panels) == 1:
            _label_ends(figure, axes, ends, looks)
    if len(panels) > 1:
        labels = list(dict.fromkeys(label for train, valid in panels.values() for label in (*train, *valid)))
        kinds = {"training": "", "validation": "o"} if any(valid for _, valid in panels.values()) else {}
        line = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.7}
        of_labels = (looks[label] | ({} if kinds else {"marker": ""}) for label in labels)
        of_kinds = ({"color": "#777777", "marker": m, "linewidth": 0.6 if m else 1.5} for m in kinds.values())
        keys = [Line2D([], [], **style, **line) for style in (*of_labels, *of_kinds)]
        figure.legend(
            keys,
            [*labels, *kinds],
            loc="outside upper center",
            ncols=min(len(keys), 4),
            frameon=False,
            handlelength=2.4,
            columnspacing=1.6,
        )
    _save(figure, path)


def _limit(axes: Axes, metric: Metric, points: Sequence[Point]) -> None:
    if metric.limits:
        low, high = metric.limits
        axes.set_ylim(low, high + 0.02 * (high - low))
        return
    values = sorted(value for point in points for value in (point.low, point.high))
    low, high = values[0], values[-1]
    room = 0.06 * (high - low) or 0.5
    axes.set_ylim(0 if 0 <= low < 0.4 * high else low - room, high + room)
    if low < 0 < high:
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)


def steps_in_a_mean(points: Sequence[Point]) -> int:
    """Steps of the centred mean that a curve of these points shows: about 1/25 of them; 1 below 50 points."""
    return 2 * (len(points) // 50) + 1


def _smooth(points: Sequence[Point]) -> list[Point]:
    """A centred mean over `steps_in_a_mean`."""
    half = steps_in_a_mean(points) // 2
    if half == 0:
        return list(points)
    smooth = []
    for index, point in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = points[index - reach : index + reach + 1]
        smooth.append(
            Point(
                point.x,
                *(sum(getattr(p, name) for p in near) / len(near) for name in ("mean", "low", "high")),
                point.seeds,
            )
        )
    return smooth


def _figure(panels: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    rows = (panels + columns - 1) // columns
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for one in axes:
        one.grid(axis="y", color="#E3E3E3", linewidth=0.8)
        one.tick_params(length=3)
    return figure, axes


def _label_ends(
    figure: Figure, axes: Axes, ends: Mapping[str, tuple[float, float]], looks: Mapping[str, dict[str, str]]
) -> None:
    """Writes each label to the right of the axes, level with the end of its line, and spread so that none overlap."""
    figure.draw_without_rendering()
    line = (
        1.3 * FONT_SIZE / (axes.bbox.height / figure.dpi * 72)
    )  # the height of a line of text, in heights of the axes
    texts = {label: textwrap.fill(label, LABEL_WIDTH) for label in ends}
    to_fraction = axes.transAxes.inverted()
    wanted = {label: float(to_fraction.transform(axes.transData.transform(end))[1]) for label, end in ends.items()}
    placed = spread(wanted, {label: line * (text.count("\n") + 1) for label, text in texts.items()})
    for label, y in placed.items():
        axes.annotate(
            texts[label],
            xy=ends[label],
            xycoords="data",
            xytext=(1.045, y),
            textcoords=axes.transAxes,
            va="center",
            ha="left",
            color=looks[label]["color"],
            fontweight="bold",
            annotation_clip=False,
            linespacing=1.1,
            arrowprops={
                "arrowstyle": "-",
                "color": looks[label]["color"],
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 5,
                "relpos": (0, 0.5),
            },
        )


def spread(wanted: Mapping[str, float], heights: Mapping[str, float]) -> dict[str, float]:
    """Centres of boxes, in the order and as near as may be to those wanted.

    Boxes do not overlap, and the centres stay in 0..1 where they fit.

    Args:
        wanted, heights: label -> wanted centre, height of its box; both in heights of the axes.
    """
    order = sorted(wanted, key=lambda label: wanted[label])
    gaps = [(heights[a] + heights[b]) / 2 for a, b in itertools.pairwise(order)]
    low = [min(max(wanted[label], 0.0), 1.0) for label in order]
    high = list(low)
    for index, gap in enumerate(gaps):  # upwards: none too near its lower neighbour
        low[index + 1] = max(low[index + 1], low[index] + gap)
    for index in reversed(range(len(gaps))):  # downwards: none too near its upper neighbour
        high[index] = min(high[index], high[index + 1] - gaps[index])
    # The mean of two lists that keep the gaps keeps them too, and stays centred on what was wanted;
    # so does the lower or the higher of two such lists, which brings the ends back inside.
    places = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    offsets = list(itertools.accumulate(gaps, initial=0.0))
    places = [min(place, 1.0 - (offsets[-1] - offset)) for place, offset in zip(places, offsets, strict=True)]
    if offsets[-1] <= 1.0:
        places = [max(place, offset) for place, offset in zip(places, offsets, strict=True)]
    return dict(zip(order, places, strict=True))


def _save(figure: Figure, path: Path) -> None:
    with new_file(path, "wb") as file:
        figure.savefig(file, format="png", facecolor="white")
