"""The report's section about sampled responses: how many were right, by what build-pairs counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas
from pydantic import TypeAdapter

from megatron_solopo.data.validation import Whole, validated
from megatron_solopo.evaluation.results import labelled_json
from megatron_solopo.evaluation.tables import markdown_table


@dataclass(frozen=True)
class _Counts:
    sampled: Whole
    paired: Whole
    all_right: Whole
    all_wrong: Whole
    responses: Whole
    right_responses: Whole
    groups: Whole
    scorer: str


_COUNTS = TypeAdapter(_Counts)


def read_counts(argument: str) -> tuple[str, _Counts]:
    """Reads ``FILE`` or ``LABEL=FILE`` of build-pairs --counts-output; LABEL defaults to the file's name.

    Raises:
        UserError: the file is missing, or is another one.
    """
    label, path, record = labelled_json("--counts", argument, "file written by build-pairs --counts-output")
    return label or path.stem, validated(_COUNTS, record, f"--counts {path}")


def sampled_section(counts: Sequence[tuple[str, _Counts]]) -> list[str]:
    """Returns the section's parts."""
    rows = []
    for label, one in counts:
        questions = max(one.sampled, 1)
        rows.append(
            {
                "label": label,
                "questions": f"{one.sampled:,}",
                "responses": f"{one.responses:,}",
                "right": f"{one.right_responses / max(one.responses, 1):.1%}",
                "all right": f"{one.all_right / questions:.1%}",
                "all wrong": f"{one.all_wrong / questions:.1%}",
                "a right and a wrong one": f"{one.paired / questions:.1%}",
                "groups": f"{one.groups:,}",
            }
        )
    scorers = ", ".join(dict.fromkeys(one.scorer for _, one in counts))
    return [
        "## Sampled responses",
        markdown_table(pandas.DataFrame(rows)),
        f"*Right: by {scorers}, of the responses that were scored; the next three columns: of the questions.*",
    ]
