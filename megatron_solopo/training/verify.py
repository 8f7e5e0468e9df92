"""`solopo verify-parallelism`: checks that parallel layouts train the same model, by one step's loss and gradient.

    solopo verify-parallelism --config run.yaml --layouts "tp2 sp" cp2 "pp2 cp2"

uses the run's model, data and method. Layouts of the same number of processes share a launch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.cli import run
from megatron_solopo.parallel import platform


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``. Returns 1 where a difference is above its bound."""
    parser = Parser(
        config=False,  # training's
        description="Compares one step's loss and gradient under parallel layouts with those of one process, from the "
        "weights of --hf-path; stages are even.",
        epilog="Every other option is one of pretrain_solopo.py (--config FILE, --hf-path, --train-data, ...); "
        "--save is not needed and nothing is written.",
    )
    parser.add_argument("--layouts", nargs="+", required=True, metavar="LAYOUT", help='"tp2 sp", cp2, "pp2 dp2", ...')
    parser.add_argument(
        "--base", default="1", metavar="LAYOUT", help="what they are compared with (default: 1 process)"
    )
    parser.add_argument("--float64", action="store_true", help="model and gradient in float64: only wrong code differs")
    parser.add_argument("--bound", type=float, help="largest relative difference (default: by dtype; bfloat16: none)")
    parser.add_argument("--tensors", type=int, default=3, metavar="N", help="worst tensors to show (default: 3)")
    parser.add_argument("--save", help=argparse.SUPPRESS)  # of a training run's command line
    options, rest = parser.parse_known_args(argv)
    from megatron_solopo.training.compare_layouts import compare  # imports megatron-core, which --help does not need

    return compare(options, rest)


def worker(argv: list[str] | None = None) -> int:
    """Runs one process of a launch; ``argv[0]`` is the job file of `compare_layouts`."""
    job = json.loads(Path((sys.argv[1:] if argv is None else argv)[0]).read_text())
    started = platform.start(job["device"], job["timeout_minutes"])
    try:
        from megatron_solopo.training.compare_layouts import measure

        with platform.explain_lost_process():
            measure(started, job)
    finally:
        platform.stop(started)
    return 0


if __name__ == "__main__":
    sys.exit(run(worker))
