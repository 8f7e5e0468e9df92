"""Reading results and runs back: intervals, averages over seeds, and labels that distinguish models."""

import json
import re
import runpy
from pathlib import Path

import pytest
from evaluation_files import write_evaluation, write_run
from refusals import refused

from megatron_solopo.errors import UserError
from megatron_solopo.evaluation import accuracy, report, results
from megatron_solopo.evaluation.intervals import wilson_interval


def test_seeds_of_one_label_are_averaged_with_their_spread(tmp_path):
    files = [
        write_evaluation(tmp_path / f"{seed}.json", {8: score, 16: score - 0.1})
        for seed, score in enumerate((0.9, 0.8, 1.0))
    ]
    evaluations = [results.read_evaluation(f"SoLoPO={path}") for path in files]
    evaluations.append(results.read_evaluation(f"base={write_evaluation(tmp_path / 'base.json', {8: 0.5})}"))
    # Files of versions whose sub-EM had no rule for short answers hold the plain form only.
    assert evaluations[0].results[0].means["sub_em_plain"] == evaluations[0].results[0].means["sub_em"]
    first, second = results.accuracy_by_length(evaluations, "SoLoPO", "documents", "sub_em")
    assert (first.x, first.low, first.high, first.seeds) == (8, 0.8, 1.0, 3) and first.mean == pytest.approx(0.9)
    assert second.mean == pytest.approx(0.8)
    [single] = results.accuracy_by_length(evaluations, "base", "documents", "sub_em")
    assert (single.low, single.high) == wilson_interval(0.5, 100)
    table = accuracy.accuracy_table(evaluations, "documents").splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["SoLoPO", "0.90 [0.80, 1.00]", "0.80 [0.70, 0.90]"]
    assert [cell.strip() for cell in table[3].split("|")[1:-1]] == ["base", "0.50 [0.40, 0.60]", "-"]


def test_curves_are_averaged_where_all_seeds_are(tmp_path):
    runs = [
        results.read_run(f"a={write_run(tmp_path / str(seed), steps, offset)}")
        for seed, (steps, offset) in enumerate(((60, 0.0), (40, 1.0)))
    ]
    points = results.curve(runs, "a", "margin")
    assert [point.x for point in points] == list(range(1, 41))
    assert points[9].mean == pytest.approx(1.5) and (points[9].low, points[9].high) == (1.0, 2.0)
    assert [point.x for point in results.curve(runs, "a", "margin", "valid")] == [20, 40]


def test_a_resumed_run_counts_each_step_once_and_an_unfinished_line_is_skipped(tmp_path, capsys):
    path = write_run(tmp_path / "run", 5) / "metrics.jsonl"
    with path.open("a") as out:
        out.write(json.dumps({"step": 5, "loss": 77.0}) + "\n" + '{"step": 6, "lo')
    run = results.read_run(str(tmp_path / "run"))
    assert [record["step"] for record in run.train] == [1, 2, 3, 4, 5] and run.train[-1]["loss"] == 77.0
    assert "unfinished" in capsys.readouterr().out
    path.write_text('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with refused("not-json", "metrics.jsonl:1: "):
        results.read_run(str(tmp_path / "run"))
    path.write_bytes(b"\xff\xfe\n\x00\n")
    with refused("not-utf8", "metrics.jsonl:1: "):
        results.read_run(str(tmp_path / "run"))


def test_the_summary_of_a_run_reads_steps_as_the_report_does(tmp_path):
    read_steps = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "musique" / "summary.py"))["read_steps"]
    lines = [{"step": 1}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 1.0}, {"step": 3, "skipped": "not finite"}]
    lines.append({"step": 2, "split": "valid"})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"split": "train", **line}) + "\n" for line in lines) + '{"step": 4, "lo')
    assert [(step["step"], step.get("loss")) for step in read_steps(tmp_path)] == [(1, None), (2, 1.0)]
    path.write_text(json.dumps(lines[-1]) + "\n")
    with pytest.raises(UserError, match="holds no training step"):
        read_steps(tmp_path)


def test_paths_of_one_data_file_are_the_same_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = write_evaluation(tmp_path / "a.json", {8: 0.1}, data="q.jsonl, p.jsonl")
    b = write_evaluation(tmp_path / "b.json", {8: 0.9}, data=f"{tmp_path}/q.jsonl, {tmp_path}/p.jsonl")
    assert len(results.read_evaluations([str(a), str(b)])) == 2


def test_names_distinguish_folders():
    assert results.folder_names(["runs/a/hf", "runs/b/hf", "base"]) == ["a/hf", "b/hf", "base"]


def test_models_without_a_label_get_different_ones(tmp_path, monkeypatch):
    a, b = (
        str(write_evaluation(tmp_path / f"{name}.json", {8: score}, model=f"runs/{name}/hf"))
        for name, score in (("A", 0.1), ("B", 0.9))
    )
    assert [one.label for one in results.read_evaluations([a, b])] == ["A/hf", "B/hf"]
    assert [one.label for one in results.read_evaluations([f"solo={a}", f"solo={b}"])] == ["solo", "solo"]
    assert [one.label for one in results.read_evaluations([a])] == ["hf"]
    assert report.main(["--output", str(tmp_path / "r.md"), "--evaluations", a, b]) == 0
    rows = [line.split()[1] for line in (tmp_path / "r.md").read_text().splitlines() if "/hf" in line]
    assert rows == ["A/hf", "B/hf"] * 3  # sub-EM, the other metrics, where the numbers come from
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert results.read_evaluation(str(write_evaluation(tmp_path / "here.json", {8: 0.5}, model="."))).label == "model"


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"data": "hotpotqa.jsonl"}, "data"),
        ({"max_new_tokens": 16, "dtype": "bfloat16"}, "max_new_tokens, dtype"),
        ({"seed": 1, "context_documents": "16", "left_out": {"too short": 2}}, None),
    ],
)
def test_only_what_differs_by_seed_and_lengths_is_averaged_without_a_label(tmp_path, changes, differing):
    settings = {"max_new_tokens": 8, "dtype": "float32", "context_documents": "8"}
    a = str(write_evaluation(tmp_path / "a.json", {8: 0.1}, **settings))
    b = str(write_evaluation(tmp_path / "b.json", {8: 0.9}, **settings | changes))
    assert [one.label for one in results.read_evaluations([f"solo={a}", f"solo={b}"])] == ["solo", "solo"]
    if differing is None:
        assert [one.label for one in results.read_evaluations([a, b])] == ["model", "model"]
        return
    with refused("seeds-differ", a, b, "'model'", f" in {differing};", "LABEL=PATH"):
        results.read_evaluations([a, b])


def test_runs_without_a_label_get_different_ones(tmp_path):
    a, b = (str(write_run(tmp_path / name / "orpo", 5, offset)) for name, offset in (("A", 0.0), ("B", 1.0)))
    assert [run.label for run in results.read_runs([f"ORPO={a}", f"ORPO={b}"])] == ["ORPO", "ORPO"]
    assert report.main(["--output", str(tmp_path / "r.md"), "--runs", a, b]) == 0
    text = (tmp_path / "r.md").read_text()
    assert re.search(r"\| A/orpo +\| ", text) and re.search(r"\| B/orpo +\| ", text) and "seeds" not in text
    with refused("seeds-differ", "'orpo'", " in folder;", "LABEL=PATH"):
        results.read_runs([f"orpo={a}", b])


def test_a_name_that_is_also_another_models_label_is_refused(tmp_path):
    a, b = (write_evaluation(tmp_path / f"{name}.json", {8: 0.5}, model=f"runs/{name}/hf") for name in "AB")
    with refused("seeds-differ", "'hf'", " in model;"):
        results.read_evaluations([f"hf={a}", str(b)])


@pytest.mark.parametrize(
    ("content", "code", "named"),
    [
        (None, "file-missing", ""),
        (b"PK\x03\x04\xff\x00", "not-utf8", "(byte 5)"),
        ('{"metrics": {}}'.encode("utf-16"), "not-utf8", "(byte 1)"),
        ("{", "not-json", "line 1"),
        ("[]", "field-type", ""),
        ("{}", "field-missing", "'metrics'"),
        ('{"metrics": {}, NAMES}', "results-empty", "'metrics'"),
        (
            '{"metrics": {"eight": {}}, NAMES}',
            "field-value",
            "metrics['eight']: ",
        ),
        (
            '{"metrics": {"8 documents": {}}, NAMES}',
            "field-missing",
            "metrics['8 documents']: the field 'interval'",
        ),
        (
            '{"metrics": {"8 documents": {"interval": {"em": [0, "1"]}, "count": 1}}, NAMES}',
            "field-type",
            "metrics['8 documents']: the field 'interval['em'][1]' must be a number, found str",
        ),
        ('{"metrics": [], NAMES}', "field-type", "the field 'metrics' must be dict, found list"),
    ],
)
def test_evaluation_files_are_refused_by_name(tmp_path, content, code, named):
    path = tmp_path / "e.json"
    if content is not None:
        names = '"model": "m", "data": "d"'
        path.write_bytes(content if isinstance(content, bytes) else content.replace("NAMES", names).encode())
    with refused(code, f"{path}: ", named):
        results.read_evaluation(str(path))
