"""Machine files, and the rules by which a step's time follows from what it computes and exchanges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refused

from megatron_solopo.config import Config
from megatron_solopo.planning.counts import Exchange, Tally, Traffic, Work
from megatron_solopo.planning.forecast import PARTS, calibrated, forecast
from megatron_solopo.planning.machines import Achieved, Host, Machine, load_machine, names
from megatron_solopo.planning.operators import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    EXPERTS,
    LINK,
    MEMORY_BOUND,
    ON_HOST,
    PRODUCTS,
    Operation,
)
from megatron_solopo.planning.rehearse import Outcome

TERA = 10**12
ROUND = Machine(
    name="round numbers",
    gpus_per_node=4,
    memory_gib=80,
    tflops={"bfloat16": 100, "float32": 10, "float8": 200},
    memory_gb_per_s=1000,
    node_gb_per_s=100,
    network_gb_per_s=10,
    achieved=Achieved(products=[0.5, 1.0], attention=[0.25, 0.5], memory=[0.5, 1.0], collectives=[0.5, 1.0]),
    collective_us=[1, 1],
    launch_us=[1, 1],
    host=Host(memory_gib=400, memory_gb_per_s=80, link_gb_per_s=10, achieved=[0.5, 1.0]),
)


def options(**parallel: Any) -> Config:
    config = Config()
    return replace(config, parallel=replace(config.parallel, **parallel))


def outcome(forward: Tally | None = None, backward: Tally | None = None, update: Tally | None = None) -> Outcome:
    return Outcome(0, {}, {}, 100, 1, Work(forward or Tally(), backward or Tally(), update or Tally()))


def operation(kind: str, flops: int = 0, size: int = 0, dtype: str = "bfloat16", count: int = 1) -> Tally:
    return Tally({Operation(kind, dtype, flops, size): count})


def exchange(name: str, kind: str, ranks: Any, size: float, number: int = 0) -> Tally:
    return Tally({}, {Exchange(name, kind, tuple(ranks)): Traffic(number, size)})


@pytest.mark.parametrize(
    ("work", "part", "low", "high"),
    [
        (operation(PRODUCTS, 100 * TERA), "products", 1, 2),
        (operation(EXPERTS, 50 * TERA, count=2), "products", 1, 2),
        (operation(PRODUCTS, 100 * TERA, dtype="float32"), "products", 10, 20),
        (operation(PRODUCTS, 100 * TERA, dtype="float8_e4m3fn"), "products", 0.5, 1),
        (operation(PRODUCTS, TERA, 1 * TERA), "products", 1, 2),  # bytes take longer
        (operation(ATTENTION_FORWARD, 100 * TERA), "attention", 2, 4),
        (operation(ATTENTION_BACKWARD, 100 * TERA), "attention", 2, 4),
        (operation(MEMORY_BOUND, size=TERA), "memory-bound", 1, 2),
        (operation(MEMORY_BOUND, size=0, count=10**6), "launches", 1, 1),
        (exchange("all_gather", "tp", range(4), 100e9), "tp", 0.75, 1.5),
        (exchange("reduce_scatter", "cp", range(4), 100e9), "cp", 0.75, 1.5),
        (exchange("all_reduce", "tp", range(4), 100e9), "tp", 1.5, 3),
        (exchange("all_to_all", "ep", range(4), 100e9), "ep", 0.75, 1.5),
        (exchange("receive", "pp", (0, 1), 100e9), "pp", 1, 2),
        (exchange("send", "pp", (0, 1), 100e9), "pp", 0, 0),
        (exchange("receive", "pp", (3, 4), 10e9), "pp", 1, 2),  # of two nodes
        (exchange("all_gather", "tp", range(8), 40e9), "tp", 7 / 8, 7 / 4),  # four adapters a node
        (exchange("all_gather", "cp", range(0, 8, 4), 10e9), "cp", 0.5, 1),  # one a node
        (exchange("all_to_all", "ep", range(8), 10e9), "ep", 0.5, 1),  # half of it leaves the node, by one's own
        (exchange("all_reduce", "tp", range(4), 0, 10**6), "tp", 1, 1),
        (operation(LINK, size=10 * 10**9), "host", 1, 2),
    ],
)
def test_rates(work: Tally, part: str, low: float, high: float) -> None:
    result = forecast([outcome(forward=work)], options(), 1, 1, ROUND)
    assert (result.low, result.high) == pytest.approx((low, high))
    assert result.parts == pytest.approx({part: (low + high) / 2} if high else {})
    assert part in PARTS


def test_a_host_that_starts_operators_in_time_costs_nothing() -> None:
    many = operation(MEMORY_BOUND, size=2_000_000, count=10**6)
    assert "launches" not in forecast([outcome(forward=many)], options(), 1, 1, ROUND).parts


@pytest.mark.parametrize(("stages", "chunks", "packs", "share"), [(1, 1, 8, 0), (4, 1, 8, 3 / 8), (4, 2, 8, 3 / 16)])
def test_bubble_of_a_pipeline(stages: int, chunks: int, packs: int, share: float) -> None:
    config = options(pipeline_model_parallel_size=stages, num_virtual_stages_per_pipeline_rank=chunks)
    stage = outcome(operation(PRODUCTS, 100 * TERA), operation(PRODUCTS, 200 * TERA))
    slower = outcome(operation(PRODUCTS, 150 * TERA), operation(PRODUCTS, 300 * TERA))
    result = forecast([stage, slower, stage], config, stages, packs, ROUND)
    assert result.parts.get("pipeline bubble", 0) == pytest.approx(share * result.parts["products"])
    assert result.low == pytest.approx(4.5 * packs * (1 + share))  # of the slowest stage
    assert result.tokens == 100 * packs


@pytest.mark.parametrize(
    ("overlaps", "buckets", "computing", "exposed"),
    [
        ((False, False), 4, 100, 1.5),
        ((True, True), 4, 100, 0.375),  # but the last of four buckets
        ((True, False), 4, 100, 0.75 + 0.1875),
        ((True, True), 1, 100, 1.5),
        ((True, True), 4, 25, 1.5 - 2 * 0.25),  # computing ends first
    ],
)
def test_overlap_of_gradients_and_parameters(
    overlaps: tuple[bool, bool], buckets: int, computing: int, exposed: float
) -> None:
    config = options(overlap_grad_reduce=overlaps[0], overlap_param_gather=overlaps[1])
    machine = replace(ROUND, collective_us=[1e-9, 1e-9]).scaled(1.0, "exact")
    machine = replace(machine, achieved=Achieved(*([[1.0, 1.0]] * 4)))
    work = operation(PRODUCTS, computing * TERA)
    reduced = exchange("reduce_scatter", "dp", range(4), 100e9, buckets)
    gathered = exchange("all_gather", "dp", range(4), 100e9, buckets)
    update = reduced + gathered + operation(MEMORY_BOUND, size=TERA)
    result = forecast([outcome(work, work, update)], config, 4, 2, machine)
    assert result.parts["dp"] == pytest.approx(exposed)
    assert result.parts["optimizer"] == pytest.approx(1)
    assert result.parts["products"] == pytest.approx(2 * 2 * computing / 100)
    assert result.tokens == 100 * 2 * 4


def test_copies_of_activations_hide_behind_the_pass_that_they_belong_to() -> None:
    """Of 1 to 2 seconds; a resident reference's pass hides none."""
    computing, copies = operation(PRODUCTS, 100 * TERA), operation(LINK, size=30 * 10**9)
    work = Work(computing + copies, computing + computing, Tally(), score=computing)
    result = forecast([Outcome(0, {}, {}, 100, 1, work)], options(), 1, 2, ROUND)
    assert (result.low, result.high) == pytest.approx((2 * (4 + 2), 2 * (8 + 4)))
    assert result.parts == pytest.approx({"products": 12, "host": 6})


@pytest.mark.parametrize(("overlaps", "low"), [(False, 3), (True, 2)])
def test_the_update_on_the_host(overlaps: bool, low: float) -> None:
    """A quarter of the node's bandwidth, and the link."""
    training = Config().training
    changed = dict(optimizer_cpu_offload=True, overlap_cpu_optimizer_d2h_h2d=overlaps)
    config = replace(options(), training=replace(training, **changed))
    update = operation(LINK, size=10 * 10**9) + operation(ON_HOST, size=40 * 10**9)
    result = forecast([outcome(update=update)], config, 1, 8, ROUND)
    assert (result.low, result.high) == pytest.approx((low, 2 * low))
    without = replace(ROUND, host=None)
    assert forecast([outcome(update=update)], config, 1, 8, without).low == 0  # on a CPU everything is there
    with refused("field-missing", "round numbers", "'host'", "link_gb_per_s"):
        forecast([replace(outcome(update=update), host=10**9)], config, 1, 8, without)


def test_calibration_hits_the_measured_step() -> None:
    """Whatever bounds the step; the range becomes one value, and ratios between parts stay."""
    forward = operation(PRODUCTS, 100 * TERA) + operation(MEMORY_BOUND, size=TERA, count=3)
    forward += exchange("all_gather", "tp", range(4), 100e9, 1000) + operation(MEMORY_BOUND, count=10**7)
    update = exchange("reduce_scatter", "dp", range(0, 16, 4), 100e9, 5)
    of_step = [outcome(forward, operation(ATTENTION_BACKWARD, 9 * TERA), update)]
    config = options(overlap_grad_reduce=True)
    for seconds in (30.0, 60.0):
        machine = calibrated(of_step, config, 16, 3, ROUND, seconds, "calibrated")
        result = forecast(of_step, config, 16, 3, machine)
        assert result.low == result.high == pytest.approx(seconds)
        assert machine.name == "calibrated"
        assert machine.achieved.products[0] / machine.achieved.attention[0] == pytest.approx(2)
    with refused("machine-calibration", "fast", "round numbers"):
        calibrated(of_step, config, 16, 3, ROUND, 0.01, "fast")


def test_a_machine_without_the_rate_of_a_dtype_is_refused() -> None:
    with refused("field-missing", "float8", "A100"):
        forecast([outcome(operation(PRODUCTS, 1, dtype="float8_e5m2"))], options(), 1, 1, load_machine("a100"))


def test_machines_of_the_package() -> None:
    assert names() == ("a100", "b200", "h100", "h200")
    assert [load_machine(name).tflops["bfloat16"] for name in names()] == [312, 2250, 989, 989]
    for name in names():
        machine = load_machine(name)
        assert machine.gpus_per_node == 8 and machine.node_gb_per_s > machine.network_gb_per_s
        assert machine.host_share().memory_gib == 250 and machine.host_share().link_gb_per_s >= 32
        assert all(high <= 1 for _, high in vars(machine.achieved).values())


def test_a_written_machine_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(ROUND.text())
    assert load_machine(str(tmp_path / "own.yaml")) == ROUND
    (tmp_path / "small.yaml").write_text(replace(ROUND, host=None).text())
    assert load_machine(str(tmp_path / "small.yaml")) == replace(ROUND, host=None)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"gpus_per_node": 8.5}, "field-type", ("own.yaml", "gpus_per_node")),
        ({"memory_gib": "80"}, "field-type", ("own.yaml", "memory_gib")),
        ({"memory_gib": None}, "field-missing", ("own.yaml", "memory_gib")),
        ({"network_gb_per_s": 0}, "field-value", ("own.yaml", "network_gb_per_s", "above 0")),
        ({"tflops": {"bfloat17": 1}}, "field-value", ("own.yaml", "bfloat17")),
        ({"launch_us": [5]}, "field-value", ("own.yaml", "launch_us", "[low, high]")),
        ({"launch_us": [5, 4]}, "field-value", ("own.yaml", "launch_us", "[low, high]")),
        ({"achieved": {"products": [55, 75]}}, "field-value", ("own.yaml", "achieved", "products", "fractions")),
        ({"host": {"memory_gib": 0}}, "field-value", ("own.yaml", "host", "memory_gib")),
        ({"memroy_gib": 80}, "option-unknown", ("own.yaml:1", "memroy_gib", "memory_gib")),
    ],
)
def test_wrong_machine_files_are_refused(
    tmp_path: Path, change: dict[str, Any], code: str, named: tuple[str, ...]
) -> None:
    path = tmp_path / "own.yaml"
    record = change | {name: value for name, value in yaml.safe_load(ROUND.text()).items() if name not in change}
    path.write_text(yaml.safe_dump(record, sort_keys=False))
    with refused(code, *named):
        load_machine(str(path))


def test_a_missing_machine_is_refused() -> None:
    with refused("file-missing", "h101", "h100"):
        load_machine("h101")
