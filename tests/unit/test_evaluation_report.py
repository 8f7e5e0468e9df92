"""Reading results and runs back, averaging over seeds, figures and the Markdown report."""

import itertools
import json
import math
import random
import re
import runpy
from pathlib import Path

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.evaluation import report, results
from megatron_solopo.evaluation.plots import look, spread


def write_evaluation(path, scores, count=100, model="runs/model", unit="documents", data="questions.jsonl", **settings):
    """An evaluation file with the same score for every metric; ``scores`` is {length: score}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = {}
    for length, score in scores.items():
        interval = list(results.wilson_interval(score, count))
        metrics[f"{length} {unit}"] = {
            "sub_em": score,
            "em": score,
            "f1": score,
            "count": count,
            "mean_prompt_tokens": 5.0 * length,
            "interval": {"sub_em": interval, "em": interval, "f1": interval},
        }
    path.write_text(json.dumps({"model": model, "data": data, "metrics": metrics, "settings": {"seed": 0, **settings}}))
    return path


def write_run(folder, steps=60, offset=0.0, preference=True):
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "loss": 2.0 / step + offset,
                "tokens": 100,
                "seconds": 0.5,
                "memory_gib": 1.0 + step / 100,
            }
            if preference:
                record |= {
                    "margin": step / 10 + offset,
                    "accuracy": step / steps,
                    "short_long_gap_nats_per_token": 1.0 / step,
                }
            out.write(json.dumps(record) + "\n")
            if step % 20 == 0:
                out.write(json.dumps({**record, "split": "valid"}) + "\n")
    return folder


@pytest.mark.parametrize(("mean", "count"), [(0.5, 10), (0.9, 512), (0.0, 20), (1.0, 20), (0.17, 300)])
def test_the_wilson_interval_inverts_the_score_test(mean, count):
    """Each end p solves |mean - p| = z sqrt(p (1 - p) / n), unless it is 0 or 1."""
    low, high = results.wilson_interval(mean, count)
    assert low <= mean <= high
    for p in (low, high):
        if 0 < p < 1:
            assert abs(mean - p) == pytest.approx(results.Z_95 * math.sqrt(p * (1 - p) / count), abs=1e-12)


def test_interval_of_scores_that_are_not_yes_or_no():
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        (low, high), method = results.mean_interval("f1", [rng.random() for _ in range(50)])
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / 400 <= 0.98 and method == "normal"
    assert results.mean_interval("em", [1.0, 0.0, 1.0, 1.0]) == (results.wilson_interval(0.75, 4), "wilson")


@pytest.mark.parametrize("count", [1, 2, 5, 10, 20])
def test_the_interval_of_few_f1_scores_holds_their_mean_at_least_as_often_as_it_says(count):
    """The normal approximation does not: of one score it has no width at all."""
    rng = random.Random(count)
    covered = 0
    for _ in range(400):
        (low, high), method = results.mean_interval("f1", [rng.choice([0.0, 0.4, 0.8, 1.0]) for _ in range(count)])
        covered += low <= 0.55 <= high
    assert method == "wilson_bound" and covered / 400 >= 0.95
    assert results.mean_interval("f1", [0.5] * count)[0] == results.wilson_interval(0.5, count)


def test_seeds_of_one_label_are_averaged_with_their_spread(tmp_path):
    files = [
        write_evaluation(tmp_path / f"{seed}.json", {8: score, 16: score - 0.1})
        for seed, score in enumerate((0.9, 0.8, 1.0))
    ]
    evaluations = [results.read_evaluation(f"SoLoPO={path}") for path in files]
    evaluations.append(results.read_evaluation(f"base={write_evaluation(tmp_path / 'base.json', {8: 0.5})}"))
    # Files from before sub-EM told short answers apart hold the plain form only.
    assert evaluations[0].results[0].means["sub_em_plain"] == evaluations[0].results[0].means["sub_em"]
    first, second = results.accuracy_by_length(evaluations, "SoLoPO", "documents", "sub_em")
    assert (first.x, first.low, first.high, first.seeds) == (8, 0.8, 1.0, 3) and first.mean == pytest.approx(0.9)
    assert second.mean == pytest.approx(0.8)
    [single] = results.accuracy_by_length(evaluations, "base", "documents", "sub_em")
    assert (single.low, single.high) == results.wilson_interval(0.5, 100)
    table = report.accuracy_table(evaluations, "documents").splitlines()
    assert table[2].split("|")[1:-1] == [" SoLoPO ", " 0.90 [0.80, 1.00] ", " 0.80 [0.70, 0.90] "]
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
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not valid JSON"):
        results.read_run(str(tmp_path / "run"))
    path.write_bytes(b"\xff\xfe\n\x00\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not UTF-8"):
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


def test_report_of_runs_and_evaluations(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "out" / "report.md"), "--title", "Three methods", "--runs"]
    for seed in (0, 1):
        for label in ("SoLoPO", "short-PO"):
            arguments.append(f"{label}={write_run(tmp_path / f'{label}-{seed}', offset=seed)}")
    arguments.append(f"base={write_run(tmp_path / 'base', preference=False)}")
    arguments += [
        "--evaluations",
        *(
            f"{label}={write_evaluation(tmp_path / label / 'e.json', {8: 0.9, 64: score}, model=label)}"
            for label, score in (("base", 0.2), ("short-PO", 0.3), ("SoLoPO", 0.95))
        ),
    ]
    assert report.main(arguments) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Three methods\n")
    for name in ("report-accuracy.png", "report-training.png", "report-supervised.png"):
        assert f"]({name})" in text
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "| 0.95 [0.89, 0.98] |" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report-accuracy.png",
        "report-supervised.png",
        "report-training.png",
        "report.md",
    ]
    [row] = [
        line
        for line in text.splitlines()
        if line.startswith("| base ") and "`" in line and "metrics" not in line and " 60 " in line
    ]
    assert "6,000" in row and " 0.5 " in row and " 1.60 " in row  # 60 x 100 tokens, 60 x 0.5 s, memory at the last step
    assert "3 figures" in capsys.readouterr().out


SOLO = {"po_loss": 0.6, "alignment_loss": 0.2, "reward_chosen": 0.1, "reward_rejected": -0.1, "logp_chosen": -9.0}


def write_solo_run(folder, steps, groups=4, valid=(), clip=1.0):
    """A run in today's form: the total loss rises with the step while the preference loss falls."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(steps + 1):
        losses = {"loss": 0.7 + step / 100, "po_loss": 0.7 - step / 100, "margin": step / 10, "accuracy": 0.5}
        if step in valid:
            lines.append({"step": step, "split": "valid", **SOLO, **losses, "loss": 5.0 + step, "groups": 3})
        if step:
            cost = {"tokens": 10, "tokens_per_second": 20.0, "padding_share": 0.0, "seconds": 0.5, "memory_gib": 1.5}
            grad = {"grad_norm": 7.0, "clip_grad": clip, "clipped": 7.0 > clip}
            last = {"groups": 1 if step == steps else groups}
            lines.append({"step": step, "split": "train", **SOLO, **losses, **grad, **last, **cost})
    lines.append({"step": steps, "split": "save", "seconds": 2.0, "memory_gib": 4.25})
    lines.append({"step": steps, "split": "export", "seconds": 2.0, "memory_gib": 2.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows_of(text, head):
    """The cells of the table whose head begins so."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(head, line))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_validation_and_the_parts_of_the_loss_are_in_the_table(tmp_path):
    run = results.read_run(str(write_solo_run(tmp_path / "solo", 20, valid=(0, 10, 20))))
    text = report.write_report(tmp_path / "r.md", [run])[0].read_text()
    head, _, *rows = rows_of(text, r"\| label +\| of ")
    assert [row[:4] for row in rows] == [
        ["solo", "train, steps 1 to 2", "8", "0.715"],
        ["solo", "train, steps 19 to 20", "5", "0.892"],  # 4 examples of 0.89, 1 of 0.90
        ["solo", "validation, before step 1", "3", "5.000"],
        ["solo", "validation, after step 20", "3", "25.000"],
    ]
    column = head.index("preference loss")
    assert [row[column] for row in rows] == ["0.685", "0.508", "0.700", "0.500"]
    assert {"alignment", "reward chosen", "reward rejected", "log-prob chosen"} <= set(head)


def test_what_a_run_took_names_saves_and_clipped_steps_apart(tmp_path):
    folders = [write_solo_run(tmp_path / name, 20, clip=clip) for name, clip in (("a", 1.0), ("b", 9.0))]
    runs = [results.read_run(str(folder)) for folder in folders]
    runs.append(results.read_run(str(write_run(tmp_path / "older", 20))))
    text = report.write_report(tmp_path / "r.md", runs)[0].read_text()
    head, _, *rows = rows_of(text, r"\| label +\| folder ")
    places = [head.index(name) for name in ("clipped", "peak memory (GiB)", "peak in saves (GiB)")]
    assert [[row[place] for place in places] for row in rows] == [
        ["20", "1.50", "4.25"],
        ["0", "1.50", "4.25"],
        ["-", "1.20", "-"],
    ]


@pytest.mark.parametrize(
    ("steps", "mean"), [(20, "lines show every step, each the mean over 1 to 4 examples"), (120, "over 5 steps, each")]
)
def test_a_caption_says_how_much_a_mean_covers(tmp_path, steps, mean):
    run = results.read_run(str(write_solo_run(tmp_path / "solo", steps, valid=(0,))))
    text = report.write_report(tmp_path / "r.md", [run])[0].read_text()
    [caption] = [line for line in text.splitlines() if line.startswith("*Preference training: ")]
    assert mean in caption and "evaluations on 3 validation examples" in caption and "--clip-grad" in caption


def test_the_parts_of_the_loss_are_drawn(tmp_path, monkeypatch):
    from megatron_solopo.evaluation import plots

    drawn = {}
    draw = plots.draw_curves

    def kept(path, panels, looks, marks):
        drawn.update(panels=panels, marks=marks)
        draw(path, panels, looks, marks)

    monkeypatch.setattr(plots, "draw_curves", kept)
    run = results.read_run(str(write_solo_run(tmp_path / "solo", 20, valid=(0, 20))))
    report.write_report(tmp_path / "r.md", [run])
    fields = {y_name: train["solo"][0].mean for y_name, train, _ in drawn["panels"].values()}
    assert list(drawn["panels"])[:3] == ["Total loss", "Preference loss", "Alignment"]
    assert {"Reward of chosen", "Reward of rejected", "Log-prob of chosen", "Gradient norm"} <= set(drawn["panels"])
    assert "Short-long gap" not in drawn["panels"] and fields["before clipping"] == 7.0  # no run has the gap
    assert [point.x for point in drawn["panels"]["Preference loss"][2]["solo"]] == [0, 20]
    assert drawn["marks"] == {"Gradient norm": [1.0]}


def test_answers_that_were_cut_are_told(tmp_path):
    path = write_evaluation(tmp_path / "e.json", {8: 0.5, 16: 0.5})
    whole = json.loads(path.read_text())
    whole["metrics"]["16 documents"]["cut"] = 12
    path.write_text(json.dumps(whole))
    evaluations = [results.read_evaluation(f"base={path}")]
    text = report.write_report(tmp_path / "r.md", (), evaluations)[0].read_text()
    assert "Answers cut at --max-new-tokens, scored as far as they go: base 12 of 100." in text


def test_the_caption_names_the_interval_of_the_drawn_metric(tmp_path):
    path = write_evaluation(tmp_path / "e.json", {8: 0.5})
    whole = json.loads(path.read_text())
    methods = {"sub_em": "wilson", "em": "wilson", "f1": "normal"}
    for metric, name in (("sub_em", "Wilson score interval"), ("f1", "normal approximation")):
        for written in (methods, None):  # an older file says nothing of F1
            whole["metrics"]["8 documents"] |= {"interval_method": written}
            path.write_text(json.dumps(whole))
            evaluations = [results.read_evaluation(f"base={path}")]
            text = report.write_report(tmp_path / "r.md", (), evaluations, metric=metric)[0].read_text()
            assert (f"intervals over questions ({name})." in text) == (written is not None or metric == "sub_em")


def test_paths_of_one_data_file_are_the_same_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = write_evaluation(tmp_path / "a.json", {8: 0.1}, data="q.jsonl, p.jsonl")
    b = write_evaluation(tmp_path / "b.json", {8: 0.9}, data=f"{tmp_path}/q.jsonl, {tmp_path}/p.jsonl")
    assert len(results.read_evaluations([str(a), str(b)])) == 2


def test_only_figures_that_were_written_are_counted(tmp_path, capsys):
    for stale in ("r-training.png", "r-x-accuracy.png"):
        (tmp_path / stale).write_bytes(b"")
    evaluation = write_evaluation(tmp_path / "e.json", {8: 0.5})
    assert report.main(["--output", str(tmp_path / "r.md"), "--evaluations", str(evaluation)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'r.md'} and 1 figure beside it\n"


def test_both_units_have_their_own_figure_and_text_is_passed_through(tmp_path):
    evaluations = [
        results.read_evaluation(str(write_evaluation(tmp_path / "a.json", {8: 0.5, 16: 0.25}))),
        results.read_evaluation(str(write_evaluation(tmp_path / "b.json", {1024: 0.5}, unit="tokens"))),
    ]
    path, _ = report.write_report(tmp_path / "r.md", (), evaluations, text="What was done.", closing="## Next\n\nMore.")
    text = path.read_text()
    assert "\n\nWhat was done.\n\n" in text and text.endswith("## Next\n\nMore.\n")
    assert {p.name for p in tmp_path.glob("*.png")} == {"r-accuracy-documents.png", "r-accuracy-tokens.png"}


def test_captions_say_what_the_points_of_their_chart_are(tmp_path):

    def captions(**files):
        evaluations = [
            results.read_evaluation(f"{name.rstrip('0123456789')}={write_evaluation(tmp_path / f'{name}.json', **one)}")
            for name, one in files.items()
        ]
        text = report.write_report(tmp_path / "r.md", (), evaluations)[0].read_text()
        return [line.split("; ", 1)[1].strip("*") for line in text.splitlines() if line.startswith("*sub-EM by")]

    short, long = ({"scores": scores, "unit": "tokens"} for scores in ({1024: 0.5}, {4096: 0.5, 8192: 0.4}))
    documents = {"scores": {8: 0.5}, "count": 50}
    single = "Bars and brackets are 95 % intervals over questions (Wilson score interval)."
    seeds = "Points are means over seeds, bars and brackets the lowest and highest seed"
    assert captions(p1=short, p2=long) == [f"100 questions, the same at every length. {single}"]
    assert captions(p1=short, p2=long, p3=documents) == [
        f"100 questions, the same at every length. {single}",
        f"50 questions, the same at every length. {single}",
    ]
    assert captions(p1=short, p2=short, p3=documents) == [
        f"100 questions, the same at every length. {seeds}.",
        f"50 questions, the same at every length. {single}",
    ]
    assert captions(p1=short, p2=short, p3=long | {"count": 50}) == [
        f"50 to 100 questions. {seeds}; with a single seed, the 95 % interval over questions (Wilson score interval)."
    ]


def test_steps_without_a_finite_loss_are_named(tmp_path):
    folder = write_run(tmp_path / "bad", 20)
    with (folder / "metrics.jsonl").open("a") as out:
        out.write('{"step": 21, "loss": NaN, "margin": NaN, "tokens": 100}\n')
    path, _ = report.write_report(tmp_path / "r.md", [results.read_run(str(folder))])
    assert "The loss was not finite in bad (1 steps)" in path.read_text()
    assert "nan" not in path.read_text().lower()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_labels_never_overlap_and_stay_inside(count):
    rng = random.Random(count)
    for _ in range(200):
        wanted = {str(index): rng.choice([0.0, 0.97, rng.random()]) for index in range(count)}
        heights = {label: rng.choice([0.05, 0.1]) for label in wanted}
        placed = spread(wanted, heights)
        order = sorted(placed, key=placed.get)
        assert [wanted[label] for label in order] == sorted(wanted.values())
        for a, b in itertools.pairwise(order):
            assert placed[b] - placed[a] >= (heights[a] + heights[b]) / 2 - 1e-9
        assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed.values())


def test_labels_that_do_not_collide_stay_where_their_lines_end():
    wanted = {"a": 0.2, "b": 0.5, "c": 0.9}
    assert spread(wanted, dict.fromkeys(wanted, 0.1)) == pytest.approx(wanted)


def test_every_label_looks_different():
    looks = look([f"label {index}" for index in range(21)])
    assert len({(one["color"], one["linestyle"]) for one in looks.values()}) == 21


def test_names_tell_folders_apart():
    assert results.folder_names(["runs/a/hf", "runs/b/hf", "base"]) == ["a/hf", "b/hf", "base"]


def test_models_without_a_label_are_told_apart(tmp_path, monkeypatch):
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
    with pytest.raises(UserError, match=f"of 'model', but differ in {differing}; give both LABEL=PATH") as caught:
        results.read_evaluations([a, b])
    assert a in str(caught.value) and b in str(caught.value)


def test_runs_without_a_label_are_told_apart(tmp_path):
    a, b = (str(write_run(tmp_path / name / "orpo", 5, offset)) for name, offset in (("A", 0.0), ("B", 1.0)))
    assert [run.label for run in results.read_runs([f"ORPO={a}", f"ORPO={b}"])] == ["ORPO", "ORPO"]
    assert report.main(["--output", str(tmp_path / "r.md"), "--runs", a, b]) == 0
    text = (tmp_path / "r.md").read_text()
    assert "| A/orpo | " in text and "| B/orpo | " in text and "seeds" not in text
    with pytest.raises(UserError, match="seeds of 'orpo', but differ in folder; give both LABEL=PATH"):
        results.read_runs([f"orpo={a}", b])


def test_a_name_that_is_also_another_models_label_is_refused(tmp_path):
    a, b = (write_evaluation(tmp_path / f"{name}.json", {8: 0.5}, model=f"runs/{name}/hf") for name in "AB")
    with pytest.raises(UserError, match="seeds of 'hf', but differ in model;"):
        results.read_evaluations([f"hf={a}", str(b)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"PK\x03\x04\xff\x00", r"not UTF-8 \(byte 5\)"),
        ('{"metrics": {}}'.encode("utf-16"), "not UTF-8"),
        ("{", "not valid JSON"),
        ("{}", "the field 'metrics' is missing"),
        ('{"metrics": {}}', "holds no context length"),
        ('{"metrics": {"eight": {}}}', r"metrics\['eight'\]: a context length is written like"),
    ],
)
def test_evaluation_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "e.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        results.read_evaluation(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_report_does_not_replace_what_it_reads(tmp_path):
    evaluation = write_evaluation(tmp_path / "e.json", {8: 0.5})
    metrics = write_run(tmp_path / "run", 5) / "metrics.jsonl"
    for output, flag, argument in (
        (evaluation, "--evaluations", f"solo={evaluation}"),
        (evaluation, "--evaluations", evaluation),
        (metrics, "--runs", f"solo={metrics.parent}"),
        (metrics, "--runs", metrics.parent),
    ):
        before = output.read_bytes()
        with pytest.raises(UserError, match=f"--output {output}: is the file of {flag} too"):
            report.main(["--output", str(output), flag, str(argument)])
        assert output.read_bytes() == before
    assert report.main(["--output", str(metrics.parent / "report.md"), "--runs", str(metrics.parent)]) == 0


def test_dollars_in_labels_are_no_mathematics(tmp_path):
    labels = ("$\\frac$", "5$ or 6$")
    runs = [results.read_run(f"{label}={write_run(tmp_path / str(i), 5)}") for i, label in enumerate(labels)]
    runs.append(results.read_run(f"{labels[0]}={write_run(tmp_path / 'sft', 5, preference=False)}"))
    evaluations = [
        results.read_evaluation(f"{label}={write_evaluation(tmp_path / f'{i}.json', {8: 0.5})}")
        for i, label in enumerate(labels)
    ]
    _, figures = report.write_report(tmp_path / "r.md", runs, evaluations)
    assert len(figures) == 3


def test_nothing_to_report_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        report.main(["--output", str(tmp_path / "r.md")])
    with pytest.raises(UserError, match="metrics.jsonl: no such file"):
        report.main(["--output", str(tmp_path / "r.md"), "--runs", str(tmp_path)])
