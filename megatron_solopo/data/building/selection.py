"""Which distractors join a question's evidence: clean ones, of the right total length, drawn from seed and question."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from megatron_solopo.data.answers import mentions, normalise, stated_golds
from megatron_solopo.data.building.pool import Candidate, DistractorPool
from megatron_solopo.data.schema import Paragraph, Question

TOKEN_TOLERANCE = 0.02
"""A context of a target of N tokens has between 0.98 N and N of them."""

# A few rounds correct the estimate of a prompt's length (documents are counted one by one, so what merges
# over their borders and the digits of their numbers are not in it); one is usually enough.
_ROUNDS = 12

# Paragraphs of the pool that are read for one question before it counts as impossible, so that a question whose
# answer is in nearly every document does not read the whole of a large pool again and again.
_MOST_READ = 50_000


class CannotBuild(Exception):
    """A question that no context of the requested size can be built for; the message is the reason to count."""


class Distractors:
    """The distractors of one question, growing from size to size.

    None has the title of a gold paragraph or of another distractor, none repeats a gold paragraph's text, and
    none contains an answer (`answers.mentions`). The question's paragraphs come first, in a random order.
    """

    def __init__(self, question: Question, pool: DistractorPool, rng: random.Random) -> None:
        self._pool = pool
        self._rng = rng
        self._unread = _MOST_READ
        self._answers = stated_golds(question.answers)
        gold = pool.candidates_for(paragraph for paragraph in question.paragraphs if paragraph.is_supporting)
        self._gold_titles = {candidate.title_key for candidate in gold}
        self._gold_texts = tuple(filter(None, (normalise(candidate.paragraph.text) for candidate in gold)))
        candidates = pool.candidates_for(paragraph for paragraph in question.paragraphs if not paragraph.is_supporting)
        self._of_question = [candidate for candidate in candidates if self._allowed(candidate)]
        rng.shuffle(self._of_question)
        self._chosen: list[Candidate] = []
        self._titles: set[str] = set()

    @property
    def paragraphs(self) -> list[Paragraph]:
        return [candidate.paragraph for candidate in self._chosen]

    def grow_to(self, count: int) -> None:
        """Adds distractors until there are ``count``.

        Raises:
            CannotBuild: there are fewer.
        """
        stream = self._stream()
        while len(self._chosen) < count:
            candidate = next(stream, None)
            if candidate is None:
                raise CannotBuild(self._too_few())
            self._take(candidate)

    def grow_to_tokens(self, size: int, tokens_before: int, count: Callable[[], int]) -> None:
        """Adds distractors until the prompt has 98 % to 100 % of ``size`` tokens.

        Args:
            tokens_before: tokens of the prompt with the distractors so far, or about as many.
            count: tokens of the prompt with the distractors chosen now.

        Raises:
            CannotBuild: no choice comes within the window.
        """
        slack = int(TOKEN_TOLERANCE * size)
        start = list(self._chosen)
        missing = size - tokens_before
        for _ in range(_ROUNDS):
            self._chosen = list(start)
            self._titles = {candidate.title_key for candidate in start}
            # Aim at the middle of the window: the estimate errs to either side.
            exhausted = self._fill(missing - slack // 4, slack // 2)
            tokens = count()
            if size - slack <= tokens <= size:
                return
            if exhausted:
                raise CannotBuild(self._too_few())
            estimated = tokens_before + sum(candidate.tokens for candidate in self._chosen[len(start) :])
            missing = size - tokens_before - (tokens - estimated)
        raise CannotBuild(f"no choice of distractors comes within {TOKEN_TOLERANCE:.0%} of {{size}}")

    def _too_few(self) -> str:
        looked = "" if self._unread else f" among the {_MOST_READ:,} paragraphs looked at"
        return f"too few distractors for {{size}} without the answer or a gold title{looked}"

    def _fill(self, missing: int, window: int) -> bool:
        """Takes distractors of ``missing - window .. missing`` tokens in all, if it can; True when none was left."""
        lengths = self._pool.typical_lengths()
        if lengths is None:
            if not self._of_question:
                return True
            tokens = [candidate.tokens for candidate in self._of_question]
            lengths = min(tokens), max(tokens)
        shortest, large = lengths
        stream = self._stream()
        while missing > window:
            if missing > 2 * large:
                candidate = next(stream, None)
                if candidate is None:
                    return True
            else:
                # Near the end one paragraph of the right length closes the gap; any other must leave room for one.
                if last := self._fitting(missing - window, missing):
                    self._take(last)
                    return False
                candidate = self._fitting(1, missing - shortest)
                if candidate is None:
                    return False
            if candidate.tokens <= missing - shortest and self._take(candidate):
                missing -= candidate.tokens
        return False

    def _fitting(self, low: int, high: int) -> Candidate | None:
        """Returns an unused distractor of ``low`` to ``high`` tokens, one of the question if there is any."""
        for candidate in self._of_question:
            if low <= candidate.tokens <= high and candidate.title_key not in self._titles:
                return candidate
        rows = self._pool.of_length(low, high)
        offset = self._rng.randrange(len(rows)) if len(rows) else 0
        for step in range(len(rows)):
            if not self._unread:
                break
            if candidate := self._read(rows[(offset + step) % len(rows)]):
                return candidate
        return None

    def _stream(self) -> Iterator[Candidate]:
        """Yields every distractor in the order of use: the question's, then the pool's in a random order, drawn
        lazily."""
        yield from self._of_question
        total = len(self._pool)
        moved: dict[int, int] = {}  # a Fisher-Yates shuffle that only remembers what it moved
        for index in range(total):
            if not self._unread:
                return
            other = self._rng.randrange(index, total)
            row = moved.get(other, other)
            moved[other] = moved.get(index, index)
            if candidate := self._read(row):
                yield candidate

    def _read(self, row: int) -> Candidate | None:
        """Returns a paragraph of the pool, if it may be taken."""
        self._unread -= 1
        candidate = self._pool[row]
        return candidate if candidate.title_key not in self._titles and self._allowed(candidate) else None

    def _take(self, candidate: Candidate) -> bool:
        if candidate.title_key in self._titles:
            return False
        self._chosen.append(candidate)
        self._titles.add(candidate.title_key)
        return True

    def _allowed(self, candidate: Candidate) -> bool:
        return (
            candidate.title_key not in self._gold_titles
            and not any(mentions(candidate.key(gold.keep), gold) for gold in self._answers)
            and not candidate.text_key.endswith(self._gold_texts)
        )
