#!/usr/bin/env python3
"""docs/planning.md's figure, docs/images/memory.svg: a process's peak by kind against context length, rehearsed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from megatron_solopo.cli import run  # noqa: E402
from megatron_solopo.evaluation.plots import COLOURS  # noqa: E402
from megatron_solopo.planning.candidate import GIB  # noqa: E402
from megatron_solopo.planning.machines import load_machine  # noqa: E402
from megatron_solopo.planning.memory import BUILD, KINDS, Moment  # noqa: E402
from megatron_solopo.planning.plan import read_options, request_of  # noqa: E402
from megatron_solopo.planning.search import plan  # noqa: E402
from megatron_solopo.planning.workers import Rehearsals  # noqa: E402

from demo_figure import STYLE  # noqa: E402  # isort: skip

FIGURE = ROOT / "docs" / "images" / "memory.svg"
MODEL = "examples/recipes/models/Qwen2.5-7B-Instruct"
LENGTHS = tuple(4096 * 2**power for power in range(6))
COPIES, SHARED = ("--context-parallel-size", "1"), ("--context-parallel-size", "8")
SAVING = (
    *("--mlp-tiles", "auto", "--use-precision-aware-optimizer"),
    *("--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"),
)
LAYOUTS = {
    "8 copies (dp8)": COPIES,
    "one sequence over 8 GPUs (cp8)": SHARED,
    "dp8, MLP in tiles, moments in bf16": (*COPIES, *SAVING),
    "cp8, MLP in tiles, moments in bf16": (*SHARED, *SAVING),
}
"""Of each panel, by rows, its options."""
WORDS = (
    *("--model", MODEL, "--gpus", "8", "--gpu-memory", "10000", "--rope-scaling", "yarn:4:32768"),
    *("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--micro-batch-size", "1"),
    *("--recompute-granularity", "full", "--global-batch-size", "8"),
)


def peaks(words: tuple[str, ...], rehearsals: Rehearsals) -> list[Moment]:
    """The largest moment of a step at each of `LENGTHS`, without the start of a run, which depends on no length."""
    moments = []
    for length in LENGTHS:
        arguments, config = read_options([*WORDS, *words, "--long-tokens", str(length)])
        request = request_of(arguments, config, load_machine(arguments.machine))
        outcomes = plan(request, 1, rehearsals).fitting[0].outcomes
        steps = [moment for outcome in outcomes for moment in outcome.peaks.values() if moment.phase != BUILD]
        moments.append(max(steps, key=lambda moment: moment.total))
    return moments


@matplotlib.rc_context(STYLE)
def draw(path: Path, layouts: dict[str, list[Moment]]) -> None:
    """A panel a layout: the kinds of its peak on top of each other."""
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    panels = figure.subplots(len(layouts) // 2, 2, sharex=True, sharey=True)
    colors = [*COLOURS, "#999999"]
    for axes, (name, moments) in zip(panels.flat, layouts.items(), strict=True):
        sizes = [[moment.held[kind] / GIB for moment in moments] for kind in KINDS]
        axes.stackplot(LENGTHS, sizes, labels=list(KINDS), colors=colors, alpha=0.85)
        axes.axhline(80, color="#333333", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, [f"{length // 1024}K" for length in LENGTHS])
        axes.minorticks_off()
        axes.set_title(name, fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("Long context, tokens")
    figure.supylabel("Peak of a process in a step, GiB (dashed: 80)", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    panels[0, 1].legend(handles[::-1], labels[::-1], loc="upper left", frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, facecolor="white", metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FIGURE, metavar="FILE.svg")
    path = parser.parse_args(argv).output
    with Rehearsals() as rehearsals:
        layouts = {name: peaks(words, rehearsals) for name, words in LAYOUTS.items()}
    draw(path, layouts)
    for name, moments in layouts.items():
        print(name, [round(moment.total / GIB, 1) for moment in moments])
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
