"""Shortens a context that is too long, by distractor text alone.

Distractors are the documents that spans mark as no evidence. They go whole, the one nearest to the middle of the text
first and then outward; of the last one only as many words go, from its end, as must. Evidence, question, instructions
and the documents' numbers stay as they were. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_solopo.data.schema import DocumentSpan, Message


@dataclass(frozen=True)
class Cut:
    """A shortened context: its chat, its documents' places, and its length in tokens."""

    messages: list[Message]
    spans: list[DocumentSpan]
    tokens: int


def cut_context(
    messages: list[Message],
    spans: Sequence[DocumentSpan],
    limit: int,
    count_prompt: Callable[[list[Message]], int],
    count_texts: Callable[[list[str]], list[int]],
) -> Cut | None:
    """Returns the context with so many distractors less that its prompt has at most ``limit`` tokens.

    Args:
        spans: the documents of the last message.
        count_prompt: returns the tokens of a chat, chat template included.
        count_texts: returns the tokens of each text.

    Returns:
        None where all distractors together are not enough.
    """
    text = messages[-1]["content"]
    order = _outward(text, spans)
    if not order:
        return None
    sizes = dict(zip(order, count_texts([text[spans[i][0] : spans[i][1]] for i in order]), strict=True))
    excess = count_prompt(messages) - limit
    while True:
        # Documents are counted one by one, so what merges over their borders is corrected by counting again.
        content, kept, removed_all = _without(text, spans, order, sizes, excess)
        shorter = [*messages[:-1], {**messages[-1], "content": content}]
        tokens = count_prompt(shorter)
        if tokens <= limit:
            return Cut(shorter, kept, tokens)
        if removed_all:
            return None
        excess += tokens - limit


def _outward(text: str, spans: Sequence[DocumentSpan]) -> list[int]:
    """Returns the distractors' numbers, the one nearest to the middle of the text first."""
    distractors = [number for number, (_, _, gold) in enumerate(spans) if not gold]
    return sorted(distractors, key=lambda i: (abs(spans[i][0] + spans[i][1] - len(text)), i))


def _without(
    text: str, spans: Sequence[DocumentSpan], order: Sequence[int], sizes: dict[int, int], excess: int
) -> tuple[str, list[DocumentSpan], bool]:
    """Returns (text, its spans, whether no distractor is left) with about ``excess`` tokens less, or somewhat more."""
    gone: set[int] = set()
    shortened: dict[int, int] = {}
    for number in order:
        if excess <= 0:
            break
        start, end, _ = spans[number]
        if sizes[number] > excess and (stop := _word_end(text, start, end, 1 - excess / sizes[number])) is not None:
            shortened[number] = stop
            break
        gone.add(number)
        excess -= sizes[number]
    parts: list[str] = []
    kept: list[DocumentSpan] = []
    size = 0

    def add(piece: str) -> None:
        nonlocal size
        parts.append(piece)
        size += len(piece)

    add(text[: spans[0][0]])
    for number, (start, end, gold) in enumerate(spans):
        if number in gone:
            continue
        if kept:  # the text before the first document that is left is no separator any more
            add(text[spans[number - 1][1] : start])
        place = size
        add(text[start : shortened.get(number, end)])
        kept.append((place, size, gold))
    add(text[spans[-1][1] :])
    return "".join(parts), kept, len(gone) == len(order)


def _word_end(text: str, start: int, end: int, share: float) -> int | None:
    """Returns where the last word ends that is wholly within this share of ``text[start:end]``; None for no word.

    A text without spaces, as in Chinese, is cut between characters.
    """
    most = stop = start + int((end - start) * share)
    while stop > start and not text[stop].isspace():
        stop -= 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    if stop == start and not any(map(str.isspace, text[start:end])):
        stop = most
    return stop if stop > start else None
