"""`solopo verify-parallelism` as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from refusals import check_refusal, refused
from training_home import ENVIRONMENT, ROOT, Home, furnish

from megatron_solopo.cli import run
from megatron_solopo.parallel.layouts import parse_layout
from megatron_solopo.training.compare_layouts import _config
from megatron_solopo.training.verify import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


def verify(home: Home, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "verify_parallelism.py"), *home.argv("none"), *flags]
    return subprocess.run(command, env=ENVIRONMENT, cwd=home.folder, capture_output=True, text=True, timeout=300)


def test_layouts_agree_with_one_process(home: Home) -> None:
    before = home.listing()
    done = verify(home, "--float64", "--layouts", "cp2", "tp2 sp", "pp2")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert re.match(r"one step of 4 examples, float64; base 1: loss [\d.]+, gradient norm [\d.]+", lines[0])
    for name in ("cp2", "tp2 sp", "pp2"):
        [line] = [line for line in lines if line.startswith(name + " ")]
        loss, gradient = map(float, line.removeprefix(name).split()[:2])
        assert loss <= 1e-10 and gradient <= 1e-10 and line.count("model.") + line.count("lm_head") == 3
    assert lines[-1] == "bound 1e-10: all layouts agree"
    assert home.listing() == before


def test_a_difference_above_the_bound_is_named(home: Home) -> None:
    done = verify(home, "--layouts", "cp2", "--bound", "1e-12", "--preference-loss", "orpo")
    assert done.returncode == 1 and "ABOVE THE BOUND" in done.stdout, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "bound 1e-12: 1 of 1 layouts differ"


@pytest.mark.parametrize(
    ("layout", "code", "named"),
    [
        ("xp2", "layout-name", ["'xp2' ", "sp, dp2, tp2, cp2, "]),
        ("tp2 tp2", "layout-name", ["'tp2' "]),
        ("tp", "layout-name", ["'tp' "]),
        ("tp0", "layout-name", ["'tp0' "]),
        ("tp3", "layout-not-divisible", ["--tensor-model-parallel-size 3: "]),
    ],
)
def test_a_wrong_layout_is_one_line(
    home: Home, layout: str, code: str, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, [*home.argv("none"), "--layouts", layout]) == 2
    check_refusal(capsys.readouterr().err, code, f"layout '{layout}': ", *named)


def test_options_that_contradict_a_layout_are_refused_by_name(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, [*home.argv("none", "--device", "cuda"), "--base", "cp2", "--layouts", "1"]) == 2
    named = ["layout 'cp2': ", "--context-parallel-size 2 ", "--device cuda ", "--bf16"]
    check_refusal(capsys.readouterr().err, "option-conflict", *named)


def test_a_layout_packs_as_many_tokens_as_the_run(home: Home) -> None:
    """A limit of each rank that is below --seq-length is one of the run's ranks only."""
    argv = home.argv("none", "--context-parallel-size", 2, "--max-tokens-per-rank", 65)
    limits = {name: _config(argv, parse_layout(name)).training.max_tokens_per_rank for name in ("1", "cp2", "cp4")}
    assert limits == {"1": 130, "cp2": 65, "cp4": 33}


def test_names_of_layouts() -> None:
    layout = parse_layout("tp2 sp cp2 pp3 dp2")
    assert layout.processes == 24 and layout.copies == 2
    assert layout.options == {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "context_parallel_size": 2,
        "pipeline_model_parallel_size": 3,
    }
    assert parse_layout("1").processes == 1 and parse_layout("1").options == {}
    with refused("layout-name", "'2'"):
        parse_layout("2")
