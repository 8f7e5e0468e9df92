"""The figures of training runs on one page: loss and margin at the start and at the end, speed, padding, memory.

python examples/musique/summary.py runs/musique/dpo runs/musique/simpo runs/musique/orpo
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_solopo.arguments import Parser
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.results import read_run


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The training steps of a run folder that were not skipped, each once.

    Raises:
        UserError: no metrics.jsonl, or no training step in it.
    """
    steps = [step for step in read_run(str(folder)).train if "skipped" not in step]
    if not steps:
        raise UserError("data-empty", f"{folder}: holds no training step")
    return steps


def lines_of(steps: Sequence[dict[str, Any]], count: int) -> list[str]:
    """Means over the first and the last ``count`` steps, then what a step costs."""
    names = [name for name in ("loss", "po_loss", "alignment_loss", "margin", "accuracy") if name in steps[0]]
    lines = []
    for name in names:
        first, last = (statistics.mean(step[name] for step in part) for part in (steps[:count], steps[-count:]))
        lines.append(
            f"{name:<24} {first:>9.4f} -> {last:>9.4f}   (mean of the first and the last {count} of {len(steps)} steps)"
        )
    speeds, seconds = ([step[name] for step in steps] for name in ("tokens_per_second", "seconds"))
    tokens = [step["tokens"] for step in steps]
    places = sorted({min(count, len(steps)), (len(steps) + 1) // 2, len(steps)})
    memory = ", ".join(f"{steps[place - 1]['memory_gib']:.2f} after step {place}" for place in places)
    return [
        *lines,
        f"{'seconds a step':<24} median {statistics.median(seconds):.2f} "
        f"(min {min(seconds):.2f}, max {max(seconds):.2f})",
        f"{'tokens a second':<24} median {statistics.median(speeds):.0f} "
        f"(min {min(speeds):.0f}, max {max(speeds):.0f}), all processes",
        f"{'tokens a step':<24} mean {statistics.mean(tokens):.0f}",
        f"{'padding share':<24} largest {max(step['padding_share'] for step in steps):.4f}",
        f"{'memory_gib':<24} {memory} (peak of training so far, of the largest process)",
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="run folders")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps a mean is taken over (default: 5)")
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise UserError("option-value", f"--steps {options.steps}: set 1 or more")
    for folder in options.runs:
        print(f"{folder}\n  " + "\n  ".join(lines_of(read_steps(folder), options.steps)))
    return 0


if __name__ == "__main__":
    from megatron_solopo.cli import run

    sys.exit(run(main))
