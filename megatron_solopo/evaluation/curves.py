"""The report's section about training runs: curves, what was learnt, what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_solopo.evaluation.results import Run, curve, finite, labels_of
from megatron_solopo.evaluation.tables import markdown_table

PREFERENCE_PANELS = {
    "Total loss": ("loss", "nats"),
    "Preference loss": ("po_loss", "nats"),
    "Alignment": ("alignment_loss", "before alpha"),
    "Margin": ("margin", "reward, chosen - rejected"),
    "Reward of chosen": ("reward_chosen", "reward"),
    "Reward of rejected": ("reward_rejected", "reward"),
    "Reward of chosen, long context": ("reward_long_chosen", "reward"),
    "Reward of rejected, long context": ("reward_long_rejected", "reward"),
    "Log-prob of chosen": ("logp_chosen", "nats an answer"),
    "Likelihood term": ("sft_loss", "before its weight"),
    "Pair accuracy": ("accuracy", "share ranked right"),
    "Short-long gap": ("short_long_gap_nats_per_token", "nats per token"),
    "Gradient norm": ("grad_norm", "before clipping"),
}
"""Panels of preference training, those that some run has: title -> (field of metrics.jsonl, name of the axis)."""

SUPERVISED_PANELS = {"Supervised loss": ("loss", "nats per token"), "Gradient norm": ("grad_norm", "before clipping")}

LEARNT_COLUMNS = {
    "loss": "loss",
    "po_loss": "preference loss",
    "alignment_loss": "alignment",
    "reward_chosen": "reward chosen",
    "reward_rejected": "reward rejected",
    "margin": "margin",
    "accuracy": "pair accuracy",
    "logp_chosen": "log-prob chosen",
    "short_long_gap_nats_per_token": "short-long gap (nats per token)",
}
"""Columns of the table of what was learnt: means over examples."""


def training_section(
    output: Path, runs: Sequence[Run], looks: dict[str, dict[str, str]], figures: list[Path]
) -> list[str]:
    """The section's parts; what is drawn is added to ``figures``."""
    from megatron_solopo.evaluation.plots import draw_curves

    parts = ["## Training"]
    preference = [run for run in runs if any("margin" in record for record in (*run.train, *run.valid))]
    supervised = [run for run in runs if run not in preference]
    for name, group, wanted in (
        ("training", preference, PREFERENCE_PANELS),
        ("supervised", supervised, SUPERVISED_PANELS),
    ):
        panels = {}
        for title, (field, y_name) in wanted.items():
            train, valid = (
                {label: points for label in labels_of(group) if (points := curve(group, label, field, split))}
                for split in ("train", "valid")
            )
            if train or valid:
                panels[title] = (y_name, train, valid)
        if not panels:
            continue
        figure = output.with_name(f"{output.stem}-{name}.png")
        records = [record for run in group for record in run.train if "clip_grad" in record]
        # One far above all gradients would only press their curve flat.
        clips = sorted({one["clip_grad"] for one in records if one["clip_grad"] <= 3 * one["grad_norm"]})
        draw_curves(figure, panels, looks, {"Gradient norm": clips})
        figures.append(figure)
        parts.append(f"![Training curves]({figure.name})")
        parts.append(f"*{_caption(name, group, panels, clips)}.*")
    parts += [
        markdown_table(*_learnt(runs), text_columns=2),
        "*Each row is a mean over the examples that it counts; train: the first and the last tenth of the steps. A tie "
        "of two rewards counts half in the pair accuracy (0 in older runs).*",
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


def _caption(name: str, runs: Sequence[Run], panels: Mapping[str, Any], clips: Sequence[float]) -> str:
    from megatron_solopo.evaluation.plots import steps_in_a_mean

    series = [points for _, train, _ in panels.values() for points in train.values()]
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
    if any(valid for _, _, valid in panels.values()):
        examples = sorted({record["groups"] for run in runs for record in run.valid if "groups" in record})
        notes.append("markers are evaluations" + (f" on {_between(examples)} validation examples" if examples else ""))
    if len(labels_of(runs)) < len(runs):
        notes.append("lines are means over seeds and bands reach from the lowest to the highest")
    if "Alignment" in panels:
        notes.append("the total loss is the preference loss + alpha x the alignment, which can rise from 0")
    if clips:
        notes.append("the dotted line is --clip-grad, to which larger gradients are scaled down")
    if name == "training" and len(labels_of(runs)) > 1:
        notes.append("losses of different methods are not comparable")
    return f"{'Preference training' if name == 'training' else 'Supervised training'}: {'; '.join(notes)}"


def _between(numbers: Sequence[int]) -> str:
    """``5`` or ``5 to 32``; ascending."""
    return f"{numbers[0]:,}" if numbers[0] == numbers[-1] else f"{numbers[0]:,} to {numbers[-1]:,}"


def _learnt(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the first and last steps of every run, and its first and last evaluation."""
    records = [record for run in runs for record in (*run.train, *run.valid)]
    columns = [field for field in LEARNT_COLUMNS if any(finite(record.get(field)) for record in records)]
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
            _weighted([(record.get(field), weight) for record, weight in zip(part, weights, strict=True)])
            for field in columns
        ]
        cells.append([label, name, examples, *("-" if mean is None else f"{mean:.3f}" for mean in means)])
    return ["label", "of", "examples", *(LEARNT_COLUMNS[field] for field in columns)], cells


def _costs(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what every run took."""
    head = ["label", "folder", "steps", "clipped", "tokens", "tokens per second", "padding share", "seconds a step"]
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
    return [*head, "minutes", "peak memory (GiB)", "peak in saves (GiB)"], rows


def _peak(records: Sequence[dict[str, Any]]) -> str:
    memory = [record["memory_gib"] for record in records if "memory_gib" in record]
    return f"{max(memory):.2f}" if memory else "-"


def _weighted(values: Sequence[tuple[Any, float]]) -> float | None:
    """The mean of (value, weight) over the values that are finite."""
    known = [(value, weight) for value, weight in values if finite(value)]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None
