"""``solopo build-pairs``: scored responses to preference groups."""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_solopo.data.contexts import ContextPair, read_contexts
from megatron_solopo.data.responses import Responses, read_responses
from megatron_solopo.data.schema import PreferenceGroup, write_jsonl
from megatron_solopo.data.scoring import sub_em
from megatron_solopo.errors import UserError

GOLD = "gold"
"""The name that stands for a responses file in a dry run without a model."""

Pair = tuple[str, str]
"""(chosen, rejected)."""


def random_pairs(right: Sequence[str], wrong: Sequence[str], rng: random.Random) -> Iterator[Pair]:
    """A right and a wrong response, both uniform over the samples (a frequent one is taken more often)."""
    while True:
        yield rng.choice(right), rng.choice(wrong)


def shortest_correct_pairs(right: Sequence[str], wrong: Sequence[str], rng: random.Random) -> Iterator[Pair]:
    """The right responses from the shortest on, each with a random wrong one."""
    while True:
        for chosen in sorted(right, key=words):
            yield chosen, rng.choice(wrong)


def length_matched_pairs(right: Sequence[str], wrong: Sequence[str], rng: random.Random) -> Iterator[Pair]:
    """A random right response with the wrong one nearest to it in words, against a length bias."""
    while True:
        chosen = rng.choice(right)
        yield chosen, min(rng.sample(wrong, len(wrong)), key=lambda text: abs(words(text) - words(chosen)))


POLICIES: dict[str, Callable[[Sequence[str], Sequence[str], random.Random], Iterator[Pair]]] = {
    "random": random_pairs,
    "shortest_correct": shortest_correct_pairs,
    "length_matched": length_matched_pairs,
}
"""Every way to pick pairs, by the name ``--policy`` knows it under."""


def words(text: str) -> int:
    return len(text.split())


@dataclass
class Counts:
    """What became of the questions, and the lengths of what was paired."""

    questions: int = 0
    paired: int = 0
    all_right: int = 0
    all_wrong: int = 0
    no_response: int = 0
    dropped_responses: Counter[str] = field(default_factory=Counter)
    right_responses: int = 0
    scored_responses: int = 0
    lengths: list[tuple[int, int]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The counts for a person."""

        def share(count: int) -> str:
            return f"{count} ({count / max(self.questions, 1):.1%})"

        right = self.right_responses / max(self.scored_responses, 1)
        lines = [
            f"questions: {self.questions}",
            f"  yield, a right and a wrong answer: {share(self.paired)}",
            f"  all right: {share(self.all_right)}, all wrong: {share(self.all_wrong)}, "
            f"no usable response: {share(self.no_response)}",
            f"responses scored: {self.scored_responses}, right: {right:.1%}",
        ]
        lines += [f"  {count} responses dropped: {reason}" for reason, count in self.dropped_responses.most_common()]
        if self.lengths:
            chosen, rejected = zip(*self.lengths, strict=True)
            longer = sum(c > r for c, r in self.lengths) / len(self.lengths)
            equal = sum(c == r for c, r in self.lengths) / len(self.lengths)
            lines.append(
                f"length in words: chosen mean {statistics.mean(chosen):.1f} median {statistics.median(chosen):.0f}, "
                f"rejected mean {statistics.mean(rejected):.1f} median {statistics.median(rejected):.0f}; "
                f"chosen longer in {longer:.1%} of groups, equal in {equal:.1%}"
            )
        return lines


def build_groups(
    pairs: Sequence[ContextPair],
    responses: dict[str, Responses],
    *,
    policy: str,
    per_question: int,
    seed: int,
    keep_unfinished: bool,
    counts: Counts,
) -> Iterator[PreferenceGroup]:
    """Yields the groups of every question with a right and a wrong response (sub-EM 1 and 0).

    Up to ``per_question`` different pairs a question; from the second on a group's id ends in ``#2``, ``#3``.
    The choice depends on the seed and the question's id only.
    """
    for pair in pairs:
        counts.questions += 1
        right, wrong = _split(pair, responses.get(pair.id), keep_unfinished, counts)
        counts.right_responses += len(right)
        counts.scored_responses += len(right) + len(wrong)
        if not right and not wrong:
            counts.no_response += 1
        elif not wrong:
            counts.all_right += 1
        elif not right:
            counts.all_wrong += 1
        else:
            counts.paired += 1
            share = len(right) / (len(right) + len(wrong))
            rng = random.Random(f"{seed}\0{pair.id}")
            picked = _distinct(POLICIES[policy](right, wrong, rng), per_question, len(set(right)) * len(set(wrong)))
            for number, (chosen, rejected) in enumerate(picked, 1):
                yield _group(pair, number, chosen, rejected, share, counts)


def build_gold_groups(pairs: Sequence[ContextPair], *, seed: int, counts: Counts) -> Iterator[PreferenceGroup]:
    """Groups without any model: the question's answer in a sentence against another question's answer.

    For dry runs only: such responses were never sampled, and nothing is learnt from them about documents.
    """
    others = sorted({pair.answers[0] for pair in pairs})
    for pair in pairs:
        counts.questions += 1
        rng = random.Random(f"{seed}\0{pair.id}")
        wrong = next(
            (text for text in map(_sentence, rng.sample(others, len(others))) if not sub_em(text, pair.answers)), None
        )
        if wrong is None:
            counts.all_right += 1
            continue
        counts.paired += 1
        counts.right_responses += 1
        counts.scored_responses += 2
        yield _group(pair, 1, _sentence(pair.answers[0]), wrong, 0.5, counts)


def _sentence(answer: str) -> str:
    return f"The answer is {answer}."


def _split(
    pair: ContextPair, sampled: Responses | None, keep_unfinished: bool, counts: Counts
) -> tuple[list[str], list[str]]:
    right: list[str] = []
    wrong: list[str] = []
    if sampled is None:
        return right, wrong
    for text, finished in zip(sampled.responses, sampled.finished, strict=True):
        if not text.strip():
            counts.dropped_responses["empty"] += 1
        elif not finished and not keep_unfinished:
            counts.dropped_responses["not ended within --max-new-tokens (--keep-unfinished keeps them)"] += 1
        else:
            (right if sub_em(text, pair.answers) else wrong).append(text)
    return right, wrong


def _distinct(candidates: Iterator[Pair], wanted: int, possible: int) -> list[Pair]:
    """The first ``wanted`` different pairs; a policy that keeps repeating itself ends the search."""
    found: dict[Pair, None] = {}
    for _, pair in zip(range(20 * wanted), candidates, strict=False):
        found[pair] = None
        if len(found) == min(wanted, possible):
            break
    return list(found)


def _group(pair: ContextPair, number: int, chosen: str, rejected: str, share: float, counts: Counts) -> PreferenceGroup:
    counts.lengths.append((words(chosen), words(rejected)))
    return PreferenceGroup(
        id=pair.id if number == 1 else f"{pair.id}#{number}",
        short_messages=pair.short_messages,
        long_messages=pair.long_messages,
        chosen=chosen,
        rejected=rejected,
        answers=pair.answers,
        scores={"chosen": 1.0, "rejected": 0.0, "share_right": round(share, 4)},
        source=pair.source,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solopo build-pairs",
        description="Score responses by sub-EM and pair a right with a wrong one for every question that has both.",
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--contexts", required=True, metavar="FILE", help="what prepare-data wrote")
    group.add_argument(
        "--responses",
        required=True,
        metavar="FILE",
        help=f"what sample-responses wrote, or '{GOLD}': a dry run without a model, the gold answer in a sentence "
        "against another question's answer",
    )
    group.add_argument("--output", required=True, metavar="FILE", help="preference groups, JSONL")
    group = parser.add_argument_group("pairing")
    group.add_argument(
        "--policy",
        choices=sorted(POLICIES),
        default="random",
        help="random: any right, any wrong; shortest_correct: shortest right, any wrong; "
        "length_matched: any right, the wrong one nearest in length (default: random)",
    )
    group.add_argument(
        "--pairs-per-question", type=int, default=1, metavar="N", help="at most N different pairs (default: 1)"
    )
    group.add_argument(
        "--keep-unfinished", action="store_true", help="use responses that were cut at --max-new-tokens too"
    )
    group.add_argument("--seed", type=int, default=0, help="with a question's id it decides its pairs (default: 0)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = _parser().parse_args(argv)
    if options.pairs_per_question < 1:
        raise UserError(f"--pairs-per-question {options.pairs_per_question}: give a number of at least 1")
    pairs = list(read_contexts(options.contexts))
    counts = Counts()
    if options.responses == GOLD:
        groups = build_gold_groups(pairs, seed=options.seed, counts=counts)
    else:
        responses = {record.id: record for record in read_responses(options.responses)}
        strangers = responses.keys() - {pair.id for pair in pairs}
        if strangers:
            raise UserError(
                f"--responses {options.responses}: {len(strangers)} ids are not in {options.contexts} (one is "
                f"{min(strangers)!r}); give the contexts file the responses were sampled from"
            )
        groups = build_groups(
            pairs,
            responses,
            policy=options.policy,
            per_question=options.pairs_per_question,
            seed=options.seed,
            keep_unfinished=options.keep_unfinished,
            counts=counts,
        )
    written = write_jsonl(options.output, _not_empty(groups, counts))
    print("\n".join(counts.lines()))
    print(f"wrote {written} preference groups to {options.output}")
    return 0


def _not_empty(groups: Iterator[PreferenceGroup], counts: Counts) -> Iterator[PreferenceGroup]:
    """Passes groups on and refuses an empty result before the output is renamed into place."""
    yield from groups
    if not counts.paired:
        raise UserError(
            f"no question has both a right and a wrong response ({counts.questions} questions: "
            f"{counts.all_right} all right, {counts.all_wrong} all wrong, {counts.no_response} without a usable "
            "response); sample more responses, raise --temperature, or use another model"
        )
