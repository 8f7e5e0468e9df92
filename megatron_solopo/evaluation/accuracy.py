"""The report's section about evaluations: accuracy by context length, and where the numbers come from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import pandas

from megatron_solopo.data.scoring import SCORERS
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.depth import depth_parts
from megatron_solopo.evaluation.intervals import intervals_text
from megatron_solopo.evaluation.paired import paired_parts
from megatron_solopo.evaluation.plots import Look, draw_accuracy
from megatron_solopo.evaluation.results import Evaluation, LengthResult, Point, accuracy_by_length, labels_of
from megatron_solopo.evaluation.tables import markdown_table
from megatron_solopo.metrics import metric_of

DEFAULT_METRIC = "sub_em"
"""The metric that is drawn unless --metric names another; tasks of a benchmark show the benchmark's own."""


def accuracy_section(
    output: Path, evaluations: Sequence[Evaluation], looks: dict[str, Look], metric: str, figures: list[Path]
) -> list[str]:
    """Returns the section's parts; what is drawn is added to ``figures``.

    Args:
        metric: drawn where it was measured, else the first metric of a task.

    Raises:
        UserError: no evaluation has ``metric``.
    """
    names = dict.fromkeys(name for one in evaluations for result in one.results for name in result.means)
    measured = list(dict.fromkeys([*(name for name in SCORERS if name in names), *names]))  # ours in their order
    only_tasks = all(result.task for one in evaluations for result in one.results)
    if metric not in measured and not (only_tasks and metric == DEFAULT_METRIC):
        raise UserError("metric-unknown", f"--metric {metric}: no evaluation has it; set one of {', '.join(measured)}")
    parts = ["## Accuracy by context length"]
    asked = list(dict.fromkeys((result.task, result.unit) for one in evaluations for result in one.results))
    for task, unit in asked:
        results = [(one.label, result) for one in evaluations for result in one.results]
        results = [(label, result) for label, result in results if (result.task, result.unit) == (task, unit)]
        of_task = [name for name in measured if any(name in result.means for _, result in results)]
        wanted = metric in of_task and not (task and metric == DEFAULT_METRIC)
        drawn = metric if wanted else next(iter(results[0][1].means))
        labels = labels_of(evaluations)
        series = {one: points for one in labels if (points := accuracy_by_length(evaluations, one, unit, drawn, task))}
        if not series:
            continue
        if task:
            parts.append(f"### {task}")
        named = f"-{task}" if task else "" if len(asked) == 1 else f"-{unit}"
        figure = output.with_name(f"{output.stem}-accuracy{named}.png")
        parts += _figure_and_table(figure, series, results, evaluations, looks, drawn, figures)
        others = [other for other in of_task if other != drawn]
        if of_shares := [other for other in others if metric_of(other).is_share]:
            parts.append(_by_length(evaluations, unit, of_shares, "{0.mean:.2f}", task))
        if cut := _cut_answers(results):
            parts.append(cut)
        if metric_of(drawn).is_share:
            parts += depth_parts(output.with_name(f"{output.stem}-depth{named}.png"), results, drawn, figures)
        parts += paired_parts(evaluations, task, unit, drawn)
        for other in (other for other in others if not metric_of(other).is_share):
            points = {one: of for one in labels if (of := accuracy_by_length(evaluations, one, unit, other, task))}
            figure = output.with_name(f"{output.stem}-{other.replace('_', '-')}{named}.png")
            parts += _figure_and_table(figure, points, results, evaluations, looks, other, figures)
            parts += paired_parts(evaluations, task, unit, other)
    return [*parts, "Where the numbers come from:", _sources(evaluations)]


def _figure_and_table(
    figure: Path,
    series: Mapping[str, Sequence[Point]],
    results: Sequence[tuple[str, LengthResult]],
    evaluations: Sequence[Evaluation],
    looks: Mapping[str, Look],
    metric: str,
    figures: list[Path],
) -> list[str]:
    """Returns the curves of one metric with their caption, and its table; a benchmark's single length is not drawn.

    Args:
        figure: its path, which is added to ``figures`` where it is drawn.
        series: label -> points.
        results: (label, result) of one task.
    """
    task, unit = results[0][1].task, results[0][1].unit
    parts = []
    if len({result.length for _, result in results}) > 1 or not task:
        tokens: dict[float, list[float]] = defaultdict(list)
        for _, result in results:
            tokens[result.length].append(result.mean_prompt_tokens)
        title = metric_of(metric).label
        means = {length: fmean(of) for length, of in tokens.items()}
        draw_accuracy(figure, series, looks, metric_of(metric), unit, means)
        figures.append(figure)
        seeds = [point.seeds for points in series.values() for point in points]
        caption = f"{title} by context length; {_questions(results)}. {_spread(seeds, _method(results, metric))}."
        parts += [f"![{title} by context length in {unit}]({figure.name})", f"*{caption}*"]
    return [*parts, accuracy_table(evaluations, unit, metric, task)]


def accuracy_table(evaluations: Sequence[Evaluation], unit: str, metric: str = "sub_em", task: str = "") -> str:
    """Returns a Markdown table, one row a label and one column a context length in ``unit``.

    A cell is ``mean [low, high]``: the 95 % interval of a single evaluation, lowest and highest of several.
    """
    return _by_length(evaluations, unit, [metric], "{0.mean:.2f} [{0.low:.2f}, {0.high:.2f}]", task)


def _by_length(evaluations: Sequence[Evaluation], unit: str, metrics: list[str], cell: str, task: str) -> str:
    """Returns a row a label; a cell holds each metric's point as ``cell`` formats it, "-" where there is none."""
    points = {
        (label, point.x, metric): cell.format(point)
        for label in labels_of(evaluations)
        for metric in metrics
        for point in accuracy_by_length(evaluations, label, unit, metric, task)
    }
    lengths = sorted({label_and_length[1] for label_and_length in points})
    labels = list(dict.fromkeys(label for label, _, _ in points))

    def text(label: str, length: float) -> str:
        cells = [points.get((label, length, metric), "-") for metric in metrics]
        return " / ".join(cells) if any(one != "-" for one in cells) else "-"

    columns = {" / ".join(metric_of(metric).label for metric in metrics): labels}
    columns |= {f"{length:,.0f} {unit}": [text(label, length) for label in labels] for length in lengths}
    return markdown_table(pandas.DataFrame(columns))


def _questions(results: Sequence[tuple[str, LengthResult]]) -> str:
    """Returns how many questions were asked, from (label, result) of what is drawn."""
    by_label: dict[str, set[int]] = defaultdict(set)
    for label, result in results:
        by_label[label].add(result.count)
    counts = sorted(set().union(*by_label.values()))
    number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    # Files of one label can have left different questions out.
    same = all(len(of_label) == 1 for of_label in by_label.values())
    return f"{number} questions" + (", the same at every length" if same else "")


def _spread(seeds: Sequence[int], method: str) -> str:
    """Returns what the bars of points are, by the number of evaluations in each; ``method``: how intervals were
    computed."""
    if max(seeds) == 1:
        return f"Bars and brackets are 95 % intervals over questions{method}"
    over_seeds = "Points are means over seeds, bars and brackets the lowest and highest seed"
    single = f"; with a single seed, the 95 % interval over questions{method}"
    return over_seeds if min(seeds) > 1 else over_seeds + single


def _method(results: Sequence[tuple[str, LengthResult]], metric: str) -> str:
    """Returns how the intervals of a metric were computed, in brackets."""
    # Older files do not record it; theirs of 0 / 1 metrics are Wilson's too.
    methods = [result.methods or {"sub_em": "wilson", "em": "wilson"} for _, result in results]
    text = intervals_text({metric: one[metric]} for one in methods if metric in one)
    return f" ({text.partition(': ')[2]})" if text else ""


def _cut_answers(results: Sequence[tuple[str, LengthResult]]) -> str:
    """Returns how many answers of each label were cut, in a sentence; "" where none was."""
    cut, asked = Counter[str](), Counter[str]()
    for label, result in results:
        if result.cut is not None:
            cut[label] += result.cut
            asked[label] += result.count
    counts = [f"{label} {number:,} of {asked[label]:,}" for label, number in cut.items() if number]
    return f"Answers cut at --max-new-tokens, scored as far as they go: {'; '.join(counts)}." if counts else ""


def _sources(evaluations: Sequence[Evaluation]) -> str:
    """Returns the table of models and settings."""
    keys = {"seed": "seed", "max_new_tokens": "new tokens at most", "dtype": "dtype", "device": "device"}
    rows = [
        {
            "label": one.label,
            "model": f"`{_shown(one.model)}`",
            "questions": f"`{', '.join(map(_shown, one.data.split(', ')))}`",
            **{head: str("-" if (value := one.settings.get(key)) is None else value) for key, head in keys.items()},
        }
        for one in evaluations
    ]
    return markdown_table(pandas.DataFrame(rows), text_columns=3)


def _shown(name: str) -> str:
    """Returns a path as seen from the current folder where it lies inside."""
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else name
