"""SimPO, DPO and SoLoPO's options beside the demo's ORPO, from the same base on the same groups; one table over seeds.

    python examples/quickstart/demo.py --seed 1 --output runs/demo-seed1
    python examples/quickstart/compare.py runs/demo runs/demo-seed1

Finished runs are skipped when it is started again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import batched
from pathlib import Path

import yaml
from demo import METHODS, Settings, Stages, evaluation, preference, slug

from megatron_solopo.arguments import Parser
from megatron_solopo.cli import run
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.report import accuracy_table
from megatron_solopo.evaluation.results import Evaluation, read_evaluation

SIMPO = "--preference-loss simpo --beta 2 --simpo-gamma 1"
DPO = "--preference-loss dpo --beta 0.1 --lr 3e-4"
SHORT_REFERENCE = "--alignment-weight 3 --alignment-reference short"
RUNS = {
    "SimPO short-PO": f"{SIMPO} --context-mode short",
    "SimPO long-PO": f"{SIMPO} --context-mode long",
    "SimPO SoLo": f"{SIMPO} --alignment-weight 1",
    "SimPO SoLo, alpha 0.3": f"{SIMPO} --alignment-weight 0.3",
    "SimPO SoLo, short side stopped": f"{SIMPO} --alignment-weight 1 --alignment-stop-short-gradient",
    "DPO short-PO": f"{DPO} --context-mode short",
    "DPO long-PO": f"{DPO} --context-mode long",
    "DPO SoLo": f"{DPO} --alignment-weight 3",
    "DPO SoLo, short reference": f"{DPO} {SHORT_REFERENCE}",
    "DPO SoLo, short reference, short side stopped": f"{DPO} {SHORT_REFERENCE} --alignment-stop-short-gradient",
}
"""Label -> options; ORPO's four runs are the demo's own."""


def name_of(label: str) -> str:
    """A label as a folder's name."""
    return label.lower().replace(",", "").replace(" ", "-")


def compare(folder: Path) -> list[Evaluation]:
    """All runs on one finished demo; returns the demo's evaluations and theirs.

    Raises:
        UserError: the demo did not finish there, or a run failed.
    """
    pairs, settings_file = folder / ".stages" / "pairs.json", folder / "solo" / "config.yaml"
    if not pairs.is_file() or not settings_file.is_file():
        raise UserError(f"{folder}: no finished demo there; run examples/quickstart/demo.py --output {folder}")
    seed = yaml.safe_load(settings_file.read_text(encoding="utf-8"))["training"]["seed"]
    settings = dataclasses.replace(Settings(), at_once=2)
    for some in batched(RUNS, settings.at_once):
        stages = Stages(folder)
        stages.fingerprint = json.loads(pairs.read_text(encoding="utf-8"))["fingerprint"]
        names = {label: name_of(label) for label in some}
        runs = [preference(settings, folder, names[label], seed, RUNS[label]) for label in some]
        stages.run(" and ".join(some), 120, *runs, remakes=[folder / name for name in names.values()])
        stages.run("evaluate " + " and ".join(some), 15, *(evaluation(settings, folder, n) for n in names.values()))
    results = {"base": "base"} | {f"ORPO {label}": slug(label) for label in METHODS}
    results |= {label: name_of(label) for label in RUNS}
    return [read_evaluation(f"{label}={folder / 'evaluation' / f'{name}.json'}") for label, name in results.items()]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("demos", nargs="+", type=Path, metavar="DIR", help="output folders of finished demos")
    options = parser.parse_args(argv)
    by_seed = [compare(folder.resolve()) for folder in options.demos]
    # The table averages evaluations of one label, in the order in which the labels come.
    print(accuracy_table([one for runs in zip(*by_seed, strict=True) for one in runs], "documents"))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
