"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; columns after the first ``text_columns`` are set to the right."""
    import pandas  # of the extra "report", as tabulate is

    frame = pandas.DataFrame([[cell.replace("|", "\\|") for cell in row] for row in rows], columns=list(head))
    aligned = ["left" if column < text_columns else "right" for column in range(len(head))]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=aligned if len(frame) else None)
