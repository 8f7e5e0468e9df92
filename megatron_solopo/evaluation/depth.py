"""The report's heat maps: accuracy by context length and depth of the evidence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib import colormaps
from matplotlib.figure import Figure

from megatron_solopo.evaluation.plots import save_figure, styled
from megatron_solopo.evaluation.results import LengthResult
from megatron_solopo.metrics import metric_of

Cells = Mapping[tuple[int, float], float]
"""(length, depth) -> mean score."""


def depth_parts(path: Path, results: Sequence[tuple[str, LengthResult]], metric: str, figures: list[Path]) -> list[str]:
    """Returns the heat map and its caption; [] where nothing was asked at several depths.

    Args:
        path: of the figure, which is added to ``figures``.
        results: (label, result) of one task; seeds of one label are averaged.
    """
    values: dict[str, dict[tuple[int, float], list[float]]] = {}
    for label, result in results:
        for depth, mean in result.depths.get(metric, {}).items():
            values.setdefault(label, defaultdict(list))[result.length, depth].append(mean)
    if not values:
        return []
    unit, title = results[0][1].unit, metric_of(metric).label
    draw_depths(
        path, {label: {cell: fmean(of) for cell, of in cells.items()} for label, cells in values.items()}, title, unit
    )
    figures.append(path)
    caption = f"{title} by context length and depth of the evidence: 0 % is the start of the context, 100 % its end"
    return [f"![{title} by length and depth]({path.name})", f"*{caption}.*"]


@styled
def draw_depths(path: Path, panels: Mapping[str, Cells], metric: str, unit: str) -> None:
    """Draws a panel a label; every cell shows its number, so that colour is not the only sign.

    Args:
        panels: label -> mean scores in [0, 1].
        metric, unit: names in the figure.
    """
    lengths = sorted({length for cells in panels.values() for length, _ in cells})
    depths = sorted({depth for cells in panels.values() for _, depth in cells})
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    width, height = max(2.6, 0.62 * len(lengths) + 1.0), max(2.0, 0.34 * len(depths) + 1.1)
    figure = Figure(figsize=(width * columns + 0.9, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    colours = colormaps["cividis"]  # even for colour-blind readers, from dark to light
    image = None
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_visible(False)
            continue
        label, cells = list(panels.items())[number]
        table = [[cells.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(table, cmap=colours, vmin=0, vmax=1, aspect="auto")
        axes.grid(visible=False)
        axes.set_title(label)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for row, of_depth in enumerate(table):
            for column, score in enumerate(of_depth):
                if score == score:
                    ink = "white" if score < 0.5 else "black"
                    axes.text(column, row, f"{score:.2f}", ha="center", va="center", color=ink, fontsize=7.5)
        if number % columns == 0:
            axes.set_ylabel("Depth of the evidence")
        if number + columns >= len(panels):
            axes.set_xlabel(f"Context length in {unit}")
            axes.xaxis.set_tick_params(labelbottom=True)
    assert image is not None, "no panel"
    figure.colorbar(image, ax=grid, label=metric, fraction=0.05)
    save_figure(figure, path)
