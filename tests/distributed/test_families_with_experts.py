"""Expert parallelism together with what else a family has, and the other cuts.

gpt-oss has experts with biases, windows and sinks; Qwen3-Next and Qwen3.5 layers with a recurrent state and a gated
shared expert; DeepSeek-V3 latent attention, a first layer without experts, and groups of experts; V2 no latent of
queries, and a router of softmax.
"""

from __future__ import annotations

from typing import Any

import pytest
from comparisons import check
from launches import Launch, World, case_name, gradient_cases, launch

SEQUENCE = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-tensor-parallel-size", 1)
CUTS: dict[str, tuple[Any, ...]] = {
    "expert": ("--expert-model-parallel-size", 2),
    "sequence": SEQUENCE,
    "sequence and expert": (*SEQUENCE, "--expert-model-parallel-size", 2),
    "pipeline": ("--pipeline-model-parallel-size", 2),
    "context and expert": ("--context-parallel-size", 2, "--expert-model-parallel-size", 2),
}
PLANS = [
    ("float64", "dpo", "gpt_oss", "by-two", "seven"),
    ("float64", "dpo", "gpt_oss", "separate", "seven"),
    ("float64", "orpo", "gpt_oss", "recompute-keep", "seven"),
    ("float64", "dpo", "qwen3_next", "by-two", "seven"),
    ("float64", "dpo", "qwen3_5_moe", "by-two", "seven"),
    ("float64", "dpo", "deepseek_v2", "by-two", "seven"),
    ("float64", "dpo", "deepseek_v3", "by-two", "seven"),
    ("float64", "orpo", "deepseek_v3", "recompute-keep", "seven"),
]


@pytest.fixture(scope="module")
def cut(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes, in each of the ways."""
    out = tmp_path_factory.mktemp("families")
    cases = [
        case | {"name": f"{name} {case['name']}"}
        for name, flags in CUTS.items()
        for case in gradient_cases(world, reference, out, PLANS, flags)
    ]
    return launch(2, out, cases, [])


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("plan", PLANS, ids=case_name)
def test_a_family_with_experts_has_the_oracles_gradient(
    cut: Launch, expected: Any, name: str, plan: tuple[str, ...]
) -> None:
    check(cut, expected, plan, f"{name} {case_name(plan)}")
