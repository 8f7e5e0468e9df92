"""--profile and --nvtx: traces of the chosen steps, and the phases of a step in them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import check_refusal
from training_home import Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.config import OutputConfig
from megatron_solopo.training.run import main

PHASES = ("data", "forward", "head", "backward", "reduce", "optimizer")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


def spans(trace: Path) -> dict[str, list[tuple[float, float]]]:
    """(begin, end) of each phase of a trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = {name: [] for name in PHASES}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] in named:
            named[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    return named


def test_the_phases_of_the_chosen_steps_are_in_the_trace(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--profile", "--profile-step-start", 1, "--profile-step-end", 3, "--nvtx", "--train-iters", 4]
    assert run(main, home.argv("profiled", "--preference-loss", "orpo", *flags)) == 0
    (trace,) = (home.folder / "profiled" / "profile").iterdir()
    assert trace.name == "rank0_steps2-3.json.gz"
    assert f"trace of the profiled steps: {trace}" in capfd.readouterr().err
    phases = spans(trace)
    packs = 2 * 2  # four examples a step, two in a pack
    counts = dict(data=2, forward=packs, head=packs, backward=packs, reduce=2, optimizer=2)
    assert Counter({name: len(each) for name, each in phases.items()}) == counts
    for head in phases["head"]:
        assert any(begin <= head[0] and head[1] <= end for begin, end in phases["forward"])
    plain = home.argv("plain", "--preference-loss", "orpo", "--train-iters", 4)
    assert run(main, plain) == 0 and not (home.folder / "plain" / "profile").exists()
    losses = [[line["loss"] for line in home.metrics(name)] for name in ("profiled", "plain")]
    assert losses[0] == losses[1]


def test_a_run_that_ends_earlier_leaves_what_it_profiled(home: Home) -> None:
    flags = ["--profile", "--profile-step-start", 1, "--preference-loss", "orpo", "--train-iters", 2]
    assert run(main, home.argv("short", *flags)) == 0
    traces = [path.name for path in (home.folder / "short" / "profile").iterdir()]
    assert traces == ["rank0_steps2-2.json.gz"]


def test_a_resumed_run_whose_profiled_steps_are_done_logs_it(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(main, home.argv("resumed", "--preference-loss", "orpo", "--train-iters", 2)) == 0
    flags = ["--preference-loss", "orpo", "--train-iters", 4, "--auto-resume", "--override-opt-param-scheduler"]
    assert run(main, home.argv("resumed", *flags, "--profile", "--profile-step-start", 1)) == 0
    assert "--profile: step 2 is done already" in capfd.readouterr().err
    assert not (home.folder / "resumed" / "profile").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--profile"], "option-value", ("--profile-step-start 10", "5 steps")),
        (["--profile", "--profile-step-start", 1, "--profile-ranks", "0,3"], "option-value", ("0,3", "not 3")),
        (["--profile", "--profile-ranks", "all"], "option-value", ("'all'", "0,8")),
        (["--profile", "--profile-step-start", 12], "option-conflict", ("--profile-step-end 12", "above")),
        (["--profile-step-start", 1], "option-unused", ("--profile-step-start", "--profile")),
    ],
)
def test_a_profile_of_nothing_is_refused(
    home: Home, flags: list[Any], code: str, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--dry-run"]):
        assert run(main, home.argv("refused", *flags, *more)) == 2
        check_refusal(capfd.readouterr().err, code, *words)


@pytest.mark.parametrize("traced", [False, True])
def test_on_cuda_the_profiler_is_that_of_nsys_unless_torch_writes_the_trace(
    tmp_path: Path, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_solopo.training import profiling

    calls: list[str] = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    monkeypatch.setattr(profiling.dist, "get_rank", lambda: 1)
    output = OutputConfig(save=str(tmp_path), profile=True, profile_step_start=1, profile_step_end=2, nvtx=True)
    output.use_pytorch_profiler, output.profile_ranks = traced, "1"
    profiler = profiling.Profiler(output, on_cuda=True)
    for done in range(3):
        profiler.before_step(done)
        with profiler.phase("data"):
            pass
        profiler.after_step(done + 1)
    steps = ["push data", "pop"]
    assert calls == (steps * 3 if traced else [*steps, "start", *steps, "stop", *steps])
    assert (tmp_path / "profile" / "rank1_steps2-2.json.gz").exists() == traced
    output.profile_ranks = "0"
    other = profiling.Profiler(output, on_cuda=True)
    other.before_step(1)
    assert other.after_step(2) is None and calls.count("start") == (not traced)
