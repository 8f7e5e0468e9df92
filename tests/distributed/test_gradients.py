"""Loss and gradient of one step do not depend on the layout, and equal a float64 oracle in plain transformers."""

from __future__ import annotations

import json
import math
from typing import Any

import oracle
import pytest
import torch
from launches import BATCHES, METHODS, PLANS, Launch, World, case_name, method_roles
from torch import Tensor

# float64 leaves room for the sums' order only; float32 is compared tensor by tensor, never element by element.
BOUND = {"float64": 1e-10, "float32": 1e-5}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """|a - b| / |b| of each tensor."""
    assert ours.keys() == theirs.keys()
    return {
        name: ((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm()).item()
        for name in ours
    }


@pytest.fixture(scope="session")
def expected(world: World, references: dict) -> Any:
    """(model, method, batch) -> the oracle's losses and gradient, computed once."""
    known: dict[tuple[str, str, str], Any] = {}

    def of(model: str, method: str, batch: str) -> Any:
        if (model, method, batch) not in known:
            roles = method_roles(METHODS[method])
            examples = json.loads(world.examples(roles).read_text())
            table = references.get(roles) if METHODS[method].get("preference_loss") == "dpo" else None
            rows = [table[i] for i in BATCHES[batch]] if table else None
            known[model, method, batch] = oracle.batch(
                world.model(model), [examples[i] for i in BATCHES[batch]], rows, METHODS[method]
            )
        return known[model, method, batch]

    return of


@pytest.fixture(params=["one", "two"])
def launched(request: pytest.FixtureRequest) -> Launch:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("plan", PLANS, ids=case_name)
def test_every_layout_equals_the_oracle(launched: Launch, expected: Any, plan: tuple[str, ...]) -> None:
    """Every pair weighs 1 / G: the oracle's gradient is the mean of gradients taken one example at a time."""
    dtype, method, model, _, batch = plan
    losses, gradient = expected(model, method, batch)
    mean = sum(losses) / len(losses)
    assert abs(launched.results[case_name(plan)]["means"]["loss"] - mean) <= BOUND[dtype] * max(1, abs(mean))
    worst = differences(launched.gradients[case_name(plan)], gradient)
    assert max(worst.values()) <= BOUND[dtype], max(worst, key=worst.get)
    assert min(tensor.norm() for tensor in gradient.values()) > 0


@pytest.mark.parametrize("plan", PLANS, ids=case_name)
def test_one_process_equals_two(one: Launch, two: Launch, plan: tuple[str, ...]) -> None:
    ours, theirs = (launch.results[case_name(plan)]["means"] for launch in (one, two))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert abs(ours[name] - theirs[name]) <= BOUND[plan[0]] * max(1, abs(theirs[name])), name
    worst = differences(*(launch.gradients[case_name(plan)] for launch in (one, two)))
    assert max(worst.values()) <= BOUND[plan[0]], max(worst, key=worst.get)


@pytest.mark.parametrize("plan", PLANS, ids=case_name)
def test_no_group_splits_or_is_left_out(launched: Launch, plan: tuple[str, ...]) -> None:
    by_process = launched.results[case_name(plan)]["packs"]
    groups = [group for packs in by_process for pack in packs for group in pack]
    assert sorted(groups) == sorted(BATCHES[plan[4]])
    assert len({len(packs) for packs in by_process}) == 1


def test_the_layouts_are_as_unequal_as_their_names_say(one: Launch, two: Launch) -> None:
    """Otherwise the comparisons above would say little."""
    packs = two.results["float64 dpo llama one-by-one one"]["packs"]
    assert sorted(packs) == [[[]], [[3]]]
    sizes = [[len(pack) for pack in packs] for packs in two.results["float64 dpo llama one-by-one seven"]["packs"]]
    assert sorted(map(sum, sizes)) == [3, 4] and any(0 in each for each in sizes)
    assert [len(p) for p in one.results["float64 dpo llama packed seven"]["packs"][0]] == [7]
    assert len(one.results["float64 dpo llama by-tokens seven"]["packs"][0]) > 1
    packed, separate, padded = (
        one.results[f"float64 dpo llama {layout} seven"] for layout in ("packed", "separate", "padded")
    )
    assert packed["tokens"] < separate["tokens"] and packed["padding"] == 0 < padded["padding"]


@pytest.mark.parametrize("model", ["llama"])
def test_the_reference_table_is_the_oracles(launched: Launch, world: World, model: str) -> None:
    """What fills the reference cache: log-prob sums of every example, whatever process computed them."""
    roles = method_roles(METHODS["dpo"])
    rows = oracle.reference_table(world.model(model), json.loads(world.examples(roles).read_text()))
    table = torch.tensor([[row[role] for role in roles] for row in rows], dtype=torch.float64)
    for layout, dtype, bound in (
        ("one-by-one", "float64", 1e-10),
        ("separate", "float64", 1e-10),
        ("by-two", "float32", 1e-4),
    ):
        found = torch.tensor(launched.results[f"{dtype} dpo llama {layout} seven"]["table"], dtype=torch.float64)
        torch.testing.assert_close(found, table, rtol=0, atol=bound)
    found = torch.tensor(launched.results["float64 dpo llama one-by-one three"]["table"], dtype=torch.float64)
    torch.testing.assert_close(found, table[BATCHES["three"]], rtol=0, atol=1e-10)


def test_the_oracle_knows_the_step_zero_laws(world: World) -> None:
    """At policy = reference DPO's loss is ln 2; with x_long = x_short the alignment is 0."""
    roles = method_roles(METHODS["dpo"])
    examples = json.loads(world.examples(roles).read_text())[:2]
    for example in examples:
        example["prompts"][1]["ids"] = example["prompts"][0]["ids"]
    table = oracle.reference_table(world.model("llama"), examples)
    losses, _ = oracle.batch(world.model("llama"), examples, table, METHODS["dpo"])
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-12)
