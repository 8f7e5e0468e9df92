"""The figures of a report. Colour-blind readers can distinguish the colours (Okabe and Ito), and markers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import matplotlib
import pandas
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_solopo.atomic import new_file
from megatron_solopo.evaluation.results import Point
from megatron_solopo.metrics import Metric

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")

styled = matplotlib.rc_context(
    {
        "axes.axisbelow": True,
        "axes.edgecolor": "#555555",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.linewidth": 0.8,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "errorbar.capsize": 2.5,
        "figure.constrained_layout.use": True,
        "figure.dpi": 200,
        "font.family": "sans-serif",
        "font.size": 9,
        "grid.color": "#E3E3E3",
        "legend.frameon": False,
        "legend.handlelength": 2.4,
        "lines.markeredgecolor": "white",
        "lines.markeredgewidth": 0.7,
        "lines.markersize": 5,
        "text.parse_math": False,  # labels are a user's, and two $ in them are no formula
        "xtick.color": "#333333",
        "ytick.color": "#333333",
    }
)


class Look(TypedDict):
    """How a label is drawn."""

    color: str
    marker: str
    linestyle: Literal["-", "--", ":"]


def look(labels: Sequence[str]) -> dict[str, Look]:
    """Colour, marker and dash of every label, by its place in the list; where the colours are used up, they come again
    with other dashes and other markers."""
    count = len(COLOURS)
    return {
        label: Look(
            color=COLOURS[i % count],
            marker=MARKERS[(i + i // count) % count],
            linestyle=DASHES[i // count % len(DASHES)],
        )
        for i, label in enumerate(labels)
    }


@styled
def draw_accuracy(
    path: Path,
    series: Mapping[str, Sequence[Point]],
    looks: Mapping[str, Look],
    metric: Metric,
    unit: str,
    prompt_tokens: Mapping[float, float],
) -> None:
    """Accuracy, or another score, by context length, one line a label, with error bars.

    Args:
        series: label -> points whose x is the context length.
        unit: name on the axis.
        prompt_tokens: mean tokens of a prompt at each length, under the ticks.
    """
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.add_subplot()
    lengths = sorted({point.x for points in series.values() for point in points})
    # Lines that agree would hide each other's error bars, so each label is moved by a few hundredths of an octave.
    step = min(0.05, 0.24 / len(series))
    for index, (label, points) in enumerate(series.items()):
        frame = pandas.DataFrame(points)
        shift = 2 ** (step * (index - (len(series) - 1) / 2))
        bars = [(frame["mean"] - frame["low"]).clip(lower=0), (frame["high"] - frame["mean"]).clip(lower=0)]
        axes.errorbar(
            frame["x"] * shift,
            frame["mean"],
            yerr=bars,
            label=label,
            **looks[label],
            linewidth=1.6,
            elinewidth=1.1,
            clip_on=False,
            zorder=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(lengths) / 1.2, max(lengths) * 1.2)
    below = {length: f"\n({prompt_tokens[length]:,.0f})" if unit != "tokens" else "" for length in lengths}
    axes.set_xticks(lengths, [f"{length:,.0f}{below[length]}" for length in lengths])
    axes.minorticks_off()
    if metric.is_share:
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    else:
        _limit(axes, metric, pandas.concat([pandas.DataFrame(points) for points in series.values()]))
    axes.set_xlabel(f"Context length in {unit}" + ("" if unit == "tokens" else " (mean prompt tokens)"))
    axes.set_ylabel(f"Accuracy ({metric.label})" if metric.is_share else f"{metric.title} ({metric.unit})")
    _legend(figure, *axes.get_legend_handles_labels())
    save_figure(figure, path)


@styled
def draw_cost(path: Path, points: Mapping[str, tuple[float, Point]], looks: Mapping[str, Look], accuracy: str) -> None:
    """Accuracy against the operations of training, one point a label, with error bars.

    Args:
        points: label -> (operations, accuracy).
        accuracy: what the accuracy is, for the axis.
    """
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.add_subplot()
    for label, (operations, point) in points.items():
        bars = [[max(0.0, point.mean - point.low)], [max(0.0, point.high - point.mean)]]
        axes.errorbar(
            operations / 1e12, point.mean, yerr=bars, label=label, **looks[label], elinewidth=1.1, clip_on=False
        )
    axes.set_xlim(0, 1.05 * max(operations for operations, _ in points.values()) / 1e12)
    axes.set_ylim(0, 1)
    axes.set_xlabel("Operations of training (10^12)")
    axes.set_ylabel(f"Accuracy ({accuracy})")
    _legend(figure, *axes.get_legend_handles_labels())
    save_figure(figure, path)


@styled
def draw_curves(
    path: Path,
    panels: Mapping[Metric, tuple[Mapping[str, Sequence[Point]], Mapping[str, Sequence[Point]]]],
    looks: Mapping[str, Look],
    marks: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Training curves, one panel a metric, and one legend above them.

    Args:
        panels: metric -> (label -> training points, label -> evaluation points).
        marks: name of a metric -> values of --clip-grad, at which a dotted line crosses the panel.
    """
    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=((6.4, 7.4, 9.6)[columns - 1], 0.8 + 2.4 * rows))
    series = [points for train, valid in panels.values() for points in (*train.values(), *valid.values())]
    steps = [point.x for points in series for point in points]
    room = 0.01 * (max(steps) - min(steps)) or 0.5
    for index, (metric, (train, valid)) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, index)
        curves = {label: smooth(points) for label, points in train.items()}
        checks = {label: pandas.DataFrame(points) for label, points in valid.items()}
        for label, frame in curves.items():
            color, dash = looks[label]["color"], looks[label]["linestyle"]
            axes.plot(frame["x"], frame["mean"], color=color, linestyle=dash, linewidth=1.5, zorder=3)
            if any(point.seeds > 1 for point in train[label]):
                axes.fill_between(frame["x"], frame["low"], frame["high"], color=color, alpha=0.15, lw=0, zorder=2)
        for label, frame in checks.items():
            axes.plot(frame["x"], frame["mean"], **looks[label], linewidth=0.6, clip_on=False, zorder=4)
        axes.set(title=metric.title, ylabel=metric.unit, xlabel="Step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        _limit(axes, metric, pandas.concat([*curves.values(), *checks.values()]))
        axes.set_xlim(min(steps) - room, max(steps) + room)
        for value in (marks or {}).get(metric.name, ()):
            axes.axhline(value, color="#555555", linestyle=":", linewidth=1.2, zorder=2)
            axes.annotate(f"clip {value:g}", (1.02, value), xycoords=("axes fraction", "data"), va="center")
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.85 * value), max(high, 1.15 * value))
    labels = list(dict.fromkeys(label for train, valid in panels.values() for label in (*train, *valid)))
    validated = any(valid for _, valid in panels.values())
    looks = {label: looks[label] if validated else Look(**{**looks[label], "marker": ""}) for label in labels}
    keys = {label: Line2D([], [], **one, linewidth=1.5) for label, one in looks.items()}
    if validated:
        keys["training"] = Line2D([], [], color="#777777")
        keys["validation"] = Line2D([], [], color="#777777", marker="o", linewidth=0.6)
    _legend(figure, [*keys.values()], [*keys])
    save_figure(figure, path)


def _legend(figure: Figure, handles: Sequence[Artist | Container], labels: Sequence[str]) -> None:
    """Puts a legend above the axes, in at most 4 columns, fewer where the figure is narrower, and makes room for it."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(min(len(labels), 4), 0, -1):
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + 0.19 * max(0, -(-len(labels) // columns) - 2))
            return
        legend.remove()


def _limit(axes: Axes, metric: Metric, points: pandas.DataFrame) -> None:
    if metric.limits:
        low, high = metric.limits
        axes.set_ylim(low, high + 0.02 * (high - low))
        return
    low, high = float(points["low"].to_numpy().min()), float(points["high"].to_numpy().max())
    room = 0.06 * (high - low) or 0.5
    axes.set_ylim(0 if 0 <= low < 0.4 * high else low - room, high + room)
    if low < 0 < high:
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)


def steps_in_a_mean(points: Sequence[Point]) -> int:
    """Steps of the centred mean that a curve of these points shows: about 1/25 of them; 1 below 50 points."""
    return 2 * (len(points) // 50) + 1


def smooth(points: Sequence[Point]) -> pandas.DataFrame:
    """Columns of `Point`; mean, low and high are centred means over `steps_in_a_mean`, over fewer at the ends."""
    frame = pandas.DataFrame(points)
    means = frame[["mean", "low", "high"]].rolling(steps_in_a_mean(points), center=True, min_periods=1).mean()
    return frame.assign(**{name: means[name] for name in means})


def save_figure(figure: Figure, path: Path) -> None:
    with new_file(path, "wb") as file:
        figure.savefig(file, format="png", facecolor="white")
