"""Models with experts: expert, expert tensor, tensor with sequence, and pipeline parallelism train the same model."""

from __future__ import annotations

import json
from typing import Any

import oracle
import pytest
import torch
from comparisons import check, differences, largest_difference
from launches import SIX_STEPS, Launch, World, case_name, gradient_cases, launch, token_examples, training_run
from methods import METHODS, SMOOTH, method_flags, method_roles

SEQUENCE = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
CUTS: dict[str, tuple[Any, ...]] = {
    "data": (),
    "expert": ("--expert-model-parallel-size", 2),
    "expert tensor": ("--expert-tensor-parallel-size", 2),
    "sequence": SEQUENCE,
    "sequence and expert": (*SEQUENCE, "--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1),
    "gathered": (
        *SEQUENCE,
        *("--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1),
        *("--moe-token-dispatcher-type", "allgather"),
    ),
    "pipeline": ("--pipeline-model-parallel-size", 2),
    "context": ("--context-parallel-size", 2),
    "context and expert": ("--context-parallel-size", 2, "--expert-model-parallel-size", 2),
}
PLANS = [
    *(
        ("float64", method, model, "by-two", "seven")
        for method in ("dpo", "orpo")
        for model in ("mixtral", "qwen3_moe")
    ),
    ("float64", "dpo", "mixtral", "one-by-one", "seven"),  # of two processes one has an empty pack
    ("float64", "dpo", "qwen3_moe", "recompute", "seven"),
    ("float64", "dpo", "qwen3_moe", "recompute-offload", "seven"),
    ("float64", "dpo", "mixtral", "padded", "seven"),
    # A first layer without experts, a shared expert, groups of experts, and a router with a bias; windows.
    ("float64", "dpo", "glm4_moe", "by-two", "seven"),
    ("float64", "dpo", "windows_moe", "by-two", "seven"),
    ("float32", "dpo", "mixtral", "by-two", "seven"),
    ("float32", "orpo", "qwen3_moe", "by-two", "seven"),
]
BALANCED = [
    ("float64", "dpo", "qwen3_moe", "padded", "four"),
    ("float64", "dpo", "mixtral", "one-by-one", "one"),
    ("float64", "dpo", "glm4_moe", "padded", "four"),
    ("float64", "dpo", "mixtral", "recompute", "seven"),
    ("float64", "dpo", "mixtral", "recompute-offload", "seven"),
]
"""With an auxiliary loss. Micro-batches are 1, 2 or 4: megatron-core 0.19.2 keeps 1 / their number in float32
(schedules.py:361), and 7 of them differ from the oracle by 2e-8."""
COEFFICIENT = 0.5
DRAWN = "drawn"
"""A run from random weights."""
THREE_STEPS = ["--train-epochs", 1, "--global-batch-size", 5, "--lr", 1e-4, "--lr-warmup-fraction", 0]
# Adam's first step is the gradient's sign, also of gradients that are rounding alone; this makes it continuous.
THREE_STEPS += ["--adam-eps", 1e-4]


def three_steps(world: World, out: Any, name: str, *flags: Any, method: str = "dpo") -> dict[str, Any]:
    cache = ("--reference-cache", out / f"reference {name}") if method == "dpo" else ()
    options = (
        *method_flags(SMOOTH if method == "dpo" else METHODS[method]),
        *THREE_STEPS,
        "--hf-path",
        world.model("qwen3_moe"),
    )
    return training_run(world, out, f"three {name}", *options, *cache, *flags)


@pytest.fixture(scope="module")
def cut(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes, in each of the ways; they also resume from checkpoints of one process and of sharded experts."""
    out = tmp_path_factory.mktemp("experts")
    cases, runs = [], []
    for name, flags in CUTS.items():
        cases += [
            case | {"name": f"{name} {case['name']}"} for case in gradient_cases(world, reference, out, PLANS, flags)
        ]
        balanced = gradient_cases(world, reference, out, BALANCED, (*flags, "--moe-aux-loss-coeff", COEFFICIENT))
        cases += [case | {"name": f"{name} balanced {case['name']}"} for case in balanced]
        runs.append(three_steps(world, out, name, *flags))
    runs.append(three_steps(world, out, DRAWN, *CUTS["context and expert"], "--random-init", method="orpo"))
    six = [*SIX_STEPS, "--valid-data", world.folder / "valid.jsonl", "--hf-path", world.model("mixtral")]
    for name in ("data", "expert"):
        cache = ("--reference-cache", out / f"reference six {name}")
        runs.append(training_run(world, out, f"six {name}", *six, *cache, *CUTS[name]))
    for name, source in RESUMED.values():
        cache = ("--reference-cache", out / f"reference six {source}")
        source_run = (out / f"six {source}", 2)
        runs.append(
            training_run(world, out, f"{source} to {name}", *six, *cache, *CUTS[name], load=True, cut=source_run)
        )
    return launch(2, out, cases, runs)


RESUMED = {
    f"{source} to {name}": (name, source)
    for source, name in (
        ("data", "expert"),
        ("expert", "expert"),
        ("expert", "sequence and expert"),
        ("expert", "pipeline"),
    )
}


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """One process."""
    out = tmp_path_factory.mktemp("whole")
    plan = ("float32", "sft", "mixtral", "by-two", "one")
    runs = [three_steps(world, out, "whole"), three_steps(world, out, "whole drawn", "--random-init", method="orpo")]
    return launch(1, out, gradient_cases(world, [], out, [plan]), runs)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("plan", PLANS, ids=case_name)
def test_experts_have_the_oracles_gradient(cut: Launch, expected: Any, name: str, plan: tuple[str, ...]) -> None:
    check(cut, expected, plan, f"{name} {case_name(plan)}")


@pytest.mark.parametrize("name", [*CUTS, DRAWN])
def test_three_steps_equal_one_process(cut: Launch, whole: Launch, name: str) -> None:
    run, one = f"three {name}", "three whole drawn" if name == DRAWN else "three whole"
    assert (cut.results[run], whole.results[one]) == ("done", "done")
    for ours, theirs in zip(cut.metrics(run), whole.metrics(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert largest_difference(cut.weights(run), whole.weights(one)) <= 1e-5


@pytest.mark.parametrize("run", RESUMED)
def test_a_run_resumes_with_other_expert_parallelism(cut: Launch, run: str) -> None:
    name, source = RESUMED[run]
    assert (cut.results[run], cut.results[f"six {source}"]) == ("done", "done")
    ours, theirs = cut.metrics(run), cut.metrics(f"six {source}")
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    exact = name == source
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0 if exact else 1e-5, abs=0) and a["lr"] == b["lr"]
    assert largest_difference(cut.weights(run), cut.weights(f"six {source}")) <= (0 if exact else 1e-5)


@pytest.fixture(scope="module")
def four(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Four processes: tensor with sequence and pipeline, whose later stages cut the padding themselves."""
    out = tmp_path_factory.mktemp("four")
    flags = (*SEQUENCE, *CUTS["pipeline"], "--moe-aux-loss-coeff", COEFFICIENT)
    cases = gradient_cases(world, reference, out, BALANCED[:1], flags)
    return launch(4, out, [case | {"name": f"four balanced {case['name']}"} for case in cases], [])


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("plan", BALANCED, ids=case_name)
def test_the_auxiliary_loss_is_that_of_each_micro_batch(
    cut: Launch,
    expected: Any,
    world: World,
    name: str,
    plan: tuple[str, ...],
) -> None:
    check_balanced(cut, expected, world, name, plan)


def test_the_auxiliary_loss_of_a_stage_that_cuts_its_padding(four: Launch, expected: Any, world: World) -> None:
    check_balanced(four, expected, world, "four", BALANCED[0])


def check_balanced(launched: Launch, expected: Any, world: World, name: str, plan: tuple[str, ...]) -> None:
    """Preference gradient + coefficient x the mean over all packs, with any layout; padding never counts."""
    case = f"{name} balanced {case_name(plan)}"
    _, method, model_name, _, batch = plan
    losses, gradient = expected(model_name, method, batch)
    model = oracle.load(world.model(model_name))
    parameters, packs = dict(model.named_parameters()), balanced_packs(launched, case)
    examples = token_examples(method_roles(METHODS[method]))
    total = sum(oracle.load_balancing(model, [examples[i] for i in pack]) for pack in packs if pack) / len(packs)
    grads = torch.autograd.grad(COEFFICIENT * total, list(parameters.values()), allow_unused=True)
    auxiliary = {
        key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(parameters.items(), grads, strict=True)
    }
    auxiliary = oracle.by_file_name(model, auxiliary)
    means = launched.results[case]["means"]
    assert means["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-10)
    assert means["moe_aux_loss"] == pytest.approx(total.item() / oracle.layers_with_experts(model), abs=1e-10)
    both = {key: gradient[key] + auxiliary[key] for key in gradient}
    worst = differences(launched.gradients[case], both)
    assert max(worst.values()) <= 1e-10, max(worst, key=worst.get)
    router = next(key for key in both if key.endswith(".gate.weight"))
    assert auxiliary[router].norm() > 1e-3 * gradient[router].norm()


def balanced_packs(launched: Launch, case: str) -> list[list[int]]:
    """Every pack of a case once; ranks that share packs return the same."""
    shares = {json.dumps(packs): packs for packs in launched.results[case]["packs"]}
    return [pack for packs in shares.values() for pack in packs]
