"""Loss and gradient of one step do not depend on the layout, and equal a float64 oracle in plain transformers."""

from __future__ import annotations

import json
import math
from typing import Any

import oracle
import pytest
import torch
from comparisons import BOUND, check, differences
from launches import (
    BATCHES,
    LAID_OUT,
    OPTION_PLANS,
    PLANS,
    Launch,
    World,
    case_name,
    gradient_cases,
    launch,
    token_examples,
)
from methods import CONSTANTS, LONG, METHODS, OPTIONS, SHORT, method_roles
from torch import Tensor


@pytest.fixture(scope="module")
def two(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes."""
    out = tmp_path_factory.mktemp("two")
    return launch(2, out, gradient_cases(world, reference, out, PLANS + OPTION_PLANS), [])


@pytest.fixture(scope="module")
def one(world: World, reference: list, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """One process."""
    out = tmp_path_factory.mktemp("one")
    return launch(1, out, gradient_cases(world, reference, out, PLANS), [])


@pytest.fixture(params=["one", "two"])
def launched(request: pytest.FixtureRequest) -> Launch:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("plan", PLANS, ids=case_name)
def test_every_layout_equals_the_oracle(launched: Launch, expected: Any, plan: tuple[str, ...]) -> None:
    check(launched, expected, plan)


@pytest.mark.parametrize("plan", OPTION_PLANS, ids=case_name)
def test_every_option_equals_the_oracle(two: Launch, expected: Any, plan: tuple[str, ...]) -> None:
    check(two, expected, plan)


def test_every_option_changes_the_loss(expected: Any) -> None:
    """Otherwise an option that nobody reads would pass the comparison above: no two methods share a gradient."""
    actual: dict[str, Tensor] = {}
    for name in OPTIONS:
        gradient = torch.cat([tensor.flatten() for tensor in expected("llama", name, "three")[1].values()])
        for other, known in actual.items():
            assert (gradient - known).norm() > 1e-4 * known.norm(), f"{name} = {other}"
        actual[name] = gradient


def test_the_options_reach_every_value(world: World) -> None:
    """A loss, context mode or alignment option that config.py gains must join the comparison."""
    from megatron_solopo.config import OWNER, names_of

    for name in names_of("method"):
        spec = OWNER[name].spec
        if name in ("reference", "reference_cache"):  # test_resident_layouts, and no value of a loss
            continue
        if spec.metadata["choices"]:
            used = {method.get(name, spec.default) for method in METHODS.values()}
            assert used == set(spec.metadata["choices"]), name
        else:
            assert any(name in method for method in METHODS.values()), name
    assert set(LAID_OUT) <= METHODS.keys() and CONSTANTS.keys() == {m.get("preference_loss") for m in OPTIONS.values()}


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
    """Otherwise the comparisons above would mean little."""
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
    """What fills the reference cache: log-prob sums of every example, from any process."""
    roles = method_roles(METHODS["dpo"])
    rows = oracle.reference_table(world.model(model), json.loads(world.examples(roles).read_text()))
    names = [oracle.named(role, response) for role in roles for response in range(8)]
    table = [[row[name] for name in names if name in row] for row in rows]
    for layout, dtype, bound in (
        ("one-by-one", "float64", 1e-10),
        ("separate", "float64", 1e-10),
        ("by-two", "float32", 1e-4),
    ):
        actual = launched.results[f"{dtype} dpo llama {layout} seven"]["table"]
        assert actual == [pytest.approx(table[i], rel=0, abs=bound) for i in BATCHES["seven"]]
    actual = launched.results["float64 dpo llama one-by-one three"]["table"]
    assert actual == [pytest.approx(table[i], rel=0, abs=1e-10) for i in BATCHES["three"]]


def test_the_oracle_obeys_the_step_zero_laws(world: World) -> None:
    """At policy = reference DPO's loss is ln 2, IPO's (1 / (2 beta))^2; with x_long = x_short the alignment is 0."""
    examples = token_examples(SHORT + LONG)[:2]
    for example in examples:
        example["prompts"][1] |= {name: example["prompts"][0][name] for name in ("ids", "jumps")}
    table = oracle.reference_table(world.model("llama"), examples)
    scores = oracle.scores(world.model("llama"), examples)
    for method, loss in (("dpo", math.log(2)), ("ipo solo both l2 per_context", (1 / 0.4) ** 2)):
        assert oracle.batch(scores, table, METHODS[method])[0] == pytest.approx([loss] * 2, abs=1e-12)
    likelihood, _ = oracle.batch(scores, table, METHODS["longpo long sequence"] | {"longpo_lambda": 0.0})
    losses, _ = oracle.batch(scores, table, METHODS["longpo long sequence"])
    assert losses == pytest.approx([each + 0.3 * math.log(2) for each in likelihood], abs=1e-12)
