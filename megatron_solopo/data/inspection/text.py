"""One example on a terminal: colours where there are any, plain marks elsewhere, long contexts folded."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from megatron_solopo.config import MethodConfig
from megatron_solopo.data.inspection.examples import FLAGS
from megatron_solopo.data.inspection.rendered import Stretch
from megatron_solopo.data.inspection.view import (
    REWARDS,
    ContextView,
    Document,
    Segment,
    View,
    answer_pattern,
    answers_line,
    excerpts,
    marked,
    within,
)

ANSWER, NOT_COUNTED, EVIDENCE, DISTRACTOR = "bold black on yellow", "underline", "yellow", "dim"
TEMPLATE, CONTROL = "italic cyan", "bold black on cyan"
CHOSEN, REJECTED, WARNING, MUTED, HEADING = "green", "red", "bold red", "dim", "bold"
_PLAIN_WIDTH = 110
_STRIP_WIDTH = 60
_AROUND = 50
_MOST_EXCERPTS = 3
"""Characters on either side of an answer in a folded distractor, and how many such distractors are shown."""
REWRITTEN = 400
"""Characters of a rendered prompt that are shown from its beginning and end where its template rewrites messages."""

# A document may hold anything; what would move the cursor or ring the bell is spelled out.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """The text with control characters other than tab and line feed spelled out."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def console(out: TextIO | None = None) -> Console:
    """A console on standard output: colours on a terminal only, and NO_COLOR is honoured."""
    out = out or sys.stdout
    return Console(file=out, highlight=False, markup=False, emoji=False, width=None if out.isatty() else _PLAIN_WIDTH)


class Printer:
    """Prints views; ``full`` folds nothing."""

    def __init__(self, to: Console, full: bool = False) -> None:
        self._to, self._full = to, full
        self._plain = not to.is_terminal or to.no_color

    def print(self, view: View, file: str | Path, method: MethodConfig) -> None:
        """The whole example: question, contexts, responses, and the pack that the loss sees."""
        example = view.example
        self._heading(f"{visible(example.id)}  (index {example.index} of {file})")
        rows = [
            ("question", visible(example.question) or "not recorded"),
            ("answers", " | ".join(map(visible, example.answers)) or "not recorded"),
            ("scores", ", ".join(f"{visible(name)} {value:g}" for name, value in example.scores.items())),
            ("source", visible(example.source)),
            ("lengths", self._lengths(view)),
        ]
        for name, value in rows:
            if value:
                self._line((f"{name:<9} ", MUTED), value)
        for flag in view.facts.flags:
            reason = f": {view.facts.refused}" if flag == "refused" else ""
            self._line((f"! {FLAGS[flag]}{visible(reason)}", WARNING))
        control = "{control tokens}" if self._plain else "control tokens"
        self._line((f"prompts as the chat template renders them: behind a bar what it adds, {control} marked", MUTED))
        for context in view.contexts:
            self._context(context)
        for response in view.responses:
            style = CHOSEN if response.name == "chosen" else REJECTED
            has = "answers not recorded"
            if response.found is not None:
                has = "an answer is found in it" if response.found else "no answer is found in it"
            self._heading(f"{response.name}  {_many(response.tokens, 'token')}, {has}", style)
            self._to.print(self._marked(response.text, response.found or (), answer_pattern(example.answers)))
        if view.segments:
            self._pack(view, method)

    def _lengths(self, view: View) -> str:
        tokens = {context.name: context.tokens for context in view.contexts}
        found = ", ".join(f"{name} {length:,} tokens" for name, length in tokens.items())
        return found + (f", ratio {tokens['short'] / tokens['long']:.3f}" if len(tokens) == 2 else "")

    def _heading(self, text: str, style: str = HEADING) -> None:
        self._to.print()
        if self._plain:
            self._line(f"== {text} ==")
        else:
            self._to.print(Rule(Text(text, style), align="left", style=MUTED))

    def _line(self, *parts: str | Text | tuple[str, str]) -> None:
        self._to.print(Text.assemble(*parts))

    def _marked(
        self, text: str, found: Sequence[tuple[int, int]], pattern: re.Pattern[str] | None = None, style: str = ""
    ) -> Text:
        """Text with answers highlighted, ``[[so]]`` without colours; those that do not count are underlined."""
        made = Text(style=style)
        for part, kind in marked(text, found, pattern):
            part = visible(part)
            bracketed = kind == "found" and self._plain
            made.append(f"[[{part}]]" if bracketed else part, {"found": ANSWER, "other": NOT_COUNTED}.get(kind))
        return made

    def _template(self, frame: Sequence[Stretch]) -> None:
        """What the chat template writes, behind a bar; control tokens in a colour, ``{so}`` without colours."""
        line = Text()
        for stretch in frame:
            text = visible(stretch.text)
            if stretch.control:
                line.append(f"{{{text}}}" if self._plain else text, CONTROL)
            else:
                line.append(text, TEMPLATE)
        for part in line.split("\n", include_separator=False, allow_blank=False):
            for row in part.wrap(self._to, self._to.width - 2):
                self._line(("| " if self._plain else "\u2506 ", MUTED), row)

    def _context(self, context: ContextView) -> None:
        title = f"{context.name} context  {_many(context.tokens, 'token')}"
        if context.documents:
            title += f", {_many(len(context.documents), 'document')}"
        self._heading(f"{title}, {answers_line(context)}")
        if context.documents:
            at = ", ".join(f"{depth:.2f}" for depth in context.depths)
            self._to.print(self._strip(context).append(f"  evidence at depth {at}" if at else ""))
        else:
            self._line(("where its documents stand is not recorded", MUTED))
        frames, shown = context.rendered.frames, context.rendered.shown
        if not shown:
            self._line(
                ("the template rewrites the messages; this is their rendering, then the last one as recorded", MUTED)
            )
            self._template(frames[0] if self._full else shortened(frames[0], REWRITTEN))
        for frame, message in zip(frames, shown[:-1], strict=False):
            self._template(frame)
            self._to.print(Text(visible(message["content"])))
        self._template(frames[-2]) if shown else self._line((f"[{context.role}]", MUTED))
        self._pieces(context)
        if shown:
            self._template(frames[-1])

    def _pieces(self, context: ContextView) -> None:
        for piece in context.pieces:
            if piece.kind == "text":
                text = piece.text.strip("\n")  # instructions and question, where documents are known
                cut = len(piece.text) - len(piece.text.lstrip("\n"))
                if text:
                    self._to.print(self._marked(text, within(piece.found, cut, cut + len(text))))
            elif piece.kind == "gold":
                self._document(piece.documents[0], context)
            elif self._full:
                for document in piece.documents:
                    self._document(document, context)
            else:
                self._line((_folded(piece.tokens, piece.documents), MUTED))
                for document in piece.with_answer[:_MOST_EXCERPTS]:
                    self._excerpt(document)

    def _document(self, document: Document, context: ContextView) -> None:
        if document.number:
            kind, style = ("evidence", f"bold {EVIDENCE}") if document.gold else ("distractor", MUTED)
            where = "" if document.first_token is None else f" from position {document.first_token:,}"
            depth = "" if document.depth is None else f", depth {document.depth:.2f}"
            mark = ">>" if document.gold else "--"
            of = f"document {document.number} of {len(context.documents)}"
            self._line((f"{mark} {kind}, {of}, {_many(document.tokens, 'token')}{where}{depth}", style))
        style = DISTRACTOR if document.number and not document.gold else ""
        text = self._marked(document.text, document.found, style=style)
        if not document.gold:
            self._to.print(text)
            return
        for line in text.wrap(self._to, self._to.width - 2):
            self._line(("> " if self._plain else "\u2503 ", EVIDENCE), line)

    def _excerpt(self, document: Document) -> None:
        """Where a folded distractor holds an answer."""
        start, end = excerpts(document.text, document.found[:1], 0, _AROUND)[0]
        text = self._marked(document.text[start:end].replace("\n", " "), within(document.found, start, end))
        self._line((f"    an answer in document {document.number}: ... ", WARNING), text, " ...")

    def _strip(self, context: ContextView) -> Text:
        """The documents as a bar, each cell the kind of what stands there; evidence is never hidden by rounding."""
        spans, total = [], sum(document.tokens for document in context.documents) or 1
        begun = 0
        for document in context.documents:
            spans.append((begun, begun + document.tokens, document.gold))
            begun += document.tokens
        cells = [False] * _STRIP_WIDTH
        for begin, end, gold in spans:
            if gold:
                first = min(begin * _STRIP_WIDTH // total, _STRIP_WIDTH - 1)
                for cell in range(first, max(first + 1, end * _STRIP_WIDTH // total)):
                    cells[cell] = True
        bar = Text("[")
        for gold in cells:
            bar.append("#" if gold else "-", EVIDENCE if gold else MUTED)
        return bar.append("]")

    def _pack(self, view: View, method: MethodConfig) -> None:
        self._heading("what the loss sees")
        self._line(
            f"--preference-loss {method.preference_loss} --context-mode {method.context_mode}; "
            f"reward: {REWARDS[method.preference_loss]}"
        )
        saved = view.separate_tokens - view.pack_tokens
        self._line(
            f"one pack of {_many(view.pack_tokens, 'token')} with shared prompts "
            f"({view.separate_tokens:,} apart, {saved / view.separate_tokens:.0%} saved)"
        )
        shown: dict[tuple[int, ...], str] = {}
        for segment in view.segments:
            ids = tuple(token.id for token in segment.tokens)
            style = CHOSEN if "chosen" in segment.role.split("_") else REJECTED
            positions = f"{segment.tokens[0].position:,} to {segment.tokens[-1].position:,}"
            self._to.print()
            self._line((f"{segment.role:<14}", f"bold {style}"), " ", "; ".join(segment.uses))
            self._line(
                f"  prompt {segment.prompt_tokens:,} tokens, response {len(ids):,}, learnt {segment.learnt:,}; "
                f"positions {positions}; predicted from {runs(segment.predictors)} of the pack"
            )
            if ids in shown:
                self._line((f"  the token ids of {shown[ids]}", MUTED))
                continue
            shown[ids] = segment.role
            self._tokens(segment)

    def _tokens(self, segment: Segment) -> None:
        """Rows of tokens behind the position of the first: shades (``|`` without colours) part them; what is not
        learnt stands in parentheses."""
        room = self._to.width - 10
        rows: list[tuple[int, list[Text]]] = []
        used = room
        for index, token in enumerate(segment.tokens):
            text = visible(token.text).replace("\n", "\u23ce").replace("\t", "\u21e5")
            text = text if token.learnt else f"({text})"
            style = "bold magenta reverse" if token.end_of_turn else "reverse" if index % 2 else ""
            cell = Text(text, "" if self._plain else style if token.learnt else MUTED)
            if used + cell.cell_len + 1 > room:
                rows.append((token.position, []))
                used = 0
            rows[-1][1].append(cell)
            used += cell.cell_len + (1 if self._plain else 0)
        for position, cells in rows:
            bar = "|" if self._plain else ""
            line = Text.assemble((f"{position:>8,} ", MUTED), bar)
            for cell in cells:
                line.append_text(cell).append(bar)
            self._to.print(line, soft_wrap=True)


def runs(places: list[tuple[int, int]]) -> str:
    """Runs of places in words."""
    return " and ".join(f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in places)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def shortened(frame: Sequence[Stretch], ends: int) -> list[Stretch]:
    """The first and the last ``ends`` characters of a longer text."""
    total = sum(len(stretch.text) for stretch in frame)
    if total <= 2 * ends:
        return list(frame)

    def part(start: int, stop: int) -> list[Stretch]:
        made, place = [], 0
        for stretch in frame:
            text = stretch.text[max(start - place, 0) : max(stop - place, 0)]
            made += [Stretch(text, stretch.control)] * bool(text)
            place += len(stretch.text)
        return made

    gap = Stretch(f"\n... {total - 2 * ends:,} characters ...\n", False)
    return [*part(0, ends), gap, *part(total - ends, total)]


def _folded(tokens: int, documents: Iterable[Document]) -> str:
    distractors = sum(document.number > 0 for document in documents)
    return f"... {_many(tokens, 'token')}" + (f" of {_many(distractors, 'distractor')}" if distractors else "") + " ..."
