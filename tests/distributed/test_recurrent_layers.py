"""Layers with a recurrent state: tensor, sequence, pipeline and context parallelism train the same model."""

from __future__ import annotations

from typing import Any

import pytest
from comparisons import check, largest_difference
from launches import Launch, World, case_name, gradient_cases, launch, training_run
from methods import METHODS, method_flags

CUTS: dict[str, tuple[Any, ...]] = {
    "data": (),
    "tensor": ("--tensor-model-parallel-size", 2),
    "sequence": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "pipeline": ("--pipeline-model-parallel-size", 2),
    "context": ("--context-parallel-size", 2),
}
PLANS = [
    ("float64", "orpo", "qwen3_5", "separate", "seven"),
    ("float64", "dpo", "qwen3_5", "recompute-keep", "seven"),
    ("float64", "dpo", "qwen3_5", "one-by-one", "one"),  # of two processes one has an empty pack
]
"""In float64 alone: in float32 the gradient of A_log is 2.0e-4 from it, and transformers' own 2.2e-4."""
RESUMED = ("data", "sequence", "pipeline", "context")
STEPS = ["--train-iters", 4, "--global-batch-size", 5, "--lr", 1e-4, "--save-interval", 2, "--adam-eps", 1e-4]


@pytest.fixture(scope="module")
def cut(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes in each of the ways; from the checkpoint of two copies those of `RESUMED` resume."""
    out = tmp_path_factory.mktemp("recurrent")
    cases, runs = [], []
    for name, flags in CUTS.items():
        cases += [
            case | {"name": f"{name} {case['name']}"} for case in gradient_cases(world, reference, out, PLANS, flags)
        ]
        if name not in RESUMED:
            continue
        start = {} if name == "data" else {"load": True, "cut": (out / "data", 2)}
        options = (*method_flags(METHODS["orpo"]), *STEPS, *flags)
        runs.append(training_run(world, out, name, *options, model="qwen3_5", **start))
    return launch(2, out, cases, runs)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("plan", PLANS, ids=case_name)
def test_recurrent_layers_have_the_oracles_gradient(
    cut: Launch, expected: Any, name: str, plan: tuple[str, ...]
) -> None:
    check(cut, expected, plan, f"{name} {case_name(plan)}")


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_in_another_layout(cut: Launch, name: str) -> None:
    assert cut.results[name] == "done"
    for ours, theirs in zip(cut.metrics(name), cut.metrics("data"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert largest_difference(cut.weights(name), cut.weights("data")) <= 1e-5
