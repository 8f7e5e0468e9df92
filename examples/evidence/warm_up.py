"""Conversations for `--objective sft`: each short context with its gold answer, in the form the prompt asks for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.cli import run
from megatron_solopo.data.files.records import write_jsonl


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--contexts", type=Path, required=True, metavar="FILE", help="contexts of prepare-data")
    parser.add_argument("--output", required=True, metavar="FILE", help="the conversations to write, JSONL")
    options = parser.parse_args(argv)
    contexts = [json.loads(line) for line in options.contexts.open(encoding="utf-8")]
    conversations = (
        {
            "id": context["id"],
            "messages": [*context["short_messages"], {"role": "assistant", "content": context["answers"][0]}],
        }
        for context in contexts
    )
    print(f"{options.output}: {write_jsonl(options.output, conversations)} conversations")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
