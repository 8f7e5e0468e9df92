"""Qwen3-Next: layers with a recurrent state, experts and a gated shared expert in one model, under each kind of cut."""

from __future__ import annotations

from typing import Any

import pytest
from comparisons import check
from launches import Launch, World, case_name, gradient_cases, launch

SEQUENCE = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-tensor-parallel-size", 1)
CUTS: dict[str, tuple[Any, ...]] = {
    "expert": ("--expert-model-parallel-size", 2),
    "sequence and expert": (*SEQUENCE, "--expert-model-parallel-size", 2),
    "pipeline": ("--pipeline-model-parallel-size", 2),
    "context and expert": ("--context-parallel-size", 2, "--expert-model-parallel-size", 2),
}
PLAN = ("float64", "dpo", "qwen3_next", "by-two", "seven")


@pytest.fixture(scope="module")
def cut(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes, in each of the ways."""
    out = tmp_path_factory.mktemp("recurrent-experts")
    cases = [
        case | {"name": f"{name} {case['name']}"}
        for name, flags in CUTS.items()
        for case in gradient_cases(world, reference, out, [PLAN], flags)
    ]
    return launch(2, out, cases, [])


@pytest.mark.parametrize("name", CUTS)
def test_experts_beside_recurrent_layers_have_the_oracles_gradient(cut: Launch, expected: Any, name: str) -> None:
    check(cut, expected, PLAN, f"{name} {case_name(PLAN)}")
