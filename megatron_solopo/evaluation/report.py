"""A report of runs and evaluations: Markdown with tables, and figures beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.data.options import check_outputs
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.results import (
    METRICS,
    Evaluation,
    LengthResult,
    Point,
    Run,
    accuracy_by_length,
    curve,
    finite,
    labelled,
    labels_of,
    metrics_file,
    read_evaluations,
    read_runs,
)

PREFERENCE_PANELS = {
    "Loss": ("loss", "total loss"),
    "Margin": ("margin", "reward chosen - rejected"),
    "Pair accuracy": ("accuracy", "share of pairs ranked right"),
    "Short-long gap": ("short_long_gap_nats_per_token", "nats per token"),
}
"""Panels of preference training: title -> (field of metrics.jsonl, name of the axis)."""

SUPERVISED_PANELS = {"Supervised loss": ("loss", "nats per token")}

RUN_COLUMNS = {
    "loss": "loss",
    "margin": "margin",
    "accuracy": "pair accuracy",
    "short_long_gap_nats_per_token": "short-long gap (nats per token)",
    "tokens_per_second": "tokens per second",
    "padding_share": "padding share",
}
"""Columns of the table of runs that are means over the last tenth of the steps."""


def write_report(
    output: str | Path,
    runs: Sequence[Run] = (),
    evaluations: Sequence[Evaluation] = (),
    title: str = "Report",
    text: str = "",
    closing: str = "",
    metric: str = "sub_em",
) -> tuple[Path, list[Path]]:
    """Writes the Markdown file and its figures (``<name>-*.png`` beside it); returns the paths of both.

    Runs and evaluations with the same label are seeds of one thing: they are averaged, and the spread is shown.

    Args:
        text, closing: Markdown put after the title and at the end.
        metric: the one that is drawn, a key of `METRICS`.

    Raises:
        UserError: nothing to report.
    """
    from megatron_solopo.evaluation.plots import look

    output = Path(output)
    if not runs and not evaluations:
        raise UserError("nothing to report: give --runs, --evaluations or both")
    output.parent.mkdir(parents=True, exist_ok=True)
    looks = look(labels_of(evaluations, runs))
    parts = [f"# {title}"]
    figures: list[Path] = []
    if text:
        parts.append(text.strip())
    if evaluations:
        parts += _accuracy_section(output, evaluations, looks, metric, figures)
    if runs:
        parts += _training_section(output, runs, looks, figures)
    if closing:
        parts.append(closing.strip())
    aside = output.with_name(output.name + ".partial")
    aside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    aside.replace(output)
    return output, figures


def accuracy_table(evaluations: Sequence[Evaluation], unit: str, metric: str = "sub_em") -> str:
    """A Markdown table, one row a label and one column a context length in ``unit``.

    A cell is ``mean [low, high]``: the 95 % interval of a single evaluation, lowest and highest of several.
    """
    return _by_length(
        evaluations,
        unit,
        METRICS[metric],
        lambda points: "{0.mean:.2f} [{0.low:.2f}, {0.high:.2f}]".format(*points),
        [metric],
    )


def _other_metrics_table(evaluations: Sequence[Evaluation], unit: str, metrics: list[str]) -> str:
    name = " / ".join(METRICS[metric] for metric in metrics)
    return _by_length(
        evaluations, unit, name, lambda points: " / ".join(f"{point.mean:.2f}" for point in points), metrics
    )


def _by_length(
    evaluations: Sequence[Evaluation], unit: str, name: str, cell: Callable[[list[Point]], str], metrics: list[str]
) -> str:
    lengths = _lengths(evaluations, unit)
    rows = []
    for label in labels_of(evaluations):
        found = [
            {point.x: point for point in accuracy_by_length(evaluations, label, unit, metric)} for metric in metrics
        ]
        if found[0]:
            rows.append(
                [
                    label,
                    *(cell([points[length] for points in found]) if length in found[0] else "-" for length in lengths),
                ]
            )
    return markdown_table([name, *(f"{length:,} {unit}" for length in lengths)], rows)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table, its columns padded so that it reads as text too.

    Columns after the first ``text_columns`` are set to the right.
    """
    table = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[column]) for row in table)) for column in range(len(head))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in table
    ]
    rule = (
        "|"
        + "|".join("-" * (width + 1) + ("-" if column < text_columns else ":") for column, width in enumerate(widths))
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def _lengths(evaluations: Sequence[Evaluation], unit: str) -> list[int]:
    return sorted({result.length for evaluation in evaluations for result in evaluation.results if result.unit == unit})


def _accuracy_section(
    output: Path,
    evaluations: Sequence[Evaluation],
    looks: dict[str, dict[str, str]],
    metric: str,
    figures: list[Path],
) -> list[str]:
    """The section's parts; what is drawn is added to ``figures``."""
    from megatron_solopo.evaluation.plots import draw_accuracy

    labels = labels_of(evaluations)
    parts = ["## Accuracy by context length"]
    units = list(dict.fromkeys(result.unit for evaluation in evaluations for result in evaluation.results))
    for unit in units:
        series = {label: points for label in labels if (points := accuracy_by_length(evaluations, label, unit, metric))}
        results = [(one.label, result) for one in evaluations for result in one.results if result.unit == unit]
        tokens = {
            length: _mean([result.mean_prompt_tokens for _, result in results if result.length == length])
            for length in _lengths(evaluations, unit)
        }
        figure = output.with_name(f"{output.stem}-accuracy{'' if len(units) == 1 else '-' + unit}.png")
        draw_accuracy(figure, series, looks, METRICS[metric], unit, tokens)
        figures.append(figure)
        parts.append(f"![{METRICS[metric]} by context length in {unit}]({figure.name})")
        parts.append(
            f"*{METRICS[metric]} by context length; {_questions(results)}. "
            f"{_spread([point.seeds for points in series.values() for point in points])}.*"
        )
        parts.append(accuracy_table(evaluations, unit, metric))
        parts.append(_other_metrics_table(evaluations, unit, [other for other in METRICS if other != metric]))
    rows = [
        [
            e.label,
            f"`{e.model}`",
            f"`{e.data}`",
            *(str(e.settings.get(key, "-")) for key in ("seed", "max_new_tokens", "dtype", "device")),
        ]
        for e in evaluations
    ]
    parts += [
        "Where the numbers come from:",
        markdown_table(
            ["label", "model", "questions", "seed", "new tokens at most", "dtype", "device"], rows, text_columns=3
        ),
    ]
    return parts


def _questions(results: Iterable[tuple[str, LengthResult]]) -> str:
    """How many questions were asked, from (label, result) of what is drawn."""
    by_label: dict[str, set[int]] = {}
    for label, result in results:
        by_label.setdefault(label, set()).add(result.count)
    counts = sorted(set().union(*by_label.values()))
    number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    # Files of one label can have left different questions out.
    same = all(len(some) == 1 for some in by_label.values())
    return f"{number} questions" + (", the same at every length" if same else "")


def _spread(seeds: Sequence[int]) -> str:
    """What the bars of points are, by the number of evaluations in each."""
    if max(seeds) == 1:
        return "Bars and brackets are 95 % intervals over questions"
    over_seeds = "Points are means over seeds, bars and brackets the lowest and highest seed"
    return over_seeds if min(seeds) > 1 else f"{over_seeds}; with a single seed, the 95 % interval over questions"


def _training_section(
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
        draw_curves(figure, panels, looks)
        figures.append(figure)
        parts.append(f"![Training curves]({figure.name})")
        notes = ["a centred mean over 1/25 of the steps"]
        if any(valid for _, _, valid in panels.values()):
            notes.append("markers are evaluation steps")
        if len(labels_of(group)) < len(group):
            notes.append("lines are means over seeds and bands reach from the lowest to the highest")
        if name == "training":
            notes.append("losses of different methods are not comparable")
        parts.append(f"*{'Preference training' if name == 'training' else 'Supervised training'}: {'; '.join(notes)}.*")
    columns = [field for field in RUN_COLUMNS if any(field in record for run in runs for record in run.train)]
    rows = [[run.label, f"`{run.folder}`", *_run_row(run, columns)] for run in runs]
    parts.append(
        markdown_table(
            [
                "label",
                "folder",
                "steps",
                *(RUN_COLUMNS[field] for field in columns),
                "tokens",
                "minutes",
                "peak memory (GiB)",
            ],
            rows,
            text_columns=2,
        )
    )
    parts.append("*Means over the last tenth of the steps; tokens and minutes are of all steps.*")
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


def _run_row(run: Run, columns: Sequence[str]) -> list[str]:
    last = run.train[-max(1, len(run.train) // 10) :]
    cells = [f"{len(run.train):,}"]
    for field in columns:
        mean = _mean([record[field] for record in last if finite(record.get(field))])
        cells.append("-" if mean is None else f"{mean:,.0f}" if field == "tokens_per_second" else f"{mean:.3f}")
    cells.append(f"{sum(record.get('tokens', 0) for record in run.train):,}")
    cells.append(f"{sum(record.get('seconds', 0.0) for record in run.train) / 60:.1f}")
    memory = [record["memory_gib"] for record in run.train if "memory_gib" in record]
    return [*cells, f"{max(memory):.2f}" if memory else "-"]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="solopo report",
        description="Draws training curves and accuracy by context length, and writes them with tables as Markdown.",
    )
    inputs = parser.add_argument_group(
        "input", "The same LABEL several times means several seeds: they are averaged, and their spread is shown."
    )
    inputs.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="[LABEL=]DIR",
        help="run folders (metrics.jsonl is read); LABEL defaults to the folder's name, with those above it where "
        "that tells runs apart",
    )
    inputs.add_argument(
        "--evaluations",
        nargs="+",
        default=[],
        metavar="[LABEL=]FILE",
        help="results written by evaluate; LABEL defaults to the name of the model's folder, with those above it "
        "where that tells models apart",
    )
    outputs = parser.add_argument_group("output")
    outputs.add_argument(
        "--output", required=True, metavar="FILE.md", help="the Markdown file; the figures go beside it"
    )
    outputs.add_argument("--title", default="Report", help="first line of the report (default: %(default)s)")
    outputs.add_argument(
        "--metric", choices=list(METRICS), default="sub_em", help="the metric that is drawn (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """``solopo report``."""
    args = build_parser().parse_args(argv)
    read = [("--evaluations", labelled(argument, "")[1]) for argument in args.evaluations]
    read += [("--runs", metrics_file(labelled(argument, "")[1])) for argument in args.runs]
    check_outputs([("--output", args.output)], read)
    path, figures = write_report(
        args.output,
        read_runs(args.runs),
        read_evaluations(args.evaluations),
        title=args.title,
        metric=args.metric,
    )
    print(f"wrote {path} and {len(figures)} {'figure' if len(figures) == 1 else 'figures'} beside it")
    return 0
