"""Tables in Markdown."""

from __future__ import annotations

import pandas


def markdown_table(frame: pandas.DataFrame, text_columns: int = 1) -> str:
    """Returns a Markdown table of texts; columns after the first ``text_columns`` are set to the right."""
    escaped = frame.map(lambda cell: cell.replace("|", "\\|"))
    aligned = ["left" if column < text_columns else "right" for column in range(frame.shape[1])]
    return escaped.to_markdown(index=False, disable_numparse=True, colalign=aligned if len(frame) else None)
