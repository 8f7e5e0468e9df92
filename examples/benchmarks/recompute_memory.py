"""Memory of a training step of a 7B model by what is recomputed, kept and offloaded: rehearsed, so no GPU is needed.

    python examples/benchmarks/recompute_memory.py [--long 131072]

It prints a Markdown table (docs/parallelism.md). Each row takes one to three minutes on one core.
"""

from __future__ import annotations

import argparse

from transformers import Qwen2Config

from megatron_solopo import config_load
from megatron_solopo.planning.memory import ACTIVATIONS
from megatron_solopo.planning.rehearse import example
from megatron_solopo.planning.workers import Rehearsals, Task

QWEN_7B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    max_position_embeddings=2**20,
    tie_word_embeddings=False,
)
GIB = 2**30
FULL = ("--recompute-granularity", "full")
KEEP = ("--recompute-keep", "core_attn")
ROWS = (FULL, (*FULL, *KEEP), (*FULL, "--activation-offload"), (*FULL, *KEEP, "--activation-offload"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", type=int, default=131072, help="tokens of the long prompt")
    length = parser.parse_args().long
    argv = ["--hf-path", "m", "--train-data", "x", "--save", "y", "--train-iters", "1", "--bf16", "--random-init"]
    configs = [config_load.load([*argv, "--seq-length", str(2 * length), *flags])[0] for flags in ROWS]
    group = example(configs[0].method, 1024, length, 256)
    print("| options | kept by the layers, GiB | peak of the step, GiB | host, GiB |\n|---|---|---|---|")
    with Rehearsals(1) as rehearsals:
        outcomes = rehearsals.each([Task(config, QWEN_7B, [group]) for config in configs])
        for flags, outcome in zip(ROWS, outcomes, strict=True):
            kept = max(moment.held[ACTIVATIONS] for moment in outcome.peaks.values())
            row = (f"`{' '.join(flags)}`", *(f"{size / GIB:.1f}" for size in (kept, outcome.peak.total, outcome.host)))
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
