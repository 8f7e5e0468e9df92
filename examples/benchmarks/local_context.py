"""CPU seconds of training steps whose examples are divided over context-parallel ranks, against whole ones on each.

    torchrun --nproc_per_node 4 examples/benchmarks/local_context.py --tokens 1024 --examples 16

The same examples are computed twice by the same processes: with --context-parallel-size as many as they are, and
whole, each process its share. The second has no communication but that of the gradients, which both have, so the
difference is what a scheme could gain that computes short examples whole on ranks of the group. A random Llama of two
layers, float32. Seconds are those of the processors, in which gloo's copies count; what a process waits does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from context_parallel import WORDS, write_start

from megatron_solopo import config_load
from megatron_solopo.training.run import started


def write_groups(path: Path, tokens: int, examples: int) -> None:
    """Examples with a short context of a quarter of ``tokens``, and answers of up to 64 words."""
    draw = random.Random(0)

    def user(count: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": " ".join(draw.choices(WORDS, k=count))}]

    def answer() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(16, 64)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(examples):
            length = draw.randint(3 * tokens // 4, tokens)
            prompts = {"short_messages": user(length // 4), "long_messages": user(length)}
            file.write(json.dumps({"id": f"g{number}", **prompts, "chosen": answer(), "rejected": answer()}) + "\n")


def measure(folder: Path, options: argparse.Namespace, context: int) -> dict[str, Any]:
    """Returns CPU seconds of a step, of all processes together, and its last line of metrics."""
    argv = ["--hf-path", folder / "start", "--random-init", "--train-data", folder / "groups.jsonl", "--device", "cpu"]
    argv += ["--save", folder / f"cp{context}", "--preference-loss", "orpo", "--seq-length", options.tokens + 128]
    argv += ["--train-iters", options.steps + 2, "--global-batch-size", options.examples, "--no-shuffle"]
    argv += ["--micro-batch-size", options.examples, "--context-parallel-size", context]
    config, _ = config_load.load([str(word) for word in argv])
    with started(config) as here:
        from megatron_solopo.training.exits import StopRequests
        from megatron_solopo.training.preflight import preflight
        from megatron_solopo.training.trainer import Trainer

        trainer = Trainer(here, config, preflight(config), StopRequests(False, None))
        trainer.score_reference()
        trainer.start()
        lines: list[Mapping[str, Any]] = []
        trainer.log.step = lambda values, warnings=None: lines.append(values)
        seconds = []
        with trainer.work:
            for number in range(options.steps + 1):
                begun = time.process_time()
                trainer.train_step()
                if number:
                    seconds.append(time.process_time() - begun)
        own = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(own)
        trainer.log.close()
        trainer.engine.close()
        del trainer
    return {**lines[-1], "cpu": own.tolist()}


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of the longest prompt (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=16, help="of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="in which both take turns (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the model (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "local_context", help="for files")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    size, first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    if first and not (options.folder / "groups.jsonl").is_file():
        options.folder.mkdir(parents=True, exist_ok=True)
        write_start(options.folder / "start", options.tokens + 128, options.hidden_size)
        write_groups(options.folder / "groups.jsonl", options.tokens, options.examples)
    results: dict[int, list[dict[str, Any]]] = {size: [], 1: []}
    for _ in range(options.rounds):
        for context, of_context in results.items():
            of_context.append(measure(options.folder, options, context))
    if first:
        print(
            "| examples | CPU s a step, all processes | tokens with padding | padding | loss |\n|---|---|---|---|---|"
        )
        for context, name in ((size, f"divided over {size} ranks"), (1, "whole, on one rank each")):
            seconds = [second for one in results[context] for second in one["cpu"]]
            last = results[context][-1]
            spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            print(f"| {name} | {spread} | {last['tokens']:,} | {last['padding_share']:.2%} | {last['loss']:.6f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
