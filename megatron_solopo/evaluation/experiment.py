"""The report of an experiment: accuracy by context length and what the training took, over seeds.

It reads the results that a recipe with a ``matrix:`` keeps (`matrix.py`): evaluation files with further fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas

from megatron_solopo.evaluation.plots import draw_cost, look
from megatron_solopo.evaluation.report import write_report
from megatron_solopo.evaluation.results import Evaluation, accuracy_by_length, labels_of, read_evaluation
from megatron_solopo.evaluation.tables import markdown_table
from megatron_solopo.metrics import metric_of

METRIC = "sub_em"

Kept = dict[str, Any]
"""A result as JSON holds it."""

COLUMNS: dict[str, tuple[str, float, str]] = {
    "steps": ("steps", 1, "{:,.0f}"),
    "tokens": ("tokens (thousand)", 1e3, "{:,.0f}"),
    "flops": ("FLOPs (10^12)", 1e12, "{:.3g}"),
    "cpu_seconds": ("processor seconds", 1, "{:.0f}"),
    "seconds": ("seconds", 1, "{:.0f}"),
}
"""A number of a training run -> its column, the size of the unit, its format."""

NOTE = (
    "*Mean [lowest, highest] over seeds. FLOPs: of the model for these examples, forward and backward, without "
    "padding, recomputation and the reference's forward passes. Seconds: of the whole command, its start included; "
    "processor seconds are those of all its processes.*"
)


def write_experiment(folder: Path, name: str, runs: Mapping[str, Sequence[Path]]) -> Path:
    """Writes report.md and its figures; returns its path.

    Args:
        name: of the recipe.
        runs: label -> results of its seeds.
    """
    evaluations = [read_evaluation(f"{label}={file}") for label, files in runs.items() for file in files]
    records = {label: [json.loads(file.read_text(encoding="utf-8")) for file in files] for label, files in runs.items()}
    seeds = {label: ", ".join(str(one["seed"]) for one in each) for label, each in records.items()}
    same = len(set(seeds.values())) == 1
    of_each = next(iter(seeds.values())) if same else "; ".join(f"{label}: {each}" for label, each in seeds.items())
    closing = ["## Training", _costs(records), NOTE]
    if figure := _draw(folder / "report-cost.png", records, evaluations):
        closing.append(f"![Accuracy against the operations of training]({figure.name})")
    report, _ = write_report(
        folder / "report.md",
        evaluations=evaluations,
        title=name,
        text=f"Written by `solopo run` of `{name}.yaml` from the results beside it. Seeds: {of_each}.",
        closing="\n\n".join(closing),
        metric=METRIC,
    )
    return report


def _costs(records: Mapping[str, Sequence[Kept]]) -> str:
    """Returns the table of what the training of each label took; the stages of a run are added up."""
    rows = []
    for label, of_seeds in records.items():
        trained = [record["training"] for record in of_seeds if record["training"]]
        responses = [" x ".join(f"{n:.3g}" for n in stages[-1]["responses"].values()) for stages in trained]
        row = {"label": label, "responses of a group": ", ".join(dict.fromkeys(responses)) or "-"}
        for column, (head, size, form) in COLUMNS.items():
            row[head] = _spread([sum(stage[column] for stage in stages) / size for stages in trained], form)
        rows.append(row)
    return markdown_table(pandas.DataFrame(rows))


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    mean, low, high = (form.format(value) for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} [{low}, {high}]"


def _draw(path: Path, records: Mapping[str, Sequence[Kept]], evaluations: Sequence[Evaluation]) -> Path | None:
    """Draws accuracy at the longest length against the operations of training; None where nothing was trained."""
    length, unit = max((result.length, result.unit) for one in evaluations for result in one.results)
    operations = {
        label: [sum(stage["flops"] for stage in record["training"]) for record in of_seeds if record["training"]]
        for label, of_seeds in records.items()
    }
    points = {
        label: (fmean(operations[label]), point)
        for label in labels_of(evaluations)
        for point in accuracy_by_length(evaluations, label, unit, METRIC)
        if point.x == length and operations[label]
    }
    if not points:
        return None
    draw_cost(path, points, look(labels_of(evaluations)), f"{metric_of(METRIC).label} at {length:,} {unit}")
    return path
