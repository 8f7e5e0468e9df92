"""Runs a command and reports the memory of it and all its child processes while it runs.

A line a sample goes to --output: seconds since the start, the sum of the resident sets (pages that processes share
count once for each), and the sum of the proportional sets (shared pages count once; 0 where the system reports none).

    python examples/musique/watch_memory.py --output runs/memory.jsonl -- torchrun --nproc_per_node 2 ...
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import psutil

from megatron_solopo.arguments import Parser
from megatron_solopo.errors import UserError


def sample(root: psutil.Process) -> tuple[int, int]:
    """Summed (resident, proportional) bytes of a process and its descendants; those that just ended count nothing."""
    resident = proportional = 0
    try:
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in tree:
        try:
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        resident += memory.rss
        proportional += getattr(memory, "pss", 0)
    return resident, proportional


def watch(command: list[str], output: Path, every: float) -> int:
    """Runs ``command``, samples it each ``every`` seconds, prints the peak; returns the command's exit status."""
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        child = psutil.Popen(command)
    except OSError as error:
        raise UserError("command-failed", f"{command[0]}: cannot be started ({error.strerror})") from None
    samples: list[dict[str, float]] = []
    with output.open("w", encoding="utf-8", buffering=1) as file:
        while child.poll() is None:
            resident, proportional = sample(child)
            line = {
                "seconds": round(time.monotonic() - start, 2),
                "resident_gib": round(resident / 2**30, 3),
                "proportional_gib": round(proportional / 2**30, 3),
            }
            file.write(json.dumps(line) + "\n")
            samples.append(line)
            time.sleep(every)
    # The first third is starting up; from there on a run should hold the same memory.
    thirds = [samples[len(samples) * part // 3 : len(samples) * (part + 1) // 3] for part in (1, 2)]
    for name in ("resident", "proportional"):
        values = [line[f"{name}_gib"] for line in samples]
        middle, last = (statistics.median(line[f"{name}_gib"] for line in third or samples) for third in thirds)
        print(
            f"memory of all processes, {name}: peak {max(values):.2f} GiB, median of the second third {middle:.2f}, "
            f"of the last third {last:.2f} ({len(values)} samples in {samples[-1]['seconds']:.0f} s)"
        )
    return child.returncode


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="samples, JSONL")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="time between samples (default: 1)")
    parser.add_argument("command", nargs="+", help="the command and its arguments, after --")
    options = parser.parse_args(argv)
    return watch(options.command, options.output, options.every)


if __name__ == "__main__":
    from megatron_solopo.cli import run

    sys.exit(run(main))
