"""Scores of the responses at one length, for files and for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_solopo.data.files.records import Record
from megatron_solopo.data.scoring import SCORERS
from megatron_solopo.evaluation.generation import Response
from megatron_solopo.evaluation.intervals import intervals_text, mean_interval
from megatron_solopo.evaluation.items import Item
from megatron_solopo.evaluation.results import LengthResult
from megatron_solopo.evaluation.scorers import GOLD_LOG_PROB, score_answer
from megatron_solopo.metrics import metric_of


def score_responses(
    items: Sequence[Item],
    index: int,
    length: int,
    unit: str,
    responses: Sequence[Response],
    normalisation: str | None = None,
    metrics: Sequence[str] = tuple(SCORERS),
    task: str = "",
) -> tuple[LengthResult, list[Record]]:
    """Returns the scores at one length and one record an item for the predictions file.

    A question's score is the mean over its items, one for each depth; intervals are over questions.

    Args:
        index: of the length in every item's ``prompts``.
        responses: one an item, in the order of the items.
        normalisation: see `scoring.score`.
        metrics: names of scores; the first one is the task's.
    """
    answered = list(zip(items, responses, strict=True))
    scores = {
        name: [score_answer(name, one.text, item.answers, normalisation) for item, one in answered] for name in metrics
    }
    log_probs = [one.gold_log_prob for one in responses if one.gold_log_prob is not None]
    if log_probs:
        scores[GOLD_LOG_PROB] = log_probs
    questions = list(dict.fromkeys(item.id for item in items))
    of_questions = {name: _means([item.id for item in items], values) for name, values in scores.items()}
    intervals = {name: mean_interval(name, list(values.values())) for name, values in of_questions.items()}
    depths = [item.depth for item in items if item.depth is not None]
    result = LengthResult(
        length,
        unit,
        means={name: statistics.fmean(values.values()) for name, values in of_questions.items()},
        intervals={name: interval for name, (interval, _) in intervals.items()},
        count=len(questions),
        mean_prompt_tokens=statistics.fmean(len(item.prompts[index]) for item in items),
        methods={name: method for name, (_, method) in intervals.items()},
        cut=sum(not response.finished for response in responses),
        task=task,
        depths={name: _means(depths, values) for name, values in scores.items()} if depths else {},
    )
    records: list[Record] = [
        {
            "id": item.id,
            "length": result.label,
            **({} if item.depth is None else {"depth": item.depth}),
            "question": item.question,
            "answers": item.answers,
            "prediction": response.text,
            "finished": response.finished,
            **{name: values[number] for name, values in scores.items()},
            "prompt_tokens": len(item.prompts[index]),
        }
        for number, (item, response) in enumerate(answered)
    ]
    return result, records


def _means[Key](keys: Sequence[Key], values: Sequence[float]) -> dict[Key, float]:
    """Returns the mean of the values of each key, in the order of the keys."""
    of_key: dict[Key, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        of_key.setdefault(key, []).append(value)
    return {key: statistics.fmean(of) for key, of in of_key.items()}


def table_lines(results: Sequence[LengthResult]) -> list[str]:
    """Returns the results for a terminal: a mean and its 95 % interval over questions for each metric and length.

    The last lines explain how the intervals were computed, and what a cut answer is where there are any.
    """
    lines: list[str] = []
    metrics: list[str] = []
    width = max(16, 2 + max((len(one.label) for one in results), default=0))
    for one in results:
        if [*one.means] != metrics:  # another task
            metrics = [*one.means]
            heads = "".join(f"{metric_of(name).label:>29}" for name in metrics)
            lines.append(f"{'context':<{width}}{'questions':>10}{'cut':>8}{'prompt tokens':>15}{heads}")
        cells = (
            f"{mean:.3f} [{one.intervals[name][0]:.3f}, {one.intervals[name][1]:.3f}]"
            for name, mean in one.means.items()
        )
        lines.append(
            f"{one.label:<{width}}{one.count:>10,}{one.cut or 0:>8,}{one.mean_prompt_tokens:>15,.1f}"
            + "".join(f"{cell:>29}" for cell in cells)
        )
    lines.append(f"[low, high]: 95 % intervals over questions; {intervals_text(one.methods for one in results)}")
    if any(one.cut for one in results):
        lines.append("cut: answers that did not end within --max-new-tokens; they are scored as far as they go")
    return lines
