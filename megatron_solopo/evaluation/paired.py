"""The report's paired differences: models compared question by question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import pandas
from pydantic import TypeAdapter

from megatron_solopo.data.files.records import read_jsonl
from megatron_solopo.data.validation import Number, validated
from megatron_solopo.evaluation.intervals import paired_difference
from megatron_solopo.evaluation.results import Evaluation, labels_of, length_label, predictions_path
from megatron_solopo.evaluation.tables import markdown_table
from megatron_solopo.metrics import metric_of

Scores = dict[str, dict[str, float]]
"""Length, as in an evaluation file -> question -> its score, averaged over seeds and depths."""

_FIELDS: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])
_SCORE: TypeAdapter[dict[str, Number]] = TypeAdapter(dict[str, Number])


def scores_by_label(evaluations: Sequence[Evaluation], metric: str) -> dict[str, Scores]:
    """Returns the scores of each label from the predictions beside its files; labels without predictions are left out.

    Raises:
        UserError: a predictions file is not one.
    """
    scores: dict[str, Scores] = {}
    for label in labels_of(evaluations):
        values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for evaluation in evaluations:
            path = predictions_path(evaluation.path)
            if evaluation.label != label or not path.is_file():
                continue
            for where, record in read_jsonl(path):
                if metric in record:
                    named = validated(_FIELDS, {name: record.get(name) for name in ("id", "length")}, where)
                    score = validated(_SCORE, {metric: record[metric]}, where)[metric]
                    values[named["length"]][named["id"]].append(score)
        if values:
            scores[label] = {
                length: {question: fmean(of) for question, of in questions.items()}
                for length, questions in values.items()
            }
    return scores


def paired_parts(evaluations: Sequence[Evaluation], task: str, unit: str, metric: str) -> list[str]:
    """Returns a table of every label's difference from the first one at each length; [] where there are no two labels
    with predictions of the same questions."""
    scores = scores_by_label(evaluations, metric)
    baseline, *others = scores or [""]
    of_task = [one for evaluation in evaluations for one in evaluation.results if (one.task, one.unit) == (task, unit)]
    lengths = sorted({one.length for one in of_task})
    rows, tests = [], dict[str, None]()
    for label in others:
        for length in lengths:
            key = length_label(length, unit, task)
            difference = paired_difference(scores[baseline].get(key, {}), scores[label].get(key, {}))
            if difference is None:
                continue
            tests[difference.test] = None
            rows.append(
                {
                    "label": label,
                    "context": f"{length:,} {unit}",
                    "questions": f"{difference.count:,}",
                    f"{metric_of(metric).label} - {baseline}": f"{difference.mean:+.3f}",
                    "95 % interval": f"[{difference.low:+.3f}, {difference.high:+.3f}]",
                    "p": f"{difference.p_value:.3g}",
                }
            )
    if not rows:
        return []
    names = {"McNemar": "McNemar's exact test", "sign flips": "a permutation test that flips signs"}
    used = " or ".join(names[test] for test in tests)
    how = f"interval: bootstrap over questions; p: {used}, two-sided"
    return [
        f"Differences from {baseline} on the same questions ({how}):",
        markdown_table(pandas.DataFrame(rows), text_columns=2),
    ]
