"""--reference resident trains as --reference cached does under every layout: weights are exchanged shard by shard,
gathered, and given back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launches import Launch, World, launch, training_run
from methods import METHODS, method_flags
from training_home import TIMES

OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 3000)
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "data": (),
    "data in bfloat16": ("--bf16", "--lr", 1e-2),
    "overlap": OVERLAP,
    "overlap in bfloat16": (*OVERLAP, "--bf16", "--lr", 1e-2),
    "tensor": ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--hf-path", "wide"),
    "context": ("--context-parallel-size", 2, *OVERLAP),
    "pipeline": ("--pipeline-model-parallel-size", 2, "--hf-path", "tied-4"),
    "virtual": (
        *("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2, "--hf-path", "llama-4"),
        *OVERLAP,
    ),
    "expert": ("--expert-model-parallel-size", 2, "--hf-path", "qwen3_moe", *OVERLAP),
    "expert tensor": (
        *("--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-model-parallel-size", 2),
        *("--expert-tensor-parallel-size", 1, "--hf-path", "qwen3_moe"),
    ),
}
"""Of two processes."""

# The cache is then filled by the packs that the steps train on.
IN_ORDER = ("--no-shuffle", "--global-batch-size", 4, "--train-iters", 2, "--lr", 1e-3, "--eval-interval", 1)


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    out = tmp_path_factory.mktemp("two")
    runs = []
    for name, layout in LAYOUTS.items():
        flags = [world.model(layout[i]) if layout[i - 1] == "--hf-path" else layout[i] for i in range(len(layout))]
        for mode in ("cached", "resident"):
            options = (*method_flags(METHODS["dpo"]), *IN_ORDER, "--valid-data", world.folder / "valid.jsonl", *flags)
            cache = () if mode == "resident" else ("--reference-cache", out / f"reference {name}")
            runs.append(training_run(world, out, f"{name} {mode}", *options, "--reference", mode, *cache))
    return launch(2, out, [], runs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_is_that_of_the_cache(two: Launch, layout: str) -> None:
    """Bit for bit: losses and norms of each step, validation, and the last weights."""
    names = [f"{layout} {mode}" for mode in ("cached", "resident")]
    assert [two.results[name] for name in names] == ["done", "done"]
    for split, count in (("train", 2), ("valid", 3)):
        cached, resident = (
            [{k: v for k, v in line.items() if k not in TIMES} for line in two.metrics(name, split)] for name in names
        )
        assert len(cached) == count and resident == cached
    ours, theirs = map(two.weights, names)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [line["loss"] for line in two.metrics(names[0])]
    assert len({round(loss, 3) for loss in losses}) > 1  # the policy has left its start, which is the reference
