"""Which responses of a question become its pairs."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_solopo.data.answers import answer_part, normalise, words_of


@dataclass(frozen=True)
class Scored:
    """A response with its score; ``ids`` are its sampled token ids, None if only the text was recorded."""

    text: str
    score: float
    ids: tuple[int, ...] | None = None


Pair = tuple[Scored, Scored]
"""(chosen, rejected)."""

Policy = Callable[[Sequence[Scored], Sequence[Scored], random.Random], Iterator[Pair]]
"""(right, wrong, generator) -> an endless iterator of pairs, of which the first distinct ones are used."""


def words(text: str) -> int:
    return len(words_of(text))


def final_answer(text: str) -> str:
    """Returns the normalised `answer_part` of a response, or the normalised response if it has none."""
    start, end = answer_part(text)
    return normalise(text[start:end]) or normalise(text)


def random_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """Yields a right and a wrong response, both uniform over the samples (a frequent text is drawn more often)."""
    while True:
        yield rng.choice(right), rng.choice(wrong)


def shortest_correct_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """Yields the right responses in order of length, each with a random wrong one."""
    while True:
        for chosen in sorted(right, key=lambda response: words(response.text)):
            yield chosen, rng.choice(wrong)


def length_matched_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """Yields a random right response with the wrong one nearest to it in words, against a length bias."""
    lengths = {response.text: words(response.text) for response in (*right, *wrong)}
    while True:
        chosen = rng.choice(right)
        length = lengths[chosen.text]
        yield chosen, min(rng.sample(wrong, len(wrong)), key=lambda response: abs(lengths[response.text] - length))


def best_worst_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """Yields pairs of high and low scores, the most extreme first; each text once, equal scores in a random order."""
    best = _once(sorted(rng.sample(right, len(right)), key=lambda response: -response.score))
    worst = _once(sorted(rng.sample(wrong, len(wrong)), key=lambda response: response.score))
    # Ordered by the sum of both ranks.
    order = sorted(
        ((b, w) for b in range(len(best)) for w in range(len(worst))), key=lambda pair: (sum(pair), max(pair))
    )
    while True:
        for b, w in order:
            yield best[b], worst[w]


def _once(responses: Sequence[Scored]) -> list[Scored]:
    """Returns the first response of each text."""
    first: dict[str, Scored] = {}
    for response in responses:
        first.setdefault(response.text, response)
    return list(first.values())


def most_frequent_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """Returns responses with the most frequent right final answer against those with the most frequent wrong one.

    The first is the answer that the model is most certain of, the second its most common mistake.
    """
    chosen, rejected = _with_most_common_answer(right), _with_most_common_answer(wrong)
    return random_pairs(chosen, rejected, rng)


def _with_most_common_answer(responses: Sequence[Scored]) -> list[Scored]:
    answers = [final_answer(response.text) for response in responses]
    ((most_common, _),) = Counter(answers).most_common(1)
    return [response for response, answer in zip(responses, answers, strict=True) if answer == most_common]


def several(
    right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random, most_chosen: int, most_rejected: int
) -> tuple[list[Scored], list[Scored]]:
    """Returns up to so many right and wrong responses of distinct texts, whose lengths are balanced.

    A side with no more texts than its maximum keeps them all. Where one side has more, each response of the other takes
    in turn the one that is nearest to it in words, until the maximum is reached; where both have more, the right ones
    are drawn first. A text that is both right and wrong, by a user's scorer, is neither.
    """
    both = {response.text for response in right} & {response.text for response in wrong}
    sides = ([response for response in _once(each) if response.text not in both] for each in (right, wrong))
    chosen, rejected = (rng.sample(side, len(side)) for side in sides)
    if len(chosen) > most_chosen and len(rejected) <= most_rejected:
        return _nearest(rejected, chosen, most_chosen), rejected
    chosen = chosen[:most_chosen]
    return chosen, _nearest(chosen, rejected, most_rejected)


def _nearest(to: Sequence[Scored], left: Sequence[Scored], count: int) -> list[Scored]:
    """Returns ``count`` of ``left``, each the nearest in words to the next one of ``to``, over and over."""
    left, taken = list(left), []
    for one in itertools.cycle(to):
        if not left or len(taken) == count:
            break
        length = words(one.text)
        taken.append(left.pop(min(range(len(left)), key=lambda i: abs(words(left[i].text) - length))))
    return taken


ALL = "all"
"""The value of ``--policy`` that makes one group of several responses (`several`), not pairs."""

POLICIES: dict[str, Policy] = {
    "random": random_pairs,
    "shortest_correct": shortest_correct_pairs,
    "length_matched": length_matched_pairs,
    "best_worst": best_worst_pairs,
    "most_frequent": most_frequent_pairs,
}
"""The policies by their names in ``--policy``."""


def distinct(candidates: Iterator[Pair], count: int, right: Sequence[Scored], wrong: Sequence[Scored]) -> list[Pair]:
    """Returns the first ``count`` pairs of distinct texts; fewer if the policy keeps repeating pairs.

    Args:
        right, wrong: the responses that the candidates are drawn from.
    """
    possible = len(_once(right)) * len(_once(wrong))
    # With so many draws a pair of two rare samples is missed with a probability of 0.7 %.
    draws = max(20 * count, 5 * len(right) * len(wrong))
    pairs: dict[tuple[str, str], Pair] = {}
    for _, pair in zip(range(draws), candidates, strict=False):
        if pair[0].text != pair[1].text:  # a user's scorer may score one text differently
            pairs.setdefault((pair[0].text, pair[1].text), pair)
        if len(pairs) == min(count, possible):
            break
    return list(pairs.values())
