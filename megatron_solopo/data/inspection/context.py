"""A prompt as it is shown: as the chat template renders it, folded around its evidence or its answers."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.answers import stated_golds
from megatron_solopo.data.inspection.blocks import Block, attributes, many, visible
from megatron_solopo.data.inspection.examples import Example, depths
from megatron_solopo.data.inspection.rendered import Rendered, render
from megatron_solopo.data.schema import DocumentSpan, Message
from megatron_solopo.data.text.chat import prompt_length, prompt_starts
from megatron_solopo.data.text.tokenizer import encode
from megatron_solopo.data.tokenized.stretch import Jump

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
_MOST_JUMPS = 6
"""Jumps of stretched positions that are listed."""


@dataclass(frozen=True)
class Document:
    """A document, or a stretch of text where documents are not known.

    Attributes:
        text: its answers in the style "answer".
        number: from 1; 0 for a stretch of text.
        first_token: its position in the prompt; None where the template changed the text.
        depth: see `examples.depths`; None where it has no meaning.
    """

    text: Text
    gold: bool
    number: int
    tokens: int
    first_token: int | None
    depth: float | None = None

    @property
    def kind(self) -> str:
        return "evidence" if self.gold else "distractor"

    def block(self, documents: int, full: bool) -> Block:
        """Returns what is shown of one of so many documents; the page cuts a distractor unless it is to be ``full``."""
        text = self.text.copy() if full or self.gold else _cut(self.text)
        text.style = "gold" if self.gold else "distractor" if self.number else ""
        if not self.number:
            return Block("", [text])
        place = "" if self.first_token is None else f" from position {self.first_token:,}"
        depth = "" if self.depth is None else f", depth {self.depth:.2f}"
        where = f"{self.kind}, document {self.number} of {documents}, {many(self.tokens, 'token')}{place}{depth}"
        return Block(where, [text], kind=self.kind)

    def hint(self) -> Text:
        """Its first answer, in a line."""
        ((start, end), *_) = _excerpts(self.text, 0, _HINT)
        excerpt = self.text[start:end]
        excerpt.plain = excerpt.plain.replace("\n", " ")
        return Text.assemble((f"    an answer in document {self.number}: ... ", "warn"), excerpt, " ...")


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
        jumps: of its positions, where they are stretched.
    """

    name: str
    tokens: int
    rendered: Rendered
    role: str
    pieces: list[Text | Block]
    documents: list[Document]
    depths: list[float]
    answers_in: list[int] | None
    full: bool = field(default=False)
    jumps: tuple[Jump, ...] = ()

    def section(self) -> Block:
        """Returns what is shown of it."""
        note = many(self.tokens, "token")
        if self.documents:
            note += f", {many(len(self.documents), 'document')}"
            parts: list[Text | Block] = [_strip(self.documents, self.depths)]
        else:
            parts = [Text("the places of its documents are not recorded", "soft")]
        if self.jumps:
            parts.append(Text(self._stretched(), "soft"))
        frames = [frame[: len(frame) - frame.plain.endswith("\n")] for frame in self.rendered.frames]
        if self.rendered.shown:
            for frame, message in zip(frames[:-2], self.rendered.shown, strict=False):
                parts += [frame, Text(visible(message["content"]))]
            parts += [frames[-2], *self.pieces, frames[-1]]
        else:
            hint = "the template rewrites the messages; this is their rendering, then the last one as recorded"
            frame = frames[0] if self.full else _shortened(frames[0])
            parts += [Text(hint, "soft"), frame, Text(f"[{self.role}]", "soft"), *self.pieces]
        return Block(f"{self.name} context", parts, f"{note}, {self._answers()}")

    def _stretched(self) -> str:
        """Its jumps, in words."""
        last = self.tokens - 1 + sum(jump.gap for jump in self.jumps)
        listed = ", ".join(f"{jump.gap:,} at token {jump.token:,}" for jump in self.jumps[:_MOST_JUMPS])
        more = ", ..." if len(self.jumps) > _MOST_JUMPS else ""
        return f"stretched to position {last:,} by {many(len(self.jumps), 'jump')}: {listed}{more}"

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


def _strip(documents: Sequence[Document], at: Sequence[float]) -> Text:
    """Returns the documents of a prompt as a bar; evidence is never hidden by rounding."""
    total, before = sum(document.tokens for document in documents) or 1, 0
    of_cell: list[Document | None] = [None] * _STRIP_WIDTH
    for document in documents:
        first = min(before * _STRIP_WIDTH // total, _STRIP_WIDTH - 1)
        before += document.tokens
        for cell in range(first, max(first + document.gold, before * _STRIP_WIDTH // total)):
            if document.gold or of_cell[cell] is None:
                of_cell[cell] = document
    strip = Text("[", "strip")
    for document, run in itertools.groupby(of_cell):
        start, cells, gold = len(strip), len(list(run)), document is not None and document.gold
        strip.append(("#" if gold else "-") * cells, "gold" if gold else "soft")
        title = f"document {document.number}, {document.kind}, {document.tokens:,} tokens" if document else ""
        strip.stylize(attributes(title=title, style=f"flex-grow: {cells}"), start, len(strip))
    return strip.append("]" + (f"  evidence at depth {', '.join(f'{d:.2f}' for d in at)}" if at else ""))


def _merged(spans: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Returns the spans in order; those with at most ``gap`` characters between them as one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _excerpts(text: Text, head: int, around: int) -> list[tuple[int, int]]:
    """Start and end of what is kept of a text that is cut: its beginning and what surrounds the answers."""
    spans = [(max(span.start - around, 0), min(span.end + around, len(text))) for span in text.spans]
    return _merged([(0, min(head, len(text))), *spans] if head else spans, 0)


def _cut(text: Text) -> Text:
    """Of a long distractor the beginning and what surrounds answers."""
    if len(text) <= _CUT:
        return text.copy()
    folded, place = Text(), 0
    for start, end in _excerpts(text, _CUT, _KEPT):
        folded.append(f" [... {start - place:,} characters ...] " if start > place else "")
        folded.append_text(text[start:end])
        place = end
    return folded.append(
        f" [... {len(text) - place:,} more characters; --full keeps them]" if place < len(text) else ""
    )


def _shortened(text: Text) -> Text:
    """Returns the beginning and the end of a longer text."""
    left = len(text) - 2 * _REWRITTEN
    if left <= 0:
        return text
    return text[:_REWRITTEN].append(f"\n... {left:,} characters ...\n").append_text(text[-_REWRITTEN:])


class _Ruler:
    """Counts the tokens of stretches of a chat's last message, as they are in the whole prompt."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[Message],
        rendered: Rendered,
        jumps: Sequence[Jump],
    ) -> None:
        self._tokenizer, self._content, self._jumps = tokenizer, messages[-1]["content"], jumps
        self._starts: list[int] | None = None
        if rendered.content is None or not tokenizer.is_fast:  # a template that rewrites; then each is counted alone
            self.total = prompt_length(tokenizer, messages)
            return
        place = rendered.content[0] - rendered.cut
        self._starts = [start - place for start in prompt_starts(tokenizer, messages)]
        self.total = len(self._starts)

    def first(self, start: int) -> int | None:
        """Returns the position of the token that starts at a character, or the next one."""
        if self._starts is None:
            return None
        token = bisect_left(self._starts, start)
        return token + sum(jump.gap for jump in self._jumps if jump.token <= token)

    def tokens(self, start: int, end: int) -> int:
        if self._starts is None:
            return len(encode(self._tokenizer, self._content[start:end]))
        return bisect_left(self._starts, end) - bisect_left(self._starts, start)


def make_context(
    example: Example,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    full: bool = False,
    jumps: tuple[Jump, ...] = (),
) -> ContextView:
    """Splits a prompt of an example, whose positions jump, into the parts that are shown."""
    messages, spans = example.chats[name], example.spans[name]
    rendered = render(tokenizer, messages)
    ruler = _Ruler(tokenizer, messages, rendered, jumps)
    content, depth = Text(visible(example.content(name))), depths(spans)
    starts = [start for start, _, _ in spans] or [0]
    for offset, places in zip(starts, example.answer_places[name], strict=True):
        for start, end in places:
            content.stylize("answer", offset + start, offset + end)
    of_gold = iter(depth)
    documents = [
        Document(
            content[start:end],
            gold,
            number,
            ruler.tokens(start, end),
            ruler.first(start),
            next(of_gold, None) if gold else None,
        )
        for number, (start, end, gold) in enumerate(spans, 1)
    ]
    answers_in = [number for number, places in enumerate(example.answer_places[name], bool(spans)) if places]
    return ContextView(
        name,
        ruler.total,
        rendered,
        messages[-1]["role"],
        _around_documents(content, spans, documents, ruler, full) if spans else _around_answers(content, ruler, full),
        documents,
        depth,
        answers_in if stated_golds(example.answers) else None,
        full,
        jumps,
    )


def _fold(tokens: int, documents: Sequence[Document], of: int, full: bool) -> Block:
    """Documents behind one line; a terminal shows only where answers are in them, or with ``full`` all."""
    number = sum(document.number > 0 for document in documents)
    title = many(tokens, "token") + (f" of {many(number, 'distractor')}" if number else "")
    with_answer = [document for document in documents if document.text.spans]
    note = f"\u00b7 an answer in document {_listed([d.number for d in with_answer])}" if with_answer else ""
    instead = [Text(f"... {title} ...", "soft"), *(document.hint() for document in with_answer[:_MOST_HINTS])]
    return Block(title, [one.block(of, full) for one in documents], note, "fold", None if full else instead)


def _around_documents(
    content: Text, spans: Sequence[DocumentSpan], documents: Sequence[Document], ruler: _Ruler, full: bool
) -> list[Text | Block]:
    """Evidence in full, each run of distractors as one fold; separators between documents belong to the fold."""
    edges = [0, *(edge for start, end, _ in spans for edge in (start, end)), len(content)]
    before, behind = content[: edges[1]], content[edges[-2] :]
    pieces: list[Text | Block] = [_instructions(before)]
    for gold, run in itertools.groupby(documents, lambda document: document.gold):
        run = list(run)
        if gold:
            pieces += [document.block(len(spans), full) for document in run]
        else:
            start, end = edges[2 * run[0].number - 1], edges[2 * run[-1].number]
            pieces.append(_fold(ruler.tokens(start, end), run, len(spans), full))
    return [piece for piece in (*pieces, _instructions(behind)) if piece]


def _instructions(text: Text) -> Text:
    """Without line breaks at either end."""
    text = text[len(text) - len(text.plain.lstrip("\n")) : len(text.plain.rstrip("\n"))]
    text.style = "instructions"
    return text


def _around_answers(content: Text, ruler: _Ruler, full: bool) -> list[Text | Block]:
    """Returns the ends of the text and what surrounds the answers; the rest in folds."""
    size = len(content)
    ends = [(0, min(_AROUND, size)), (max(size - 2 * _AROUND, 0), size)]
    kept = _merged([*ends, *_excerpts(content, 0, _AROUND)], _SHORTEST_FOLD)
    pieces: list[Text | Block] = [content[slice(*kept[0])]]
    for (_, start), (end, last) in itertools.pairwise(kept):
        tokens = ruler.tokens(start, end)
        stretch = Document(content[start:end], False, 0, tokens, ruler.first(start))
        pieces += [_fold(tokens, [stretch], 0, full), content[end:last]]
    return pieces
