"""The report's section about training runs: curves, what was learnt, what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_solopo.evaluation.results import Run, curve, finite, labels_of
from megatron_solopo.evaluation.tables import markdown_table
from megatron_solopo.metrics import Metric, metric_of, of_records


def training_section(
    output: Path, runs: Sequence[Run], looks: dict[str, dict[str, str]], figures: list[Path]
) -> list[str]:
    """The section's parts; what is drawn is added to ``figures``."""
    from megatron_solopo.evaluation.plots import draw_curves

    parts = ["## Training"]
    preference = [run for run in runs if any("margin" in record for record in (*run.train, *run.valid))]
    supervised = [run for run in runs if run not in preference]
    for name, group in (("training", preference), ("supervised", supervised)):
        panels = {}
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
        markdown_table(*_learnt(runs), text_columns=2),
        "*Each row is a mean over the examples that it counts; train: the first and the last tenth of the steps. A tie "
        "of two rewards counts half in the pair accuracy (0 in older runs); arrows point to the better end.*",
        markdown_table(*_costs(runs), text_columns=2),
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
    """What the runs' steps and evaluations measure and a figure draws, with the labels that their losses declared."""
    more = {name: metric for run in runs for name, metric in run.metrics.items()}
    return of_records([record for run in runs for record in (*run.train, *run.valid)], more)


def _caption(name: str, runs: Sequence[Run], panels: Mapping[Metric, Any], clips: Sequence[float]) -> str:
    from megatron_solopo.evaluation.plots import steps_in_a_mean

    series = [points for train, _ in panels.values() for points in train.values()]
    notes = []
    if series:
        averaged = sorted({steps_in_a_mean(points) for points in series})
        groups = sorted({record["groups"] for run in runs for record in run.train if "groups" in record})
        of_a_step = f", each the mean over {_between(groups)} examples" if groups else ""
        notes.append(
            f"lines show every step{of_a_step}"
            if averaged == [1]
            else f"lines are centred means over {_between(averaged)} steps{of_a_step}"
        )
    if any(valid for _, valid in panels.values()):
        examples = sorted({record["groups"] for run in runs for record in run.valid if "groups" in record})
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


def _between(numbers: Sequence[int]) -> str:
    """``5`` or ``5 to 32``; ascending."""
    return f"{numbers[0]:,}" if numbers[0] == numbers[-1] else f"{numbers[0]:,} to {numbers[-1]:,}"


def _learnt(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the first and last steps of every run, and its first and last evaluation."""
    columns = [metric for metric in _measured(runs) if metric.column]
    rows = []
    for run in runs:
        steps = [record for record in run.train if finite(record.get("loss"))]
        tenth = max(1, len(steps) // 10)
        some = {steps[0]["step"]: steps[:tenth], steps[-tenth]["step"]: steps[-tenth:]} if steps else {}
        for part in some.values():
            first, last = part[0]["step"], part[-1]["step"]
            rows.append([run.label, f"train, step{'s' if last > first else ''} {_between([first, last])}", part])
        for record in {one["step"]: one for one in (*run.valid[:1], *run.valid[-1:])}.values():
            step = record["step"]
            rows.append([run.label, f"validation, {f'after step {step:,}' if step else 'before step 1'}", [record]])
    cells = []
    for label, name, part in rows:
        weights = [record.get("groups", 1) for record in part]
        examples = f"{sum(weights):,}" if all("groups" in record for record in part) else "-"
        means = [
            _weighted([(record.get(metric.name), weight) for record, weight in zip(part, weights, strict=True)])
            for metric in columns
        ]
        cells.append([label, name, examples, *("-" if mean is None else f"{mean:.3f}" for mean in means)])
    return ["label", "of", "examples", *(metric.head for metric in columns)], cells


def _costs(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what every run took."""
    shown = ("clipped", "tokens", "tokens_per_second", "padding_share", "seconds")
    head = ["label", "folder", "steps", *(metric_of(name).label for name in shown)]
    rows = []
    for run in runs:
        means = (
            (text, _weighted([(record.get(field), 1) for record in run.train]))
            for field, text in (("tokens_per_second", "{:,.0f}"), ("padding_share", "{:.3f}"), ("seconds", "{:.3g}"))
        )
        told = any("clip_grad" in record for record in run.train)
        cells = [
            f"{len(run.train):,}",
            f"{sum(record.get('clipped', 0) for record in run.train):,}" if told else "-",
            f"{sum(record.get('tokens', 0) for record in run.train):,}",
            *("-" if mean is None else text.format(mean) for text, mean in means),
            f"{sum(record.get('seconds', 0.0) for record in run.train) / 60:.1f}",
            *(_peak(records) for records in (run.train, run.saves)),
        ]
        rows.append([run.label, f"`{run.folder}`", *cells])
    return [*head, "minutes", metric_of("memory_gib").head, "peak in saves (GiB)"], rows


def _peak(records: Sequence[dict[str, Any]]) -> str:
    memory = [record["memory_gib"] for record in records if "memory_gib" in record]
    return f"{max(memory):.2f}" if memory else "-"


def _weighted(values: Sequence[tuple[Any, float]]) -> float | None:
    """The mean of (value, weight) over the values that are finite."""
    known = [(value, weight) for value, weight in values if finite(value)]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None
