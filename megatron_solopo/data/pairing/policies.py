"""Which responses of a question become its pairs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_solopo.data.answers import answer_part, normalise, words_of


@dataclass(frozen=True)
class Scored:
    """A response with its score; ``ids`` are the token ids it was sampled as, None where only the text is known."""

    text: str
    score: float
    ids: tuple[int, ...] | None = None


Pair = tuple[Scored, Scored]
"""(chosen, rejected)."""

Policy = Callable[[Sequence[Scored], Sequence[Scored], random.Random], Iterator[Pair]]
"""(right, wrong, generator) -> pairs, endless; the first different ones are taken."""


def words(text: str) -> int:
    return len(words_of(text))


def final_answer(text: str) -> str:
    """The `answer_part` of a response, else the whole of it, normalised."""
    start, end = answer_part(text)
    return normalise(text[start:end]) or normalise(text)


def random_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """A right and a wrong response, both uniform over the samples (a frequent one is taken more often)."""
    while True:
        yield rng.choice(right), rng.choice(wrong)


def shortest_correct_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """The right responses from the shortest on, each with a random wrong one."""
    while True:
        for chosen in sorted(right, key=lambda response: words(response.text)):
            yield chosen, rng.choice(wrong)


def length_matched_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """A random right response with the wrong one nearest to it in words, against a length bias."""
    lengths = {response.text: words(response.text) for response in (*right, *wrong)}
    while True:
        chosen = rng.choice(right)
        length = lengths[chosen.text]
        yield chosen, min(rng.sample(wrong, len(wrong)), key=lambda response: abs(lengths[response.text] - length))


def best_worst_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """From the highest score with the lowest inwards, each text once, equal scores in a random order."""
    best = _once(sorted(rng.sample(right, len(right)), key=lambda response: -response.score))
    worst = _once(sorted(rng.sample(wrong, len(wrong)), key=lambda response: response.score))
    # Pairs in order of how far both stand from their end.
    order = sorted(
        ((b, w) for b in range(len(best)) for w in range(len(worst))), key=lambda pair: (sum(pair), max(pair))
    )
    while True:
        for b, w in order:
            yield best[b], worst[w]


def _once(responses: Sequence[Scored]) -> list[Scored]:
    """The first response of each text."""
    first: dict[str, Scored] = {}
    for response in responses:
        first.setdefault(response.text, response)
    return list(first.values())


def most_frequent_pairs(right: Sequence[Scored], wrong: Sequence[Scored], rng: random.Random) -> Iterator[Pair]:
    """Responses with the most frequent right final answer against those with the most frequent wrong one.

    The first is the answer the model is surest of, the second its commonest mistake.
    """
    chosen, rejected = _with_commonest_answer(right), _with_commonest_answer(wrong)
    return random_pairs(chosen, rejected, rng)


def _with_commonest_answer(responses: Sequence[Scored]) -> list[Scored]:
    answers = [final_answer(response.text) for response in responses]
    ((commonest, _),) = Counter(answers).most_common(1)
    return [response for response, answer in zip(responses, answers, strict=True) if answer == commonest]


POLICIES: dict[str, Policy] = {
    "random": random_pairs,
    "shortest_correct": shortest_correct_pairs,
    "length_matched": length_matched_pairs,
    "best_worst": best_worst_pairs,
    "most_frequent": most_frequent_pairs,
}
"""Every way to pick pairs, by the name ``--policy`` knows it under."""


def distinct(candidates: Iterator[Pair], wanted: int, right: Sequence[Scored], wrong: Sequence[Scored]) -> list[Pair]:
    """The first ``wanted`` pairs of different texts; a policy that keeps repeating itself ends the search.

    Args:
        right, wrong: what the candidates are drawn from.
    """
    possible = len(_once(right)) * len(_once(wrong))
    # So many draws miss one sample of each side, once among many of the same text, with a probability of 0.7 %.
    draws = max(20 * wanted, 5 * len(right) * len(wrong))
    found: dict[tuple[str, str], Pair] = {}
    for _, pair in zip(range(draws), candidates, strict=False):
        if pair[0].text != pair[1].text:  # a scorer of one's own may disagree with itself
            found.setdefault((pair[0].text, pair[1].text), pair)
        if len(found) == min(wanted, possible):
            break
    return list(found.values())
