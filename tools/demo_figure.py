#!/usr/bin/env python3
"""The README's figure, docs/images/demo.svg, from the first accuracy table of docs/method.md (`make figure`)."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from megatron_solopo.evaluation.plots import look  # noqa: E402

TABLE, FIGURE = ROOT / "docs" / "method.md", ROOT / "docs" / "images" / "demo.svg"
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.hashsalt": "demo",  # the same file at each run
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}
CELL = re.compile(r"([\d.]+) \[([\d.]+), ([\d.]+)\]")


def read_table(markdown: str) -> tuple[list[int], dict[str, list[tuple[float, float, float]]]]:
    """Returns (context lengths, label -> (mean, lowest, highest) at each) of the first table with cells `0.9 [0.8,
    1.0]`."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    series: dict[str, list[tuple[float, float, float]]] = {}
    head: list[str] = []
    for row in rows:
        matches = [CELL.fullmatch(cell) for cell in row[1:]]
        if matches and all(matches):
            series[row[0]] = [(float(m[1]), float(m[2]), float(m[3])) for m in matches if m]
        elif series:
            break
        elif not set("".join(row)) <= set("-:"):
            head = row
    return [int(cell.split()[0]) for cell in head[1:]], series


@matplotlib.rc_context(STYLE)
def draw(path: Path, lengths: list[int], series: dict[str, list[tuple[float, float, float]]]) -> None:
    """One line per model, with the range over seeds as error bars, labelled at its right end."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    for shift, (label, style) in enumerate(look(list(series)).items()):
        means = [mean for mean, _, _ in series[label]]
        errors = [[m - low for m, low, _ in series[label]], [high - m for m, _, high in series[label]]]
        # Neighbouring lines would hide each other's error bars, so each is shifted by 1/50 of an octave.
        places = [length * 2 ** (0.02 * (shift - 2)) for length in lengths]
        axes.errorbar(
            places, means, yerr=errors, **style, label=label, linewidth=1.6, markersize=5, capsize=2.5, clip_on=False
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel("Facts in the context (preference pairs are sampled with 8)")
    axes.set_ylabel("Accuracy (sub-EM)")
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, facecolor="white", metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FIGURE, metavar="FILE.svg")
    path = parser.parse_args(argv).output
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, *read_table(TABLE.read_text(encoding="utf-8")))
    print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
