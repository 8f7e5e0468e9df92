"""Memory of a training step of a 7B model by what is recomputed, kept and offloaded: rehearsed, so no GPU is needed.

    python examples/benchmarks/recompute_memory.py [--tokens 131072] [--lora]

It prints a Markdown table (docs/parallelism.md). Each row takes half a minute to three minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_solopo import config_load
from megatron_solopo.model.hf_config import read_hf_config
from megatron_solopo.planning.memory import ACTIVATIONS
from megatron_solopo.planning.rehearse import example
from megatron_solopo.planning.workers import Rehearsals, Task

MODEL = Path(__file__).resolve().parents[1] / "recipes" / "models" / "Qwen2.5-7B-Instruct"
GIB = 2**30
FULL, TILES = "--recompute-granularity full", "--mlp-tiles auto"
KEEP, OFFLOAD = "--recompute-keep core_attn", "--activation-offload"
LORA = "--lora-rank 16"
SMALL = "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
HOST = "--optimizer-cpu-offload"
ROWS = (
    (32768, 1, f"{FULL} {TILES} {HOST}"),
    (131072, 1, f"{FULL} {SMALL}"),
    (131072, 1, f"{FULL} {TILES} {SMALL}"),
    (131072, 1, f"{FULL} {TILES} {KEEP} {SMALL}"),
    (131072, 1, f"{FULL} {TILES} {OFFLOAD} {SMALL}"),
    (131072, 1, f"{FULL} {TILES} {KEEP} {OFFLOAD} {SMALL}"),
    (131072, 8, f"{FULL} {TILES} {SMALL} --context-parallel-size 8"),
    (262144, 1, f"{FULL} {TILES} {OFFLOAD} {SMALL}"),
    (524288, 1, f"{FULL} {TILES} {OFFLOAD} {HOST}"),
    (131072, 1, f"{LORA} {FULL}"),
    (131072, 1, f"{LORA} {FULL} {TILES}"),
    (131072, 1, f"{LORA} {FULL} {TILES} {KEEP}"),
    (262144, 1, f"{LORA} {FULL} {TILES}"),
    (262144, 1, f"{LORA} {FULL} {TILES} {OFFLOAD}"),
    (524288, 1, f"{LORA} {FULL} {TILES} {OFFLOAD}"),
)
"""Tokens of the long prompt, processes, and options; those of --lora-rank 16 are in docs/lora.md."""


def task(tokens: int, processes: int, flags: str) -> Task:
    """A step of one example of SoLo-DPO: prompts of 1,024 and of ``tokens`` tokens, responses of 256."""
    argv = ["--hf-path", "m", "--train-data", "x", "--save", "y", "--train-iters", "1", "--bf16", "--random-init"]
    config, _ = config_load.load([*argv, *flags.split()])
    return Task(config, read_hf_config(MODEL, None), [example(config.method, 1024, tokens, 256)], 1, 0, processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="only the rows of this length")
    parser.add_argument("--lora", action="store_true", help="only the rows with adapters")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if arguments.tokens in (None, row[0]) and (not arguments.lora or LORA in row[2])]
    print("| tokens | GPUs | options | kept by the layers, GiB | peak of a GPU, GiB | host, GiB |")
    print("|---|---|---|---|---|---|")
    with Rehearsals(1) as rehearsals:
        for row, outcome in zip(rows, rehearsals.each([task(*row) for row in rows]), strict=True):
            kept = max(moment.held[ACTIVATIONS] for moment in outcome.peaks.values())
            sizes = (f"{size / GIB:.1f}" for size in (kept, outcome.peak.total, outcome.host))
            print(f"| {row[0]:,} | {row[1]} | `{row[2]}` | {' | '.join(sizes)} |", flush=True)


if __name__ == "__main__":
    main()
