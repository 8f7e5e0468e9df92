"""What is shown, once: rich's `Text` and `Table`, and `Block` of them. A console prints it, and `html` makes it a piece
of the page.

The name of a style is both an entry of `STYLES` and a CSS class of the page; the ``meta`` of a style are HTML
attributes. Where there are no colours, `MARKS` and `BARS` show in characters what colours would show.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from markupsafe import Markup, escape
from rich.console import Console, ConsoleOptions, RenderableType
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
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
    "place": "dim",
    "short": "cyan",
    "long": "magenta",
    "odd": "reverse",
    "end": "bold magenta reverse",
    "untrained": "dim",
    **dict.fromkeys(("neutral", "token", "trained", "line", "strip", "bars", "instructions"), ""),
}
MARKS = {"answer": ("[[", "]]"), "control": ("{", "}"), "untrained": ("(", ")"), "token": ("", "|"), "place": ("", "|")}
BARS = {"gold": ("> ", "\u2503 "), "template": ("| ", "\u2506 ")}
"""Before each line of a text of this style: without colours, with them."""
_DRAWN = {"template": ("\n", Markup("<i>\u23ce</i>\n")), "token": (" ", Markup("<i>\u00b7</i>"))}
"""What the page draws for a character that could not be seen at the end of a line or of a token."""

PLAIN_WIDTH = 110

# A document may hold anything; what would move the cursor or ring the bell is drawn, one character for one.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)


def visible(text: str) -> str:
    """Returns the text with its control characters but tab and line feed as pictures of them, at the same places."""
    return text.translate(_PICTURES)


def many(count: int, what: str) -> str:
    """``1 token``, ``2,000 tokens``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def attributes(**values: str) -> Style:
    """Returns a style that changes nothing on a terminal and adds HTML attributes on the page."""
    return Style(meta=values)


def table(*columns: str) -> Table:
    """Returns an empty table; a column whose name starts with ``>`` holds numbers."""
    empty = Table(box=None, pad_edge=False, header_style="soft")
    for name in columns:
        empty.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return empty


def console(out: TextIO | None = None) -> Console:
    """Returns a console on standard output: colours on a terminal only, and NO_COLOR is honoured."""
    console = Console(file=out, highlight=False, markup=False, emoji=False, theme=Theme(STYLES))
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def stretches(text: Text) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Yields (characters, names of their styles, HTML attributes) in order."""
    edges = sorted({0, len(text), *(edge for span in text.spans for edge in (span.start, span.end))})
    for start, end in itertools.pairwise(edges):
        styles = [span.style for span in text.spans if span.start <= start and end <= span.end]
        names = list(dict.fromkeys(style for style in styles if isinstance(style, str)))
        metas = [style.meta for style in styles if isinstance(style, Style)]
        yield text.plain[start:end], names, {key: value for meta in metas for key, value in meta.items()}


@dataclass
class Block:
    """Parts under a heading.

    Attributes:
        kind: "fold", "evidence", "distractor", or a section with this class of the page.
        instead: what a terminal prints of it, if not its heading and parts.
    """

    title: str
    parts: Sequence[Text | Table | Block]
    note: str = ""
    kind: str = ""
    instead: Sequence[Text] | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = not console.is_terminal or console.no_color
        if self.kind in ("evidence", "distractor"):
            style = "gold" if self.kind == "evidence" else "distractor"
            yield Text(f"{'>>' if style == 'gold' else '--'} {self.title}", style)
        elif self.instead is None and self.title and self.kind != "fold":
            heading = f"{self.title}  {self.note}"
            yield ""
            yield f"== {heading} ==" if plain else Rule(Text(heading, "bold"), align="left", style="soft")
        for part in self.parts if self.instead is None else self.instead:
            if isinstance(part, Text):
                yield from _lines(_marked(part) if plain else part, plain, console, options)
            else:
                yield part

    def __html__(self) -> str:
        outer, head = ("details", "summary") if self.kind == "fold" else ("section", "h3")
        note = Markup(' <span class="note">{}</span>').format(self.note) if self.note else ""
        heading = Markup(f"<{head}>{{}}{{}}</{head}>").format(self.title, note) if self.title else ""
        return Markup(f'<{outer} class="{{}}">{{}}{{}}</{outer}>').format(self.kind, heading, html(self.parts))


def _marked(text: Text) -> Text:
    """With `MARKS` in the place of colours."""
    signed = Text(style=text.style)
    for part, names, _ in stretches(text):
        before, after = zip(*(MARKS.get(name, ("", "")) for name in ("", *names)), strict=True)
        signed.append("".join((*before, part, *reversed(after))))
    return signed


def _lines(text: Text, plain: bool, console: Console, options: ConsoleOptions) -> Iterator[Text]:
    """Yields the text behind the bar of its style, if that has one."""
    name = str(text.style)
    if name not in BARS:
        yield text
        return
    bar, inner = BARS[name][not plain], text.copy()
    inner.style = "template" if name == "template" else ""
    for line in inner.wrap(console, options.max_width - len(bar)):
        yield Text.assemble((bar, "gold" if name == "gold" else "soft"), line)


def html(shown: object) -> Markup:
    """Returns a piece of the page; texts are escaped."""
    if isinstance(shown, Text):
        return Markup('<div class="text {}">{}</div>').format(shown.style, _inline(shown))
    if isinstance(shown, Table):
        rows = zip(*(column.cells for column in shown.columns), strict=True)
        body = [_row(shown, "td", cells, row.style) for row, cells in zip(shown.rows, rows, strict=True)]
        head = _row(shown, "th", (column.header for column in shown.columns))
        return Markup('<div class="table"><table>{}{}</table></div>').format(head, Markup("").join(body))
    return Markup("").join(map(html, shown)) if isinstance(shown, list | tuple) else escape(shown)


def _row(table: Table, tag: str, cells: Iterable[RenderableType], style: object = "") -> Markup:
    row = Markup('<tr class="{}">').format(style or "")
    for column, cell in zip(table.columns, cells, strict=True):
        content = _inline(cell) if isinstance(cell, Text) else cell
        row += Markup('<{0} class="{1}">{2}</{0}>').format(tag, column.justify, content)
    return row + Markup("</tr>")


def _inline(text: Text) -> Markup:
    parts = []
    for part, names, more in stretches(text):
        content = escape(part)
        for old, new in (_DRAWN[name] for name in (str(text.style), *names) if name in _DRAWN):
            content = content.replace(old, new)
        pairs = {"class": " ".join(names), **more} if names or more else {}
        written = Markup("").join(Markup(' {}="{}"').format(*pair) for pair in pairs.items())
        parts.append(Markup("<span{}>{}</span>").format(written, content) if pairs else content)
    return Markup("").join(parts)
