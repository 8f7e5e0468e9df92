"""The HTML page: the blocks that a terminal shows, in one file with its style and script that asks no network for
anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from megatron_solopo.atomic import write_text
from megatron_solopo.config import MethodConfig
from megatron_solopo.data.inspection.blocks import html, table, visible
from megatron_solopo.data.inspection.charts import Chart, charts
from megatron_solopo.data.inspection.statistics import Statistics
from megatron_solopo.data.inspection.view import View

_LISTED = 3
"""Repeated texts that are listed of each kind."""


@dataclass(frozen=True)
class Source:
    """How the page was written; ``kind`` is what the file holds, ``method`` None for contexts."""

    name: str
    kind: str
    tokenizer: str
    method: MethodConfig | None
    seed: int
    full: bool
    seq_length: int | None


def write_page(path: Path, source: Source, statistics: Statistics, views: Sequence[View]) -> int:
    """Writes the page, aside first and renamed at the end; returns its size in bytes.

    Everything that comes from data is escaped. The same data, options and seed write the same bytes.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"visible": visible, "html": html}
    style, script = (Markup(environment.get_template(f"page.{kind}.jinja").render()) for kind in ("css", "js"))
    drawn = charts(statistics)
    text = environment.get_template("page.html.jinja").render(
        source=source,
        statistics=statistics,
        views=views,
        charts=drawn,
        tiles=_tiles(statistics.examples, drawn),
        oddities=_oddities(source, statistics, views),
        repeats=_repeats(statistics),
        style=style,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_text(path, text, errors="replace")
    return path.stat().st_size


def _tiles(examples: int, drawn: Sequence[Chart]) -> list[tuple[str, str]]:
    """Returns (name, value) of the figures at the top."""
    tiles = [("examples", f"{examples:,}")]
    for chart in drawn:
        what = chart.title[:1].lower() + chart.title[1:]
        if what.startswith(("tokens of", "compression ratio")):
            for index, (name, _, _) in enumerate(chart.series):
                named = f"tokens, {name}" if len(chart.series) > 1 else what
                tiles.append((f"median {named}", chart.figures(index)[0]))
    return tiles


def _oddities(source: Source, statistics: Statistics, views: Sequence[View]) -> Table:
    """Returns what may be wrong, how often, and the button that shows such samples."""
    rows = table("what", f">{source.kind}", ">share", "among the samples")
    for key, words, number in statistics.checks():
        if key == "too_long" and not source.seq_length:
            continue
        shown = sum(key in view.facts.flags for view in views)
        button = Markup('<button class="link" data-flag="{0}" data-text="show {1}">show {1}</button>')
        rows.add_row(
            f"{words} {source.seq_length}" if key == "too_long" else words,
            *_share(number, statistics.examples),
            button.format(key, shown) if shown else "",
            style="some" if number else "none",
        )
    return rows


def _repeats(statistics: Statistics) -> Table:
    """Texts that come again."""
    rows = table("what", ">came before", ">share", "most often")
    for what, repeats in statistics.repeats.items():
        often = Text("\n").join(
            Text.assemble((f"{times} x ", "soft"), visible(text)) for text, times in repeats.most(_LISTED)
        )
        share = _share(repeats.repeated, statistics.examples)
        rows.add_row(what, *share, often, style="some" if repeats.repeated else "none")
    return rows


def _share(number: int, of: int) -> tuple[str, str]:
    return f"{number:,}", f"{100 * number / of:.1f} %"
