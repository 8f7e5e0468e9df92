"""Forecast against measured: ratios between training steps of four configurations on one CPU core.

    python examples/benchmarks/forecast.py [--rounds 3] [--steps 3]

The rates of the machine file are those of three small loops (a product, attention, a sum of two tensors), and one
configuration, the first, calibrates it; the others' times are then forecast. Measured are CPU seconds of the process in
`train_step`, not seconds of the clock, so that other work on the machine counts less; the configurations take turns,
and the median of all rounds is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.planning.forecast import calibrated, forecast
from megatron_solopo.planning.machines import Achieved, Machine
from megatron_solopo.planning.operators import blocked_pairs
from megatron_solopo.planning.rehearse import example
from megatron_solopo.planning.workers import Rehearsals, Task

MODEL = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=8000,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
SHORT, RESPONSE = 256, 64
"""Tokens of the short prompt and of each response."""
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "1K, shared prompts": (1024, ()),
    "2K, shared prompts": (2048, ()),
    "1K, separate prompts": (1024, ("--no-share-prompts",)),
    "1K, shared, full recompute": (1024, ("--recompute-granularity", "full")),
}
"""Name -> tokens of the long prompt, and options. The first one calibrates."""


def config_of(case: str) -> Config:
    argv = ["--hf-path", "model", "--random-init", "--train-data", "x", "--save", "y", "--train-iters", "3"]
    return config_load.load([*argv, "--preference-loss", "orpo", "--context-mode", "long", *CASES[case][1]])[0]


def group_of(case: str, config: Config) -> Any:
    return example(config.method, SHORT, CASES[case][0], RESPONSE)


def measure(case: str, count: int) -> list[float]:
    """CPU seconds of ``count`` steps behind a first one."""
    from megatron_solopo.parallel import platform

    here = platform.start("cpu")
    from megatron_solopo.training import engine as engines
    from megatron_solopo.training.step import train_step
    from megatron_solopo.training.step_work import training_work

    config = config_of(case)
    engines.initialize_parallel(config)
    engine = engines.build_engine(here, MODEL, config)
    optimizer, scheduler = engines.build_optimizer(engine, config.training, count + 1)
    engine.train()
    config.training.global_batch_size = config.training.micro_batch_size = 1
    group = group_of(case, config)
    data: Any = SimpleNamespace(groups=[group], of_epoch=lambda index, epoch: group)
    schedule: Any = SimpleNamespace(
        steps=count + 1,
        step=lambda number: [0],
        epochs=lambda number: [0],
        examples=1,
        global_batch_size=1,
        total=count + 1,
    )
    memory: Any = SimpleNamespace(on_this_rank=lambda: 0.0)
    seconds = []
    with training_work(engine, data, schedule, config, None) as work:
        for number in range(count + 1):
            begin = time.process_time()
            train_step(engine, optimizer, scheduler, data, schedule, work, number, config, memory)
            seconds.append(time.process_time() - begin)
    engine.close()
    platform.stop(here)
    return seconds[1:]


def this_cpu() -> Machine:
    """The rates of one core, by three loops."""
    import torch

    torch.set_num_threads(1)

    def median(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(7):
            begin = time.process_time()
            work()
            times.append(time.process_time() - begin)
        return statistics.median(times)

    tokens, heads, length, head_dim = 1280, 8, 1024, 64
    left, right = torch.randn(tokens, 512), torch.randn(512, 2816)
    products = 2 * tokens * 512 * 2816 / median(lambda: left @ right)
    query, key = (torch.randn(1, count, length, head_dim) for count in (heads, 4))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    out, lse = forward(query, key, key, 0.0, True)
    both = median(lambda: (forward(query, key, key, 0.0, True), backward(out, query, key, key, out, lse, 0.0, True)))
    attention = 14 * heads * blocked_pairs(length, length) * head_dim / both
    one, other, total = (torch.ones(2**24) for _ in range(3))  # 64 MiB each, which no cache holds
    memory = 3 * one.nbytes / median(lambda: torch.add(one, other, out=total))
    whole = [1.0, 1.0]
    return Machine(
        name="one core of this CPU",
        gpus_per_node=1,
        memory_gib=1.0,
        tflops={"float32": products / 1e12},
        memory_gb_per_s=memory / 1e9,
        node_gb_per_s=1.0,
        network_gb_per_s=1.0,
        achieved=Achieved(whole, [attention / products] * 2, whole, whole),
        collective_us=[1e-3, 1e-3],
        launch_us=[1e-3, 1e-3],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times that each configuration is started")
    parser.add_argument("--steps", type=int, default=3, help="steps of each start that are measured")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.steps)))
        return
    measured: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(arguments.rounds):
        for case in CASES:
            command = [sys.executable, __file__, "--worker", case, "--steps", str(arguments.steps)]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            measured[case] += json.loads(done.stdout.splitlines()[-1])
    configs = {case: config_of(case) for case in CASES}
    with Rehearsals(1) as rehearsals:
        tasks = [Task(config, MODEL, [group_of(case, config)], device="cpu") for case, config in configs.items()]
        outcomes = dict(zip(CASES, rehearsals.each(tasks), strict=True))
    medians = {case: statistics.median(seconds) for case, seconds in measured.items()}
    first, machine = next(iter(CASES)), this_cpu()
    print(
        f"measured rates: {machine.tflops['float32'] * 1e3:.0f} GFLOP/s of products, "
        f"{machine.achieved.attention[0]:.2f} of that in attention, {machine.memory_gb_per_s:.1f} GB/s"
    )
    machine = calibrated([outcomes[first]], configs[first], 1, 1, machine, medians[first], "calibrated")
    print(f"fractions after calibration by '{first}': products {machine.achieved.products[0]:.2f}")
    print(f"{'configuration':<30} tokens  CPU s a step  spread  measured ratio  forecast ratio  difference")
    for case, seconds in medians.items():
        result = forecast([outcomes[case]], configs[case], 1, 1, machine)
        ratio, ours = seconds / medians[first], result.seconds / medians[first]
        spread = (max(measured[case]) - min(measured[case])) / seconds
        print(
            f"{case:<30} {outcomes[case].tokens:>6} {seconds:>13.2f} {spread:>7.0%} {ratio:>15.3f} {ours:>15.3f} "
            f"{ours / ratio - 1:>+11.1%}  " + ", ".join(f"{k} {v:.2f}" for k, v in result.parts.items())
        )


if __name__ == "__main__":
    main()
