"""The report's section about training runs: curves, first and last metrics, time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas

from megatron_solopo.evaluation.plots import Look, draw_curves, steps_in_a_mean
from megatron_solopo.evaluation.results import Point, Run, curve, finite, labels_of
from megatron_solopo.evaluation.tables import markdown_table
from megatron_solopo.metrics import Metric, metric_of, of_records

Panels = Mapping[Metric, tuple[Mapping[str, Sequence[Point]], Mapping[str, Sequence[Point]]]]


def training_section(output: Path, runs: Sequence[Run], looks: dict[str, Look], figures: list[Path]) -> list[str]:
    """Returns the section's parts; what is drawn is added to ``figures``."""
    parts = ["## Training"]
    preference = [run for run in runs if any("margin" in record for record in (*run.train, *run.valid))]
    supervised = [run for run in runs if run not in preference]
    for name, group in (("training", preference), ("supervised", supervised)):
        panels: dict[Metric, tuple[dict[str, list[Point]], dict[str, list[Point]]]] = {}
        for metric in _measured(group):
            train, valid = (
                {label: points for label in labels_of(group) if (points := curve(group, label, metric.name, split))}
                for split in ("train", "valid")
            )
            if train or valid:
                panels[metric] = (train, valid)
        if not panels:
            continue
        figure = output.with_name(f"{output.stem}-{name}.png")
        records = [record for run in group for record in run.train if finite(record.get("clip_grad"))]
        # One far above all gradients would only press their curve flat.
        clips = sorted({one["clip_grad"] for one in records if one["clip_grad"] <= 3 * one["grad_norm"]})
        draw_curves(figure, panels, looks, {"grad_norm": clips})
        figures.append(figure)
        parts.append(f"![Training curves]({figure.name})")
        parts.append(f"*{_caption(name, group, panels, clips)}.*")
    parts += [
        markdown_table(_first_and_last(runs), text_columns=2),
        "*Each row is a mean over the examples that it counts; train: the first and the last tenth of the steps. A tie "
        "of two rewards counts half in the pair accuracy (0 in older runs); arrows point to the better end.*",
        markdown_table(_costs(runs), text_columns=2),
        "*Of all steps. Peak memory is that of the largest process; saves (checkpoints and exports) gather the weights "
        "and the optimizer's state and are measured apart, except in older runs.*",
    ]
    broken = [
        f"{run.label} ({count} steps)"
        for run in runs
        if (count := sum("loss" in record and not finite(record["loss"]) for record in run.train))
    ]
    if broken:
        parts.append(
            f"**The loss was not finite in {', '.join(broken)}; those steps are left out of the figures and means.**"
        )
    return parts


def _measured(runs: Sequence[Run]) -> list[Metric]:
    """Returns what the runs' steps and evaluations measure and a figure draws, with the labels that their losses
    declared."""
    more = {name: metric for run in runs for name, metric in run.metrics.items()}
    return of_records([record for run in runs for record in (*run.train, *run.valid)], more)


def _caption(name: str, runs: Sequence[Run], panels: Panels, clips: Sequence[float]) -> str:
    series = [points for train, _ in panels.values() for points in train.values()]
    notes = []
    if series:
        averaged = {steps_in_a_mean(points) for points in series}
        groups = [record["groups"] for run in runs for record in run.train if "groups" in record]
        lines = "show every step" if averaged == {1} else f"are centred means over {_between(averaged)} steps"
        notes.append(f"lines {lines}" + (f", each the mean over {_between(groups)} examples" if groups else ""))
    if any(valid for _, valid in panels.values()):
        examples = [record["groups"] for run in runs for record in run.valid if "groups" in record]
        notes.append("markers are evaluations" + (f" on {_between(examples)} validation examples" if examples else ""))
    if len(labels_of(runs)) < len(runs):
        notes.append("lines are means over seeds and bands reach from the lowest to the highest")
    if metric_of("alignment_loss") in panels:
        notes.append("the total loss is the preference loss + alpha x the alignment, which can rise from 0")
    if clips:
        notes.append("the dotted line is --clip-grad, to which larger gradients are scaled down")
    if name == "supervised":
        notes.append("the loss is in nats per token")
    elif len(labels_of(runs)) > 1:
        notes.append("losses of different methods are not comparable")
    return f"{'Preference training' if name == 'training' else 'Supervised training'}: {'; '.join(notes)}"


def _between(numbers: Iterable[int]) -> str:
    """``5`` or ``5 to 32``."""
    ordered = sorted(numbers)
    return f"{ordered[0]:,}" if ordered[0] == ordered[-1] else f"{ordered[0]:,} to {ordered[-1]:,}"


def _numbers(records: Iterable[Mapping[str, object]], name: str) -> np.ndarray:
    """Returns [records] float64; NaN where a record has no such number or it is not finite."""
    values = (record.get(name) for record in records)
    return np.array([float(value) if isinstance(value, int | float) and finite(value) else np.nan for value in values])


def _mean(values: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """Returns the mean of the values that are not NaN; NaN where there is none."""
    weighted = ~np.isnan(values) * weights
    return float(np.nansum(values * weights) / weighted.sum()) if weighted.sum() else np.nan


def _text(form: str, value: float) -> str:
    return "-" if np.isnan(value) else form.format(value)


def _first_and_last(runs: Sequence[Run]) -> pandas.DataFrame:
    """Returns the first and last steps of every run, and its first and last evaluation."""
    metrics = [metric for metric in _measured(runs) if metric.column]
    rows = []

    def add(run: Run, name: str, part: Sequence[Mapping[str, object]]) -> None:
        groups = _numbers(part, "groups")
        weights = np.nan_to_num(groups, nan=1.0)
        means = {metric.head: _mean(_numbers(part, metric.name), weights) for metric in metrics}
        examples = "-" if np.isnan(groups).any() else f"{weights.sum():,.0f}"
        cells = {head: _text("{:.3f}", mean) for head, mean in means.items()}
        rows.append({"label": run.label, "of": name, "examples": examples} | cells)

    for run in runs:
        steps = [record for record in run.train if finite(record.get("loss"))]
        tenth = max(1, len(steps) // 10)
        for part in (steps[:tenth], steps[-tenth:])[: min(len(steps), 2)]:
            first, last = part[0]["step"], part[-1]["step"]
            add(run, f"train, step{'s' if last > first else ''} {_between([first, last])}", part)
        for record in (*run.valid[:1], *run.valid[1:][-1:]):
            step = record["step"]
            add(run, f"validation, {f'after step {step:,}' if step else 'before step 1'}", [record])
    return pandas.DataFrame(rows, columns=["label", "of", "examples", *(metric.head for metric in metrics)])


def _costs(runs: Sequence[Run]) -> pandas.DataFrame:
    """Returns what every run took."""
    means = {"tokens_per_second": "{:,.0f}", "padding_share": "{:.3f}", "seconds": "{:.3g}"}
    rows = []
    for run in runs:
        clipped = any("clip_grad" in record for record in run.train)
        peaks = [max(_numbers(records, "memory_gib"), default=np.nan) for records in (run.train, run.saves)]
        sums = {name: np.nansum(_numbers(run.train, name)) for name in ("clipped", "tokens", "seconds")}
        rows.append(
            {
                "label": run.label,
                "folder": f"`{run.folder}`",
                "steps": f"{len(run.train):,}",
                metric_of("clipped").label: f"{sums['clipped']:,.0f}" if clipped else "-",
                metric_of("tokens").label: f"{sums['tokens']:,.0f}",
                **{metric_of(n).label: _text(form, _mean(_numbers(run.train, n))) for n, form in means.items()},
                "minutes": f"{sums['seconds'] / 60:.1f}",
                metric_of("memory_gib").head: _text("{:.2f}", peaks[0]),
                "peak in saves (GiB)": _text("{:.2f}", peaks[1]),
            }
        )
    return pandas.DataFrame(rows)
