"""``solopo build-pairs``: scored responses to preference groups."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_solopo.arguments import Parser
from megatron_solopo.atomic import write_text
from megatron_solopo.data.building.contexts import ContextPair, read_contexts
from megatron_solopo.data.files.records import write_records
from megatron_solopo.data.options import add_normalisation_option, check_outputs, files_of
from megatron_solopo.data.pairing.counts import Counts
from megatron_solopo.data.pairing.kept_scores import Score, kept_scores
from megatron_solopo.data.pairing.policies import (
    ALL,
    POLICIES,
    Policy,
    Scored,
    best_worst_pairs,
    distinct,
    several,
    words,
)
from megatron_solopo.data.sampling.responses import InStep, Responses
from megatron_solopo.data.schema import PreferenceGroup
from megatron_solopo.data.scoring import SCORERS, load_scorer
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar

GOLD = "gold"
"""The value of ``--responses`` for a dry run without a model, and a choice of ``--all-wrong``."""

TWO_VALUED = ("sub_em", "sub_em_plain", "em")
"""Scorers whose scores are 0 and 1 only, and so cannot rank correct responses."""


@dataclass(frozen=True)
class Pairing:
    """Options of pairing; ``--help`` describes them. Without ``policy`` a group has several responses."""

    score: Score
    correct_threshold: float = 0.5
    incorrect_threshold: float = 0.5
    policy: Policy | None = POLICIES["random"]
    per_question: int = 1
    most_chosen: int = 4
    most_rejected: int = 4
    all_right: str = "skip"
    all_wrong: str = "skip"
    keep_unfinished: bool = False
    seed: int = 0
    count_tokens: Callable[[str], int] | None = None
    gold_template: str = "The answer is {answer}."

    def gold(self, answer: str) -> str:
        """Returns the response that a gold answer makes."""
        return self.gold_template.replace("{answer}", answer)


def build_groups(
    pairs: Iterator[ContextPair], responses: Callable[[str], Responses | None], how: Pairing, counts: Counts
) -> Iterator[PreferenceGroup]:
    """Yields the preference groups of every question that has a pair.

    A question has up to ``how.per_question`` different pairs; the ids of its second and later groups end in ``#2``,
    ``#3``. The choice depends only on the seed and the question's id.

    Args:
        responses: returns the sampled responses of a question's id, None if it was not sampled.
    """
    for pair in pairs:
        counts.questions += 1
        sampled = responses(pair.id)
        if sampled is None:
            counts.not_sampled += 1
            continue
        scored = _score(pair, sampled, how, counts)
        counts.add_short(pair.answers, [(one.text, one.score) for one in scored])
        right = [response for response in scored if response.score > how.correct_threshold]
        wrong = [response for response in scored if response.score < how.incorrect_threshold]
        counts.scored_responses += len(scored)
        counts.right_responses += len(right)
        counts.undecided_responses += len(scored) - len(right) - len(wrong)
        extra: dict[str, float] = {}
        policy = how.policy
        rng = random.Random(f"{how.seed}\0{pair.id}")
        if not scored:
            counts.no_response += 1
            continue
        if right and wrong:
            counts.paired += 1
        elif right or wrong:
            choice = how.all_right if right else how.all_wrong
            counts.all_right += bool(right)
            counts.all_wrong += bool(wrong)
            if choice == "skip":
                continue
            if choice == GOLD:
                counts.gold += 1
                extra = {"chosen_is_gold": 1.0}
                right = _scored(pair, [how.gold(pair.answers[0])], how)
            else:
                lowest, highest = min(r.score for r in scored), max(r.score for r in scored)
                if lowest == highest:
                    continue
                counts.ranked += 1
                right = [response for response in scored if response.score == highest]
                wrong = [response for response in scored if response.score == lowest]
                policy = policy and best_worst_pairs
        else:
            counts.undecided += 1
            continue
        share = {"share_right": round(sum(r.score > how.correct_threshold for r in scored) / len(scored), 4)}
        if policy is None:
            chosen, rejected = several(right, wrong, rng, how.most_chosen, how.most_rejected)
            if chosen and rejected:
                yield _group(pair, 1, chosen, rejected, share | extra, how, counts)
            continue
        drawn = distinct(policy(right, wrong, rng), how.per_question, right, wrong)
        for number, (one, other) in enumerate(drawn, 1):
            yield _group(pair, number, [one], [other], share | extra, how, counts)


def build_gold_groups(
    pairs: Iterator[ContextPair], others: Sequence[str], how: Pairing, counts: Counts
) -> Iterator[PreferenceGroup]:
    """Yields groups without any model: the question's answer in a sentence against another question's answer.

    For dry runs only: no model sampled these responses, and training on them teaches nothing about documents.

    Args:
        others: the distinct answers of all questions, in a fixed order.
    """
    for pair in pairs:
        counts.questions += 1
        rng = random.Random(f"{how.seed}\0{pair.id}")
        drawn = (_scored(pair, [how.gold(other)], how)[0] for other in _shuffled(others, rng))
        wrong = next((response for response in drawn if response.score < how.incorrect_threshold), None)
        if wrong is None:
            counts.all_right += 1
            continue
        counts.paired += 1
        counts.right_responses += 1
        counts.scored_responses += 2
        [right] = _scored(pair, [how.gold(pair.answers[0])], how)
        yield _group(pair, 1, [right], [wrong], {"share_right": 0.5, "chosen_is_gold": 1.0}, how, counts)


def _shuffled(items: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Yields a few random items, then all items in random order; callers seldom need more than the first few."""
    yield from rng.sample(items, min(len(items), 16))
    yield from rng.sample(items, len(items))


def _score(pair: ContextPair, sampled: Responses, how: Pairing, counts: Counts) -> list[Scored]:
    """Returns the usable responses of a question with their scores."""
    texts, kept = [], []
    ids = sampled.token_ids or [None] * len(sampled.responses)
    for text, finished, token_ids in zip(sampled.responses, sampled.finished, ids, strict=True):
        if not text.strip():
            counts.dropped_responses["empty"] += 1
        elif not finished and not how.keep_unfinished:
            counts.dropped_responses["not ended within --max-new-tokens (--keep-unfinished keeps them)"] += 1
        else:
            texts.append(text)
            kept.append(token_ids)
    return _scored(pair, texts, how, kept)


def _scored(
    pair: ContextPair, texts: Sequence[str], how: Pairing, ids: Sequence[list[int] | None] | None = None
) -> list[Scored]:
    if not texts:
        return []
    return [
        Scored(text, score, None if token_ids is None else tuple(token_ids))
        for text, score, token_ids in zip(
            texts, how.score(pair.question, pair.answers, texts), ids or [None] * len(texts), strict=True
        )
    ]


def _group(
    pair: ContextPair,
    number: int,
    chosen: Sequence[Scored],
    rejected: Sequence[Scored],
    scores: dict[str, float],
    how: Pairing,
    counts: Counts,
) -> PreferenceGroup:
    counts.groups += 1
    counts.responses += len(chosen) + len(rejected)
    counts.with_ids += any(response.ids is not None for response in (*chosen, *rejected))
    for lengths, length in ((counts.words, words), (counts.tokens, how.count_tokens)):
        if length is not None:
            sides = ([length(response.text) for response in side] for side in (chosen, rejected))
            for one, other in itertools.product(*sides):
                lengths.add(one, other)
    each = {
        name if not index else f"{name}_{index}": response.score
        for name, side in (("chosen", chosen), ("rejected", rejected))
        for index, response in enumerate(side)
    }

    def field(values: list[Any]) -> Any:
        """Returns what a group holds of a side: a list with --policy all, else the value of its one response."""
        if how.policy is not None:
            return values[0]
        return values if any(value is not None for value in values) else None

    return PreferenceGroup(
        id=pair.id if number == 1 else f"{pair.id}#{number}",
        short_messages=pair.short_messages,
        long_messages=pair.long_messages,
        chosen=field([response.text for response in chosen]),
        rejected=field([response.text for response in rejected]),
        answers=[*pair.answers],
        scores={**each, **scores},
        source=pair.source,
        question=pair.question,
        short_spans=pair.short_spans,
        long_spans=pair.long_spans,
        chosen_ids=field([response.ids and list(response.ids) for response in chosen]),
        rejected_ids=field([response.ids and list(response.ids) for response in rejected]),
        chat_template_date=pair.chat_template_date,
    )


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo build-pairs",
        description="Score responses and pair a right with a wrong one for every question that has both. "
        "A killed run with a user-defined scorer is resumed when the command is repeated.",
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--contexts", required=True, metavar="FILE", help="output of prepare-data")
    group.add_argument(
        "--responses",
        required=True,
        metavar="FILE",
        help=f"output of sample-responses, or '{GOLD}': a dry run without a model, the gold answer in a sentence "
        "against another question's answer",
    )
    group.add_argument(
        "--output", required=True, metavar="FILE", help="preference groups: Parquet if it ends in .parquet, else JSONL"
    )
    group.add_argument(
        "--counts-output",
        metavar="FILE",
        help="JSON of the counts of questions and responses, for solopo report --counts (default: none)",
    )
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--scorer",
        default="sub_em",
        metavar="NAME",
        help=f"{', '.join(SCORERS)}, or module:function for a function of yours, called with the response, the list of "
        "accepted answers and, if it has such a parameter, question=...; it returns a number. sub_em finds short gold "
        "answers (yes, no, one short word, a number) as whole words of the response's answer part only; sub_em_plain "
        "is the paper's, any part of the text (default: sub_em)",
    )
    add_normalisation_option(group)
    group.add_argument(
        "--correct-threshold", type=float, default=0.5, metavar="X", help="a score above X is correct (default: 0.5)"
    )
    group.add_argument(
        "--incorrect-threshold",
        type=float,
        default=0.5,
        metavar="X",
        help="a score below X is incorrect; responses that are neither are in no pair and counted (default: 0.5)",
    )
    group = parser.add_argument_group("pairing")
    group.add_argument(
        "--policy",
        choices=sorted([ALL, *POLICIES]),
        default="random",
        help="which responses form a pair; random: any right, any wrong; shortest_correct: shortest right, any wrong; "
        "length_matched: any right, the wrong one nearest in length; best_worst: highest score, lowest score; "
        "most_frequent: the right and the wrong final answer (after the last 'Answer:') that came up most often; "
        "all: one group of up to --max-chosen right and --max-rejected wrong ones (default: random)",
    )
    for side, word in (("chosen", "right"), ("rejected", "wrong")):
        group.add_argument(
            f"--max-{side}",
            type=int,
            metavar="N",
            help=f"--policy all: largest number of {word} responses of a group; of more texts those are taken whose "
            "lengths are nearest to the other side's (default: 4)",
        )
    group.add_argument(
        "--pairs-per-question",
        type=int,
        default=1,
        metavar="N",
        help="largest number of different pairs of a question (default: 1)",
    )
    group.add_argument(
        "--all-right",
        choices=("skip", "ranked"),
        default="skip",
        help="questions without a wrong response; skip: no group; ranked: highest against lowest score, where they "
        "differ (default: skip)",
    )
    group.add_argument(
        "--all-wrong",
        choices=("skip", "ranked", GOLD),
        default="skip",
        help="questions without a right response; gold: the gold answer in a sentence is chosen, though the model did "
        "not sample it (off-policy) (default: skip)",
    )
    group.add_argument(
        "--gold-template",
        metavar="TEXT",
        help="how a gold answer is a response; set the form that the prompt asks for, such as '{answer}', or the pairs "
        f"teach another form (default: '{Pairing.gold_template}')",
    )
    group.add_argument(
        "--keep-unfinished", action="store_true", help="use responses that were cut at --max-new-tokens too"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="random seed; with its id it determines a question's pairs (default: 0)"
    )
    group = parser.add_argument_group("lengths: words are always counted")
    group.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="Hugging Face folder; lengths are then counted in its tokens too (default: none)",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    template = options.gold_template
    if template is not None and GOLD not in (options.all_wrong, options.responses):
        raise UserError(
            "option-unused", f"--gold-template {template} would have no effect: it needs --all-wrong {GOLD}"
        )
    if template is not None and "{answer}" not in template:
        raise UserError("option-value", f"--gold-template {template}: must contain {{answer}}")
    if options.pairs_per_question < 1:
        raise UserError(
            "option-value", f"--pairs-per-question {options.pairs_per_question}: set a number of at least 1"
        )
    for flag, value in (
        ("--correct-threshold", options.correct_threshold),
        ("--incorrect-threshold", options.incorrect_threshold),
    ):
        if not math.isfinite(value):
            raise UserError("option-value", f"{flag} {value}: set a finite number")
    if not options.incorrect_threshold <= options.correct_threshold:
        raise UserError(
            "option-conflict",
            f"--incorrect-threshold {options.incorrect_threshold:g} is above --correct-threshold "
            f"{options.correct_threshold:g}: a response could be both; lower it",
        )
    for flag in ("max_chosen", "max_rejected"):
        value, name = getattr(options, flag), f"--{flag.replace('_', '-')}"
        if value is not None and options.policy != ALL:
            raise UserError("option-unused", f"{name} {value} would have no effect: it needs --policy {ALL}")
        if value is not None and value < 1:
            raise UserError("option-value", f"{name} {value}: set a number of at least 1")
    if options.policy == ALL and options.pairs_per_question > 1:
        raise UserError(
            "option-unused",
            f"--pairs-per-question {options.pairs_per_question} would have no effect: --policy {ALL} makes one group "
            "of a question; raise --max-chosen or --max-rejected",
        )
    for flag in ("all_right", "all_wrong"):
        if getattr(options, flag) == "ranked" and options.scorer in TWO_VALUED:
            raise UserError(
                "option-conflict",
                f"--{flag.replace('_', '-')} ranked with --scorer {options.scorer}: its scores are 0 and 1 only, so "
                "equal responses have no rank; use f1 or module:function",
            )


def _count_tokens(folder: str) -> Callable[[str], int]:
    # Not at the top: with transformers and torch, which take 3 s and the rest does without.
    from megatron_solopo.data.text.tokenizer import encode, read_tokenizer

    tokenizer = read_tokenizer(folder)
    return lambda text: len(encode(tokenizer, text))


def _pairing(options: argparse.Namespace, score: Score) -> Pairing:
    return Pairing(
        score=score,
        correct_threshold=options.correct_threshold,
        incorrect_threshold=options.incorrect_threshold,
        policy=POLICIES.get(options.policy),
        per_question=options.pairs_per_question,
        most_chosen=options.max_chosen or Pairing.most_chosen,
        most_rejected=options.max_rejected or Pairing.most_rejected,
        all_right=options.all_right,
        all_wrong=options.all_wrong,
        keep_unfinished=options.keep_unfinished,
        seed=options.seed,
        count_tokens=_count_tokens(options.tokenizer) if options.tokenizer else None,
        gold_template=options.gold_template or Pairing.gold_template,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = build_parser().parse_args(argv)
    sampled = None if options.responses == GOLD else options.responses
    read = [("--contexts", options.contexts), ("--responses", sampled), *files_of(options)]
    check_outputs([("--output", options.output), ("--counts-output", options.counts_output)], read)
    _check(options)
    scorer = load_scorer(options.scorer, options.normalisation)
    counts, source = Counts(options.scorer), None
    with kept_scores(options.scorer, scorer, Path(options.output)) as score:
        how = _pairing(options, score)
        if sampled is None:
            others = sorted({pair.answers[0] for pair in read_contexts(options.contexts)})
            groups = build_gold_groups(read_contexts(options.contexts), others, how, counts)
        else:
            source = InStep(options.responses)
            groups = build_groups(read_contexts(options.contexts), source, how, counts)
        written = write_records(options.output, _checked(groups, counts, source, options))
    if options.counts_output is not None:
        write_text(options.counts_output, json.dumps(counts.record(), indent=1) + "\n")
    print("\n".join(counts.lines()))
    print(f"wrote {written} preference groups to {options.output}")
    return 0


def _checked(
    groups: Iterator[PreferenceGroup], counts: Counts, source: InStep | None, options: argparse.Namespace
) -> Iterator[PreferenceGroup]:
    """Yields the groups, and checks the totals at their end, before the output is renamed into place.

    Raises:
        UserError: an id occurs twice, no group is left, or contexts and responses do not belong together.
    """
    seen = set()
    for group in ProgressBar(groups, desc="pairing", unit="group", leave=False):
        if group.id in seen:
            raise UserError(
                "id-twice",
                f"--pairs-per-question {options.pairs_per_question}: {group.id!r} would be the id of two groups, of a "
                f"question and of another one's further pair; rename that question in {options.contexts} and "
                f"{options.responses}",
            )
        seen.add(group.id)
        yield group
    if not counts.questions:
        raise UserError(
            "data-empty", f"--contexts {options.contexts}: holds no question; set the output of prepare-data"
        )
    unknown = source.unasked() if source else set()
    if unknown:
        raise UserError(
            "responses-other-contexts",
            f"--responses {options.responses}: {len(unknown)} ids are not in {options.contexts} (one is "
            f"{min(unknown)!r}); set the contexts file that the responses were sampled from",
        )
    if not counts.groups:
        raise UserError(
            "pairs-none",
            f"no question has both a right and a wrong response ({counts.sampled} questions: "
            f"{counts.all_right} all right, {counts.all_wrong} all wrong, {counts.no_response} without a usable "
            f"response{f'; {counts.not_sampled} more were not sampled' if counts.not_sampled else ''}); "
            + (
                "use contexts of more questions, whose answers differ"
                if source is None
                else "sample more responses, raise --temperature, or use another model"
            ),
        )
