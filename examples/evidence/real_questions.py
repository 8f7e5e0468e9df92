"""Questions of several sources as one file of `--source jsonl`, in turn; those answered by yes or no are left out.

A model that guesses is right in half of them, whatever it reads.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from megatron_solopo.arguments import Parser
from megatron_solopo.cli import run
from megatron_solopo.data.building.sources import LeftOut, read_questions
from megatron_solopo.data.files.records import write_jsonl
from megatron_solopo.errors import UserError

GUESSED = {"yes", "no"}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="SOURCE=FILE", help="hotpotqa=train.json and so on")
    parser.add_argument("--output", required=True, metavar="FILE", help="the questions to write, JSONL")
    options = parser.parse_args(argv)
    of_sources = [_questions(entry) for entry in options.data]
    in_turn = (question for row in itertools.zip_longest(*of_sources) for question in row if question)
    print(f"{options.output}: {write_jsonl(options.output, in_turn)} questions")
    return 0


def _questions(entry: str) -> Iterator[dict[str, Any]]:
    """Yields the questions of ``SOURCE=FILE``, with the source's name before their ids."""
    source, separator, file = entry.partition("=")
    if not separator:
        raise UserError("option-value", f"--data {entry}: must be SOURCE=FILE")
    for question in read_questions(source, [file], LeftOut()):
        if question.answer.strip().lower() not in GUESSED:
            yield {
                "id": f"{source}-{question.id}",
                "question": question.question,
                "answers": list(question.answers),
                "documents": [vars(paragraph) for paragraph in question.paragraphs],
            }


if __name__ == "__main__":
    sys.exit(run(main))
