"""solopo benchmark without its processes: tables, ratios, baselines, the longest context, wrong options."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refusal, refused

from megatron_solopo import config_load
from megatron_solopo.benchmark import measure
from megatron_solopo.benchmark.cases import LONGEST, PLAIN, SUITES, TRL, Case, Setting, Table, against_trl
from megatron_solopo.benchmark.command import build_parser, tables_of
from megatron_solopo.benchmark.jobs import Job, options_of, write_inputs
from megatron_solopo.benchmark.longest import Search, longest
from megatron_solopo.benchmark.measure import as_json, kept
from megatron_solopo.benchmark.ratios import Ratio, compared, ratios_of, read_baseline, write_baseline
from megatron_solopo.benchmark.report import END, START, write_page
from megatron_solopo.cli import dispatch, run
from megatron_solopo.planning.rehearse import example

SETTING = Setting("d64-l2", vocab_size=256, pairs=8)


def figures(
    seconds: float, products: float = 1.0, attention: float = 1.0, outside: float = 0.0, timed: bool = True
) -> dict[str, Any]:
    """A process whose steps spend a share of their time outside forward and backward; its processor time is half."""
    inside = seconds * (1 - outside)
    phases = {
        clock: {"forward": factor * inside / 3, "backward": factor * inside * 2 / 3}
        for clock, factor in (("seconds", 1), ("cpu", 0.5))
    }
    return {
        "seconds": [seconds] * 3,
        "cpu": [seconds / 2] * 3,
        "flops": [products, attention],
        "phases": phases if timed else None,
    }


def record(each: dict[Case, list[dict[str, Any]]], judged: bool = True, setting: Setting = SETTING) -> dict[str, Any]:
    table = Table("t", "", setting, tuple(each), judged=judged)
    cases = [{"name": case.name, "case": asdict(case), "rounds": rounds} for case, rounds in each.items()]
    return json.loads(json.dumps({"table": asdict(table), "cases": cases}))


def by_name(document: dict[str, Any], clock: str = "seconds") -> dict[str, Ratio]:
    return {ratio.name.removeprefix("t: "): ratio for ratio in ratios_of(document, clock)}


def test_a_floor_has_a_rate_for_products_and_one_for_attention() -> None:
    """t = 2 products + 5 attention in the plain cases; a case at 1.1 of its floor."""
    long, short = PLAIN
    solo = Case(loss="simpo")
    document = record(
        {
            long: [figures(2 * 10 + 5 * 8, 10, 8)] * 2,
            short: [figures(2 * 3 + 5 * 1, 3, 1)] * 2,
            solo: [figures(1.1 * (2 * 7 + 5 * 6), 7, 6), figures(1.0 * (2 * 7 + 5 * 6), 7, 6)],
        }
    )
    for clock in ("seconds", "cpu"):
        ratio = by_name(document, clock)["solo simpo, shared, over its floor"]
        assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1.0, 1.05, 1.1)) and ratio.aim == 1.05
    unsolvable = record({long: [figures(1, 10, 8)], short: [figures(100, 3, 1)], solo: [figures(1)]})
    assert not [name for name in by_name(unsolvable) if "floor" in name]


def test_time_outside_is_not_part_of_the_floor_and_is_a_ratio_for_whole_batches() -> None:
    solo = Case()
    plain = {PLAIN[0]: [figures(20, 5, 2)], PLAIN[1]: [figures(10, 2, 2)]}
    document = record(plain | {solo: [figures(20 / 0.98, 5, 2, outside=0.02)]})
    ratios = by_name(document)
    ratio = ratios["solo dpo, shared, outside forward and backward"]
    assert ratio.value == pytest.approx(0.02) and ratio.reaches
    assert ratios["solo dpo, shared, over its floor"].value == pytest.approx(1)
    few = record({solo: [figures(10, outside=0.02)]}, setting=replace(SETTING, pairs=1))
    assert not by_name(few)


def test_pairs_a_second_are_compared_with_trl_at_the_same_recomputation() -> None:
    plain, full = against_trl(), against_trl(recompute=True)
    times = dict(zip(plain + full, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), strict=True))
    document = record({case: [figures(time, timed=case.side != TRL)] * 3 for case, time in times.items()})
    ratios = by_name(document)
    assert ratios["long dpo, shared, over TRL"].value == 3 and ratios["long dpo, shared, over TRL"].aim == 1.7
    assert ratios["long dpo, separate, over TRL"].value == 1.5
    assert ratios["long dpo, shared, full recompute, over TRL"].value == 1.5
    assert ratios["long dpo, shared, over separate"].value == 2
    unjudged = by_name(record({case: [figures(time)] for case, time in times.items()}, judged=False))
    assert {ratio.aim for ratio in unjudged.values()} == {None}


def test_ratios_are_of_a_round_so_a_slow_minute_does_not_count() -> None:
    ours, _, trl = against_trl()
    ratio = by_name(record({ours: [figures(1), figures(10)], trl: [figures(2), figures(20)]}))
    assert [ratio["long dpo, shared, over TRL"].low, ratio["long dpo, shared, over TRL"].high] == [2, 2]


def test_another_loss_is_not_compared_with_trls() -> None:
    document = record({Case(mode="long", loss="simpo"): [figures(1)], Case(TRL, "long"): [figures(2, timed=False)]})
    assert not [name for name in by_name(document) if "TRL" in name]


def test_lengths_are_compared_with_trl() -> None:
    ours, _, trl = against_trl()
    cases = [
        {"name": case.name, "case": asdict(case), "longest": length, "too_long": length + 100}
        for case, length in ((ours, 1800), (trl, 1000))
    ]
    table = asdict(Table("t", "", SETTING, (ours, trl), LONGEST, judged=True))
    (ratio,) = ratios_of({"table": table, "cases": cases}, "seconds")
    assert (ratio.value, ratio.high, ratio.aim) == (1.8, 1.9, 1.8) and ratio.reaches and ratio.low < 1.8


def test_a_baseline_fails_only_where_all_rounds_are_worse(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    write_baseline(
        path, "cpu", "seconds", [Ratio("speed", 2.0, 1.9, 2.1, "higher"), Ratio("floor", 1.0, 0.9, 1.1, "lower")]
    )
    baseline = read_baseline(path, "cpu", "seconds")
    for speed, floor, fails in (
        (Ratio("speed", 1.7, 1.6, 1.81, "higher"), Ratio("floor", 1.2, 1.15, 1.3, "lower"), []),  # of 1.805 and 1.155
        (Ratio("speed", 1.7, 1.6, 1.80, "higher"), Ratio("floor", 1.0, 1.0, 1.0, "lower"), ["speed"]),
        (Ratio("speed", 9.0, 9.0, 9.0, "higher"), Ratio("floor", 1.2, 1.16, 1.3, "lower"), ["floor"]),
    ):
        lines, failed = compared(baseline, [speed, floor, Ratio("new", 1, 1, 1, "lower")], 0.05)
        assert failed == bool(fails) and len(lines) == 2
        assert [line.split()[1].rstrip(":") for line in lines if line.startswith("regressed")] == fails
    for kind, clock in (("h200", "seconds"), ("cpu", "cpu")):
        with refused("baseline-other-machine", f"--baseline {path}", "'cpu' and 'seconds'", f"{kind!r} and {clock!r}"):
            read_baseline(path, kind, clock)
    with refused("baseline-other-ratios"):
        compared(baseline, [Ratio("new", 1, 1, 1, "lower")], 0.05)
    for text in (
        "[]",
        "{",
        '{"machine": "m", "ratios": []}',
        '{"machine": "m", "clock": "cpu", "ratios": [{}]}',
    ):
        path.write_text(text)
        with refused("baseline-unreadable", f"--baseline {path}"):
            read_baseline(path, "cpu", "seconds")


@pytest.mark.parametrize(
    ("peak", "longest_that_fits"),
    [
        (lambda length: 100 + length, 9900),
        (lambda length: 100 + length + length * length / 10_000, 6124),
        (lambda length: 3000 + length // 1000 * 1000, 7999),  # an allocator's steps
    ],
)
def test_the_longest_context_is_found_without_steps_far_beyond_the_limit(
    peak: Callable[[int], float], longest_that_fits: int
) -> None:
    tried: list[int] = []

    def measure(length: int) -> float:
        tried.append(length)
        return peak(length)

    search = longest(measure, 10_000, 1024)
    assert 0.94 * longest_that_fits <= search.length <= longest_that_fits < search.too_long
    assert len(tried) == len(set(tried)) <= 12 and max(map(peak, tried)) < 13_000
    assert all(length % 64 == 0 for length in tried)


def test_shorter_contexts_are_tried_where_the_first_does_not_fit() -> None:
    tried: list[int] = []

    def peak(length: int) -> float:
        tried.append(length)
        return 20 * length

    assert longest(peak, 10_000, 1024) == Search(448, 512) and tried[:3] == [1024, 512, 256]
    assert max(tried[2:]) < 512


def test_a_limit_below_the_shortest_step_is_refused() -> None:
    with refused("memory-limit", "--memory-limit", "64 tokens", "raise it"):
        longest(lambda length: 2**30, 2**29, 1024)


def test_every_case_of_the_suites_is_a_command_line_of_training() -> None:
    for table in (table for tables in SUITES.values() for table in tables):
        assert len({case.name for case in table.cases}) == len(table.cases)
        for case in table.cases:
            if case.side != TRL:
                config_load.load(options_of(Job(table.setting, case, "folder")))


WRONG = [
    ("option-missing", "--model", []),
    ("option-conflict", "--pairs", ["--suite", "quick", "--pairs", "2"]),
    ("option-conflict", "--tables", ["--model", "d64-l2", "--tables", "trl"]),
    ("option-value", "--tables trl-9k: the suite has floor, trl", ["--suite", "quick", "--tables", "trl-9k"]),
    ("option-conflict", "--longest-context", ["--model", "d64-l2", "--memory-limit", "1"]),
    ("option-conflict", "--profile", ["--model", "d64-l2", "--longest-context", "--profile"]),
    ("option-conflict", "--rounds", ["--model", "d64-l2", "--longest-context", "--rounds", "2"]),
    ("option-conflict", "--losses", ["--model", "d64-l2", "--modes", "sft", "--losses", "ipo"]),
    ("option-conflict", "--short-tokens", ["--model", "d64-l2", "--modes", "long", "--short-tokens", "64"]),
    ("option-conflict", "--short-tokens", ["--model", "d64-l2", "--longest-context", "--short-tokens", "64"]),
    ("option-conflict", "--tolerance", ["--model", "d64-l2", "--tolerance", "0.1"]),
    ("file-system", "none.md", ["--model", "d64-l2", "--page", "none.md"]),
    ("option-conflict", "--vocab-size", ["--model", "folder", "--vocab-size", "500"]),
    ("file-missing", "--model folder", ["--model", "folder"]),
    ("option-unknown", "--recompute-granularty", ["--model", "d64-l2", "--options", "--recompute-granularty full"]),
    ("option-value", "--preference-loss", ["--model", "d64-l2", "--losses", "dpoo"]),
    ("option-value", "--pairs", ["--model", "d64-l2", "--pairs", "0"]),
    ("option-value", "--responses: invalid", ["--model", "d64-l2", "--responses", "4"]),
    ("option-conflict", "--responses", ["--model", "d64-l2", "--responses", "2x2", "--against", "trl"]),
    ("memory-limit", "available", ["--model", "d64-l2", "--longest-context", "--memory-limit", "1e9"]),
    ("file-system", "none.json", ["--model", "d64-l2", "--baseline", "none.json"]),
]


@pytest.mark.parametrize(("code", "named", "argv"), WRONG)
def test_wrong_options_are_one_line_before_anything_is_measured(
    code: str, named: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(dispatch, ["benchmark", *argv, "--device", "cpu", "--output", "out"]) == 2
    check_refusal(capsys.readouterr().err, code, named)
    assert not (tmp_path / "out").exists()


def test_without_trl_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "trl" else find(name, *more))
    for argv in (["--model", "d64-l2", "--against", "trl"], ["--suite", "quick"]):
        assert run(dispatch, ["benchmark", *argv, "--device", "cpu", "--output", str(tmp_path / "out")]) == 2
        check_refusal(capsys.readouterr().err, "package-missing", argv[-2], "pip install trl==1.16.0")


def test_a_table_is_all_combinations_of_its_options() -> None:
    parser = build_parser()
    argv = [
        "--model",
        "d64-l2",
        "--modes",
        "long",
        "sft",
        "--losses",
        "dpo",
        "simpo",
        "--prompts",
        "shared",
        "separate",
    ]
    argv += ["--recompute", "none", "full", "--against", "trl", "--options", "--lr 1e-3", "--output", "out"]
    (table,) = tables_of(parser.parse_args(argv), parser.explicit)
    names = [case.name for case in table.cases]
    assert len(names) == len(set(names)) == 2 * (2 * 2 + 1 + 1)
    assert {case.options for case in table.cases if case.side != TRL} == {("--lr", "1e-3")}
    parsed = tables_of(parser.parse_args(["--suite", "full", "--tables", "longest", "--output", "o"]), parser.explicit)
    assert [table.name for table in parsed] == ["longest"]


def test_several_responses_are_cases_and_reach_the_examples(tmp_path: Path) -> None:
    parser = build_parser()
    argv = "--model d64-l2 --modes long --responses 1x1 2x3 --output o".split()
    (table,) = tables_of(parser.parse_args(argv), parser.explicit)
    assert [case.name for case in table.cases] == ["long dpo, shared", "long dpo, shared, 2 x 3"]
    write_inputs(job := Job(table.setting, table.cases[1], str(tmp_path)))
    (record,) = map(json.loads, job.data.read_text().splitlines())
    assert [len({*record[side]}) for side in ("chosen", "rejected")] == [2, 3]
    config, _ = config_load.load(options_of(job))
    (prompt,) = example(config.method, 16, 64, 8, 2, 3).prompts
    sides = [(one.side.name, one.response) for one in prompt.completions]
    assert sides == [("CHOSEN", 0), ("CHOSEN", 1), ("REJECTED", 0), ("REJECTED", 1), ("REJECTED", 2)]


def test_a_finished_table_is_kept_until_it_changes(tmp_path: Path) -> None:
    table = SUITES["quick"][0]
    assert kept(tmp_path, table) is None
    (tmp_path / "floor.json").write_text(json.dumps({"table": as_json(table), "cases": []}))
    assert kept(tmp_path, table) == {"table": as_json(table), "cases": []}
    assert kept(tmp_path, replace(table, rounds=9)) is None
    earlier = as_json(table)
    for case in earlier["cases"]:
        del case["chosen"], case["rejected"]
    (tmp_path / "floor.json").write_text(json.dumps({"table": earlier, "cases": []}))
    assert kept(tmp_path, table) == {"table": earlier, "cases": []}  # of a version without these fields
    (tmp_path / "floor.json").write_text("{")
    with refused("file-unreadable", "floor.json"):
        kept(tmp_path, table)


def test_a_page_gets_the_tables_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    write_page(page, "new")
    assert page.read_text() == f"before\n{START}\n\nnew\n{END}\nafter\n"
    page.write_text("no marks")
    with refused("page-markers-missing", f"--page {page}"):
        write_page(page, "new")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs of a table, none of which is run: a step takes a second, and a byte a token and parameter."""
    done: list[Job] = []

    def in_a_process(job: Job) -> dict[str, Any]:
        done.append(job)
        return figures(1.0) | {"peak_gib": (100 + job.setting.long) / 2**30, "parameters": 100}

    monkeypatch.setattr(measure, "in_a_process", in_a_process)
    return done


def test_the_cases_of_a_table_take_turns(jobs: list[Job]) -> None:
    ours, separate, trl = against_trl()
    table = Table("t", "", SETTING, (ours, separate, trl), rounds=2)
    lines = list[str]()
    document = measure.measured(table, True, lines.append)
    assert [job.case for job in jobs] == [ours, separate, trl] * 2 and len({job.folder for job in jobs}) == 6
    assert [job.profile for job in jobs] == [False] * 3 + [True] * 3
    assert [len(case["rounds"]) for case in document["cases"]] == [2, 2, 2] and len(lines) == 6
    kinds = [case["memory_gib"] for case in document["cases"]]
    assert kinds[0]["weights"] == kinds[1]["weights"] > 0 and kinds[2] is None
    assert document == json.loads(json.dumps(document)) and document["table"] == as_json(table)


def test_the_limit_of_all_cases_is_four_times_the_states_of_the_first(jobs: list[Job]) -> None:
    ours, _, trl = against_trl()
    table = Table("t", "", replace(SETTING, long=1024), (ours, trl), LONGEST)
    document = measure.measured(table, False, print)
    assert [case["limit_gib"] * 2**30 for case in document["cases"]] == [4 * 16 * 100] * 2
    assert [case["longest"] for case in document["cases"]] == [6300 // 64 * 64] * 2
    assert len({(job.case, job.setting.long) for job in jobs}) == len(jobs)
    assert all(job.setting.short == job.setting.long // 8 for job in jobs)
    document = measure.measured(replace(table, limit=2100), False, print)
    assert document["cases"][0]["longest"] == 2000 // 64 * 64


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = Job(SETTING, Case(options=("--lr", "1e-3")), "folder", profile=True)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
