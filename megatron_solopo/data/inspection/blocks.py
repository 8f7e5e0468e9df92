"""What is shown, once: each block prints itself through rich (``__rich_console__``) and is a piece of the page
(``__html__``).

Texts are rich's, and the name of a style is both an entry of `STYLES` and a CSS class of the page. Where there are no
colours, `MARKS` and `BARS` say in characters what they would say.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import rich.table
from markupsafe import Markup, escape
from rich.console import Console, ConsoleOptions, RenderResult
from rich.rule import Rule
from rich.text import Text
from rich.theme import Theme

STYLES = {
    "answer": "bold black on yellow",
    "other": "underline",
    "gold": "yellow",
    "distractor": "dim",
    "template": "italic cyan",
    "control": "bold black on cyan",
    "chosen": "green",
    "rejected": "red",
    "warn": "bold red",
    "soft": "dim",
    "short": "cyan",
    "long": "magenta",
    "neutral": "",
    "odd": "reverse",
    "end": "bold magenta reverse",
}
MARKS = {"answer": ("[[", "]]"), "control": ("{", "}")}
BARS = {"gold": ("> ", "\u2503 "), "template": ("| ", "\u2506 ")}
"""Before each line of a text of this style: without colours, with them."""

PLAIN_WIDTH = 110

# A document may hold anything; what would move the cursor or ring the bell is drawn, one character for one.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)


def visible(text: str) -> str:
    """The text with its control characters but tab and line feed as pictures of them, at the same places."""
    return text.translate(_PICTURES)


def highlighted(text: str, found: Sequence[tuple[int, int]], pattern: re.Pattern[str] | None = None) -> Text:
    """The text with answers in the style "answer", and in "other" those that do not count.

    An answer that does not count is part of a longer word, or in a response outside its answer part.

    Args:
        found: start and end of those that count.
        pattern: `answer_pattern`, which the others match.
    """
    made = Text(visible(text))
    for start, end in found:
        made.stylize("answer", start, end)
    for match in pattern.finditer(text) if pattern else ():
        if not any(match.start() < end and start < match.end() for start, end in found):
            made.stylize("other", *match.span())
    return made


def many(count: int, what: str) -> str:
    """``1 token``, ``2,000 tokens``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def console(out: TextIO | None = None) -> Console:
    """A console on standard output: colours on a terminal only, and NO_COLOR is honoured."""
    out = out or sys.stdout
    width = None if out.isatty() else PLAIN_WIDTH
    return Console(file=out, highlight=False, markup=False, emoji=False, width=width, theme=Theme(STYLES))


def is_plain(console: Console) -> bool:
    """Whether marks must stand for colours."""
    return not console.is_terminal or console.no_color


def stretches(text: Text) -> Iterator[tuple[str, str]]:
    """(characters, names of their styles) in order."""
    edges = sorted({0, len(text), *(edge for span in text.spans for edge in (span.start, span.end))})
    for start, end in itertools.pairwise(edges):
        names = dict.fromkeys(str(span.style) for span in text.spans if span.start <= start and end <= span.end)
        yield text.plain[start:end], " ".join(names)


def printable(text: Text, console: Console) -> Text:
    """The text for this console, with `MARKS` where it has no colours."""
    if not is_plain(console):
        return text
    marked = (MARKS.get(name, ("", "")) + (part,) for part, name in stretches(text))
    return Text("".join(f"{before}{part}{after}" for before, after, part in marked))


def html(text: Text, change: Callable[[str], Markup] = escape) -> Markup:
    """The text as HTML: its styles are classes, its answers ``<mark>``."""
    made = []
    for part, names in stretches(text):
        tag = "mark" if names in ("answer", "other") else "span"
        made.append(Markup('<{0} class="{1}">{2}</{0}>').format(tag, names, change(part)) if names else change(part))
    return Markup("").join(made)


class Table(rich.table.Table):
    """A table of rich that is one of the page too: the style of a row is its class."""

    def __html__(self) -> str:
        def row(tag: str, contents: Iterable[Any], style: Any = "") -> Markup:
            made = Markup('<tr class="{}">').format(style or "")
            for column, one in zip(self.columns, contents, strict=True):
                right = Markup(' class="num"') if column.justify == "right" else ""
                made += Markup("<{0}{1}>{2}</{0}>").format(tag, right, html(one) if isinstance(one, Text) else one)
            return made + Markup("</tr>")

        rows = zip(*(column.cells for column in self.columns), strict=True)
        made = [row("td", contents, of.style) for of, contents in zip(self.rows, rows, strict=True)]
        head = row("th", (column.header for column in self.columns))
        return Markup('<div class="table"><table>{}{}</table></div>').format(head, Markup("").join(made))


def table(*columns: str) -> Table:
    """An empty table; a column whose name begins with ``>`` is one of numbers."""
    made = Table(box=None, pad_edge=False, header_style="soft")
    for name in columns:
        made.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return made


class Block(Protocol):
    """Something to show."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult: ...

    def __html__(self) -> str: ...


def joined(blocks: Sequence[Block]) -> Markup:
    return Markup("").join(escape(block) for block in blocks)


@dataclass
class Prose:
    """A text of the data; ``kind`` is its style as a whole: "" of a message, "gold", "distractor", "template"."""

    text: Text
    kind: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = printable(self.text, console).copy()
        text.style = self.kind
        if self.kind not in BARS:
            yield text
            return
        bar, text.style = BARS[self.kind][not is_plain(console)], "template" if self.kind == "template" else ""
        for line in text.wrap(console, options.max_width - len(bar)):
            yield Text.assemble((bar, "gold" if self.kind == "gold" else "soft"), line)

    def __html__(self) -> str:
        if self.kind != "template":
            return Markup('<div class="body {}">{}</div>').format(self.kind, html(self.text))
        text = html(self.text, lambda part: escape(part).replace("\n", Markup('<i class="break">\u23ce</i>\n')))
        return Markup('<div class="template">{}</div>').format(text)


@dataclass
class Note:
    """A line about what is shown; ``style`` as in `STYLES`."""

    text: str
    style: str = "soft"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text, self.style)

    def __html__(self) -> str:
        return Markup('<p class="small {}">{}</p>').format(self.style, self.text)


@dataclass
class Section:
    """Blocks under a heading; ``kind`` is a class of the page."""

    title: str
    note: str
    blocks: Sequence[Block]
    kind: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heading = f"{self.title}  {self.note}"
        yield ""
        yield f"== {heading} ==" if is_plain(console) else Rule(Text(heading, "bold"), align="left", style="soft")
        yield from self.blocks

    def __html__(self) -> str:
        head = '<div class="head"><h3>{}</h3><span class="small soft">{}</span></div>'
        return Markup(f'<section class="{{}}">{head}{{}}</section>').format(
            self.kind, self.title, self.note, joined(self.blocks)
        )


@dataclass(frozen=True)
class Token:
    """One token of a response: its id, its text, its position in the sequence, and whether it is learnt."""

    id: int
    text: str
    position: int
    learnt: bool
    end_of_turn: bool

    @property
    def shown(self) -> str:
        """With line breaks and tabs to be seen."""
        return visible(self.text).replace("\n", "\u23ce").replace("\t", "\u21e5")


@dataclass
class Tokens:
    """A response token by token: shades part them (``|`` without colours); what is not learnt is in parentheses."""

    title: str
    kind: str
    tokens: Sequence[Token]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"\n{self.title}", f"bold {STYLES[self.kind]}")
        bar, room = "|" if is_plain(console) else "", options.max_width - 10
        line = Text()
        for index, token in enumerate(self.tokens):
            style = ("end" if token.end_of_turn else "odd" if index % 2 else "") if token.learnt else "soft"
            cell = Text(token.shown if token.learnt else f"({token.shown})", "" if bar else style)
            if not line or line.cell_len + cell.cell_len > room + 9:
                yield from [line] * bool(line)
                line = Text.assemble((f"{token.position:>8,} ", "soft"), bar, no_wrap=True, overflow="ignore")
            line.append_text(cell).append(bar)
        yield line

    def __html__(self) -> str:
        made = []
        for index, token in enumerate(self.tokens):
            place = Markup("<sub>{:,}</sub>").format(token.position) if index % 20 == 0 else ""
            classes = "learnt" * token.learnt + " end" * token.end_of_turn
            title = f"position {token.position}, id {token.id}{'' if token.learnt else ', not learnt'}"
            shown = escape(token.shown)
            if token.text.strip(" ") != token.text:
                shown = shown.replace(" ", Markup('<i class="space">\u00b7</i>'))
            line_end = Markup("<br>") if "\n" in token.text else ""
            made.append(Markup('{}<b class="{}" title="{}">{}</b>{}').format(place, classes, title, shown, line_end))
        return Markup('<div class="tone-{}"><p class="small soft">{}</p><div class="tokens">{}</div></div>').format(
            self.kind, self.title, Markup("").join(made)
        )
