"""Recipes: how their paths, variants and options are read, and what is refused before the first stage starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_solopo.cli import dispatch, run
from megatron_solopo.errors import UserError
from megatron_solopo.recipe import read_recipe, readable

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

RECIPE = """\
output: made
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
    assert recipe.output == folder / "made"
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


def test_a_variant_changes_stages_and_adds_some(folder: Path) -> None:
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


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("quickstart/*.yaml")), ids=lambda path: path.name)
def test_the_recipes_of_the_examples_pass_every_check(path: Path) -> None:
    assert len(lines(path)) > 10


def stage(text: str) -> str:
    return f"output: o\nstages:\n  one:\n{text}\n"


WRONG = {
    "no recipe": ("- a", "r.yaml: must hold output: and stages:"),
    "no output": ("stages: {one: {report: {output: a}}}", "r.yaml: output: missing; give the folder"),
    "no stages": ("output: o", "r.yaml: has no stages"),
    "unknown": ("outputs: o", "r.yaml:1: unknown 'outputs'; did you mean output?; a recipe has base, output"),
    "no YAML": ("output: [", "r.yaml:1: not valid YAML"),
    "name twice": ("output: o\nstages:\n  a: {}\n  a: {}", "r.yaml:4: not valid YAML ('a' is given twice)"),
    "name of a file": ("output: o\nstages:\n  ../a: {}", "r.yaml:3: '../a': name a stage by letters"),
    "own base": ("base: r.yaml", "r.yaml: is its own base"),
    "no base": ("base: b.yaml", "b.yaml: no such file"),
    "no command": (stage("    processes: 2"), "r.yaml:3: stage 'one': give one command: prepare-data"),
    "command typo": (
        stage("    evalute: {}"),
        "r.yaml:4: 'evalute' is no command of a stage; did you mean evaluate?",
    ),
    "launch": (stage("    verify-parallelism: {}"), "r.yaml:4: 'verify-parallelism' is no command of a stage"),
    "two commands": (stage("    ask: {}\n    report: {}"), "r.yaml:3: stage 'one': give one command"),
    "processes of one": (
        stage("    processes: 2\n    report: {}"),
        "r.yaml:4: processes: report runs in one; of",
    ),
    "no process": (stage("    processes: 0\n    train: {}"), "r.yaml:4: processes: must be a number of at least 1"),
    "no mapping": (stage("    report: a"), "r.yaml:4: report: must hold 'name: value' lines"),
    "no script": (stage("    script: t.py"), "r.yaml:3: stage 'one': "),
    "option": (
        stage("    report:\n      outputs: a"),
        "r.yaml:5: unknown option 'outputs'; did you mean output?",
    ),
    "option of training": (
        stage("    train:\n      sequence_length: 8"),
        "r.yaml:5: unknown option 'sequence_length'; did you mean seq_length?",
    ),
    "value": (stage("    report:\n      output: a\n      metric: x"), "r.yaml:6: metric: invalid choice: 'x'"),
    "value of training": (stage("    train:\n      lr: fast"), "r.yaml:5: lr: must be float, found 'fast'"),
    "missing": (
        stage("    report:\n      runs: [a]"),
        "r.yaml:3: stage 'one': the following arguments are required: --output",
    ),
    "without effect": (
        stage("    train: {hf_path: m, train_data: d, save: s, train_iters: 1,\n      simpo_gamma: 1}"),
        "r.yaml:5: stage 'one': --simpo-gamma would have no effect: it needs --preference-loss simpo",
    ),
    "conversion": (
        stage("    convert-checkpoint: {command: megatron-to-hf, loda: a}"),
        "r.yaml:4: unknown option 'loda'; did you mean load?",
    ),
    "no conversion": (stage("    convert-checkpoint: {load: a}"), "command: missing; give one of hf-to-megatron"),
    "same output": (
        "output: o\nstages:\n  a:\n    report: {output: x.md}\n  b:\n    report: {output: ./../o/x.md}".replace(
            "./../o/", ""
        ),
        "r.yaml:5: stage 'b': x.md is what stage 'a' makes too",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_before_any_stage_starts(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second of two stages, where the recipe has stages: the first one must not have started."""
    text, expected = WRONG[case]
    (tmp_path / "first.py").write_text("open('started', 'w')")
    (tmp_path / "r.yaml").write_text(text)
    if text.startswith("output: o\nstages:\n  one:"):
        (tmp_path / "b.yaml").write_text("output: o\nstages: {first: {script: first.py, options: {output: x}}}")
        (tmp_path / "r.yaml").write_text(f"{text}base: b.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert run(dispatch, ["run", "r.yaml"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {expected}") and printed.err.count("\n") == 1
    assert not printed.out and not (tmp_path / "o" / "started").exists()


def test_an_unknown_stage_is_named(folder: Path) -> None:
    from megatron_solopo.pipeline import main

    with pytest.raises(UserError, match="^--from context: no such stage; did you mean contexts"):
        main([str(folder / "r.yaml"), "--from", "context"])
    with pytest.raises(UserError, match="^--only: not allowed with argument --from"):
        main([str(folder / "r.yaml"), "--from", "solo", "--only", "solo"])
