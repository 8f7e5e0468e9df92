#!/usr/bin/env python3
"""examples/recipes/plans and the tables of docs/planning.md: models x GPUs x lengths, planned (`make recipes`)."""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_solopo.cli import run  # noqa: E402
from megatron_solopo.planning.candidate import GIB  # noqa: E402
from megatron_solopo.planning.machines import load_machine  # noqa: E402
from megatron_solopo.planning.plan import facts_of, read_options, request_of  # noqa: E402
from megatron_solopo.planning.plan_file import write_plan  # noqa: E402
from megatron_solopo.planning.search import plan, search  # noqa: E402
from megatron_solopo.planning.workers import Rehearsals  # noqa: E402

PLANS, PAGE = ROOT / "examples" / "recipes" / "plans", ROOT / "docs" / "planning.md"
MODELS = "examples/recipes/models"
YARN = {131072: ("--rope-scaling", "yarn:4:32768")}
SHAPES: dict[str, dict[int, tuple[str, ...]]] = {
    "Qwen2.5-7B-Instruct": YARN,
    "Llama-3.1-8B-Instruct": {},
    "Qwen3-8B": YARN,
    "Qwen3-30B-A3B": YARN,
    "Llama-3.1-70B-Instruct": {},
}
"""Model -> options that its lengths need."""
LENGTHS = (8192, 32768, 131072)
GPUS = (("h100", 8), ("h100", 64), ("h200", 1))
LARGE = {"Llama-3.1-70B-Instruct": 64}
"""Models that are planned for so many GPUs and more alone."""
BEGIN, END = "<!-- plans -->", "<!-- end of plans -->"


@dataclass(frozen=True)
class Recipe:
    """A plan that is to be made; its file has its name."""

    model: str
    machine: str
    gpus: int
    tokens: int

    @property
    def path(self) -> Path:
        model = self.model.removesuffix("-Instruct").lower()
        return PLANS / f"{model}-{self.gpus}x{self.machine}-{self.tokens // 1024}k.yaml"

    @property
    def words(self) -> list[str]:
        """The options of ``solopo plan``."""
        return [
            *("--model", f"{MODELS}/{self.model}", "--gpus", str(self.gpus), "--machine", self.machine),
            *("--long-tokens", str(self.tokens), "--global-batch-size", "64"),
            *("--hf-path", f"models/{self.model}", "--save", f"runs/{self.path.stem}"),
            *SHAPES[self.model].get(self.tokens, ()),
        ]


def recipes() -> list[Recipe]:
    return [
        Recipe(model, machine, gpus, tokens)
        for machine, gpus in GPUS
        for model in SHAPES
        if gpus >= LARGE.get(model, 1)
        for tokens in LENGTHS
    ]


def planned(recipe: Recipe, top: int, rehearsals: Rehearsals) -> str:
    """Writes the recipe's file where something fits; returns its cell of the table. What the nearest layout lacks is
    estimated, where nothing fits by estimates."""
    arguments, config = read_options(recipe.words)
    request = request_of(arguments, config, load_machine(recipe.machine))
    searched = search(request)
    recipe.path.unlink(missing_ok=True)
    if not searched.fitting:
        if not searched.others:
            return "refused: " + searched.refused.most_common(1)[0][0]
        nearest = searched.others[0]
        return f"lacks about {nearest.lacks(request)} ({nearest.name})"
    if top == 0:
        best = searched.fitting[0]
        return f"{best.name}: about {best.peak.total / GIB:.1f} GiB, estimated"
    result = plan(request, top, rehearsals, searched)
    worst = max((candidate.error for candidate in result.best), key=abs, default=0.0)
    print(
        f"  {result.searched.layouts:,} layouts, {len(result.searched.fitting):,} fit; estimates {worst:+.1%}",
        flush=True,
    )
    if result.fitting:
        best = result.fitting[0]
        write_plan(recipe.path, best.config, ["solopo", "plan", *recipe.words], facts_of(request, best))
        return f"{best.name}: {best.peak.total / GIB:.1f} GiB, {best.step.low:.0f}-{best.step.high:.0f} s"
    return f"lacks {result.nearest.lacks(request)} ({result.nearest.name})"


def page(cells: dict[Recipe, str]) -> str:
    """The Markdown tables."""
    lines = []
    for machine, gpus in GPUS:
        lines += ["", f"{gpus} x {load_machine(machine).name}:", ""]
        lines += ["| model | " + " | ".join(f"{tokens // 1024}K" for tokens in LENGTHS) + " |", "|---" * 4 + "|"]
        for model in SHAPES:
            of_model = [cells.get(Recipe(model, machine, gpus, tokens)) for tokens in LENGTHS]
            if any(of_model):
                lines.append(f"| {model} | " + " | ".join(cell or "" for cell in of_model) + " |")
    return "\n".join([*lines, ""])


def read_page() -> dict[Recipe, str]:
    """The cells that the page has."""
    cells: dict[Recipe, str] = {}
    kind = GPUS[0]
    for line in PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines():
        kind = next((it for it in GPUS if line == f"{it[1]} x {load_machine(it[0]).name}:"), kind)
        model, *row = (cell.strip() for cell in line.strip("| ").split(" | "))
        if model in SHAPES:
            cells |= {Recipe(model, *kind, tokens): cell for tokens, cell in zip(LENGTHS, row, strict=False) if cell}
    return cells


def write_page(cells: dict[Recipe, str]) -> None:
    """Puts the tables of what is planned so far into the page."""
    text = PAGE.read_text(encoding="utf-8")
    tables = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    PAGE.write_text(tables.sub(lambda _: f"{BEGIN}\n{page(cells)}\n{END}", text), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--top", type=int, default=4, help="layouts of each that are rehearsed; 0: estimates")
    parser.add_argument("--only", default="", metavar="REGEX", help="recipes whose names match; others stay")
    options = parser.parse_args(argv)
    cells = read_page() if options.only else {}
    with Rehearsals() as rehearsals:
        for recipe in recipes():
            if not re.search(options.only, recipe.path.stem):
                continue
            cells[recipe] = planned(recipe, options.top, rehearsals)
            print(f"{time.strftime('%H:%M:%S')} {recipe.path.stem}: {cells[recipe]}", flush=True)
            write_page(cells)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
