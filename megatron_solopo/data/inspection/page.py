"""The HTML page: one file with its style, script, charts and samples, that asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from megatron_solopo.atomic import write_text
from megatron_solopo.config import MethodConfig
from megatron_solopo.data.inspection.charts import Series, gathers, histogram, strip
from megatron_solopo.data.inspection.examples import FLAGS
from megatron_solopo.data.inspection.rendered import Stretch
from megatron_solopo.data.inspection.statistics import Distribution, Statistics
from megatron_solopo.data.inspection.text import REWRITTEN, runs, shortened, visible
from megatron_solopo.data.inspection.view import (
    REWARDS,
    Document,
    Piece,
    Response,
    View,
    answer_pattern,
    answers_line,
    excerpts,
    marked,
    within,
)

CUT, AROUND = 320, 120
"""Characters that a distractor keeps on the page from its beginning and around an answer, unless it is to be full."""
LISTED = 3
"""Repeated texts that are listed of each kind."""


@dataclass(frozen=True)
class Figure:
    """A chart with its title, a line of figures for each series, and a note where it needs one."""

    title: str
    chart: Markup
    lines: list[tuple[str, str, str]]
    note: str = ""


@dataclass(frozen=True)
class Source:
    """What the page says of its making; ``kind`` is what the file holds, ``method`` None for contexts."""

    name: str
    kind: str
    tokenizer: str
    method: MethodConfig | None
    seed: int
    full: bool
    seq_length: int | None


def write_page(path: Path, source: Source, statistics: Statistics, views: Sequence[View]) -> int:
    """Writes the page, aside first and renamed at the end; returns its size in bytes.

    The same data, options and seed give the same bytes.
    """
    text = render(source, statistics, views)
    write_text(path, text, errors="replace")
    return path.stat().st_size


def render(source: Source, statistics: Statistics, views: Sequence[View]) -> str:
    """The page as text; everything that comes from data is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"visible": visible, "spaces": _spaces, "runs": runs}
    style = environment.get_template("page.css.jinja").render()
    script = environment.get_template("page.js.jinja").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        source=source,
        statistics=statistics,
        views=views,
        figures=figures(statistics),
        tiles=tiles(statistics),
        bias=statistics.length_bias(),
        checks=statistics.checks(),
        flags=FLAGS,
        reward=REWARDS[source.method.preference_loss] if source.method else "",
        repeats=[(what, found.repeated, found.most(LISTED)) for what, found in statistics.repeats.items()],
        in_samples={key: sum(key in view.facts.flags for view in views) for key in FLAGS},
        style=Markup(style),
        script=Markup(script),
        script_digest=digest,
        strip=strip,
        response_marks=_response_marks,
        text_marks=_text_marks,
        document_marks=partial(_document_marks, full=source.full),
        template=_template,
        shortened=(lambda frame: frame) if source.full else partial(shortened, ends=REWRITTEN),
        answers_line=answers_line,
        shown_segments=_shown_segments,
    )


def tiles(statistics: Statistics) -> list[tuple[str, str]]:
    """(name, value) of the figures at the top."""
    found = [("examples", f"{statistics.examples:,}")]
    for name in ("short", "long"):
        if name in statistics.tokens:
            found.append((f"median tokens, {name} context", f"{statistics.tokens[name].quantile(0.5):,.0f}"))
    if statistics.ratio.total:
        found.append(("median ratio, short / long", f"{statistics.ratio.quantile(0.5):.3f}"))
    for name in ("chosen", "rejected"):
        if name in statistics.tokens:
            found.append((f"median tokens, {name}", f"{statistics.tokens[name].quantile(0.5):,.0f}"))
    return found


def figures(statistics: Statistics) -> list[Figure]:
    """The charts for which there are numbers."""
    made = []
    for name in ("short", "long"):
        if name in statistics.tokens:
            series = [Series(name, name, statistics.tokens[name])]
            made.append(_figure(f"Tokens of the {name} context", series, "tokens", note="Chat template included."))
    if statistics.ratio.total:
        series = [Series("ratio", "neutral", statistics.ratio)]
        made.append(_figure("Compression ratio short / long", series, "of the long context's tokens"))
    for name in ("short", "long"):
        if statistics.depths[name].total:
            made.append(
                _figure(
                    f"Evidence depth, {name} context",
                    [Series("depth", "evidence", statistics.depths[name])],
                    "of the way from the first document to the last",
                    (0, 1),
                    "0: as the first document, 1: as the last. Where documents are few, more stand at the ends.",
                )
            )
    both = [Series(name, name, statistics.tokens[name]) for name in ("chosen", "rejected") if name in statistics.tokens]
    if both:
        made.append(_figure("Tokens of the responses", both, "tokens", note="The end of turn counts."))
        series = [Series("chosen - rejected", "signed", statistics.difference)]
        made.append(_figure("Chosen minus rejected", series, "tokens", note="Right of 0, chosen is longer."))
    for name in ("short", "long"):
        if statistics.documents[name].total:
            series = [Series(name, name, statistics.documents[name])]
            made.append(_figure(f"Documents of the {name} context", series, "documents"))
    for name, values in sorted(statistics.scores.items()):
        if len(values.values) > 1:
            title = "Share of right answers" if name == "share_right" else f"Score: {name}"
            shares = all(0 <= value <= 1 for value, _ in values.values)
            made.append(_figure(title, [Series(name, "neutral", values)], "", (0, 1) if shares else None))
    return made


def _figure(
    title: str, series: list[Series], unit: str, limits: tuple[float, float] | None = None, note: str = ""
) -> Figure:
    lines = [(one.name, one.style, _spread(one.values)) for one in series]
    if gathers(series, limits):
        note = f"{note} The outer bars gather what lies beyond.".strip()
    return Figure(title, histogram(series, unit, limits), lines, note)


def _spread(values: Distribution) -> str:
    digits = 0 if values.step >= 1 else 3
    low, median, high = (f"{values.quantile(share):,.{digits}f}" for share in (0.05, 0.5, 0.95))
    return f"median {median}, mean {values.mean:,.{digits or 1}f}, middle 90 % from {low} to {high}"


def _marks(text: str, found: Sequence[tuple[int, int]], pattern: re.Pattern[str] | None = None) -> Markup:
    """Text with answers in ``<mark>``, another one where they do not count."""
    made = []
    for part, kind in marked(text, found, pattern):
        around = {"found": "<mark>{}</mark>", "other": '<mark class="other">{}</mark>'}.get(kind, "{}")
        made.append(Markup(around).format(visible(part)))
    return Markup("").join(made)


def _response_marks(view: View, response: Response) -> Markup:
    return _marks(response.text, response.found or (), answer_pattern(view.example.answers))


def _text_marks(piece: Piece) -> Markup:
    text = piece.text.strip("\n")
    start = len(piece.text) - len(piece.text.lstrip("\n"))
    return _marks(text, within(piece.found, start, start + len(text)))


def _document_marks(document: Document, full: bool) -> Markup:
    """A document with its answers marked; of a long distractor only the beginning and what surrounds answers."""
    text = document.text
    if full or document.gold or len(text) <= CUT:
        return _marks(text, document.found)
    made, place = [], 0
    for start, end in excerpts(text, document.found, CUT, AROUND):
        gap = f" [... {start - place:,} characters ...] " if start > place else ""
        made += [Markup(escape(gap)), _marks(text[start:end], within(document.found, start, end))]
        place = end
    rest = f" [... {len(text) - place:,} more characters; --full keeps them]" if place < len(text) else ""
    return Markup("").join([*made, escape(rest)])


def _template(frame: Sequence[Stretch]) -> Markup:
    """What the chat template writes, with its line breaks and control tokens to be seen."""
    made = []
    for stretch in frame:
        text = escape(visible(stretch.text)).replace("\n", Markup('<i class="break">\u23ce</i>\n'))
        made.append(Markup('<b class="control" title="control token">{}</b>').format(text) if stretch.control else text)
    whole = Markup("").join(made)
    return Markup(whole.removesuffix("\n"))


def _shown_segments(view: View) -> dict[str, str]:
    """Role -> the roles with the same token ids, the first of each; their tokens are shown once."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for segment in view.segments:
        alike.setdefault(tuple(token.id for token in segment.tokens), []).append(segment.role)
    return {same[0]: ", ".join(same) for same in alike.values()}


def _spaces(text: str) -> Markup:
    """A token with its spaces and line breaks to be seen."""
    shown = visible(text.replace("\n", "\u23ce").replace("\t", "\u21e5"))
    return Markup(re.sub(r"^ | $", '<i class="space">\u00b7</i>', str(escape(shown))))
