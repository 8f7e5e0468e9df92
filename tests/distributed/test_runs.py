"""Whole runs over several processes: the same trajectory on every layout, unbroken or resumed."""

from __future__ import annotations

import json
import math
import re

import oracle
import pytest
import torch
from comparisons import largest_difference
from launches import SIX_STEPS, Launch, World, common_runs, launch, training_run
from methods import METHODS, SHORT, method_flags
from safetensors.torch import load_file
from training_home import TIMES
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes."""
    out = tmp_path_factory.mktemp("two")
    valid = ["--valid-data", world.folder / "valid.jsonl"]
    return launch(
        2,
        out,
        [],
        [
            *common_runs(world, out),
            training_run(world, out, "unbroken", *SIX_STEPS, *valid),
            training_run(world, out, "resumed", *SIX_STEPS, *valid, load=True, cut=(out / "unbroken", 4)),
            training_run(
                world, out, "same-contexts", "--train-iters", 2, "--global-batch-size", 4, "--lr", 1e-3, data="same"
            ),
            training_run(
                world,
                out,
                "longpo",
                *method_flags(METHODS["longpo long token"]),
                "--reference-cache",
                out / "longpo-reference",
                *("--train-iters", 2, "--global-batch-size", 4, "--lr", 1e-3, "--no-shuffle"),
            ),
            training_run(
                world,
                out,
                "bfloat16",
                "--bf16",
                "--objective",
                "sft",
                "--train-iters",
                20,
                "--global-batch-size",
                6,
                "--lr",
                1e-2,
                data="chats",
            ),
            training_run(
                world, out, "not-finite", "--train-iters", 3, "--lr", 1e30, "--clip-grad", 0, "--lr-warmup-fraction", 0
            ),
        ],
    )


@pytest.fixture(scope="module")
def one(world: World, two: Launch, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """One process; it also resumes from a checkpoint of two."""
    out = tmp_path_factory.mktemp("one")
    valid = ["--valid-data", world.folder / "valid.jsonl"]
    return launch(
        1,
        out,
        [],
        [
            *common_runs(world, out),
            training_run(world, out, "from-two", *SIX_STEPS, *valid, load=True, cut=(two.folder / "unbroken", 2)),
        ],
    )


def timeless(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_every_run_ends_well(one: Launch, two: Launch) -> None:
    for launched in (one, two):
        runs = {name: result for name, result in launched.results.items() if name != "not-finite"}
        assert runs and set(runs.values()) == {"done"}, runs


@pytest.mark.parametrize("method", ["dpo", "simpo", "orpo", "sft", "stretched"])
def test_three_steps_of_one_process_equal_two(one: Launch, two: Launch, world: World, method: str) -> None:
    ours, theirs = (launch.metrics(f"three-{method}") for launch in (one, two))
    assert [line["groups"] for line in ours] == [5, 5, 1]  # 11 examples in steps of 5
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
        assert a["lr"] == b["lr"] and a["tokens"] - a["padding_share"] * a["tokens"] == pytest.approx(
            b["tokens"] - b["padding_share"] * b["tokens"]
        )
    assert largest_difference(one.weights(f"three-{method}"), two.weights(f"three-{method}")) <= 1e-5
    before = load_file(world.model("llama") / "model.safetensors")
    after = two.weights(f"three-{method}")
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(two: Launch) -> None:
    """The run was killed after step 6, its last complete checkpoint being of step 4."""
    for split, steps in (("train", [1, 2, 3, 4, 5, 6]), ("valid", [0, 3, 6])):
        unbroken, resumed = two.metrics("unbroken", split), two.metrics("resumed", split)
        assert [line["step"] for line in resumed] == steps
        assert timeless(resumed) == timeless(unbroken)
    ours, theirs = two.weights("resumed"), two.weights("unbroken")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_process_resumes_from_a_checkpoint_of_two(one: Launch, two: Launch) -> None:
    ours, theirs = one.metrics("from-two"), two.metrics("unbroken")
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["lr"] == b["lr"]
    assert largest_difference(one.weights("from-two"), two.weights("unbroken")) <= 1e-5


def test_step_zero_laws_through_the_trainer(two: Launch) -> None:
    """Policy = cached reference: DPO's loss is ln 2, and the alignment of a context with itself is 0."""
    first = two.metrics("same-contexts")[0]
    assert first["po_loss"] == pytest.approx(math.log(2), abs=2e-6)
    assert first["alignment_loss"] <= 2e-5 and first["short_long_gap_nats_per_token"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2), abs=6e-5)
    first = two.metrics("unbroken")[0]
    assert first["po_loss"] == pytest.approx(math.log(2), abs=2e-6) and abs(first["margin"]) <= 1e-5
    assert first["short_long_gap_nats_per_token"] != pytest.approx(0, abs=1e-3)


def test_longpo_compares_the_long_context_with_a_reference_on_the_short_one(two: Launch, world: World) -> None:
    """The table on disk and the first step's loss are the oracle's, on token ids that this test writes down itself."""
    tokenizer = AutoTokenizer.from_pretrained(world.model("llama"))

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    examples = []
    for line in (world.folder / "groups.jsonl").read_text().splitlines():
        group = json.loads(line)
        prompts = []
        for context in ("short", "long"):
            prompt = ids(f"<user> {group[context + '_messages'][0]['content']} <assistant>")
            completions = [
                {"role": f"{context}_{answer}", "ids": ids(group[answer] + " <end>"), "loss_mask": None}
                for answer in ("chosen", "rejected")
            ]
            prompts.append({"ids": prompt, "completions": completions, "jumps": []})
        examples.append({"id": group["id"], "prompts": prompts})
    rows = oracle.reference_table(world.model("llama"), examples)
    (cache,) = (two.folder / "longpo-reference").iterdir()
    wanted = torch.tensor([row[role] for row in rows for role in SHORT], dtype=torch.float64)
    torch.testing.assert_close(load_file(cache)["log_probs"], wanted, rtol=0, atol=1e-4)
    method = METHODS["longpo long token"]
    losses, _ = oracle.batch(oracle.scores(world.model("llama"), examples[:4]), rows[:4], method)
    first, second = two.metrics("longpo")
    assert first["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert first["po_loss"] != pytest.approx(math.log(2), abs=1e-3) and second["loss"] != first["loss"]


def test_solo_equals_plain_optimization_where_contexts_are_the_same(two: Launch) -> None:
    second = two.metrics("same-contexts")[1]
    assert second["loss"] == pytest.approx(second["po_loss"], abs=1e-4) and second["po_loss"] < math.log(2)


def test_a_bfloat16_run_trains_and_exports(two: Launch) -> None:
    lines = two.metrics("bfloat16")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert {tensor.dtype for tensor in two.weights("bfloat16").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(two.folder / "bfloat16-hf")
    assert model.dtype == torch.bfloat16 and torch.isfinite(model(torch.tensor([[1, 5, 2]])).logits).all()


def test_a_loss_that_is_not_finite_ends_the_run_by_name(two: Launch) -> None:
    """Nothing is saved or exported from there."""
    assert re.match(r"step [123]: the (loss|gradient) is not finite for .*; lower --lr", two.results["not-finite"])
    assert not (two.folder / "not-finite-hf").exists() and not list((two.folder / "not-finite").glob("iter_*"))


def test_the_run_folder_records_the_run(two: Launch) -> None:
    folder = two.folder / "unbroken"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "metrics.jsonl",
        "config.yaml",
        "versions.yaml",
        "export.json",
        "latest_checkpointed_iteration.txt",
        "iter_0000002",
        "iter_0000004",
        "iter_0000006",
    }
    assert "processes: 2" in (folder / "versions.yaml").read_text()
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["split"], first["step"]) == ("valid", 0)  # what the model did before the first step
