"""The matrix of parallel layouts: each trains the model that one process trains, and has the oracle's gradient.

A layout is named by its sizes: "tp2 sp cp2 pp2" is eight processes that share one model; processes beyond those are
data-parallel copies.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from comparisons import check, largest_difference
from launches import SIX_STEPS, Launch, World, case_name, gradient_cases, launch, training_run
from methods import METHODS, method_flags

from megatron_solopo.config import flag
from megatron_solopo.parallel.layouts import parse_layout

LAYOUTS: dict[int, list[str]] = {
    2: ["cp2", "cp2 separate"],
    4: [
        "dp4",
        "tp4",
        "tp4 sp",
        "pp4",
        "cp4",
        "cp4 separate",
        "tp2 pp2",
        "tp2 sp pp2 separate",
        "tp2 cp2",
        "tp2 sp cp2",
        "cp2 pp2",
        "cp2 pp2 separate",
        "pp2 vpp2",
        "cp2 pp2 vpp2",
        "ep2",
        "ep4",
        "pp2 ep2",
        "cp2 ep2",
        "tp2 sp etp1 ep2",
        "tp2 sp",
        "pp2",
        "cp2",
        "cp2 padded",
    ],
    8: [
        "tp2 sp cp2 pp2",
        "tp4 sp cp2",
        "tp2 cp4",
        "cp4 pp2",
        "tp2 cp2 pp2 vpp2",
        "cp2 pp4",
        "tp2 sp pp4",
        "tp2 sp cp2",
        "cp2 pp2",
        "tp4",
    ],
}
PLANS = [
    ("float64", "dpo", "wide"),
    ("float64", "simpo", "wide-qwen3"),
    ("float64", "orpo", "wide-tied"),
    ("float32", "dpo", "wide-mistral"),
    ("float32", "simpo", "wide-qwen3"),
    ("float32", "orpo", "wide-tied"),
]
"""Llama, Qwen3 (norms over heads), Qwen2 (tied, with biases), Mistral (heads wider than hidden size / heads)."""
WITH_EXPERTS = [
    ("float64", "dpo", "qwen3_moe"),
    ("float64", "simpo", "mixtral"),
    ("float64", "orpo", "qwen3_moe"),
    ("float32", "dpo", "qwen3_moe"),
    ("float32", "simpo", "mixtral"),
    ("float32", "orpo", "qwen3_moe"),
]
STEPPED = {
    2: ["cp2"],
    4: ["dp4", "tp4 sp", "pp4", "cp4", "tp2 sp cp2", "cp2 pp2 vpp2", "pp2 ep2", "tp2 sp etp1 ep2"],
    8: ["tp2 sp cp2 pp2"],
}
"""Layouts that also take three optimizer steps; a run costs as much as ten gradients."""
RESUMED = {"tp2 sp cp2": ["pp2 vpp2", "cp4"], "cp2 pp2": ["tp4 sp", "dp4"]}
"""Layout of the first steps -> layouts that resume from their checkpoint, on four processes."""
if os.environ.get("SOLOPO_LAYOUTS") == "cheap":  # what `make test` has a minute for: every cut once, beside another
    LAYOUTS = {4: ["dp4", "tp2 sp cp2", "cp2 pp2 vpp2", "tp4 sp", "cp4 separate", "tp2 sp etp1 ep2"]}
    STEPPED, RESUMED = {}, {}
THREE_STEPS = ["--train-iters", 3, "--global-batch-size", 5, "--lr", 1e-4, "--lr-warmup-fraction", 0]


def flags_of(layout: str) -> list[Any]:
    """The options of a layout's name; how packs are laid out is `pieces_of`'s."""
    name = layout.removesuffix("separate").removesuffix("padded")
    options = parse_layout(name).options.items()
    return [part for option, size in options for part in ([flag(option)] if size is True else [flag(option), size])]


def pieces_of(layout: str) -> str:
    """The way its packs are laid out, one of launches.LAYOUTS."""
    return next((name for name in ("separate", "padded") if name in layout), "by-two")


def plans(layout: str) -> list[tuple[str, ...]]:
    plans = WITH_EXPERTS if any(part.startswith("ep") for part in layout.split()) else PLANS
    return [(dtype, method, model, pieces_of(layout), "seven") for dtype, method, model in plans]


def model_of(layout: str) -> str:
    return plans(layout)[0][2]


@pytest.fixture(scope="module")
def base(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Three steps in one process."""
    out = tmp_path_factory.mktemp("base")
    three = [three_steps(world, out, model, model, []) for model in ("wide", "qwen3_moe")]
    return launch(1, out, [], [*three, six_steps(world, out, "six", [])])


def three_steps(world: World, out: Any, name: str, model: str, flags: list[Any]) -> dict:
    # ORPO: a reference of the same weights would start at the alignment's kink, where the gradient is the sign of
    # rounding noise, and packs of other lengths round otherwise.
    return training_run(world, out, f"three {name}", *method_flags(METHODS["orpo"]), *THREE_STEPS, *flags, model=model)


def six_steps(world: World, out: Any, name: str, flags: list[Any], source: str | None = None) -> dict:
    """Six steps, or those after the second of ``source``."""
    start = {"load": True, "cut": (out / source, 2)} if source else {}
    return training_run(world, out, name, *SIX_STEPS[:-2], "--preference-loss", "orpo", *flags, model="wide", **start)


@pytest.fixture(scope="module")
def launches(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """processes -> one launch with all layouts of that size, when it is asked for."""
    done: dict[int, Launch | AssertionError] = {}

    def of(processes: int) -> Launch:
        if processes not in done:
            out = tmp_path_factory.mktemp(f"layouts-{processes}")
            cases = [
                case | {"name": f"{layout} {case['name']}"}
                for layout in LAYOUTS[processes]
                for case in gradient_cases(world, reference, out, plans(layout), tuple(flags_of(layout)))
            ]
            try:
                runs = [
                    three_steps(world, out, layout, model_of(layout), flags_of(layout))
                    for layout in STEPPED.get(processes, ())
                ]
                for source, targets in RESUMED.items() if processes == 4 else ():
                    runs.append(six_steps(world, out, f"six {source}", flags_of(source)))
                    runs += [
                        six_steps(world, out, f"six {source} to {target}", flags_of(target), f"six {source}")
                        for target in targets
                    ]
                done[processes] = launch(processes, out, cases, runs, torchrun=True)
            except AssertionError as error:  # once for all tests of this size
                done[processes] = error
        launched = done[processes]
        if isinstance(launched, AssertionError):
            raise launched
        return launched

    return of


CASES = [(size, layout) for size, layouts in LAYOUTS.items() for layout in layouts]


def identifier(value: Any) -> str:
    return " ".join(value[:3]) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    ("processes", "layout", "plan"),
    [(size, layout, plan) for size, layout in CASES for plan in plans(layout)],
    ids=identifier,
)
def test_every_layout_has_the_oracles_gradient(
    launches: Any,
    expected: Any,
    processes: int,
    layout: str,
    plan: tuple[str, ...],
) -> None:
    check(launches(processes), expected, plan, f"{layout} {case_name(plan)}")


@pytest.mark.parametrize(
    ("processes", "layout"), [(size, layout) for size in STEPPED for layout in STEPPED[size]], ids=identifier
)
def test_three_steps_equal_one_process(launches: Any, base: Launch, processes: int, layout: str) -> None:
    launched, whole = launches(processes), f"three {model_of(layout)}"
    assert launched.results[f"three {layout}"] == "done"
    for ours, theirs in zip(launched.metrics(f"three {layout}"), base.metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["groups"] == theirs["groups"] and ours["accuracy"] == theirs["accuracy"]
    assert largest_difference(launched.weights(f"three {layout}"), base.weights(whole)) <= 1e-5


@pytest.mark.parametrize(("source", "target"), [(s, t) for s, targets in RESUMED.items() for t in targets])
def test_a_run_resumes_in_another_layout(launches: Any, base: Launch, source: str, target: str) -> None:
    """Weights, optimizer and schedule of every step are those of one process that never stopped."""
    launched, name = launches(4), f"six {source} to {target}"
    assert launched.results[name] == "done"
    for ours, theirs in zip(launched.metrics(name), base.metrics("six"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and ours["lr"] == theirs["lr"]
    assert largest_difference(launched.weights(name), base.weights("six")) <= 1e-5
