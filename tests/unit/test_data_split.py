"""Near-duplicate questions: detected exactly, kept on one side, with any order of the input."""

from __future__ import annotations

import random
from itertools import combinations

from megatron_solopo.data.building.split import near_duplicates, shingles, validation_members

WORDS = [f"w{index}" for index in range(30)]


def wordings(count: int, seed: int = 0) -> list[str]:
    """Questions of which many differ from another in a word or two."""
    rng = random.Random(seed)
    questions: list[str] = []
    for _ in range(count):
        words = (
            rng.choice(questions).split()
            if questions and rng.random() < 0.7
            else rng.choices(WORDS, k=rng.randint(1, 16))
        )
        for _ in range(rng.randint(0, 1)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        questions.append(" ".join(words))
    return questions


def joined_one_by_one(questions: list[str], threshold: float) -> set[frozenset[int]]:
    """The groups by comparing all pairs."""
    groups = [{index} for index in range(len(questions))]
    for one, other in combinations(range(len(questions)), 2):
        a, b = shingles(questions[one]), shingles(questions[other])
        if len(a & b) >= threshold * len(a | b) and groups[one] is not groups[other]:
            groups[one] |= groups[other]
            for index in groups[other]:
                groups[index] = groups[one]
    return {frozenset(group) for group in groups}


def as_sets(groups: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, group in enumerate(groups) if group == first) for first in set(groups)}


def test_groups_are_those_of_comparing_all_pairs() -> None:
    for seed in range(3):
        questions = wordings(150, seed)
        for threshold in (0.5, 0.8, 1.0):
            groups = near_duplicates(questions, threshold)
            assert as_sets(groups) == joined_one_by_one(questions, threshold)
            assert all(group <= index and groups[group] == group for index, group in enumerate(groups))
    assert 20 < len(set(near_duplicates(wordings(150)))) < 130  # both kinds of questions were there


def test_what_counts_as_a_near_duplicate() -> None:
    first = "Who was the director of the film Solaris, released in 1972?"
    groups = near_duplicates(
        [
            first,
            "who was director of film 'Solaris' released in 1972",
            "Who was the director of the film Stalker, released in 1979?",  # the same template, another question
            "???",
            "!!!",
        ]
    )
    assert groups == [0, 0, 2, 3, 4]


def test_validation_takes_whole_groups_and_about_its_share() -> None:
    questions = wordings(400)
    ids = [f"id{index}" for index in range(400)]
    groups = near_duplicates(questions)
    chosen = validation_members(ids, groups, 0.1, seed=0)
    assert 36 <= len(chosen) <= 40
    assert not {groups[index] for index in chosen} & {groups[index] for index in set(range(400)) - chosen}
    assert validation_members(ids, groups, 0.1, seed=1) != chosen
    # The same questions in another order have the same members.
    order = random.Random(1).sample(range(400), 400)
    again = near_duplicates([questions[index] for index in order])
    shuffled = validation_members([ids[index] for index in order], again, 0.1, seed=0)
    assert {order[index] for index in shuffled} == chosen
