"""Peaks of memory, rehearsed against measured: a training step on CPU processes, by the allocator's own events.

    python examples/benchmarks/rehearsal.py [--layouts 1 "tp2 sp" pp2] [--models llama moe] [--dtypes fp32 bf16]

Measured by torch.profiler (``profile_memory``), which sees each block that torch's CPU allocator gives and takes in
this thread, in a run of two steps without anything of planning/ but the generated examples; the peak is that of the
second step. Each collective ends before the step continues, and gloo's threads have dropped its tensors by then: so
every block is freed where the profiler sees it, and a block whose end was not seen is an error. What gloo allocates
within a collective (copies that NCCL does not make) is not part of the peak and has a column of its own.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves
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
LAYOUTS = ("1", "dp2", "tp2 sp", "pp2", "pp2 vpp2", "cp2", "dp2 ep2")
TOKENS = (300, 1000, 50)
"""Of the short prompt, the long one and each response."""

COLLECTIVE = "collective"
COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "_allgather_base",
    "allgather_into_tensor_coalesced",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "alltoall_base",
    "broadcast",
)
"""Methods of a process group that the step calls."""


@dataclass(frozen=True)
class Case:
    """A row of the table for each of its processes."""

    model: str
    layout: str
    dtype: str
    recompute: bool

    @property
    def config(self) -> Config:
        argv = ["--hf-path", "model", "--random-init", "--train-data", "x", "--save", "y", "--train-iters", "3"]
        argv += ["--preference-loss", "orpo", *(["--recompute-granularity", "full"] if self.recompute else [])]
        config, _ = config_load.load([*argv, *(["--bf16"] if self.dtype == "bf16" else [])])
        config.parallel = parse_layout(self.layout).applied(config.parallel)
        return config

    @property
    def packs(self) -> int:
        """Packs of a process and step: a pipeline is filled."""
        return 4 if "pp" in self.layout else 1


def measure(case: Case, here: Any) -> dict[str, float]:
    """This process's peak of a second step of a case; collective. See `measured_step`."""
    config, model = case.config, MODELS[case.model]
    return measured_step(config, model, [example(config.method, *TOKENS)] * case.packs, here)


def measured_step(config: Config, hf_config: PretrainedConfig, groups: Sequence[Any], here: Any) -> dict[str, float]:
    """This process's peak of a second step, bytes; collective. Megatron-core's process groups must not exist yet.

    Args:
        groups: packs of a process, each of one group.
        here: the platform of this process.
    """
    from megatron_solopo.model.router import Router
    from megatron_solopo.parallel import platform
    from megatron_solopo.training import engine as engines
    from megatron_solopo.training.step import train_step
    from megatron_solopo.training.step_work import training_work

    routing = Router.routing

    def balanced(router: Any, logits: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Each expert gets as many tokens as the others: what a rehearsal assumes (docs/planning.md)."""
        rows, count, most = logits.data.flatten(0, 1), logits.shape[-1], router.topk
        rows.zero_().scatter_(1, torch.arange(len(rows) * most).remainder_(count).view(-1, most), 1.0)
        return routing(router, logits, padding_mask)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Router, "routing", balanced))
        stack.enter_context(one_collective_at_a_time())
        profiled = stack.enter_context(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
        engines.initialize_parallel(config)
        engine = engines.build_engine(here, hf_config, config)
        optimizer, scheduler = engines.build_optimizer(engine, config.training, 2)
        engine.train()
        examples = [*groups] * engines.data_parallel()[1]
        data: Any = SimpleNamespace(groups=examples, of_epoch=lambda index, epoch: examples[index])
        count = len(examples)
        config.training.global_batch_size, config.training.micro_batch_size = count, 1
        schedule: Any = SimpleNamespace(
            steps=2,
            step=lambda number: list(range(count)),
            epochs=lambda number: [0] * count,
            examples=1,
            global_batch_size=1,
            total=1,
        )
        memory: Any = SimpleNamespace(on_this_rank=lambda: 0.0)
        with training_work(engine, data, schedule, config, None) as work:
            for number in range(2):
                with record_function(f"step {number}"):
                    train_step(engine, optimizer, scheduler, data, schedule, work, number, config, memory)
        engine.close()
        del engine, optimizer, scheduler, work
        platform.end_model_parallel()  # collects garbage
    return _peak(profiled)


@contextlib.contextmanager
def one_collective_at_a_time() -> Iterator[None]:
    """Within it a collective returns when it is done and no thread of gloo refers to its tensors any more."""
    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist.ProcessGroup, name, _finished(getattr(dist.ProcessGroup, name))))
        yield


class _Done:
    """A collective that has ended."""

    def wait(self) -> None:
        pass


def _finished(collective: Callable[..., Any]) -> Callable[..., _Done]:
    def finished(group: Any, *args: Any) -> _Done:
        tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        before = [_references(tensor) for tensor in tensors]
        with record_function(COLLECTIVE):
            collective(group, *args).wait()
            while [_references(tensor) for tensor in tensors] != before:
                time.sleep(1e-4)
        return _Done()

    return finished


def _references(tensor: Tensor) -> tuple[int, int]:
    """Of the tensor, and of its storage by views."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # pyright: ignore[reportAttributeAccessIssue]  # in no stub


def _peak(profiled: Any) -> dict[str, float]:
    """The largest sum of blocks of the second step, and the most that gloo allocated in one collective.

    Raises:
        RuntimeError: the end of a block was not seen.
    """
    events = list(profiled.profiler.kineto_results.experimental_event_tree())
    blocks: list[tuple[int, int, int]] = []  # time, address, bytes (negative where freed)
    collectives: list[tuple[int, int]] = []
    begin = end = 0
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            blocks.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name == COLLECTIVE:
            collectives.append((event.start_time_ns, event.end_time_ns))
        elif event.name == "step 1":
            begin, end = event.start_time_ns, event.end_time_ns
    collectives.sort()
    starts = [start for start, _ in collectives]
    held: dict[int, int] = {}
    of_gloo: dict[int, int] = {}  # place of a collective -> bytes
    now = peak = 0
    for moment, address, size in sorted(blocks):
        place = bisect.bisect_right(starts, moment) - 1
        if place >= 0 and moment <= collectives[place][1]:
            if begin <= moment <= end and size > 0:
                of_gloo[place] = of_gloo.get(place, 0) + size
        elif size > 0:
            if address in held:
                raise RuntimeError(f"the end of a block of {held[address]:,} bytes was not seen")
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        if begin <= moment <= end:
            peak = max(peak, now)
    if now > peak / 1000:
        raise RuntimeError(f"{now:,} bytes were not seen to end: {sorted(held.values())[-8:]}")
    return {"peak": peak, "gloo": max(of_gloo.values(), default=0)}


def measured(cases: Sequence[Case]) -> list[list[dict[str, float]]]:
    """What each process of a launch measured, of each case; all have one layout."""
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps({"folder": folder, "cases": [dataclasses.asdict(case) for case in cases]})
        command = [sys.executable, "-m", "megatron_solopo.launch", "--standalone"]
        command += ["--nproc_per_node", str(parse_layout(cases[0].layout).processes), __file__, "--worker", job]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def worker(folder: str, cases: Sequence[dict[str, Any]]) -> None:
    from megatron_solopo.parallel import platform

    here = platform.start("cpu")
    results = [measure(Case(**case), here) for case in cases]
    Path(folder, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))
    platform.stop(here)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="LAYOUT")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(**json.loads(arguments.worker))
        return
    print("model  layout       dtype  recompute  rank  measured MiB  rehearsed MiB  difference  gloo's MiB  at")
    with Rehearsals(1) as rehearsals:
        for layout in arguments.layouts:
            experts = "expert_model_parallel_size" in parse_layout(layout).options
            models = [model for model in arguments.models if model == "moe" or not experts]
            cases = [Case(m, layout, d, r) for m, d, r in itertools.product(models, arguments.dtypes, (False, True))]
            world = parse_layout(layout).processes
            real = measured(cases)
            for number, case in enumerate(cases):
                config, model = case.config, MODELS[case.model]
                groups = [example(config.method, *TOKENS)]
                tasks = [Task(config, model, groups, case.packs, rank, world, "cpu") for rank in range(world)]
                for outcome in rehearsals.each(tasks):
                    result, ours = real[outcome.rank][number], outcome.peak.total
                    print(
                        f"{case.model:<6} {layout:<12} {case.dtype:<6} {'full' if case.recompute else 'none':<9} "
                        f"{outcome.rank:>5} {result['peak'] / 2**20:>13.2f} {ours / 2**20:>14.2f} "
                        f"{ours / result['peak'] - 1:>+10.2%} {result['gloo'] / 2**20:>11.2f}  {outcome.peak.phase}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
