"""The GPU suite as far as a machine without GPU shows it: every cell with cut shapes, and what becomes of results."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused

from megatron_solopo.pack import Context, Side

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

CELLS = (
    "environment start oracle attention training candidates model_1_5b model_7b engine_speed profile sharing model_3b "
    "trl engine_profile engine_3b longest"
).split()
TRACES = ["profile_portable.json.gz", "profile_transformer_engine.json.gz"]


def tool(name: str, *argv: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{name}.py", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=580)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def statuses(records: list[dict[str, Any]]) -> dict[str, str]:
    return {record["cell"]: record["status"] for record in records if "status" in record}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results.jsonl of a dry run of all cells."""
    output = tmp_path_factory.mktemp("suite") / "new" / "folder"
    done = tool("gpu_suite", "--dry-run", "--output", output)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("environment") and len(done.stdout) < 12000
    assert sorted(path.name for path in output.iterdir()) == ["env.txt", *TRACES, "results.jsonl", "table.md"]
    return output / "results.jsonl"


def test_every_cell_runs_on_the_cpu(results: Path) -> None:
    records = lines(results)
    tails = [record["tail"] for record in records if record.get("status") == "failed"]
    assert statuses(records) == {**dict.fromkeys(CELLS, "ok"), "transformer_engine": "skipped"}, tails
    (skipped,) = (record for record in records if record.get("status") == "skipped")
    assert skipped["tail"] == "needs CUDA"
    figures = {(record["cell"], record["key"]): record["value"] for record in records if "key" in record}
    assert figures["environment", "dry_run"] is True
    assert figures["attention", "packed/shared/tokens"] < figures["attention", "packed/separate/tokens"]
    compared = [key for cell, key in figures if cell == "oracle" and key.endswith("/gradient")]
    assert len(compared) == 2 + 2 * 2 * 2 * 4  # float64 in two layouts; precision, model, layout, method
    assert figures["oracle", "dpo llama shared float64/gradient"] < 1e-12
    assert figures["training", "dpo/resume_is_exact"] is True
    assert figures["candidates", "adam_on_cpu"] == "skipped: needs CUDA"
    assert "backward = 2 x forward" in figures["model_1_5b", "mfu_is"]


def test_cells_of_whole_steps_say_what_they_ran_and_whether_it_reaches_the_bounds(results: Path) -> None:
    records = [record for record in lines(results) if "key" in record]
    figures = {(record["cell"], record["key"]): record["value"] for record in records}
    units = {(record["cell"], record["key"]): record["unit"] for record in records}
    for case in ("recompute_none", "recompute_full"):
        # Measured by the allocator's events, against the rehearsal of the same configuration.
        assert figures["model_3b", f"{case}/peak_off/verdict"] == "pass (at most 0.05)"
        for kind in ("shared", "separate", "trl"):
            assert figures["trl", f"{case}/{kind}/first_loss"] == pytest.approx(math.log(2), abs=1e-4)
            assert figures["trl", f"{case}/{kind}/pairs_per_second"] > 0
        assert figures["trl", f"{case}/trl/tokens_of_a_sequence"] == 256 + 16
        checkpointing = json.loads(figures["trl", f"{case}/trl/options"])["gradient_checkpointing"]
        of_ours = figures["trl", f"{case}/shared/options"]
        assert checkpointing == (case == "recompute_full") == ("--recompute-granularity full" in of_ours)
        assert figures["trl", f"{case}/trl/shared_over_trl/verdict"] == "not judged (at least 1.7)"
        assert figures["trl", f"{case}/trl/separate_over_trl/verdict"] == "not judged (at least 1)"
    for cell in ("model_3b", "engine_3b"):
        assert figures[cell, "recompute_none/mfu/verdict"] == "not judged (at least 0.45, aim 0.5)"
        assert "989 TFLOP/s" in figures[cell, "mfu_is"]
    assert figures["engine_speed", "tiny/fp8_over_bf16/verdict"] == "not judged (at least 1.25, aim 1.4)"
    prompt = 256 + 15  # a response's last token predicts nothing
    assert figures["sharing", "long/separate/tokens"] == 2 * 2 * prompt
    assert figures["sharing", "long/shared/tokens"] == 2 * (prompt + 15)
    for cell in ("profile", "engine_profile"):
        milliseconds = [figures[cell, f"kernels/{number:02}"] for number in range(1, 11)]
        assert milliseconds == sorted(milliseconds, reverse=True) and (cell, "kernels/11") not in figures
        assert " calls: " in units[cell, "kernels/01"] and 0 <= figures[cell, "idle"] < 1
    assert figures["longest", "tiny/longest"] == 640  # in units of 64; the dry run's device holds 700
    assert figures["longest", "tiny/tried/704"] == "out of memory"
    assert figures["longest", "tiny/guess"] % 64 == 0


def test_finished_cells_are_not_repeated(results: Path, tmp_path: Path) -> None:
    earlier = lines(results)
    cut = [record for record in earlier if record["cell"] != "environment"]
    (tmp_path / "earlier.jsonl").write_text("".join(json.dumps(record) + "\n" for record in cut) + '{"cell": "star')
    done = tool("gpu_suite", "--dry-run", "--resume", tmp_path / "earlier.jsonl", "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr[-4000:]
    ran = [line.split()[:2] for line in done.stdout.partition("\n| cell")[0].splitlines()]
    assert ran == [["environment", "ok"], ["transformer_engine", "skipped"]]
    again = lines(tmp_path / "again" / "results.jsonl")
    assert statuses(again) == statuses(earlier)
    done_before = [record for record in cut if record["cell"] in CELLS]
    assert again[: len(done_before)] == done_before


def test_a_place_that_cannot_be_written_is_refused_before_any_cell(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = tool("gpu_suite", "--dry-run", "--output", tmp_path / "file" / "suite")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --output {tmp_path / 'file' / 'suite' / 'results.jsonl'}: ")
    missing = tool("gpu_suite", "--dry-run", "--resume", tmp_path / "none.jsonl", "--output", tmp_path / "suite")
    assert missing.returncode == 2 and f"{tmp_path / 'none.jsonl'}: No such file" in missing.stderr


def test_without_a_gpu_every_cell_is_skipped(tmp_path: Path) -> None:
    done = tool("gpu_suite", "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    records = lines(tmp_path / "results.jsonl")
    assert set(statuses(records).values()) == {"skipped"} and len(records) == len(CELLS) + 1
    assert all("torch sees no CUDA device" in record["tail"] for record in records)


BROKEN = """
import os, sys, time, types
sys.path.insert(0, "tools")
import gpu_suite
from gpu.cells import Cell

broken = types.ModuleType("gpu.broken")
sys.modules["gpu.broken"] = broken

def fails(out):
    out.value("known", 1.5, "ms")
    out.check("beyond", float("nan"), 1.0)
    with out.part("of the cell"):
        raise ValueError("what went wrong")
    out.value("after", True)

def raises(out):
    print("x" * 9000)
    raise OSError("a library")

def hangs(out):
    out.value("before", 1)
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)

def dies(out):
    os.abort()

cells = []
for function in (fails, raises, hangs, dies):
    setattr(broken, function.__name__, function)
    cells.append(Cell(function.__name__, f"broken:{function.__name__}", 1, ""))
suite = gpu_suite.Suite(gpu_suite.options_of(["--dry-run"]), gpu_suite.Path(sys.argv[1]), 0.0)
suite.warm = True
suite.cap = lambda cell: 4.0 if cell.name == "hangs" else 100.0
suite.run(cells)
"""
"""Cells that do what a machine may do."""


def test_a_cell_that_fails_hangs_or_dies_does_not_affect_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BROKEN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = lines(tmp_path / "results.jsonl")
    assert statuses(records) == {"fails": "failed", "raises": "failed", "hangs": "timeout", "dies": "killed by SIGABRT"}
    figures = {(record["cell"], record["key"]): record["value"] for record in records if "key" in record}
    assert figures == {
        ("fails", "known"): 1.5,
        ("fails", "beyond"): "nan",
        ("fails", "of the cell"): "failed: ValueError: what went wrong",
        ("fails", "after"): True,
        ("hangs", "before"): 1,
    }
    tails = {record["cell"]: record["tail"] for record in records if "status" in record}
    assert tails["fails"].endswith("beyond: nan, bound 1e+00; of the cell: ValueError: what went wrong")
    assert tails["raises"].endswith("OSError: a library") and len(tails["raises"]) <= 3000
    assert "time.sleep" in tails["hangs"] or "in hangs" in tails["hangs"]  # where it was


def test_operations_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's counter over transformers' forward pass, with attention cut to its causal half and the output layer to
    the tokens that are predicted."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from gpu.models import TINY
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, Qwen2Config

    from megatron_solopo.benchmark.flops import flops_of_packs
    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup

    hf_config = Qwen2Config(**TINY, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(hf_config)
    prompt, response, layers, width = 50, 7, TINY["num_hidden_layers"], TINY["hidden_size"]

    def counted(tokens: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.ones(1, tokens, dtype=torch.int64))
        return counter.get_total_flops()

    head = 2 * TINY["vocab_size"] * width

    def expected(tokens: int, predicted: int) -> int:
        full, causal = tokens * tokens, tokens * (tokens + 1) // 2
        angles = width // TINY["num_attention_heads"] * tokens  # of RoPE, which transformers makes by a product
        return counted(tokens) - angles - head * (tokens - predicted) - 4 * layers * width * (full - causal)

    completion = Completion(Side.CHOSEN, [1] * (response + 1))
    one = TokenGroup("g", (Prompt(Context.SHORT, [1] * prompt, (completion,)),))
    for pack in (build_pack([one], [0], share_prompts=False), build_pack([one], [0], True, 1, 1, 128)):
        assert flops_of_packs(hf_config, [pack]).total == 3 * expected(prompt + response, response + 1)
    two = TokenGroup("g", (Prompt(Context.SHORT, [1] * prompt, (completion,) * 2),))
    shared = build_pack([two], [0])
    again = expected(prompt + response, response + 1) - expected(prompt, 0)
    assert flops_of_packs(hf_config, [shared]).total == 3 * (expected(prompt + response, response + 1) + again)


def test_the_stored_answers_are_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("tools", "tests/distributed"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    from gpu import answers

    kept, computed = torch.load(answers.FILE, weights_only=True), answers.compute()
    assert answers.FILE.stat().st_size < 2**20
    assert (kept["weights"], kept["tokens"]) == (computed["weights"], computed["tokens"])
    assert kept["reference"] == [pytest.approx(row, rel=1e-12) for row in computed["reference"]]
    assert kept["cases"].keys() == computed["cases"].keys() and len(computed["cases"]) == 8
    for name, case in computed["cases"].items():
        assert kept["cases"][name]["loss"] == pytest.approx(case["loss"], rel=1e-12)
        for tensor, gradient in case["gradient"].items():
            torch.testing.assert_close(kept["cases"][name]["gradient"][tensor], gradient, rtol=1e-6, atol=1e-12)


def test_the_tables_are_those_of_the_results_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu_report

    machines = gpu_report.kept()
    text = gpu_report.PAGE.read_text(encoding="utf-8")
    assert gpu_report.page(text, machines) == text, "run tools/gpu_report.py"
    baselines = {path.stem for path in gpu_report.BASELINES.glob("*.json")}
    assert {name for name in baselines if not name.startswith("cpu-")} == machines.keys()  # solopo benchmark has CPUs'
    for name, records in machines.items():
        assert (gpu_report.BASELINES / f"{name}.json").read_text(encoding="utf-8") == gpu_report.baseline(name, records)


def test_a_machines_results_become_tables_and_a_baseline(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import gpu_report

    for name, folder in (("KEPT", "kept"), ("BASELINES", "baselines")):
        monkeypatch.setattr(gpu_report, name, tmp_path / folder)
    page = tmp_path / "gpu.md"
    page.write_text(f"# Before\n\n{gpu_report.START}\nold\n{gpu_report.END}\n\nAfter\n")
    monkeypatch.setattr(gpu_report, "PAGE", page)
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    with refused("results-incomplete", str(results), "dry run"):
        gpu_report.main([str(results)])
    assert not (tmp_path / "kept").exists() and "old" in page.read_text()
    assert gpu_report.main(["--print", str(results)]) == 0
    assert "cpu-" in capsys.readouterr().out and "old" in page.read_text()

    def record(cell: str, key: str, value: Any, unit: str = "") -> dict[str, Any]:
        return {"cell": cell, "key": key, "value": value, "unit": unit, "t": 1.0}

    lines = [
        record("environment", "machine", "nvidia-h200"),
        record("environment", "dry_run", False),
        record("environment", "product", 700.0, "TFLOP/s"),
        record("environment", "product", 790.123, "TFLOP/s"),
        {"cell": "environment", "status": "ok", "seconds": 7.5},
        record("oracle", "dpo llama shared float32/gradient", 2e-7),
        record("oracle", "orpo llama shared float32/gradient", 3e-6),
        record("oracle", "orpo llama shared bfloat16/gradient", "nan"),
        record("oracle", "dpo llama shared bfloat16/gradient", 0.01),
        record("attention", "8192/efficient/refused", "RuntimeError: no"),
        record("training", "sft/learns", True),
        record("model_7b", "8k/recompute_none", "failed: OutOfMemoryError: CUDA out of memory"),
        {"cell": "model_7b", "status": "failed", "seconds": 30.0, "tail": "..."},
    ]
    source = tmp_path / "results.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gpu_report.main([str(source)]) == 0
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\nAfter\n") and "old" not in text
    for row in (
        "| | nvidia-h200 |",
        "| bfloat16 product, 8,192 cubed | 790 TFLOP/s |",
        "| gradient of a step, float32, largest error (bound 1e-5) | 3e-06 |",
        "| gradient of a step, bfloat16, largest error (bound 5e-2) | nan |",
        "| 8,192: efficient, forward and backward | refused |",
        "| 8,192: math, forward and backward | not measured |",
        "| supervised training learns | yes |",
        "| 7B, 1K / 8K, forward and backward, 8k recompute none: step | failed: OutOfMemoryError: CUDA out of memory |",
        "| copy on the device | not measured |",
    ):
        assert row + "\n" in text, row
    assert "30 s |" in text
    document = json.loads((tmp_path / "baselines" / "nvidia-h200.json").read_text())
    assert document["figures"]["environment"]["product"] == {"value": 790.123, "unit": "TFLOP/s"}
    before = text
    assert gpu_report.main([]) == 0 and page.read_text() == before
