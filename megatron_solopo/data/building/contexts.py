"""Short and long contexts of one question: the same gold paragraphs among few or many distractors.

Everything in this module is a pure function of its arguments: the context of a question depends on the seed, the
question and the pool as a set, never on the order of the input or on which worker builds it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from megatron_solopo.data.building.pool import DistractorPool
from megatron_solopo.data.building.selection import TOKEN_TOLERANCE, CannotBuild, Distractors
from megatron_solopo.data.files.records import read_jsonl
from megatron_solopo.data.schema import Paragraph, Question, check_spans
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.data.validation import (
    Chat,
    Day,
    DocumentSpan,
    Message,
    Printed,
    Whole,
    Words,
    check_unique,
    validated,
)

CountTokens = Callable[[list[Message]], int]
"""Returns the number of tokens of a chat, chat template included."""


@dataclass(frozen=True)
class Context:
    """One built context.

    ``spans`` are the documents in the last message's content, in the order of ``paragraphs``; ``tokens`` is the
    length of the whole prompt, None where the size is a number of documents.
    """

    messages: list[Message]
    paragraphs: tuple[Paragraph, ...]
    spans: list[DocumentSpan]
    tokens: int | None = None

    @property
    def gold_positions(self) -> tuple[int, ...]:
        """The indices of the gold paragraphs in ``paragraphs``."""
        return tuple(index for index, paragraph in enumerate(self.paragraphs) if paragraph.is_supporting)


@dataclass(frozen=True)
class ContextPair:
    """A line of a contexts file: one question on its short and its long context (lengths in tokens).

    ``short_gold`` and ``long_gold`` are the indices of the gold documents; ``dropped_gold`` counts the gold
    documents that only the long context has. ``chat_template_date`` is the day that the chat template printed when they
    were counted, None where it prints none.
    """

    id: str
    question: str
    answers: Words
    short_messages: Chat
    long_messages: Chat
    short_tokens: Whole
    long_tokens: Whole
    source: Printed = ""
    short_documents: Whole = 0
    long_documents: Whole = 0
    short_gold: tuple[Whole, ...] = ()
    long_gold: tuple[Whole, ...] = ()
    short_spans: list[DocumentSpan] = field(default_factory=list)
    long_spans: list[DocumentSpan] = field(default_factory=list)
    dropped_gold: Whole = 0
    chat_template_date: Day | None = None


_PAIR = TypeAdapter(ContextPair)


def read_contexts(path: str | Path) -> Iterator[ContextPair]:
    """Reads what ``prepare-data`` wrote.

    Raises:
        UserError: naming ``file:line`` and the field.
    """
    seen: dict[str, str] = {}
    for where, record in read_jsonl(path):
        pair = validated(_PAIR, record, where)
        check_spans(pair.short_spans, pair.short_messages, "short_spans", where)
        check_spans(pair.long_spans, pair.long_messages, "long_spans", where)
        check_unique(pair.id, where, seen)
        yield pair


def build_contexts(
    question: Question,
    pool: DistractorPool,
    sizes: Sequence[int],
    *,
    prompt_format: PromptFormat,
    seed: int,
    count_tokens: CountTokens | None = None,
    gold_depth: float | None = None,
    drop_gold_fraction: float = 0.0,
) -> list[Context]:
    """Builds contexts of ``question`` of these sizes, each with all gold paragraphs and the smaller ones' distractors.

    Gold paragraphs keep their order. Distractors come from the question's paragraphs first, then from the
    pool; `selection.Distractors` defines which are allowed.

    Args:
        sizes: ascending. Documents, gold ones included, or, with ``count_tokens``, tokens of the whole
            prompt, of which a context has between 98 % and 100 %.
        seed: with the question's id it decides everything random.
        gold_depth: None puts the gold paragraphs at uniformly random positions; 0 puts them together at the
            start, 1 at the end, a number between at that share of the distractors.
        drop_gold_fraction: fraction of the gold paragraphs that the first size lacks, in [0, 1]; a fraction of a
            paragraph is one with that probability, and at least one paragraph stays.

    Raises:
        CannotBuild: the reason why a size cannot be had for this question.
    """
    if list(sizes) != sorted(sizes) or not sizes:
        raise ValueError(f"sizes must be ascending and not empty, got {list(sizes)}")
    gold = [paragraph for paragraph in question.paragraphs if paragraph.is_supporting]
    kept = _keep(gold, drop_gold_fraction, random.Random(f"{seed}\0{question.id}\0kept gold"))
    distractors = Distractors(question, pool, random.Random(f"{seed}\0{question.id}"))
    contexts: list[Context] = []
    for index, size in enumerate(sizes):
        evidence = kept if index == 0 else gold

        def arrange(size: int = size, evidence: Sequence[Paragraph] = evidence) -> Context:
            # A separate generator, so that the order at one size does not depend on the other sizes built.
            rng = random.Random(f"{seed}\0{question.id}\0{size}")
            paragraphs = _arrange(evidence, distractors.paragraphs, gold_depth, rng)
            return _context(question, paragraphs, prompt_format, count_tokens)

        try:
            if count_tokens is None:
                if len(evidence) > size:
                    raise CannotBuild("more gold paragraphs than the {size} wanted")
                distractors.grow_to(size - len(evidence))
                contexts.append(arrange())
            else:
                # With the same gold the smaller context is the start, counted already.
                same = contexts[-1] if contexts and (index > 1 or evidence == kept) else None
                contexts.append(_grow(distractors, size, same or arrange(), arrange))
        except CannotBuild as reason:
            unit = "tokens" if count_tokens else "documents"
            raise CannotBuild(str(reason).format(size=f"{size} {unit}")) from None
    return contexts


def _grow(distractors: Distractors, size: int, smaller: Context, arrange: Callable[[], Context]) -> Context:
    """Adds distractors to ``smaller`` until it has ``size`` tokens."""
    tokens = _tokens(smaller)
    if (1 - TOKEN_TOLERANCE) * size <= tokens <= size:
        return smaller
    if tokens > size:
        raise CannotBuild("the question and its gold paragraphs alone are longer than {size}")
    built = [smaller]

    def count() -> int:
        built.append(arrange())
        return _tokens(built[-1])

    distractors.grow_to_tokens(size, tokens, count)
    return built[-1]


def _tokens(context: Context) -> int:
    assert context.tokens is not None, "sizes in documents"
    return context.tokens


def _keep(gold: list[Paragraph], drop_fraction: float, rng: random.Random) -> list[Paragraph]:
    """Returns the gold paragraphs that are kept, in their order."""
    exact = drop_fraction * len(gold)
    dropped = min(int(exact) + (rng.random() < exact - int(exact)), len(gold) - 1)
    stay = sorted(rng.sample(range(len(gold)), len(gold) - dropped))
    return [gold[index] for index in stay]


def _arrange(
    gold: Sequence[Paragraph], distractors: Sequence[Paragraph], gold_depth: float | None, rng: random.Random
) -> list[Paragraph]:
    paragraphs = list(distractors)
    rng.shuffle(paragraphs)
    if gold_depth is None:
        positions = sorted(rng.sample(range(len(gold) + len(paragraphs)), len(gold)))
    else:
        first = round(gold_depth * len(paragraphs))
        positions = range(first, first + len(gold))
    for position, paragraph in zip(positions, gold, strict=True):
        paragraphs.insert(position, paragraph)
    return paragraphs


def _context(
    question: Question, paragraphs: Sequence[Paragraph], prompt_format: PromptFormat, count_tokens: CountTokens | None
) -> Context:
    messages, spans = prompt_format.messages_and_spans(question.question, paragraphs)
    return Context(messages, tuple(paragraphs), spans, count_tokens(messages) if count_tokens else None)
