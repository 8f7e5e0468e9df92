"""Optimizers with another form of the same state are the plain one in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launches import Launch, World, launch, training_run
from training_home import TIMES

LAYOUTS: dict[str, tuple[Any, ...]] = {
    "data": ("--overlap-grad-reduce", "--overlap-param-gather"),
    "tensor": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "pipeline": ("--pipeline-model-parallel-size", 2),
    "experts": ("--expert-model-parallel-size", 2),
}
FORMS: dict[str, tuple[Any, ...]] = {
    "plain": (),
    "device": ("--use-precision-aware-optimizer", "--no-store-param-remainders"),
    "host": ("--optimizer-cpu-offload", "--optimizer-offload-fraction", 0.6, "--overlap-cpu-optimizer-d2h-h2d"),
}
RUN = (
    *("--bf16", "--preference-loss", "orpo", "--train-iters", 3, "--global-batch-size", 5, "--lr", 1e-2),
    *("--weight-decay", 0.1, "--lr-warmup-fraction", 0),
)


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    out = tmp_path_factory.mktemp("optimizers")
    runs = [
        training_run(
            world, out, f"{layout}-{form}", *RUN, *flags, *more, model="mixtral" if layout == "experts" else "llama"
        )
        for layout, flags in LAYOUTS.items()
        for form, more in FORMS.items()
    ]
    return launch(2, out, [], runs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "plain"])
def test_every_layout_takes_the_plain_optimizers_steps(two: Launch, layout: str, form: str) -> None:
    names = [f"{layout}-{form}", f"{layout}-plain"]
    assert [two.results[name] for name in names] == ["done", "done"]
    lines, plain = (
        [{key: value for key, value in line.items() if key not in TIMES} for line in two.metrics(name)]
        for name in names
    )
    assert lines == plain and len(plain) == 3
    weights, expected = map(two.weights, names)
    assert {name for name in expected if not torch.equal(weights[name], expected[name])} == set()
