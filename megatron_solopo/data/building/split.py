"""A validation set of whole groups of near-duplicate questions.

Near-duplicates are joined exactly, by prefix filtering (Bayardo et al., WWW 2007): a question has about twenty
shingles, so that no sketch such as MinHash, which may miss pairs, is needed for speed.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from megatron_solopo.data.answers import normalise, words_of

NEAR_DUPLICATE = 0.8
"""Questions whose sets of words and word pairs have at least this Jaccard similarity are near-duplicates."""


def shingles(question: str) -> frozenset[str]:
    """Returns the words and the pairs of neighbouring words of a question, normalised."""
    words = words_of(normalise(question)) or [question]
    return frozenset([*words, *map(" ".join, zip(words, words[1:], strict=False))])


def near_duplicates(questions: Iterable[str], threshold: float = NEAR_DUPLICATE) -> list[int]:
    """For each question the index of the first question of its group.

    A group is what near-duplicates join, directly or through others.
    """
    texts: dict[frozenset[str], int] = {}
    first = [texts.setdefault(shingles(question), index) for index, question in enumerate(questions)]
    frequency = Counter(shingle for shingled in texts for shingle in shingled)
    parent = {index: index for index in texts.values()}

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    # Two sets of similarity t or more share one of the rarest |s| - ceil(t |s|) + 1 shingles of each.
    by_shingle: dict[str, list[tuple[int, frozenset[str]]]] = defaultdict(list)
    for shingled, index in texts.items():
        rarest = sorted(shingled, key=lambda shingle: (frequency[shingle], shingle))
        for shingle in rarest[: len(shingled) - math.ceil(threshold * len(shingled)) + 1]:
            for other, theirs in by_shingle[shingle]:
                if not threshold <= len(shingled) / len(theirs) <= 1 / threshold or root(index) == root(other):
                    continue
                common = len(shingled & theirs)
                if common >= threshold * (len(shingled) + len(theirs) - common):
                    low, high = sorted((root(index), root(other)))
                    parent[high] = low
            by_shingle[shingle].append((index, shingled))
    return [root(index) for index in first]


def validation_members(ids: Sequence[str], groups: Sequence[int], fraction: float, seed: int) -> set[int]:
    """Returns the indices of about ``fraction`` of the questions, in whole groups, drawn from seed and ids.

    Groups come in a random order that depends on their ids only; one that would exceed the fraction is skipped.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)

    def draw(group: list[int]) -> bytes:
        return hashlib.sha256(f"{seed}\0{min(ids[index] for index in group)}".encode()).digest()

    most = round(fraction * len(ids))
    chosen: set[int] = set()
    for group in sorted(members.values(), key=draw):
        if len(chosen) + len(group) <= most:
            chosen.update(group)
    return chosen
