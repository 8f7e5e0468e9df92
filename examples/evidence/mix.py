"""Groups of two files as one: each Nth question has the longer context, the others the shorter one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.cli import run
from megatron_solopo.data.files.records import write_jsonl
from megatron_solopo.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--short", type=Path, required=True, metavar="FILE", help="groups with the shorter contexts")
    parser.add_argument("--long", type=Path, required=True, metavar="FILE", help="the same with the longer ones")
    parser.add_argument("--every", type=int, required=True, metavar="N", help="one group of N has the longer context")
    parser.add_argument("--output", required=True, metavar="FILE", help="the groups to write, JSONL")
    options = parser.parse_args(argv)
    short, long = ([json.loads(line) for line in path.open(encoding="utf-8")] for path in (options.short, options.long))
    if [group["id"] for group in short] != [group["id"] for group in long]:
        raise UserError("data-kind", f"--short {options.short}: has other groups than --long {options.long}")
    mixed = (pair[number % options.every == 0] for number, pair in enumerate(zip(short, long, strict=True)))
    print(f"{options.output}: {write_jsonl(options.output, mixed)} groups, one of {options.every} from {options.long}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
