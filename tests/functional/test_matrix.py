"""`solopo run` of a recipe with a matrix: which stages run, what is kept of a run, and the report."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from refusals import check_refusal, refused
from training_home import furnish

from megatron_solopo.cli import dispatch, run

STAGE = """\
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--data", nargs="*", default=[])
parser.add_argument("--output")
parser.add_argument("--note", default="")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
read = sum(float(pathlib.Path(file).read_text()) for file in options.data)
with open("calls", "a") as file:
    file.write(options.output + " ")
path = pathlib.Path(options.output)
path.parent.mkdir(exist_ok=True)
if path.suffix != ".json":
    path.write_text(str(read + options.seed + 1))
else:
    at = lambda score: {"sub_em": score, "count": 4, "mean_prompt_tokens": 9, "interval": {"sub_em": [0, 1]}}
    metrics = {"8 documents": at(read / 10), "16 documents": at(read / 20)}
    settings = {"pool": [str(path.absolute().parents[3] / "pool.jsonl")]}
    path.write_text(json.dumps({"model": str(path.absolute()), "data": "d", "metrics": metrics, "settings": settings}))
    lines = [{"id": "q", "question": "Q?", "length": length, "sub_em": of["sub_em"]} for length, of in metrics.items()]
    path.with_suffix(".predictions.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


def script(**options: object) -> dict[str, object]:
    return {"script": "stage.py", "options": options}


class Experiment:
    """World and `unused` are shared; a variant reads the world through `middle`, unless its data name the world."""

    def __init__(self, folder: Path) -> None:
        (folder / "stage.py").write_text(STAGE)
        self.folder, self.results = folder, folder / "kept"
        self.recipe = {
            "output": "out",
            "stages": {
                "world": script(output="world/a.txt", seed=0, note="of=./world"),
                "unused": script(data=["world/a.txt"], output="unused.txt"),
                "other": script(output="other.txt"),
            },
            "matrix": {
                "seeds": ["0", "1"],
                "results": "kept",
                "result": "$variant/evaluation.json",
                "stages": {
                    "middle": script(data=["$world"], output="$variant/middle.txt", note="$note"),
                    "last": script(data="$data", output="$variant/evaluation.json", note="$$5"),
                },
                "variants": {
                    "plain": {"data": "world/a.txt"},
                    "two": {"label": "Two", "world": "world/a.txt", "note": None, "data": "$variant/middle.txt"},
                },
            },
        }

    def run(self, *flags: str) -> int:
        (self.folder / "e.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        for calls in self.folder.glob("out/*/calls"):
            calls.unlink()
        return run(dispatch, ["run", os.path.relpath(self.folder / "e.yaml"), *flags])

    def calls(self, *flags: str) -> list[str]:
        """Runs it; what the stages of each seed wrote."""
        assert self.run(*flags) == 0
        calls = [self.folder / "out" / f"seed-{seed}" / "calls" for seed in (0, 1)]
        return [each.read_text().strip() if each.exists() else "" for each in calls]


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path)


def test_each_run_needs_its_stages_alone_and_is_not_repeated(
    experiment: Experiment, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(experiment.folder)  # its recipe has a relative name, and its stages run elsewhere
    every = "world/a.txt plain/evaluation.json two/middle.txt two/evaluation.json"
    assert experiment.calls() == [every, every]
    plain, two = (json.loads((experiment.results / f"{name}-seed-1.json").read_text()) for name in ("plain", "two"))
    assert plain["metrics"]["8 documents"]["sub_em"] == 0.2 and two["metrics"]["8 documents"]["sub_em"] == 0.3
    assert (plain["seed"], two["variant"], two["training"]) == (1, "two", [])
    assert plain["model"] == "plain/evaluation.json" and str(experiment.folder) not in json.dumps(two)
    assert two["stages"]["world"][2]["seed"] == "1" and two["stages"]["two.last"][2]["note"] == "$5"
    assert "note" not in two["stages"]["two.middle"][2]
    assert two["stages"]["world"][2]["note"] == "of=world" and two["settings"] == {"pool": ["pool.jsonl"]}
    report = (experiment.results / "report.md").read_text()
    assert re.search(r"\| plain +\| +0\.15 \[0\.10, 0\.20\] \|", report)
    assert re.search(r"\| Two +\| +0\.25 \[0\.20, 0\.30\] \|", report) and "Seeds: 0, 1." in report
    assert experiment.calls() == ["", ""]
    shutil.rmtree(experiment.folder / "out")  # another machine, which has the results alone
    assert experiment.calls() == ["", ""]
    (experiment.results / "two-seed-0.json").unlink()
    assert experiment.calls() == ["world/a.txt two/middle.txt two/evaluation.json", ""]
    capfd.readouterr()
    assert experiment.run("--seed", "2", "--dry-run") == 0
    assert not (experiment.folder / "out" / "seed-2").exists() and "two.middle runs: " in capfd.readouterr().out


def test_a_change_repeats_the_runs_that_it_concerns(experiment: Experiment) -> None:
    experiment.calls()
    experiment.recipe["matrix"]["variants"]["two"]["note"] = "n"
    assert experiment.calls() == ["two/middle.txt two/evaluation.json"] * 2
    experiment.recipe["stages"] = {"first": script(output="first.txt")} | experiment.recipe["stages"]
    assert experiment.calls() == ["", ""]  # no run needs the new stage
    experiment.recipe["stages"]["late"] = script(data=["world/a.txt"], output="late.txt")
    experiment.recipe["matrix"]["variants"] |= {
        "three": {"data": ["other.txt", "late.txt"]},
        "four": {"data": ["late.txt"]},  # before which `other` does not run, and which is not repeated for that
    }
    assert experiment.calls() == ["other.txt late.txt three/evaluation.json four/evaluation.json"] * 2


def test_predictions_are_kept_where_differences_are_wanted(experiment: Experiment) -> None:
    """Those of results that were kept without them come from the run's folder, or from the run once more."""
    experiment.calls()
    assert not list(experiment.results.glob("*.jsonl"))
    experiment.recipe["matrix"]["predictions"] = True
    assert experiment.calls() == ["", ""]  # no stage runs again
    assert sorted(file.name for file in experiment.results.glob("*.jsonl")) == sorted(
        f"{name}-seed-{seed}.predictions.jsonl" for name in ("plain", "two") for seed in (0, 1)
    )
    kept = (experiment.results / "two-seed-0.predictions.jsonl").read_text()
    assert json.loads(kept.splitlines()[0]) == {"id": "q", "length": "8 documents", "sub_em": pytest.approx(0.2)}
    report = (experiment.results / "report.md").read_text()
    assert re.search(r"\| Two +\| 8 documents +\| +1 \| +\+0\.100 \|", report)
    (experiment.results / "two-seed-1.predictions.jsonl").unlink()
    shutil.rmtree(experiment.folder / "out")
    assert experiment.calls() == ["", "world/a.txt two/middle.txt two/evaluation.json"]


def test_a_recipe_changes_the_matrix_of_its_base(experiment: Experiment) -> None:
    """It takes seeds, stages and variants from it, runs those that it names, and shares the folder of their stages."""
    experiment.calls()
    later = {
        "base": "e.yaml",
        "matrix": {
            "results": "kept-too",
            "stages": {"last": {"options": {"note": "longer"}}},
            "variants": {"two": {"label": "2"}},
        },
    }
    (experiment.folder / "f.yaml").write_text(yaml.safe_dump(later))
    assert run(dispatch, ["run", str(experiment.folder / "f.yaml")]) == 0
    calls = (experiment.folder / "out" / "seed-1" / "calls").read_text()
    assert calls == "world/a.txt plain/evaluation.json two/middle.txt two/evaluation.json two/evaluation.json "
    of_base, changed = (
        json.loads((experiment.folder / kept / "two-seed-1.json").read_text()) for kept in ("kept", "kept-too")
    )
    assert (of_base["stages"]["two.last"][2]["note"], changed["stages"]["two.last"][2]["note"]) == ("$5", "longer")
    assert "| 2 " in (experiment.folder / "kept-too" / "report.md").read_text()
    assert not (experiment.folder / "kept-too" / "plain-seed-1.json").exists()
    del later["matrix"]["results"]  # those of the base would be overwritten
    with refused("recipe-incomplete", "f.yaml:", "matrix: results: missing"):
        (experiment.folder / "f.yaml").write_text(yaml.safe_dump(later))
        dispatch(["run", str(experiment.folder / "f.yaml")])


def test_a_run_resumes_at_the_stage_that_failed(experiment: Experiment, capfd: pytest.CaptureFixture[str]) -> None:
    last = experiment.recipe["matrix"]["stages"]["last"]
    last["options"]["data"] = ["$data", "missing.txt"]
    assert experiment.run() == 2
    check_refusal(capfd.readouterr().err, "stage-failed", "[2/2] plain.last")
    assert not (experiment.results / "report.md").exists()
    last["options"]["data"] = "$data"
    experiment.recipe["matrix"]["variants"]["two"]["data"] = "missing.txt"
    assert experiment.run() == 2
    report = (experiment.results / "report.md").read_text()  # of the run that ended before the error
    assert "| plain " in report and "| Two " not in report
    experiment.recipe["matrix"]["variants"]["two"]["data"] = "$variant/middle.txt"
    assert experiment.calls()[0] == "two/middle.txt two/evaluation.json"


WRONG = {
    "unknown": ({"seed": ["1"]}, "recipe-key", "'seed'", "mean seeds?"),
    "missing": ({"results": None}, "recipe-incomplete", "matrix: results: missing"),
    "predictions": ({"predictions": "all"}, "recipe-value", "predictions: ", "true or false", "'all'"),
    "seeds": ({"seeds": "3"}, "recipe-value", "seeds: ", "list of whole numbers", "'3'"),
    "name": ({"variants": {"a/b": {}}}, "stage-name", "'a/b'", "variant"),
    "result": ({"result": "nothing.json"}, "recipe-value", "nothing.json", "no stage writes it"),
    "variable": (
        {"variants": {"a": {"data": "a/middle.txt", "note": "n"}}},
        "recipe-variable",
        "world: ",
        "$world",
        "'a'",
        "variant, data, note",
    ),
}
"""Mistake -> (what it changes of the matrix, code, what the message names)"""


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_before_the_first_run(
    case: str, experiment: Experiment, capfd: pytest.CaptureFixture[str]
) -> None:
    change, code, *named = WRONG[case]
    experiment.recipe["matrix"] |= change
    assert experiment.run() == 2
    check_refusal(capfd.readouterr().err, code, "e.yaml:", *named)
    assert not (experiment.folder / "out").exists()


def test_a_matrix_chooses_its_stages_itself(experiment: Experiment, capfd: pytest.CaptureFixture[str]) -> None:
    assert experiment.run("--only", "world") == 2
    check_refusal(capfd.readouterr().err, "option-conflict", "--only world", "matrix")


def test_what_a_training_took_is_kept(experiment: Experiment) -> None:
    home = furnish(experiment.folder / "home").folder
    matrix = experiment.recipe["matrix"]
    train = {"hf_path": f"{home}/hf", "train_data": f"{home}/groups.jsonl", "device": "cpu", "seq_length": "128"}
    train |= {"train_iters": "8", "global_batch_size": "2", "micro_batch_size": "2", "save": "$variant/run"}
    last = script(data=["$data"], output="$variant/evaluation.json", note="$variant/run")
    matrix |= {
        "seeds": ["0"],
        "stages": {"train": {"train": train}, "last": last},
        "variants": {"one": {"data": "world/a.txt"}},
    }
    assert experiment.run() == 0
    [training] = json.loads((experiment.results / "one-seed-0.json").read_text())["training"]
    lines = (experiment.folder / "out/seed-0/one/run/metrics.jsonl").read_text().splitlines()
    tokens = sum(row["tokens"] for row in map(json.loads, lines) if row["split"] == "train")
    assert (training["steps"], training["tokens"], training["last"]["step"]) == (8, tokens, 8)
    assert training["responses"] == {"chosen": 1.0, "rejected": 1.0} and training["cpu_seconds"] > 0

    model = json.loads((home / "hf" / "config.json").read_text())
    hidden, layers, heads = (model[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    head = model.get("head_dim") or hidden // heads
    layer = 2 * hidden * head * (heads + model["num_key_value_heads"]) + 3 * hidden * model["intermediate_size"]
    products = 6 * layers * layer * tokens  # of 16 examples, six of them twice
    rest = 6 * hidden * model["vocab_size"] * tokens + 12 * layers * heads * head * tokens * 128
    assert products < training["flops"] < products + rest
    assert "processor seconds" in (experiment.results / "report.md").read_text()
    assert (experiment.results / "report-cost.png").read_bytes().startswith(b"\x89PNG")
