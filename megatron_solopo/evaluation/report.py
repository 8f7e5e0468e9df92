"""A report of runs and evaluations: Markdown with tables, and figures beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.atomic import write_text
from megatron_solopo.data.options import check_outputs
from megatron_solopo.data.scoring import SCORERS
from megatron_solopo.errors import UserError, require
from megatron_solopo.evaluation.curves import training_section
from megatron_solopo.evaluation.results import (
    Evaluation,
    LengthResult,
    Point,
    Run,
    accuracy_by_length,
    intervals_text,
    labelled,
    labels_of,
    metrics_file,
    read_evaluations,
    read_runs,
)
from megatron_solopo.evaluation.tables import markdown_table
from megatron_solopo.metrics import metric_of


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
        metric: the one that is drawn, a key of `SCORERS`.

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
        parts += training_section(output, runs, looks, figures)
    if closing:
        parts.append(closing.strip())
    write_text(output, "\n\n".join(parts) + "\n")
    return output, figures


def accuracy_table(evaluations: Sequence[Evaluation], unit: str, metric: str = "sub_em") -> str:
    """A Markdown table, one row a label and one column a context length in ``unit``.

    A cell is ``mean [low, high]``: the 95 % interval of a single evaluation, lowest and highest of several.
    """
    return _by_length(
        evaluations,
        unit,
        metric_of(metric).label,
        lambda point: f"{point.mean:.2f} [{point.low:.2f}, {point.high:.2f}]",
        [metric],
    )


def _other_metrics_table(evaluations: Sequence[Evaluation], unit: str, metrics: list[str]) -> str:
    name = " / ".join(metric_of(metric).label for metric in metrics)
    return _by_length(evaluations, unit, name, lambda point: f"{point.mean:.2f}", metrics)


def _by_length(
    evaluations: Sequence[Evaluation], unit: str, name: str, cell: Callable[[Point], str], metrics: list[str]
) -> str:
    """A row a label; a cell holds what ``cell`` writes of each metric, "-" where a file has none."""
    lengths = _lengths(evaluations, unit)
    rows = []
    for label in labels_of(evaluations):
        found = [
            {point.x: point for point in accuracy_by_length(evaluations, label, unit, metric)} for metric in metrics
        ]
        if any(found):
            cells = (
                [cell(points[length]) if length in points else "-" for points in found]
                if any(length in points for points in found)
                else ["-"]
                for length in lengths
            )
            rows.append([label, *map(" / ".join, cells)])
    return markdown_table([name, *(f"{length:,} {unit}" for length in lengths)], rows)


def _measured(evaluations: Sequence[Evaluation]) -> list[str]:
    """Every metric that some file has: ours in their order, then others."""
    names = dict.fromkeys(name for one in evaluations for result in one.results for name in result.means)
    return list(dict.fromkeys([*(name for name in SCORERS if name in names), *names]))


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
    measured = _measured(evaluations)
    if metric not in measured:
        raise UserError(f"--metric {metric}: no evaluation has it; give one of {', '.join(measured)}")
    parts = ["## Accuracy by context length"]
    units = list(dict.fromkeys(result.unit for evaluation in evaluations for result in evaluation.results))
    for unit in units:
        series = {label: points for label in labels if (points := accuracy_by_length(evaluations, label, unit, metric))}
        if not series:
            continue
        results = [(one.label, result) for one in evaluations for result in one.results if result.unit == unit]
        tokens = {
            length: _mean([result.mean_prompt_tokens for _, result in results if result.length == length])
            for length in _lengths(evaluations, unit)
        }
        figure = output.with_name(f"{output.stem}-accuracy{'' if len(units) == 1 else '-' + unit}.png")
        draw_accuracy(figure, series, looks, metric_of(metric).label, unit, tokens)
        figures.append(figure)
        parts.append(f"![{metric_of(metric).label} by context length in {unit}]({figure.name})")
        parts.append(
            f"*{metric_of(metric).label} by context length; {_questions(results)}. "
            f"{_spread([point.seeds for points in series.values() for point in points], _method(results, metric))}.*"
        )
        parts.append(accuracy_table(evaluations, unit, metric))
        parts.append(_other_metrics_table(evaluations, unit, [other for other in measured if other != metric]))
        parts += _cut_answers(results)
    rows = [
        [
            e.label,
            f"`{_shown(e.model)}`",
            f"`{', '.join(map(_shown, e.data.split(', ')))}`",
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


def _spread(seeds: Sequence[int], method: str) -> str:
    """What the bars of points are, by the number of evaluations in each; ``method``: how intervals were computed."""
    if max(seeds) == 1:
        return f"Bars and brackets are 95 % intervals over questions{method}"
    over_seeds = "Points are means over seeds, bars and brackets the lowest and highest seed"
    single = f"; with a single seed, the 95 % interval over questions{method}"
    return over_seeds if min(seeds) > 1 else over_seeds + single


def _method(results: Sequence[tuple[str, LengthResult]], metric: str) -> str:
    """How the intervals of a metric were computed, in brackets."""
    # Older files do not say; theirs of 0 / 1 metrics are Wilson's too.
    known = [result.methods or {"sub_em": "wilson", "em": "wilson"} for _, result in results]
    text = intervals_text({metric: one[metric]} for one in known if metric in one)
    return f" ({text.partition(': ')[2]})" if text else ""


def _cut_answers(results: Sequence[tuple[str, LengthResult]]) -> list[str]:
    """How many answers of each label were cut, in a sentence; [] where none was."""
    counts: dict[str, list[int]] = {}
    for label, result in results:
        for place, number in enumerate((result.cut or 0, result.count if result.cut is not None else 0)):
            counts.setdefault(label, [0, 0])[place] += number
    cut = [f"{label} {some:,} of {asked:,}" for label, (some, asked) in counts.items() if some]
    text = f"Answers cut at --max-new-tokens, scored as far as they go: {'; '.join(cut)}."
    return [text] if cut else []


def _shown(name: str) -> str:
    """A path as seen from the current folder where it lies inside."""
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else name


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def build_parser() -> Parser:
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
        "--metric", choices=list(SCORERS), default="sub_em", help="the metric that is drawn (default: %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """``solopo report``."""
    args = build_parser().parse_args(argv)
    for package in ("matplotlib", "pandas", "tabulate"):
        require("solopo report", package, "report")
    read = [("--evaluations", labelled(argument, "")[1]) for argument in args.evaluations]
    read += [("--runs", metrics_file(labelled(argument, "")[1])) for argument in args.runs]
    check_outputs([("--output", args.output)], read)
    path, figures = write_report(
        args.output,
        read_runs(args.runs, required=not args.evaluations),
        read_evaluations(args.evaluations),
        title=args.title,
        metric=args.metric,
    )
    print(f"wrote {path} and {len(figures)} {'figure' if len(figures) == 1 else 'figures'} beside it")
    return 0
