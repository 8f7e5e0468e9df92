"""Recipes: how their paths, variants and options are read, and what is refused before the first stage starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import check_refusal, refused

from megatron_solopo.cli import dispatch, run
from megatron_solopo.matrix import identity, run_of
from megatron_solopo.recipe import readable
from megatron_solopo.recipe_file import read_recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

RECIPE = """\
output: out
stages:
  contexts:
    prepare-data: &data
      data: [./q.jsonl, more.jsonl]
      tokenizer: /models/base
      prompt_template: "@../prompt.txt"
      short_tokens: 16
      long_tokens: 64
      seed: 3
      output: contexts.jsonl
  solo:
    processes: 4
    train: {hf_path: /models/base, train_data: groups.jsonl, train_iters: 2, lr: 1e-3, save: solo, seed: 3}
  other:
    prepare-data: {<<: *data, long_tokens: 128, output: other.jsonl}
  curves:
    report: {runs: [Solo=./kept/solo, solo], output: report.md}
  back:
    convert-checkpoint: {command: megatron-to-hf, load: solo, save_hf: hf}
  table:
    script: table.py
    options: {runs: [a, b], seed: 3, full: true, quiet: false, note: -1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "table.py").touch()
    return tmp_path


def lines(recipe: Path, **changed: object) -> dict[str, str]:
    return {
        stage.name: readable(stage.command_line(stage.checked()[0])) for stage in read_recipe(recipe, **changed).stages
    }


def test_stages_are_command_lines(folder: Path) -> None:
    recipe = read_recipe(folder / "r.yaml")
    assert recipe.output == folder / "out"
    prepare = (
        f"solopo prepare-data --data {folder}/q.jsonl more.jsonl --tokenizer /models/base --prompt-template "
        f"@{folder.parent}/prompt.txt --short-tokens 16 --long-tokens 64 --seed 3 --output contexts.jsonl"
    )
    assert lines(folder / "r.yaml") == {
        "contexts": prepare,
        "solo": "solopo launch --standalone --nproc_per_node 4 -m megatron_solopo.cli train --hf-path /models/base "
        "--train-data groups.jsonl --train-iters 2 --lr 1e-3 --save solo --seed 3 --auto-resume",
        "other": prepare.replace("--long-tokens 64", "--long-tokens 128").replace("contexts.jsonl", "other.jsonl"),
        "curves": f"solopo report --runs Solo={folder}/kept/solo solo --output report.md",
        "back": "solopo convert-checkpoint megatron-to-hf --load solo --save-hf hf",
        "table": f"python {folder}/table.py --runs a b --seed 3 --full --note=-1",
    }


def test_a_stage_with_a_file_of_options_has_those_of_the_file(folder: Path) -> None:
    """What `solopo run` compares with the stage's last run; a change in the file is a change of the stage."""
    (folder / "solo.yaml").write_text("training: {train_iters: 2, lr: 2e-3}\n")
    stage = "train: {config: ./solo.yaml, hf_path: m, train_data: g.jsonl, save: solo, lr: 1e-3}"
    (folder / "r.yaml").write_text(f"output: out\nstages:\n  solo:\n    {stage}\n")
    [solo] = read_recipe(folder / "r.yaml").stages
    words, values = solo.checked()
    assert words[:2] == ["--config", f"{folder}/solo.yaml"]
    assert (values["train_iters"], values["lr"], "config" in values) == (2, 1e-3, False)


def test_a_variant_changes_and_adds_stages(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "v.yaml").write_text(
        "base: ../r.yaml\noutput: here\nstages:\n  contexts:\n    prepare-data: {data: [./mine.jsonl], limit: 5}\n"
        "  solo: {processes: 1}\n  last:\n    ask: {model: [hf], document: d, question: what}\n"
    )
    before, now = lines(folder / "r.yaml"), lines(folder / "deep" / "v.yaml")
    assert list(now) == [*before, "last"]
    assert now["contexts"] == before["contexts"].replace(
        f"{folder}/q.jsonl more.jsonl", f"{folder}/deep/mine.jsonl"
    ) + (" --limit 5")
    assert now["solo"] == before["solo"].replace("launch --standalone --nproc_per_node 4 -m megatron_solopo.cli ", "")
    assert all(now[name] == before[name] for name in ("other", "curves", "back", "table"))
    assert read_recipe(folder / "deep" / "v.yaml").output == folder / "deep" / "here"


def test_the_command_line_names_another_folder_and_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert read_recipe("r.yaml", output="runs/second").output == folder / "runs" / "second"
    before, now = lines(folder / "r.yaml"), lines(folder / "r.yaml", seed=7)
    assert now == {name: line.replace("--seed 3", "--seed 7") for name, line in before.items()}


ITERATED = """\
output: out
stages:
  first: {prepare-data: &prepare {data: [./q.jsonl], tokenizer: m, short_tokens: 8, long_tokens: 16, output: c.jsonl}}
rounds:
  count: 2
  model: ./base
  result: r$round/hf
  stages:
    ask: {sample-responses: {contexts: c.jsonl, model: $previous, seed: 4, output: r$round/r.jsonl}}
    train:
      train: {hf_path: $previous, train_data: r$round/g.jsonl, train_iters: 1, save: r$round/run, save_hf: $model}
    all: {report: {runs: [$each=r$each/run, base=b/run], output: r$round/report.md}}
"""


def test_rounds_are_stages_behind_the_others(folder: Path) -> None:
    (folder / "r.yaml").write_text(ITERATED)
    now = lines(folder / "r.yaml")
    assert list(now) == ["first", *(f"round-{n}.{name}" for n in (1, 2) for name in ("ask", "train", "all"))]
    assert now["round-1.ask"] == (
        f"solopo sample-responses --contexts c.jsonl --model {folder}/base --seed 4 --output r1/r.jsonl"
    )
    assert now["round-2.ask"] == "solopo sample-responses --contexts c.jsonl --model r1/hf --seed 4 --output r2/r.jsonl"
    assert "--hf-path r1/hf " in now["round-2.train"] and "--save-hf r2/hf " in now["round-2.train"]
    assert now["round-1.all"] == "solopo report --runs 1=r1/run base=b/run --output r1/report.md"
    assert now["round-2.all"] == "solopo report --runs 1=r1/run 2=r2/run base=b/run --output r2/report.md"
    seeded = lines(folder / "r.yaml", seed=7, rounds=1)
    assert len(seeded) == 4 and "--seed 7" in seeded["round-1.ask"]
    assert "--seed 8" in lines(folder / "r.yaml", seed=7)["round-2.ask"]

    (folder / "v.yaml").write_text(
        "base: r.yaml\nserving: {url: http://localhost:1/v1, command: serve $model}\nrounds:\n  count: 1\n  stages:\n"
        "    ask: {served: $previous, sample-responses: {model: policy, tokenizer: $previous, samples: 2}}\n"
    )
    [_, ask, *_] = read_recipe(folder / "v.yaml").stages
    assert ask.served == str(folder / "base")
    assert (
        lines(folder / "v.yaml")["round-1.ask"]
        == now["round-1.ask"].replace(
            f"--contexts c.jsonl --model {folder}/base",
            "--server http://localhost:1/v1 --contexts c.jsonl --model policy",
        )
        + f" --tokenizer {folder}/base --samples 2"
    )
    assert "round-2.ask" not in lines(folder / "v.yaml")


@pytest.mark.parametrize(
    "path",
    sorted([*EXAMPLES.glob("quickstart/*.yaml"), *EXAMPLES.glob("iterate/*.yaml")]),
    ids=lambda path: path.name,
)
def test_the_recipes_of_the_examples_pass_every_check(path: Path) -> None:
    assert len(lines(path)) > 10


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("evidence/*.yaml")), ids=lambda path: path.name)
def test_the_experiments_pass_every_check_and_their_results_are_of_these_options(path: Path) -> None:
    """Of a changed option the results would be made again, and the pages would show figures of another run."""
    recipe = read_recipe(path)
    assert recipe.matrix is not None
    for seed in recipe.matrix.seeds:
        for variant in recipe.matrix.variants:
            run = run_of(recipe, recipe.matrix, seed, variant)
            assert not {"solo", "short-po", "long-po"} & {stage.name for stage in run.stages}  # the demo's trainings
            file = recipe.matrix.results / f"{variant}-seed-{seed}.json"
            assert not file.exists() or json.loads(file.read_text())["stages"] == identity(run), file


def stage(text: str) -> str:
    return f"output: o\nstages:\n  one:\n{text}\n"


WRONG = {
    "no recipe": ("- a", "yaml-structure", "r.yaml: ", "output:", "stages:"),
    "no output": ("stages: {one: {report: {output: a}}}", "recipe-incomplete", "r.yaml: output: "),
    "no stages": ("output: o", "recipe-incomplete", "r.yaml: ", "no stages"),
    "unknown": ("outputs: o", "recipe-key", "r.yaml:1: ", "'outputs'", "mean output?", "base, output"),
    "no YAML": ("output: [", "not-yaml", "r.yaml:1: "),
    "name twice": ("output: o\nstages:\n  a: {}\n  a: {}", "not-yaml", "r.yaml:4: ", "'a'"),
    "name of a file": ("output: o\nstages:\n  ../a: {}", "stage-name", "r.yaml:3: ", "'../a'"),
    "base of itself": ("base: r.yaml", "recipe-base-loop", "r.yaml: "),
    "no base": ("base: b.yaml", "file-missing", "b.yaml: "),
    "no command": (stage("    processes: 2"), "stage-command", "r.yaml:3: stage 'one': ", "prepare-data"),
    "command typo": (stage("    evalute: {}"), "recipe-key", "r.yaml:4: ", "'evalute'", "mean evaluate?"),
    "launch": (stage("    verify-parallelism: {}"), "recipe-key", "r.yaml:4: ", "'verify-parallelism'"),
    "two commands": (stage("    ask: {}\n    report: {}"), "stage-command", "r.yaml:3: stage 'one': ", "one command"),
    "processes of one": (stage("    processes: 2\n    report: {}"), "recipe-key", "r.yaml:4: processes: ", "report"),
    "no process": (stage("    processes: 0\n    train: {}"), "recipe-value", "r.yaml:4: processes: ", "at least 1"),
    "no mapping": (stage("    report: a"), "yaml-structure", "r.yaml:4: report: ", "'name: value'"),
    "no script": (stage("    script: t.py"), "file-missing", "r.yaml:3: stage 'one': ", "t.py"),
    "option": (stage("    report:\n      outputs: a"), "option-unknown", "r.yaml:5: ", "'outputs'", "mean output?"),
    "option of training": (
        stage("    train:\n      sequence_length: 8"),
        "option-unknown",
        "r.yaml:5: ",
        "'sequence_length'",
        "mean seq_length?",
    ),
    "value": (stage("    report:\n      output: a\n      metric: x"), "option-value", "r.yaml:6: metric: ", "'x'"),
    "value of training": (stage("    train:\n      lr: fast"), "option-value", "r.yaml:5: lr: ", "float", "'fast'"),
    "missing": (stage("    report:\n      runs: [a]"), "option-missing", "r.yaml:3: stage 'one': ", "--output"),
    "without effect": (
        stage("    train: {hf_path: m, train_data: d, save: s, train_iters: 1,\n      simpo_gamma: 1}"),
        "option-unused",
        "r.yaml:5: stage 'one': --simpo-gamma ",
        "--preference-loss simpo",
    ),
    "conversion": (
        stage("    convert-checkpoint: {command: megatron-to-hf, loda: a}"),
        "option-unknown",
        "r.yaml:4: ",
        "'loda'",
        "mean load?",
    ),
    "no conversion": (stage("    convert-checkpoint: {load: a}"), "option-missing", "command: ", "hf-to-megatron"),
    "other conversion": (
        stage("    convert-checkpoint: {command: to-hf}"),
        "option-value",
        "r.yaml:4: command: ",
        "'to-hf'",
        "hf-to-megatron",
    ),
    "same output": (
        "output: o\nstages:\n  a:\n    report: {output: x.md}\n  b:\n    report: {output: ./../o/x.md}".replace(
            "./../o/", ""
        ),
        "stage-output-twice",
        "r.yaml:5: stage 'b': ",
        "x.md",
        "'a'",
    ),
}
WRONG |= {
    "round's variable": (
        ITERATED.replace("seed: 4", "seed: $number"),
        "recipe-variable",
        "r.yaml:9: seed: $number: ",
        "a round has no such variable",
        "round, previous, model",
    ),
    "round without a model": (ITERATED.replace(", save_hf: $model", ""), "recipe-value", "r.yaml:4: rounds: ", "r1/hf"),
    "one result of all rounds": (
        ITERATED.replace("result: r$round/hf", "result: hf"),
        "recipe-variable",
        "r.yaml:4: rounds: result: hf: ",
        "$round",
    ),
    "no rounds": (ITERATED.replace("count: 2", "count: none"), "recipe-value", "r.yaml:5: count: ", "'none'"),
    "round's key": (ITERATED.replace("count: 2", "counts: 2"), "recipe-key", "r.yaml:5: ", "mean count?"),
    "rounds of a matrix": (
        ITERATED + "matrix: {seeds: [1], results: a, result: b, stages: {a: {ask: {}}}, variants: {a: {}}}\n",
        "option-conflict",
        "r.yaml:4: rounds: ",
        "matrix",
    ),
    "no server": (
        ITERATED.replace("ask: {", "ask: {served: $previous, "),
        "recipe-incomplete",
        "r.yaml:9: stage 'round-1.ask': served: ",
        "serving:",
    ),
    "served report": (stage("    served: a\n    report: {}"), "recipe-key", "r.yaml:4: served: ", "report", "evaluate"),
    "server without a model": (
        "serving:\n  url: http://localhost:1/v1\n  command: serve\n" + ITERATED,
        "recipe-variable",
        "r.yaml:3: command: ",
        "$model",
    ),
    "server's command with an open quote": (
        "serving:\n  url: http://localhost:1/v1\n  command: serve '$model\n" + ITERATED,
        "recipe-value",
        "r.yaml:3: command: ",
        "quotes",
    ),
    "server's URL": (
        "serving: {url: localhost, command: serve $model}\n" + ITERATED,
        "recipe-value",
        "r.yaml:1: url: ",
        "'localhost'",
    ),
    "server of nobody": (
        "serving: {url: http://localhost:1/v1}\n" + ITERATED,
        "recipe-incomplete",
        "r.yaml:1: serving: command: ",
        "reload:",
    ),
}
"""Mistake -> (text of the recipe, code, start of the message, what else it names)"""


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_before_any_stage_starts(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second of two stages, where the recipe has stages: the first one must not have started."""
    text, code, place, *named = WRONG[case]
    (tmp_path / "first.py").write_text("open('started', 'w')")
    (tmp_path / "r.yaml").write_text(text)
    if text.startswith("output: o\nstages:\n  one:"):
        (tmp_path / "b.yaml").write_text("output: o\nstages: {first: {script: first.py, options: {output: x}}}")
        (tmp_path / "r.yaml").write_text(f"{text}base: b.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert run(dispatch, ["run", "r.yaml"]) == 2
    printed = capsys.readouterr()
    assert check_refusal(printed.err, code, *named).startswith(place) and printed.err.count("\n") == 1
    assert not printed.out and not (tmp_path / "o" / "started").exists()


def test_an_unknown_stage_is_named(folder: Path) -> None:
    from megatron_solopo.pipeline import main

    with refused("stage-unknown", "--from context: ", "mean contexts?"):
        main([str(folder / "r.yaml"), "--from", "context"])
    with refused("option-unused", "--rounds 2 ", "no rounds:"):
        main([str(folder / "r.yaml"), "--rounds", "2"])
    with refused("option-value", "--rounds 0: "):
        main([str(folder / "r.yaml"), "--rounds", "0"])
    with refused("option-conflict", "--only: ", "--from"):
        main([str(folder / "r.yaml"), "--from", "solo", "--only", "solo"])
