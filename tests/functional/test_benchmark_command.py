"""solopo benchmark as a user runs it, on a tiny model: both sides train, and the files say what they did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_solopo.benchmark.cases import AS_SHIPPED, Setting
from megatron_solopo.benchmark.jobs import Job
from megatron_solopo.benchmark.phases import PACKS, PHASES
from megatron_solopo.cli import dispatch, run

ARGV = (
    "benchmark --model d64-l2 --vocab-size 256 --modes long --prompts separate --against trl --long-tokens 96 "
    "--response-tokens 16 --pairs 2 --rounds 1 --steps 1 --threads 1 --device cpu --profile"
).split()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    page = folder / "page.md"
    page.write_text("<!-- tables: solopo benchmark -->\n<!-- end of tables -->\n")
    argv = [*ARGV, "--output", str(folder / "out"), "--page", str(page)]
    assert run(dispatch, [*argv, "--write-baseline", str(folder / "base.json")]) == 0
    return folder


def test_both_sides_train_on_the_same_tokens(output: Path) -> None:
    document: dict[str, Any] = json.loads((output / "out" / "results.json").read_text())
    (table,) = document["tables"]
    assert table["machine"]["kind"].endswith("1-threads") and table["machine"]["trl"]
    ours, trl = (case["rounds"][0] for case in table["cases"])
    assert [case["name"] for case in table["cases"]] == ["long dpo, separate", "TRL DPO"]
    # 2 pairs of 2 sequences of 96 and 16 tokens, whose last token predicts nothing
    assert ours["tokens"] == trl["tokens"] == 2 * 2 * (96 + 16 - 1)
    assert ours["flops"] == trl["flops"] and ours["parameters"] == trl["parameters"]
    assert "precompute_ref_log_probs': True" in trl["options"] and "--no-share-prompts" in ours["options"]
    for figures in (ours, trl):
        assert len(figures["seconds"]) == len(figures["cpu"]) == 1 and figures["seconds"][0] > 0
        assert 0 < figures["peak_gib"] < 2 and figures["ceiling"]["seconds"] > 0
    assert len(ours["costs"]) == 3 and all(0 < share < 1 for _, share in ours["costs"])
    phases = ours["phases"]["seconds"]
    assert list(phases) == list(PHASES) and phases["forward"] > 0 and phases["backward"] > 0 < phases["packs"]
    assert sum(value for name, value in phases.items() if name != PACKS) == pytest.approx(ours["seconds"][0])
    assert table["cases"][0]["memory_gib"]["weights"] == pytest.approx(4 * ours["parameters"] / 2**30, rel=0.01)
    names = [ratio["name"] for ratio in document["ratios"]]
    assert names == ["table: long dpo, separate, over TRL"]


def test_trl_as_shipped_computes_its_reference_in_every_step(tmp_path: Path) -> None:
    setting = Setting("d64-l2", vocab_size=256, long=96, short=32, response=16)
    job = Job(setting, AS_SHIPPED[-1], str(tmp_path / "job"), steps=1)
    job.write(tmp_path / "job.json")
    command = [sys.executable, "-m", "megatron_solopo.benchmark.jobs", tmp_path / "job.json", tmp_path / "result.json"]
    subprocess.run(command, check=True, timeout=120)
    result = json.loads((tmp_path / "result.json").read_text())
    assert "precompute_ref_log_probs" not in result["options"] and len(result["seconds"]) == 1


def test_the_files_beside_it_and_the_page_have_the_table(output: Path) -> None:
    text = (output / "out" / "results.md").read_text()
    assert (
        "| long dpo, separate" in text
        and "| seconds of a step" in text
        and "Largest costs of a step" in text
        and "Settings of TRL" in text
    )
    assert text.partition("\n\n")[2].strip() in (output / "page.md").read_text()
    assert (output / "out" / "results.png").read_bytes()[1:4] == b"PNG"


def test_a_finished_table_is_compared_without_being_measured_again(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*ARGV, "--output", str(output / "out"), "--baseline", str(output / "base.json")]
    assert run(dispatch, argv) == 0
    printed = capsys.readouterr()
    assert "measured before" in printed.err and "\nok        table: long dpo, separate, over TRL: " in printed.out
    document = json.loads((output / "base.json").read_text())
    for name in ("value", "low", "high"):
        document["ratios"][0][name] *= 1.2
    (output / "worse.json").write_text(json.dumps(document))
    argv[-1] = str(output / "worse.json")
    assert run(dispatch, argv) == 1
    assert "\nregressed table: long dpo, separate, over TRL: " in capsys.readouterr().out


def test_a_case_that_fails_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*ARGV, "--output", str(tmp_path / "out"), "--options", "--seed 1 --load none"]
    assert run(dispatch, argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "long dpo, separate" in line and line.endswith("[benchmark-failed]")
