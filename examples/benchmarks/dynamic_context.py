"""What it costs to compute short examples on the complete context-parallel group, when a few are long: arithmetic.

    python examples/benchmarks/dynamic_context.py --model examples/recipes/models/Qwen2.5-7B-Instruct \\
        --tokenizer MODEL --data musique_ans_train_subset.jsonl

Lengths are those of real MuSiQue questions (short: the supporting paragraphs; long: all of them), of which a share has
a long context of --long-tokens instead. Four ways to compute a step's examples are compared by the planner's closed
form of a pack's time (`megatron_solopo.planning.cost`):

full      every pack is divided over the context-parallel group: what training does
local     examples below --local-tokens are computed whole, each by one rank of the group, where that is shorter
no wait   as if these cost no communication and left no rank idle: the most that any such scheme can gain
mcore     megatron-core's BalancedCPScheduler: sequences are separate and run one by one, each on as many ranks as it
          needs; its own schedule of these lengths, timed by the same closed form

No step is run, and nothing here was compared with a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import attention_cost, pieces_multiple_of, plan_step
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.model.cost import width_of_cost
from megatron_solopo.planning.cost import seconds_of_packs
from megatron_solopo.planning.machines import Machine, load_machine
from megatron_solopo.planning.process import Process, Shape, Work
from megatron_solopo.planning.rehearse import example

RESPONSE = 100
"""Tokens of a response."""
EXAMPLES = 64
"""Examples of a step."""
MIXES: dict[str, tuple[tuple[int, int] | None, int]] = {
    "MuSiQue": (None, 0),
    "MuSiQue, 1 of 64 long": (None, 1),
    "MuSiQue, 8 of 64 long": (None, 8),
    "MuSiQue, 32 of 64 long": (None, 32),
    "1K / 8K": ((1024, 8192), 0),
    "1K / 8K, 1 of 64 long": ((1024, 8192), 1),
    "1K / 8K, 8 of 64 long": ((1024, 8192), 8),
}
"""Name -> tokens of short and long contexts, None for those of the questions; how many have --long-tokens instead."""
GPUS = 64
LAYOUTS = ((8, 1), (8, 8), (16, 4), (32, 2), (64, 1))
"""(context-parallel size, copies of the model). A node has 8 GPUs."""


def lengths_of(data: Path, tokenizer: str, count: int) -> list[tuple[int, int]]:
    """Returns tokens of (the supporting paragraphs, all paragraphs) of the first questions."""
    encode = AutoTokenizer.from_pretrained(tokenizer)
    lengths = []
    for line in data.read_text(encoding="utf-8").splitlines()[:count]:
        paragraphs = json.loads(line)["paragraphs"]
        tokens = [len(encode(f"{p['title']}\n{p['paragraph_text']}\n\n").input_ids) for p in paragraphs]
        supporting = [n for n, p in zip(tokens, paragraphs, strict=True) if p["is_supporting"]]
        lengths.append((sum(supporting), sum(tokens)))
    return lengths


class Times:
    """Seconds of packs on a machine.

    Args:
        context: context-parallel size of the run.
    """

    def __init__(self, hf_config: PretrainedConfig, machine: Machine, context: int, most_tokens: int) -> None:
        argv = ["--hf-path", "model", "--train-data", "data", "--save", "run", "--train-iters", "1", "--bf16"]
        argv += ["--seq-length", str(most_tokens * context), "--max-tokens-per-rank", str(most_tokens)]
        argv += ["--micro-batch-size", str(EXAMPLES), "--context-parallel-size", str(context)]
        self.config, _ = config_load.load(argv)
        self.shape = Shape.of(hf_config, self.config.model.make_vocab_size_divisible_by)
        self.machine, self.width = machine, width_of_cost(hf_config)
        self._configs: dict[int, Config] = {}

    def of_pack(self, groups: Iterable[TokenGroup], context: int, share: bool = True) -> float:
        """Returns the seconds of a pack that ``context`` ranks share."""
        if context not in self._configs:
            self._configs[context] = deepcopy(self.config)
            self._configs[context].parallel.context_parallel_size = context
        config = self._configs[context]
        multiple, each = pieces_multiple_of(config), []
        for group in groups:
            each.append(Work.of(group, 1, 1, share, multiple, multiple))
        if not each:
            return 0.0
        work = Work(
            tokens=sum(one.tokens for one in each),
            key_rows=sum(one.key_rows for one in each),
            predicted=sum(one.predicted for one in each),
            pairs=sum(one.pairs for one in each),
            packs=1,
        )
        return seconds_of_packs(Process(self.shape, config, work, context), self.machine)

    def of_share(self, packs: Sequence[Sequence[TokenGroup]], context: int, local_tokens: int) -> dict[str, float]:
        """Returns the seconds of the packs of one copy of the model, by each way of computing them."""
        groups = [group for pack in packs for group in pack]
        full = sum(self.of_pack(pack, context) for pack in packs)
        short = [group for group in groups if group.tokens(True) <= local_tokens]
        long = sum(self.of_pack([group], context) for group in groups if group.tokens(True) > local_tokens)
        # the dearest first, each to the rank with the least
        ranks: list[list[TokenGroup]] = [[] for _ in range(context)]
        for group in sorted(short, key=self.cost, reverse=True):
            min(ranks, key=lambda of_rank: sum(map(self.cost, of_rank))).append(group)
        alone = max(self.of_pack(of_rank, 1) for of_rank in ranks)
        even = sum(self.of_pack([group], 1) for group in short) / context
        return {"full": full, "local": min(full, long + alone), "no wait": min(full, long + even)}

    def cost(self, group: TokenGroup) -> float:
        return attention_cost(group, self.width)


def of_mcore(times: Times, groups: Sequence[TokenGroup], ranks: int, most_tokens: int) -> float:
    """Returns the seconds of a step by megatron-core's scheduler over ``ranks`` ranks: of each of its rounds those of
    the rank that computes longest, because a barrier ends it."""
    from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler

    group: Any = SimpleNamespace(size=lambda: ranks)  # of which the scheduler reads no more
    scheduler = BalancedCPScheduler(most_tokens, group)
    sequences = [
        TokenGroup("", (prompt.__class__(prompt.context, prompt.ids, (completion,)),))
        for group in groups
        for prompt in group.prompts
        for completion in prompt.completions
    ]
    numbered = [(number, one.tokens(False)) for number, one in enumerate(sequences)]
    _, rounds = scheduler.get_groups_and_subsamples(numbered, None)
    total = 0.0
    for of_ranks in rounds:
        size = {number: sum(number in of_rank for of_rank in of_ranks) for of_rank in of_ranks for number in of_rank}
        total += max(
            sum(times.of_pack([sequences[number]], size[number], False) for number in of_rank) for of_rank in of_ranks
        )
    return total


def main(argv: list[str] | None = None) -> int:
    """Runs the arithmetic; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with a config.json")
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer")
    parser.add_argument("--data", required=True, type=Path, help="MuSiQue, JSONL")
    parser.add_argument("--machine", default="h100", help="machine file (default: %(default)s)")
    parser.add_argument("--long-tokens", type=int, default=131072, help="of a long context (default: %(default)s)")
    parser.add_argument("--local-tokens", type=int, default=16384, help="of a group that one rank computes whole")
    options = parser.parse_args(argv)
    hf_config, machine = AutoConfig.from_pretrained(options.model), load_machine(options.machine)
    lengths = lengths_of(options.data, options.tokenizer, EXAMPLES)
    means = [sum(of) / len(lengths) for of in zip(*lengths, strict=True)]
    print(f"{len(lengths)} questions: {means[0]:,.0f} tokens of supporting paragraphs, {means[1]:,.0f} of all")
    columns = ("full", "local", "no wait", "mcore")
    print("| layout | mix | tokens a step | short tokens | " + " | ".join(columns) + " |\n" + "|---" * 8 + "|")
    best: dict[str, dict[str, tuple[float, str]]] = {mix: {} for mix in MIXES}
    for context, copies in LAYOUTS:
        layout = f"cp{context}" + (f" dp{copies}" if copies > 1 else "")
        # a rank holds its part of the longest example, and packs of others as large
        times = Times(hf_config, machine, context, 2 * options.long_tokens // context)
        for mix in MIXES:
            groups = groups_of(mix, lengths, options.long_tokens, times.config)
            plan = plan_step(groups, times.width, copies, times.config)
            of_copies = [
                times.of_share([[groups[n] for n in pack] for pack in packs], context, options.local_tokens)
                for packs in plan.shares
            ]
            seconds = {name: max(one[name] for one in of_copies) for name in columns[:3]}
            most = -(-(options.long_tokens + RESPONSE) // context)
            seconds["mcore"] = of_mcore(times, groups, context * copies, most)
            if context * copies == GPUS:
                for name in columns:
                    best[mix][name] = min(best[mix].get(name, (math.inf, "")), (seconds[name], layout))
            tokens = [group.tokens(True) for group in groups]
            few = sum(n for n in tokens if n <= options.local_tokens) / sum(tokens)
            shown = [f"{seconds[name]:.2f} s" + change(seconds[name], seconds["full"]) for name in columns]
            print(f"| {layout} | {mix} | {sum(tokens):,} | {few:.0%} | " + " | ".join(shown) + " |")
    print(f"\n{GPUS} GPUs, the fastest of the layouts above for each way:\n")
    print("| mix | " + " | ".join(columns) + " |\n" + "|---" * 5 + "|")
    for mix, of_mix in best.items():
        shown = [f"{of_mix[n][0]:.2f} s, {of_mix[n][1]}" + change(of_mix[n][0], of_mix["full"][0]) for n in columns]
        print(f"| {mix} | " + " | ".join(shown) + " |")
    return 0


def groups_of(mix: str, lengths: Sequence[tuple[int, int]], long_tokens: int, config: Config) -> list[TokenGroup]:
    """Returns the examples of a step."""
    both, count = MIXES[mix]
    is_long = random.Random(0).sample(range(EXAMPLES), count)
    groups = []
    for number, of_question in enumerate(lengths):
        short, long = both or of_question
        groups.append(example(config.method, short, long_tokens if number in is_long else long, RESPONSE))
    return groups


def change(seconds: float, of_full: float) -> str:
    return "" if seconds == of_full else f" ({seconds / of_full - 1:+.1%})"


if __name__ == "__main__":
    raise SystemExit(main())
