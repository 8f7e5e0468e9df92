"""Short and long contexts of one question: the same gold paragraphs among few or many distractors.

Everything here is a pure function of its arguments: the context of a question depends on the seed, the
question and the pool as a set, never on the order of the input or on which worker builds it.
"""

from __future__ import annotations

import dataclasses
import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_solopo.data.schema import (
    DocumentSpan,
    Message,
    Paragraph,
    Question,
    check_messages,
    check_spans,
    read_jsonl,
    require,
)
from megatron_solopo.data.scoring import normalise, normalised_answers
from megatron_solopo.errors import UserError

DEFAULT_DOCUMENT_TEMPLATE = "Document {number}: {title}\n{text}"
DEFAULT_DOCUMENT_SEPARATOR = "\n\n"
DEFAULT_PROMPT_TEMPLATE = (
    "Answer the question from the documents below. Most of them have nothing to do with it.\n\n"
    "{documents}\n\n"
    "Question: {question}\n\n"
    "First reason step by step in a few short sentences, naming the facts you use. "
    'Then end with one line that starts with "Answer:" and gives the answer in as few words as possible.'
)

TOKEN_TOLERANCE = 0.02
"""A context of a target of N tokens has between 0.98 N and N of them."""

# A few rounds correct the estimate of a prompt's length (documents are counted one by one, so what merges
# over their borders and the digits of their numbers are not in it); one is usually enough.
_ROUNDS = 12


class CannotBuild(Exception):
    """A question that no context of the wanted size can be built for; the message is the reason to count."""


@dataclass(frozen=True)
class PromptFormat:
    """How paragraphs and a question become a chat.

    In the document template ``{number}`` (from 1), ``{title}`` and ``{text}`` are replaced, in the prompt
    template ``{documents}`` and ``{question}``; other braces stay as they are.

    Raises:
        UserError: a template lacks a placeholder that it needs.
    """

    document_template: str = DEFAULT_DOCUMENT_TEMPLATE
    document_separator: str = DEFAULT_DOCUMENT_SEPARATOR
    prompt_template: str = DEFAULT_PROMPT_TEMPLATE
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        for flag, template, needed in (
            ("--document-template", self.document_template, ("text",)),
            ("--prompt-template", self.prompt_template, ("documents", "question")),
        ):
            for name in needed:
                if f"{{{name}}}" not in template:
                    raise UserError(f"{flag}: the template has no {{{name}}}; put it where the {name} should stand")

    def document(self, paragraph: Paragraph, number: int) -> str:
        return _replace(self.document_template, number=str(number), title=paragraph.title, text=paragraph.text)

    def messages(self, question: str, paragraphs: Sequence[Paragraph]) -> list[Message]:
        """The chat that asks ``question`` over ``paragraphs``, in their order; it ends with a user message."""
        documents = self.document_separator.join(
            self.document(paragraph, number) for number, paragraph in enumerate(paragraphs, 1)
        )
        chat = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        content = _replace(self.prompt_template, documents=documents, question=question)
        return [*chat, {"role": "user", "content": content}]


@dataclass(frozen=True)
class Context:
    """One built context.

    ``gold_positions`` are the indices of the gold paragraphs in ``paragraphs``; ``tokens`` is the length of
    the whole prompt, None where the size was given in documents.
    """

    messages: list[Message]
    paragraphs: tuple[Paragraph, ...]
    gold_positions: tuple[int, ...]
    tokens: int | None = None


@dataclass(frozen=True)
class ContextPair:
    """A line of a contexts file: one question on its short and its long context (lengths in tokens)."""

    id: str
    question: str
    answers: list[str]
    short_messages: list[Message]
    long_messages: list[Message]
    short_tokens: int
    long_tokens: int
    source: str
    short_documents: int = 0
    long_documents: int = 0
    short_gold: tuple[int, ...] = ()
    long_gold: tuple[int, ...] = ()
    short_spans: list[DocumentSpan] = field(default_factory=list)
    long_spans: list[DocumentSpan] = field(default_factory=list)


def read_contexts(path: str | Path) -> Iterator[ContextPair]:
    """Reads what ``prepare-data`` wrote.

    Raises:
        UserError: naming ``file:line`` and the field.
    """
    seen: dict[str, str] = {}
    for where, record in read_jsonl(path):
        pair = ContextPair(
            id=require(record, "id", str, where),
            question=require(record, "question", str, where),
            answers=require(record, "answers", list, where),
            short_messages=check_messages(require(record, "short_messages", list, where), "short_messages", where),
            long_messages=check_messages(require(record, "long_messages", list, where), "long_messages", where),
            short_tokens=require(record, "short_tokens", int, where),
            long_tokens=require(record, "long_tokens", int, where),
            source=str(record.get("source", "")),
            short_documents=record.get("short_documents", 0),
            long_documents=record.get("long_documents", 0),
            short_gold=tuple(record.get("short_gold", ())),
            long_gold=tuple(record.get("long_gold", ())),
            short_spans=check_spans(record.get("short_spans"), record["short_messages"], "short_spans", where),
            long_spans=check_spans(record.get("long_spans"), record["long_messages"], "long_spans", where),
        )
        if not pair.answers or not all(isinstance(answer, str) for answer in pair.answers):
            raise UserError(f"{where}: the field 'answers' must be a non-empty list of texts")
        if pair.id in seen:
            raise UserError(f"{where}: the id {pair.id!r} was used before at {seen[pair.id]}; ids must be unique")
        seen[pair.id] = where
        yield pair


@dataclass(frozen=True)
class Candidate:
    """A paragraph with what the checks compare: normalised title and text, and its length as a document."""

    paragraph: Paragraph
    title_key: str
    text_key: str
    tokens: int


class DistractorPool:
    """Paragraphs to fill contexts with, each kept once and in an order that the input's order does not change.

    Args:
        paragraphs: whatever may serve as a distractor; gold flags are dropped.
        prompt_format: how a paragraph is written, for its length.
        count: token counts of a list of texts; only needed for sizes in tokens.
    """

    def __init__(
        self,
        paragraphs: Iterable[Paragraph],
        prompt_format: PromptFormat,
        count: Callable[[list[str]], list[int]] | None = None,
    ) -> None:
        self._format = prompt_format
        self._count = count
        distinct = sorted({(paragraph.title, paragraph.text) for paragraph in paragraphs})
        self.candidates = self._make(distinct)
        self._known = dict(zip(distinct, self.candidates, strict=True))
        self.by_length = sorted(self.candidates, key=lambda candidate: candidate.tokens)
        self.lengths = [candidate.tokens for candidate in self.by_length]

    def __len__(self) -> int:
        return len(self.candidates)

    def candidates_for(self, paragraphs: Iterable[Paragraph]) -> list[Candidate]:
        """Candidates of any paragraphs; those in the pool are not measured again."""
        keys = [(paragraph.title, paragraph.text) for paragraph in paragraphs]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        made = dict(zip(new, self._make(new), strict=True))
        return [self._known.get(key) or made[key] for key in keys]

    def _make(self, keys: list[tuple[str, str]]) -> list[Candidate]:
        paragraphs = [Paragraph(title, text) for title, text in keys]
        lengths = [0] * len(keys)
        if self._count and keys:
            # A two-digit number stands for all; the separator belongs to the document because tokenizers
            # merge it with the last character.
            separator = self._format.document_separator
            lengths = self._count([self._format.document(paragraph, 10) + separator for paragraph in paragraphs])
        return [
            # Titles of punctuation or articles alone ("!!!", "The The") keep their own spelling as the key.
            Candidate(
                paragraph,
                normalise(paragraph.title) or paragraph.title.strip().lower(),
                normalise(f"{paragraph.title} {paragraph.text}"),
                length,
            )
            for paragraph, length in zip(paragraphs, lengths, strict=True)
        ]


def build_contexts(
    question: Question,
    pool: DistractorPool,
    sizes: Sequence[int],
    *,
    prompt_format: PromptFormat,
    seed: int,
    count_tokens: Callable[[list[Message]], int] | None = None,
) -> list[Context]:
    """Contexts of ``question`` of the given sizes, each with all gold paragraphs and the smaller ones' distractors.

    Gold paragraphs keep their order and stand at uniformly random positions. Distractors come from the
    question's own paragraphs first, then from the pool; none has the title of a gold paragraph or of
    another distractor in the context, and none contains an answer or alias (normalised substring).

    Args:
        sizes: ascending. Documents, gold ones included, or, with ``count_tokens``, tokens of the whole
            prompt, of which a context has between 98 % and 100 %.
        seed: with the question's id it decides everything random.
        count_tokens: tokens of a chat as a model sees it, chat template included.

    Raises:
        CannotBuild: the reason why a size cannot be had for this question.
    """
    if list(sizes) != sorted(sizes) or not sizes:
        raise ValueError(f"sizes must be ascending and not empty, got {list(sizes)}")
    selection = _Selection(question, pool, random.Random(f"{seed}\0{question.id}"))
    contexts: list[Context] = []
    for size in sizes:
        if count_tokens is None:
            selection.grow_to_documents(size)
            contexts.append(_arrange(question, selection.distractors, prompt_format, seed, size))
        else:
            if not contexts:
                contexts.append(_counted(_arrange(question, (), prompt_format, seed, size), count_tokens))
            contexts.append(
                selection.grow_to_tokens(
                    size,
                    contexts[-1],
                    lambda size=size: _counted(
                        _arrange(question, selection.distractors, prompt_format, seed, size), count_tokens
                    ),
                )
            )
    return contexts[-len(sizes) :]


def _counted(context: Context, count_tokens: Callable[[list[Message]], int]) -> Context:
    return dataclasses.replace(context, tokens=count_tokens(context.messages))


def _arrange(
    question: Question, distractors: Sequence[Paragraph], prompt_format: PromptFormat, seed: int, size: int
) -> Context:
    # Its own generator, so that the order at one size does not depend on the other sizes built.
    rng = random.Random(f"{seed}\0{question.id}\0{size}")
    gold = [paragraph for paragraph in question.paragraphs if paragraph.is_supporting]
    others = list(distractors)
    rng.shuffle(others)
    positions = sorted(rng.sample(range(len(gold) + len(others)), len(gold)))
    paragraphs: list[Paragraph] = others
    for position, paragraph in zip(positions, gold, strict=True):
        paragraphs.insert(position, paragraph)
    return Context(prompt_format.messages(question.question, paragraphs), tuple(paragraphs), tuple(positions))


class _Selection:
    """The distractors of one question, growing from size to size."""

    def __init__(self, question: Question, pool: DistractorPool, rng: random.Random) -> None:
        self._pool = pool
        self._rng = rng
        self._answers = normalised_answers(question.answers)
        gold = pool.candidates_for(paragraph for paragraph in question.paragraphs if paragraph.is_supporting)
        self._gold_count = len(gold)
        self._gold_titles = {candidate.title_key for candidate in gold}
        self._gold_texts = tuple(filter(None, (normalise(candidate.paragraph.text) for candidate in gold)))
        own = pool.candidates_for(paragraph for paragraph in question.paragraphs if not paragraph.is_supporting)
        self._own = [candidate for candidate in own if self._allowed(candidate)]
        rng.shuffle(self._own)
        self._chosen: list[Candidate] = []
        self._titles: set[str] = set()

    @property
    def distractors(self) -> list[Paragraph]:
        return [candidate.paragraph for candidate in self._chosen]

    def grow_to_documents(self, size: int) -> None:
        wanted = size - self._gold_count
        if wanted < 0:
            raise CannotBuild(f"more gold paragraphs than the {size} documents wanted")
        for candidate in self._stream():
            if len(self._chosen) >= wanted:
                break
            self._take(candidate)
        if len(self._chosen) < wanted:
            raise CannotBuild(f"too few distractors for {size} documents without the answer or a gold title")

    def grow_to_tokens(self, size: int, smaller: Context, arrange: Callable[[], Context]) -> Context:
        """Adds distractors to ``smaller`` until the prompt of ``arrange()`` has 98 % to 100 % of ``size`` tokens."""
        slack = int(TOKEN_TOLERANCE * size)
        start = list(self._chosen)
        here = smaller.tokens
        if size - slack <= here <= size:
            return smaller
        if here > size:
            raise CannotBuild(f"the question and its gold paragraphs alone are longer than {size} tokens")
        missing = size - here
        for _ in range(_ROUNDS):
            self._chosen = list(start)
            self._titles = {candidate.title_key for candidate in start}
            # Aim at the middle of the window: the estimate errs to either side.
            exhausted = self._fill(missing - slack // 4, slack // 2)
            context = arrange()
            if size - slack <= context.tokens <= size:
                return context
            if exhausted:
                raise CannotBuild(f"too few distractors for {size} tokens without the answer or a gold title")
            estimated = here + sum(candidate.tokens for candidate in self._chosen[len(start) :])
            missing = size - here - (context.tokens - estimated)
        raise CannotBuild(f"no choice of distractors comes within {TOKEN_TOLERANCE:.0%} of {size} tokens")

    def _fill(self, missing: int, window: int) -> bool:
        """Takes distractors of ``missing - window .. missing`` tokens in all, if it can; True when none was left."""
        lengths = sorted([*self._pool.lengths, *(candidate.tokens for candidate in self._own)])
        if not lengths:
            return True
        shortest, large = lengths[len(lengths) // 20], lengths[3 * len(lengths) // 4]
        stream = self._stream()
        too_long = False
        while missing > window:
            # Near the end one paragraph of the right length closes the gap.
            if missing <= 2 * large and (last := self._fitting(missing - window, missing)):
                self._take(last)
                return False
            candidate = next(stream, None)
            if candidate is None:
                return not too_long
            # Leave room for one more, or the gap could not be closed.
            if candidate.tokens > missing - shortest:
                too_long = True
            elif self._take(candidate):
                missing -= candidate.tokens
        return False

    def _fitting(self, low: int, high: int) -> Candidate | None:
        """An unused distractor of ``low`` to ``high`` tokens, an own one if there is any."""
        for candidate in self._own:
            if low <= candidate.tokens <= high and candidate.title_key not in self._titles:
                return candidate
        first, end = bisect_left(self._pool.lengths, low), bisect_right(self._pool.lengths, high)
        if first == end:
            return None
        offset = self._rng.randrange(end - first)
        for step in range(end - first):
            candidate = self._pool.by_length[first + (offset + step) % (end - first)]
            if candidate.title_key not in self._titles and self._allowed(candidate):
                return candidate
        return None

    def _stream(self) -> Iterator[Candidate]:
        """Every distractor in the order of use: own ones, then the pool's in a random order, drawn lazily."""
        yield from self._own
        total = len(self._pool)
        moved: dict[int, int] = {}  # a Fisher-Yates shuffle that only remembers what it moved
        for index in range(total):
            other = self._rng.randrange(index, total)
            candidate = self._pool.candidates[moved.get(other, other)]
            moved[other] = moved.get(index, index)
            if candidate.title_key not in self._titles and self._allowed(candidate):
                yield candidate

    def _take(self, candidate: Candidate) -> bool:
        if candidate.title_key in self._titles:
            return False
        self._chosen.append(candidate)
        self._titles.add(candidate.title_key)
        return True

    def _allowed(self, candidate: Candidate) -> bool:
        return (
            candidate.title_key not in self._gold_titles
            and not any(answer in candidate.text_key for answer in self._answers)
            and not candidate.text_key.endswith(self._gold_texts)
        )


_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def _replace(template: str, **values: str) -> str:
    """One pass over the template, so that braces inside a value are never taken for a placeholder."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)
