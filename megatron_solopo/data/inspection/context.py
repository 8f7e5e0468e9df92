"""A prompt as it is shown: as the chat template renders it, folded around its evidence or its answers."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.answers import stated_golds
from megatron_solopo.data.inspection.blocks import (
    Block,
    Note,
    Prose,
    Section,
    highlighted,
    joined,
    many,
    printable,
    visible,
)
from megatron_solopo.data.inspection.examples import Example, depths
from megatron_solopo.data.inspection.rendered import Rendered, render
from megatron_solopo.data.schema import Message
from megatron_solopo.data.text.chat import prompt_length, prompt_starts
from megatron_solopo.data.text.tokenizer import encode

# Where documents are not known, this many characters stay around an answer and at both ends.
_AROUND = 240
_SHORTEST_FOLD = 400
_CUT, _KEPT = 320, 120
"""Characters that a distractor keeps on a page from its beginning and around an answer, unless it is to be full."""
_REWRITTEN = 400
"""Characters of a rendered prompt that are shown from its beginning and end where its template rewrites messages."""
_HINT, _MOST_HINTS = 50, 3
"""Characters on either side of an answer in a folded distractor, and how many such distractors a terminal shows."""
_STRIP_WIDTH = 60


@dataclass(frozen=True)
class Document:
    """A document, or a stretch of text where documents are not known.

    Attributes:
        text: its answers in the style "answer".
        number: from 1; 0 for a stretch of text.
        first_token: its position in the prompt; None where the template changed the text.
        depth: see `examples.depths`; None where it says nothing.
        of: documents of the prompt.
        full: whether the page cuts nothing.
    """

    text: Text
    gold: bool
    number: int
    tokens: int
    first_token: int | None
    depth: float | None = None
    of: int = 0
    full: bool = True

    @property
    def kind(self) -> str:
        return "evidence" if self.gold else "distractor"

    @property
    def where(self) -> str:
        place = "" if self.first_token is None else f" from position {self.first_token:,}"
        depth = "" if self.depth is None else f", depth {self.depth:.2f}"
        return f"{self.kind}, document {self.number} of {self.of}, {many(self.tokens, 'token')}{place}{depth}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        style = "gold" if self.gold else "distractor" if self.number else ""
        if self.number:
            yield Text(f"{'>>' if self.gold else '--'} {self.where}", style)
        yield Prose(self.text, style)

    def __html__(self) -> str:
        body = Prose(self.text if self.full or self.gold else _cut(self.text))
        where = Markup('<div class="where">{}</div>').format(self.where) if self.number else ""
        return Markup('<div class="document {}">{}{}</div>').format(self.kind, where, body)


@dataclass(frozen=True)
class Fold:
    """Documents behind one line; a terminal shows only where answers are in them, or with ``full`` all."""

    tokens: int
    documents: Sequence[Document]
    full: bool

    @property
    def summary(self) -> str:
        number = sum(document.number > 0 for document in self.documents)
        return many(self.tokens, "token") + (f" of {many(number, 'distractor')}" if number else "")

    @property
    def with_answer(self) -> list[Document]:
        """The documents in which an answer is found."""
        return [document for document in self.documents if document.text.spans]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.full:
            yield from self.documents
            return
        yield Text(f"... {self.summary} ...", "soft")
        for document in self.with_answer[:_MOST_HINTS]:
            (start, end), *_ = _excerpts(document.text, 0, _HINT)
            excerpt = document.text[start:end]
            excerpt.plain = excerpt.plain.replace("\n", " ")
            place = f"    an answer in document {document.number}: ... "
            yield Text.assemble((place, "warn"), printable(excerpt, console), " ...")

    def __html__(self) -> str:
        numbers = [document.number for document in self.with_answer]
        answers = f" \u00b7 an answer in document {_listed(numbers)}" if numbers else ""
        return Markup('<details class="fold"><summary>{}{}</summary>{}</details>').format(
            self.summary, answers, joined(self.documents)
        )


@dataclass(frozen=True)
class Strip:
    """The documents of a prompt as a bar; evidence is never hidden by rounding."""

    documents: Sequence[Document]
    note: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        total = sum(document.tokens for document in self.documents) or 1
        cells, begun = [("-", "soft")] * _STRIP_WIDTH, 0
        for document in self.documents:
            first = min(begun * _STRIP_WIDTH // total, _STRIP_WIDTH - 1)
            begun += document.tokens
            last = max(first + 1, begun * _STRIP_WIDTH // total)
            if document.gold:
                cells[first:last] = [("#", "gold")] * (last - first)
        yield Text.assemble("[", *cells, "]", f"  {self.note}" if self.note else "")

    def __html__(self) -> str:
        cell = Markup('<i class="{}" style="flex-grow: {}" title="document {}, {}, {:,} tokens"></i>')
        cells = (cell.format(one.kind, one.tokens, one.number, one.kind, one.tokens) for one in self.documents)
        strip = Markup('<div class="strip" role="img" aria-label="{}">{}</div>')
        return strip.format(self.note or "documents", Markup("").join(cells))


@dataclass(frozen=True)
class ContextView:
    """A prompt.

    Attributes:
        tokens: of the whole prompt, chat template included.
        rendered: the prompt as the chat template writes it.
        role: of the last message.
        pieces: the last message in order.
        documents: all documents in order.
        depths: of the evidence.
        answers_in: numbers of the documents in which an answer is found, 0 for the last message where documents are not
            known; None where no answer is searched for in documents.
        full: whether nothing is folded or cut.
    """

    name: str
    tokens: int
    rendered: Rendered
    role: str
    pieces: list[Prose | Document | Fold]
    documents: list[Document]
    depths: list[float]
    answers_in: list[int] | None
    full: bool = field(default=False)

    def section(self) -> Section:
        """What is shown of it."""
        note = many(self.tokens, "token")
        if self.documents:
            note += f", {many(len(self.documents), 'document')}"
            at = ", ".join(f"{depth:.2f}" for depth in self.depths)
            blocks: list[Block] = [Strip(self.documents, f"evidence at depth {at}" if at else "")]
        else:
            blocks = [Note("where its documents stand is not recorded")]
        frames, shown = self.rendered.frames, self.rendered.shown
        if shown:
            for frame, message in zip(frames[:-2], shown, strict=False):
                blocks += [_template(frame), Prose(Text(visible(message["content"])))]
            blocks += [_template(frames[-2]), *self.pieces, _template(frames[-1])]
        else:
            said = "the template rewrites the messages; this is their rendering, then the last one as recorded"
            frame = frames[0] if self.full else shortened(frames[0])
            blocks += [Note(said), _template(frame), Note(f"[{self.role}]"), *self.pieces]
        return Section(f"{self.name} context", f"{note}, {self._answers()}", blocks)

    def _answers(self) -> str:
        """In which documents an answer is found, in words."""
        if self.answers_in is None:
            return "answers not searched for in documents"
        if not self.answers_in:
            return "no answer found"
        if self.answers_in == [0]:
            return "an answer found"
        return f"an answer found in document{'s' * (len(self.answers_in) > 1)} {_listed(self.answers_in)}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _template(text: Text) -> Prose:
    """What the chat template writes, without its last line break."""
    return Prose(text[: len(text) - text.plain.endswith("\n")], "template")


def _trimmed(text: Text) -> Text:
    """Without line breaks at either end."""
    return text[len(text) - len(text.plain.lstrip("\n")) : len(text.plain.rstrip("\n"))]


def _excerpts(text: Text, head: int, around: int) -> list[tuple[int, int]]:
    """Start and end of what is kept of a text that is cut: its beginning and what surrounds the answers."""
    kept: list[tuple[int, int]] = [(0, min(head, len(text)))] if head else []
    for span in text.spans:
        start, end = max(span.start - around, 0), min(span.end + around, len(text))
        if kept and start <= kept[-1][1]:
            kept[-1] = kept[-1][0], max(end, kept[-1][1])
        else:
            kept.append((start, end))
    return kept


def _cut(text: Text) -> Text:
    """Of a long distractor the beginning and what surrounds answers."""
    if len(text) <= _CUT:
        return text
    made, place = Text(), 0
    for start, end in _excerpts(text, _CUT, _KEPT):
        made.append(f" [... {start - place:,} characters ...] " if start > place else "")
        made.append_text(text[start:end])
        place = end
    return made.append(f" [... {len(text) - place:,} more characters; --full keeps them]" if place < len(text) else "")


def shortened(text: Text) -> Text:
    """The beginning and the end of a longer text."""
    left = len(text) - 2 * _REWRITTEN
    if left <= 0:
        return text
    return text[:_REWRITTEN].append(f"\n... {left:,} characters ...\n").append_text(text[-_REWRITTEN:])


class _Ruler:
    """Counts the tokens of stretches of a chat's last message, as they stand in the whole prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], rendered: Rendered) -> None:
        self._tokenizer, self._content = tokenizer, messages[-1]["content"]
        self._starts: list[int] | None = None
        if rendered.content is None or not tokenizer.is_fast:  # a template that rewrites; then each is counted alone
            self.total = prompt_length(tokenizer, messages)
            return
        place = rendered.content[0] - rendered.cut
        self._starts = [start - place for start in prompt_starts(tokenizer, messages)]
        self.total = len(self._starts)

    def first(self, start: int) -> int | None:
        """The position of the token that begins at a character, or the next one."""
        return None if self._starts is None else bisect_left(self._starts, start)

    def tokens(self, start: int, end: int) -> int:
        if self._starts is None:
            return len(encode(self._tokenizer, self._content[start:end]))
        return bisect_left(self._starts, end) - bisect_left(self._starts, start)


def make_context(example: Example, name: str, tokenizer: PreTrainedTokenizerBase, full: bool = False) -> ContextView:
    """Takes a prompt of an example apart."""
    messages, spans = example.chats[name], example.spans[name]
    rendered = render(tokenizer, messages)
    ruler = _Ruler(tokenizer, messages, rendered)
    starts = [start for start, _, _ in spans] or [0]
    found = [
        (begin + start, begin + end)
        for begin, places in zip(starts, example.answers_found[name], strict=True)
        for start, end in places
    ]
    content = highlighted(example.content(name), found)
    parts = content.divide([edge for start, end, _ in spans for edge in (start, end)])
    of_gold = iter(depths(spans))
    documents = [
        Document(
            parts[2 * number - 1],
            gold,
            number,
            ruler.tokens(start, end),
            ruler.first(start),
            next(of_gold, None) if gold else None,
            len(spans),
            full,
        )
        for number, (start, end, gold) in enumerate(spans, 1)
    ]
    answers_in = [number for number, places in enumerate(example.answers_found[name], bool(spans)) if places]
    if not stated_golds(example.answers):
        answers_in = None
    pieces = _around_documents(parts, documents, ruler, full) if spans else _around_answers(content, found, ruler, full)
    depth = depths(spans)
    role = messages[-1]["role"]
    return ContextView(name, ruler.total, rendered, role, pieces, documents, depth, answers_in, full)


def _around_documents(
    parts: Sequence[Text], documents: Sequence[Document], ruler: _Ruler, full: bool
) -> list[Prose | Document | Fold]:
    """Evidence in full, each run of distractors as one fold; separators between documents belong to the fold.

    Args:
        parts: what stands before, in and after each document in turn.
    """
    places = list(itertools.accumulate(map(len, parts), initial=0))
    pieces: list[Prose | Document | Fold] = [Prose(_trimmed(parts[0]), "instructions")]
    for gold, run in itertools.groupby(documents, lambda document: document.gold):
        if gold:
            pieces += run
        else:
            folded = list(run)
            start, end = places[2 * folded[0].number - 1], places[2 * folded[-1].number]
            pieces.append(Fold(ruler.tokens(start, end), folded, full))
    pieces.append(Prose(_trimmed(parts[-1]), "instructions"))
    return [piece for piece in pieces if not isinstance(piece, Prose) or piece.text]


def _around_answers(
    content: Text, found: Sequence[tuple[int, int]], ruler: _Ruler, full: bool
) -> list[Prose | Document | Fold]:
    """The ends of the text and what surrounds the answers; the rest in folds."""
    size, start, end = len(content), 0, 0
    pieces: list[Prose | Document | Fold] = []
    kept = [(0, _AROUND), (size - 2 * _AROUND, size), *((first - _AROUND, last + _AROUND) for first, last in found)]
    for first, last in sorted(kept):
        if first - end > _SHORTEST_FOLD:
            tokens = ruler.tokens(end, first)
            stretch = Document(content[end:first], False, 0, tokens, ruler.first(end), full=full)
            pieces += [Prose(content[start:end]), Fold(tokens, [stretch], full)]
            start = first
        end = min(max(end, last), size)
    return [*pieces, Prose(content[start:end])]
