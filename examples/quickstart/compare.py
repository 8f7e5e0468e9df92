"""The accuracies of compare.yaml beside the demo's, in one table over seeds.

solopo run examples/quickstart/compare.yaml
solopo run examples/quickstart/compare.yaml --output runs/demo-seed1 --seed 1
python examples/quickstart/compare.py runs/demo runs/demo-seed1
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.cli import run
from megatron_solopo.evaluation.accuracy import accuracy_table
from megatron_solopo.evaluation.results import read_evaluation

RESULTS = {
    "base": "base",
    "ORPO short-PO": "short-po",
    "ORPO long-PO": "long-po",
    "ORPO SoLo": "solo",
    "ORPO SoLo, stop-grad on short": "solo-stopped",
    "SimPO short-PO": "simpo-short-po",
    "SimPO long-PO": "simpo-long-po",
    "SimPO SoLo": "simpo-solo",
    "SimPO SoLo, alpha 0.3": "simpo-solo-alpha-0.3",
    "SimPO SoLo, stop-grad on short": "simpo-solo-short-side-stopped",
    "DPO short-PO": "dpo-short-po",
    "DPO long-PO": "dpo-long-po",
    "DPO SoLo": "dpo-solo",
    "DPO SoLo, short reference": "dpo-solo-short-reference",
    "DPO SoLo, short reference, stop-grad on short": "dpo-solo-short-reference-short-side-stopped",
}
"""Label -> name of its file in evaluation/; the first five are those of the demo."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("demos", nargs="+", type=Path, metavar="DIR", help="output folders of compare.yaml")
    demos = parser.parse_args(argv).demos
    # The table averages evaluations of one label, in the order in which the labels come.
    evaluations = [
        read_evaluation(f"{label}={demo / 'evaluation' / f'{name}.json'}")
        for label, name in RESULTS.items()
        for demo in demos
    ]
    print(accuracy_table(evaluations, "documents"))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
