"""Tensor parallelism (with and without sequence parallelism), pipeline and context parallelism train the same model."""

from __future__ import annotations

from typing import Any

import pytest
from comparisons import check, largest_difference
from launches import SIX_STEPS, Launch, World, case_name, gradient_cases, launch, training_run
from methods import SMOOTH, method_flags

CUTS: dict[str, tuple[Any, ...]] = {
    "tensor": ("--tensor-model-parallel-size", 2),
    "sequence": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "pipeline": ("--pipeline-model-parallel-size", 2),
    "context": ("--context-parallel-size", 2),
}
PLANS = [
    *(("float64", method, "llama", "by-two", "seven") for method in ("dpo", "simpo", "orpo", "sft")),
    ("float64", "dpo", "llama", "separate", "seven"),
    *(("float64", "dpo", "llama", f"recompute{part}", "seven") for part in ("", "-keep", "-offload", "-mlp")),
    *(("float64", "dpo", "llama", layout, "seven") for layout in ("tiles", "tiles-recompute")),
    ("float64", "dpo", "llama", "one-by-one", "one"),
    ("float64", "ipo solo 0.8 token", "llama", "by-two", "seven"),
    ("float64", "longpo long token", "llama", "by-two", "seven"),
    ("float64", "orpo", "llama", "by-two", "many"),
    ("float64", "orpo", "qwen2", "by-two", "seven"),  # tied embeddings, biases
    # Windows of one layer and of all, RoPE by layer and on some channels, norms on both sides and behind,
    # norms over all heads, fused projections, a layer without RoPE, queries scaled by position, heads of two sizes.
    *(("float64", "dpo", model, "by-two", "seven") for model in ("gemma3", "gemma4", "glm4", "olmo3", "phi3")),
    *(("float64", "dpo", model, "by-two", "seven") for model in ("smollm3", "ministral3")),
    *(("float64", "dpo", "gemma3", layout, "seven") for layout in ("separate", "recompute-keep")),
    ("float64", "dpo", "gemma4", "recompute-keep", "seven"),
    ("float32", "dpo", "llama", "by-two", "seven"),
    ("float32", "orpo", "qwen2", "by-two", "seven"),
    ("float32", "orpo", "qwen2", "tiles-recompute", "seven"),
]


TABLED = ("float64", "dpo", "llama", "recompute", "seven")
"""Whose every metric, and the table of the reference, is compared with one process."""
THREE_STEPS = ["--train-epochs", 1, "--global-batch-size", 5, "--lr", 1e-4, "--lr-warmup-fraction", 0]
# Adam's first step is the gradient's sign, also of gradients that are rounding alone; this makes it continuous.
THREE_STEPS += ["--adam-eps", 1e-4]


@pytest.fixture(scope="module")
def one(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """One process."""
    out = tmp_path_factory.mktemp("one")
    run = training_run(world, out, "three", *method_flags(SMOOTH), *THREE_STEPS)
    return launch(1, out, gradient_cases(world, reference, out, [TABLED]), [run])


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two copies of the model."""
    out = tmp_path_factory.mktemp("two")
    run = training_run(world, out, "unbroken", *SIX_STEPS, "--valid-data", world.folder / "valid.jsonl")
    return launch(2, out, [], [run])


@pytest.fixture(scope="module")
def cut(world: World, reference: list, two: Launch, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes that share one model, in each of the ways; they also resume from data-parallel checkpoints."""
    out = tmp_path_factory.mktemp("cut")
    cases, runs = [], []
    for name, flags in CUTS.items():
        more = gradient_cases(world, reference, out, PLANS, CUTS[name])
        cases += [case | {"name": f"{name} {case['name']}"} for case in more]
        # A cached reference of another cut differs in the last bits, which the alignment's kink at 0 would show.
        flags = (*flags, "--reference-cache", out / f"reference-{name}")
        runs += [
            training_run(world, out, f"three-{name}", *method_flags(SMOOTH), *THREE_STEPS, *flags),
            training_run(
                world, out, f"from-two-{name}", *SIX_STEPS, "--valid-data", world.folder / "valid.jsonl", *flags,
                load=True, cut=(two.folder / "unbroken", 2),
            ),
        ]  # fmt: skip
    return launch(2, out, cases, runs)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("plan", PLANS, ids=case_name)
def test_a_cut_model_has_the_oracles_gradient(cut: Launch, expected: Any, name: str, plan: tuple[str, ...]) -> None:
    check(cut, expected, plan, f"{name} {case_name(plan)}")


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_model_logs_what_one_process_logs(cut: Launch, one: Launch, name: str) -> None:
    ours, theirs = cut.results[f"{name} {case_name(TABLED)}"]["means"], one.results[case_name(TABLED)]["means"]
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[key] - theirs[key]) <= 1e-10 * max(1, abs(theirs[key])) for key in theirs)
    tables = [
        results[case]["table"]
        for results, case in ((cut.results, f"{name} {case_name(TABLED)}"), (one.results, case_name(TABLED)))
    ]
    assert tables[0] == [pytest.approx(row, rel=0, abs=1e-10) for row in tables[1]]


@pytest.mark.parametrize("name", CUTS)
def test_three_steps_of_a_cut_model_equal_one_process(cut: Launch, one: Launch, name: str) -> None:
    assert cut.results[f"three-{name}"] == "done"
    for ours, theirs in zip(cut.metrics(f"three-{name}"), one.metrics("three"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert largest_difference(cut.weights(f"three-{name}"), one.weights("three")) <= 1e-5


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_model_resumes_from_a_checkpoint_of_an_uncut_one(cut: Launch, two: Launch, name: str) -> None:
    assert cut.results[f"from-two-{name}"] == "done"
    ours, theirs = cut.metrics(f"from-two-{name}"), two.metrics("unbroken")
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["lr"] == b["lr"]
    assert largest_difference(cut.weights(f"from-two-{name}"), two.weights("unbroken")) <= 1e-5
