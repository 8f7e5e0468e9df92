"""Pipelines whose stages hold several model chunks or unequal numbers of layers, and overlapped communication, train
the same model."""

from __future__ import annotations

from typing import Any

import pytest
from comparisons import check, differences, largest_difference
from launches import SIX_STEPS, Launch, World, case_name, gradient_cases, launch, training_run
from methods import METHODS, method_flags
from safetensors.torch import load_file

VIRTUAL = ("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2)
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
# Tiny models would fit one bucket, and nothing would wait for a part of the parameters.
BUCKETS = (*OVERLAP, "--ddp-bucket-size", 3000)
CUTS: dict[str, tuple[Any, ...]] = {
    "virtual": VIRTUAL,
    "first-3": ("--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 3),
    "last-3": ("--pipeline-model-parallel-size", 2, "--decoder-last-pipeline-num-layers", 3),
    "data-overlap": BUCKETS,
}
"""Of two processes."""

FOUR: dict[str, tuple[Any, ...]] = {
    "virtual-overlap": (*VIRTUAL, *BUCKETS),
    "pipeline-overlap": ("--pipeline-model-parallel-size", 2, *BUCKETS),
}
"""Of four processes: two copies of a model of two stages."""

PLANS = [
    ("float64", "dpo", "llama-4", "by-two", "seven"),
    ("float64", "sft", "llama-4", "one-by-one", "seven"),  # an odd number of packs, and none for a stage
    ("float64", "dpo", "llama-4", "one-by-one", "one"),
    ("float64", "dpo", "llama-4", "recompute", "seven"),
    ("float64", "dpo", "llama-4", "recompute-offload", "seven"),
    ("float64", "dpo", "llama-4", "tiles-recompute", "seven"),  # packs of one and of several tiles
    ("float64", "orpo", "qwen2-4", "by-two", "seven"),  # tied embeddings
    ("float32", "dpo", "llama-4", "by-two", "seven"),
    ("float32", "orpo", "qwen2-4", "by-two", "seven"),
]
FOUR_PLANS = [plan for plan in PLANS if plan[0] == "float64" and plan[3] != "recompute"]
BFLOAT16 = ("bfloat16", "dpo", "llama-4", "by-two", "seven")
THREE_STEPS = ("--train-epochs", 1, "--global-batch-size", 5, "--lr", 1e-4, "--lr-warmup-fraction", 0)
THREE = {"llama-4": "dpo", "tied-4": "orpo"}
"""Three steps of every layout: model -> method; a third run, "drawn", starts from random weights."""
ROUGH = 0.05
"""How far from the oracle bfloat16 may be at all, relative to a tensor's norm."""
LARGE_LR = 1e-2
"""In bfloat16 a step must be larger than the rounding of the weights."""


def three_steps(world: World, out: Any, name: str, flags: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    # A cached reference of another cut differs in the last bits, which the alignment's kink at 0 would show.
    cache = {"llama-4": ("--reference-cache", out / f"reference-{name}"), "tied-4": ()}
    other = {"bfloat16": ("--bf16", "--lr", LARGE_LR), "drawn": ("--random-init",)}
    return [
        training_run(
            world, out, f"{model}-{name}", *method_flags(METHODS[method]), *THREE_STEPS, *flags, *cache[model],
            model=model,
        )
        for model, method in THREE.items()
    ] + [
        training_run(
            world, out, f"{kind}-{name}", *method_flags(METHODS["orpo"]), *THREE_STEPS, *flags, *more, model="llama-4"
        )
        for kind, more in other.items()
    ]  # fmt: skip


def gradients(world: World, reference: list, out: Any, cuts: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    plans = [*(FOUR_PLANS if cuts is FOUR else PLANS), BFLOAT16]
    return [
        case | {"name": f"{name} {case['name']}"}
        for name, flags in cuts.items()
        for case in gradient_cases(world, reference, out, plans, flags)
    ]


@pytest.fixture(scope="module")
def alone(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """One process."""
    out = tmp_path_factory.mktemp("alone")
    return launch(1, out, gradient_cases(world, reference, out, [BFLOAT16]), three_steps(world, out, "alone"))


@pytest.fixture(scope="module")
def staged(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes; two complete runs of six steps, and each resumed from the other's checkpoint of step 2."""
    out = tmp_path_factory.mktemp("staged")
    runs = [run for name, flags in CUTS.items() for run in three_steps(world, out, name, flags)]

    def six(name: str, flags: tuple[Any, ...], start: str | None = None) -> dict[str, Any]:
        flags = (*SIX_STEPS, "--valid-data", world.folder / "valid.jsonl", *flags)
        cut = (out / start, 2) if start else None
        cache = ("--reference-cache", out / f"reference-{name}")
        return training_run(world, out, name, *flags, *cache, model="llama-4", load=cut is not None, cut=cut)

    runs += [
        six("data", BUCKETS),
        six("virtual", VIRTUAL),
        six("data-to-virtual", VIRTUAL, "data"),
        six("virtual-to-data", BUCKETS, "virtual"),
        six("virtual-to-first-3", CUTS["first-3"], "virtual"),
    ]
    return launch(2, out, gradients(world, reference, out, CUTS), runs)


@pytest.fixture(scope="module")
def four(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    out = tmp_path_factory.mktemp("four")
    runs = [run for name, flags in FOUR.items() for run in three_steps(world, out, name, flags)]
    return launch(4, out, gradients(world, reference, out, FOUR), runs)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("plan", PLANS, ids=case_name)
def test_stages_have_the_oracles_gradient(staged: Launch, expected: Any, name: str, plan: tuple[str, ...]) -> None:
    check(staged, expected, plan, f"{name} {case_name(plan)}")


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("plan", FOUR_PLANS, ids=case_name)
def test_copies_of_stages_have_the_oracles_gradient(
    four: Launch, expected: Any, name: str, plan: tuple[str, ...]
) -> None:  # fmt: skip
    check(four, expected, plan, f"{name} {case_name(plan)}")


def check_three_steps(ours: Launch, theirs: Launch, name: str, model: str) -> None:
    run = f"{model}-{name}"
    assert ours.results[run] == "done"
    for a, b in zip(ours.metrics(run), theirs.metrics(f"{model}-alone"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert largest_difference(ours.weights(run), theirs.weights(f"{model}-alone")) <= 1e-5


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("model", [*THREE, "drawn"])
def test_three_steps_equal_one_process(staged: Launch, alone: Launch, name: str, model: str) -> None:
    check_three_steps(staged, alone, name, model)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("model", [*THREE, "drawn"])
def test_three_steps_of_copies_equal_one_process(four: Launch, alone: Launch, name: str, model: str) -> None:
    check_three_steps(four, alone, name, model)


@pytest.fixture
def of(request: pytest.FixtureRequest) -> Any:
    """Name of a layout -> its launch."""
    return lambda name: request.getfixturevalue("four" if name in FOUR else "staged")


@pytest.mark.parametrize("name", [*CUTS, *FOUR])
def test_a_gradient_in_bfloat16_is_as_near_the_oracle_as_one_process(
    of: Any, alone: Launch, expected: Any, name: str
) -> None:
    """Each activation is rounded to 8 bits, wherever the model is cut, so no layout may be farther away than one
    process, tensor by tensor; twice as far is the luck of rounding, and a gradient of wrong code is elsewhere."""
    _, method, model, _, batch = BFLOAT16
    losses, gradient = expected(model, method, batch)
    case, whole = f"{name} {case_name(BFLOAT16)}", case_name(BFLOAT16)
    ours, theirs = (differences(x, gradient) for x in (of(name).gradients[case], alone.gradients[whole]))
    assert max(theirs.values()) < ROUGH
    assert all(ours[tensor] <= 2 * theirs[tensor] for tensor in gradient)
    mean = sum(losses) / len(losses)
    assert of(name).results[case]["means"]["loss"] == pytest.approx(mean, rel=ROUGH)


@pytest.mark.parametrize("name", [*CUTS, *FOUR])
def test_three_steps_in_bfloat16_follow_one_process(of: Any, alone: Launch, world: World, name: str) -> None:
    """A weight moves by about the learning rate each step, for any gradient; where that is rounding noise, the
    directions differ. Parameters that were not gathered, or a step too late, would be as far away as they moved."""
    run, whole = f"bfloat16-{name}", "bfloat16-alone"
    assert (of(name).results[run], alone.results[whole]) == ("done", "done")
    for ours, theirs in zip(of(name).metrics(run), alone.metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2**-8)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=ROUGH)
    before = load_file(world.model("llama-4") / "model.safetensors")
    after, one = of(name).weights(run), alone.weights(whole)
    for tensor, start in before.items():
        moved = (one[tensor].double() - start.double()).norm()
        rounding = 2**-8 * start.double().norm()
        assert (after[tensor].double() - one[tensor].double()).norm() < moved / 4 + rounding < moved, tensor


@pytest.mark.parametrize("name", ["virtual", "data-to-virtual", "virtual-to-data", "virtual-to-first-3"])
def test_checkpoints_load_with_any_number_of_stages(staged: Launch, name: str) -> None:
    """Against six uninterrupted steps of replicas of the model; evaluation sees the same weights too."""
    assert staged.results["data"] == staged.results[name] == "done"
    for split, steps in (("train", [1, 2, 3, 4, 5, 6]), ("valid", [0, 3, 6])):
        ours, theirs = staged.metrics(name, split), staged.metrics("data", split)
        assert [line["step"] for line in ours] == steps
        for a, b in zip(ours, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert largest_difference(staged.weights(name), staged.weights("data")) <= 1e-5
