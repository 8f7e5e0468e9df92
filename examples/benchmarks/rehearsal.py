"""Peaks of memory, rehearsed against measured: a training step on CPU processes, by the allocator's own events.

    python examples/benchmarks/rehearsal.py [--layouts 1 "tp2 sp" pp2] [--models llama moe]

Measured by torch.profiler (``profile_memory``), which sees every block that torch's CPU allocator gives and takes, in a
run of two steps without anything of planning/ but the made-up examples; the peak is that of the second step. Blocks
whose end no event shows are freed by a thread of gloo: its copies while it communicates, which NCCL keeps elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.parallel.layouts import parse_layout
from megatron_solopo.planning.rehearse import example
from megatron_solopo.planning.workers import Rehearsals, Task

SHAPE: dict[str, Any] = dict(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=8000,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
EXPERTS = dict(head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192, norm_topk_prob=True)
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "moe": Qwen3MoeConfig(**SHAPE | EXPERTS),
}
LAYOUTS = ("1", "dp2", "tp2 sp", "pp2", "cp2", "dp2 ep2")
TOKENS = (300, 1000, 50)
"""Of the short prompt, the long one and each response."""


def config_of(layout: str, recompute: bool) -> Config:
    argv = ["--hf-path", "model", "--random-init", "--train-data", "x", "--save", "y", "--train-iters", "3"]
    argv += ["--preference-loss", "orpo", *(["--recompute-granularity", "full"] if recompute else [])]
    config, _ = config_load.load(argv)
    config.parallel = parse_layout(layout).applied(config.parallel)
    return config


def packs_of(layout: str) -> int:
    """Packs of a process and step: a pipeline is filled."""
    return 3 if "pp" in layout else 1


def measure(model: str, layout: str, recompute: bool) -> dict[str, Any]:
    """This process's peak of a second step, bytes; collective."""
    from megatron_solopo.parallel import platform

    here = platform.start("cpu")
    from torch.profiler import ProfilerActivity, profile, record_function

    from megatron_solopo.training import engine as engines
    from megatron_solopo.training import step as steps

    config, packs = config_of(layout, recompute), packs_of(layout)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engines.initialize_parallel(config)
        engine = engines.build_engine(here, MODELS[model], config)
        optimizer, scheduler = engines.build_optimizer(engine, config.training, 2)
        engine.train()
        count = packs * engines.data_parallel()[1]
        config.training.global_batch_size, config.training.micro_batch_size = count, 1
        data: Any = SimpleNamespace(groups=[example(config.method, *TOKENS)] * count)
        schedule: Any = SimpleNamespace(
            steps=2, step=lambda number: list(range(count)), examples=1, global_batch_size=1, total=1
        )
        memory: Any = SimpleNamespace(on_this_rank=lambda: 0.0)
        with steps.training_work(engine, data, schedule, config, None) as work:
            for number in range(2):
                with record_function(f"step {number}"):
                    steps.train_step(engine, optimizer, scheduler, data, schedule, work, number, config, memory)
        rank = int(os.environ.get("RANK", "0"))
        engine.close()
        del engine, optimizer, scheduler, work
        platform.stop(here)  # collects garbage, so that all that is freed in this thread is seen
    return {"rank": rank} | _peak(profiled)


def _peak(profiled: Any) -> dict[str, int]:
    """From the profile's tree of events."""
    from torch._C._profiler import _EventType

    blocks: list[tuple[int, int, int]] = []  # time, address, bytes (negative where freed)
    begin = end = 0
    events = list(profiled.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            blocks.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name == "step 1":
            begin, end = event.start_time_ns, event.end_time_ns
    blocks.sort(key=lambda block: block[0])
    last: dict[int, int] = {}
    unseen: set[int] = set()
    for place, (_, address, size) in enumerate(blocks):
        if size > 0:
            unseen |= {last[address]} if address in last else set()
            last[address] = place
        else:
            last.pop(address, None)
    unseen |= set(last.values())
    held: dict[int, int] = {}
    now = peak = 0
    for place, (time, address, size) in enumerate(blocks):
        if size > 0 and place not in unseen:
            held[address] = size
            now += size
        elif size < 0:
            now -= held.pop(address, 0)
        if begin <= time <= end:
            peak = max(peak, now)
    return {"peak": peak, "unseen": sum(blocks[place][2] for place in unseen)}


def measured(model: str, layout: str, recompute: bool, folder: Path) -> list[dict[str, Any]]:
    """What each process of a launch measured."""
    job = json.dumps({"model": model, "layout": layout, "recompute": recompute, "folder": str(folder)})
    command = [sys.executable, "-m", "megatron_solopo.launch", "--standalone"]
    command += ["--nproc_per_node", str(parse_layout(layout).processes), __file__, "--worker", job]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="LAYOUT")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        job = json.loads(given.worker)
        folder = Path(job.pop("folder"))
        result = measure(**job)
        (folder / f"{result['rank']}.json").write_text(json.dumps(result))
        return
    print("model  layout    recompute  rank  measured MiB  rehearsed MiB  difference  at")
    cases = [(m, lay, r) for m in given.models for lay in given.layouts for r in (False, True)]
    with Rehearsals(1) as rehearsals:
        for model, layout, recompute in cases:
            if "ep" in layout and model != "moe":
                continue
            config = config_of(layout, recompute)
            groups, world = [example(config.method, *TOKENS)], parse_layout(layout).processes
            tasks = [Task(config, MODELS[model], groups, packs_of(layout), rank, world, "cpu") for rank in range(world)]
            with tempfile.TemporaryDirectory() as folder:
                real = measured(model, layout, recompute, Path(folder))
            for outcome, result in zip(rehearsals.each(tasks), real, strict=True):
                peak, ours = result["peak"], outcome.peak.total
                print(
                    f"{model:<6} {layout:<9} {'full' if recompute else 'none':<9} {outcome.rank:>5} "
                    f"{peak / 2**20:>13.2f} {ours / 2**20:>14.2f} {ours / peak - 1:>+10.2%}  {outcome.peak.phase}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
