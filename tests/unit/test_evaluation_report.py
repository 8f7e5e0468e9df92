"""Figures and the Markdown report."""

import itertools
import json
import re
import subprocess
import sys

import pytest
from evaluation_files import write_evaluation, write_run
from refusals import refused

from megatron_solopo import metrics
from megatron_solopo.evaluation import curves, plots, report, results
from megatron_solopo.evaluation.plots import look, smooth


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
    counts = {"sampled": 40, "paired": 10, "all_right": 4, "all_wrong": 20, "responses": 320, "right_responses": 80}
    (tmp_path / "c.json").write_text(json.dumps(counts | {"groups": 12, "scorer": "sub_em"}))
    arguments += ["--counts", f"one={tmp_path / 'c.json'}"]
    assert report.main(arguments) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Three methods\n")
    [sampled] = rows_of(text, r"\| label +\| +questions")[2:]
    assert sampled == ["one", "40", "320", "25.0%", "10.0%", "50.0%", "25.0%", "12"]
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


def test_counts_of_another_kind_are_refused(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    for name, code in (("c.json", "field-missing"), ("d.json", "file-missing")):
        with refused(code, f"--counts {tmp_path / name}: "):
            report.main(["--output", str(tmp_path / "r.md"), "--counts", str(tmp_path / name)])


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
    """The cells of the table whose head starts so."""
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
    column = head.index("preference loss (nats) ↓")
    assert [row[column] for row in rows] == ["0.685", "0.508", "0.700", "0.500"]
    assert {"alignment (before alpha) ↓", "reward of chosen (reward)", "log-prob of chosen (nats an answer)"} <= set(
        head
    )


def test_the_costs_of_a_run_list_saves_and_clipped_steps_separately(tmp_path):
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
def test_a_caption_names_how_much_a_mean_covers(tmp_path, steps, mean):
    run = results.read_run(str(write_solo_run(tmp_path / "solo", steps, valid=(0,))))
    text = report.write_report(tmp_path / "r.md", [run])[0].read_text()
    [caption] = [line for line in text.splitlines() if line.startswith("*Preference training: ")]
    assert mean in caption and "evaluations on 3 validation examples" in caption and "--clip-grad" in caption


def test_the_parts_of_the_loss_are_drawn(tmp_path, monkeypatch):
    drawn = {}
    draw = plots.draw_curves

    def kept(path, panels, looks, marks):
        drawn.update(panels=panels, marks=marks)
        draw(path, panels, looks, marks)

    monkeypatch.setattr(curves, "draw_curves", kept)
    run = results.read_run(str(write_solo_run(tmp_path / "solo", 20, valid=(0, 20))))
    report.write_report(tmp_path / "r.md", [run])
    panels = {metric.title: panel for metric, panel in drawn["panels"].items()}
    assert list(panels)[:5] == ["Total loss", "Preference loss", "Pair accuracy", "Reward margin", "Alignment"]
    assert {"Reward of chosen", "Reward of rejected", "Log-prob of chosen"} <= set(panels)
    assert "Short-long gap" not in panels and panels["Gradient norm"][0]["solo"][0].mean == 7.0  # no run has the gap
    assert [point.x for point in panels["Preference loss"][1]["solo"]] == [0, 20]
    assert drawn["marks"] == {"grad_norm": [1.0]}


def test_an_axis_ends_where_its_metric_does(tmp_path, monkeypatch):
    """A pair accuracy of 0.5 is drawn between 0 and 1, and a loss near its values."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    report.write_report(tmp_path / "r.md", [results.read_run(str(write_solo_run(tmp_path / "solo", 20)))])
    limits = {axes.get_title(loc="left"): axes.get_ylim() for axes in figures[0].axes}
    assert limits["Pair accuracy"] == (0, 1.02) and limits["Total loss"][0] > 0.6


def test_cut_answers_are_reported(tmp_path):
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
        for written in (methods, None):  # an older file does not mention F1
            whole["metrics"]["8 documents"] |= {"interval_method": written}
            path.write_text(json.dumps(whole))
            evaluations = [results.read_evaluation(f"base={path}")]
            text = report.write_report(tmp_path / "r.md", (), evaluations, metric=metric)[0].read_text()
            assert (f"intervals over questions ({name})." in text) == (written is not None or metric == "sub_em")


def test_only_figures_that_were_written_are_counted(tmp_path, capsys):
    for stale in ("r-training.png", "r-x-accuracy.png"):
        (tmp_path / stale).write_bytes(b"")
    evaluation = write_evaluation(tmp_path / "e.json", {8: 0.5})
    assert report.main(["--output", str(tmp_path / "r.md"), "--evaluations", str(evaluation)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'r.md'} and 1 figure beside it\n"


def test_both_units_have_a_figure_and_text_is_passed_through(tmp_path):
    evaluations = [
        results.read_evaluation(str(write_evaluation(tmp_path / "a.json", {8: 0.5, 16: 0.25}))),
        results.read_evaluation(str(write_evaluation(tmp_path / "b.json", {1024: 0.5}, unit="tokens"))),
    ]
    path, _ = report.write_report(tmp_path / "r.md", (), evaluations, text="What was done.", closing="## Next\n\nMore.")
    text = path.read_text()
    assert "\n\nWhat was done.\n\n" in text and text.endswith("## Next\n\nMore.\n")
    assert {p.name for p in tmp_path.glob("*.png")} == {"r-accuracy-documents.png", "r-accuracy-tokens.png"}


def test_captions_explain_the_points_of_their_chart(tmp_path):

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


def test_a_curve_is_a_centred_mean():
    points = [results.Point(step, step % 2, step % 2 - 1, step % 2 + 1, 1) for step in range(1, 101)]
    frame = smooth(points)  # 100 points: over 5 steps
    for name in ("mean", "low", "high"):
        values = [getattr(point, name) for point in points]
        expected = [sum(part) / len(part) for i in range(100) if (part := values[max(i - 2, 0) : i + 3])]
        assert frame[name].tolist() == pytest.approx(expected)
    assert frame["x"].tolist() == [*range(1, 101)] and frame["seeds"].tolist() == [1] * 100
    assert smooth(points[:49])["mean"].tolist() == [point.mean for point in points[:49]]


def test_a_legend_names_every_label_once(tmp_path, monkeypatch):
    """Runs and evaluations of a label look alike."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    runs = [results.read_run(f"{name}={write_solo_run(tmp_path / name, 20, valid=(0, 20))}") for name in "ab"]
    evaluations = [
        results.read_evaluation(f"{name}={write_evaluation(tmp_path / f'{name}.json', {8: 0.5})}") for name in "ab"
    ]
    report.write_report(tmp_path / "r.md", runs, evaluations)
    accuracy, training = ([text.get_text() for text in figure.legends[0].texts] for figure in figures)
    assert accuracy == ["a", "b"] and training == ["a", "b", "training", "validation"]
    colours = {line.get_color() for axes in figures[1].axes for line in axes.lines if line.get_marker() == "o"}
    assert colours == {plots.COLOURS[0]} != {plots.COLOURS[1]}


def test_every_label_looks_different():
    looks = look([f"label {index}" for index in range(21)])
    for style in ("linestyle", "marker"):  # points alone show no line
        assert len({(one["color"], one[style]) for one in looks.values()}) == 21


def test_a_legend_of_many_long_labels_is_within_its_figure(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    for count in (2, 19):
        labels = [f"a label of many words, the {number}th" for number in range(count)]
        points = {label: (1e12, results.Point(8, 0.5, 0.4, 0.6, 1)) for label in labels}
        plots.draw_cost(tmp_path / "cost.png", points, look(labels), "sub-EM")
    for figure in figures:
        figure.canvas.draw()
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width and legend.y0 >= figure.axes[0].bbox.y1
        assert figure.axes[0].bbox.height > 150


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
        with refused("file-overlap", f"--output {output}: ", flag):
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
    with refused("option-missing", "--runs", "--evaluations"):
        report.main(["--output", str(tmp_path / "r.md")])
    with refused("file-missing", "metrics.jsonl: "):
        report.main(["--output", str(tmp_path / "r.md"), "--runs", str(tmp_path)])


def test_importing_the_report_does_not_import_torch():
    code = "import sys, megatron_solopo.evaluation.report; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == [
        "False",
        "False",
    ]


def test_a_metric_that_is_declared_appears_everywhere(tmp_path, monkeypatch):
    """One declaration, by whoever measures it, and the curves, the table and the printed line have it."""
    from megatron_solopo.training import log

    declared = dict(metrics._DECLARED)
    monkeypatch.setattr(metrics, "_DECLARED", declared)
    metrics.register(metrics.Metric("kl", "divergence", "nats per token", False, line="kl {:.3g}"))
    folder = write_solo_run(tmp_path / "run", 20)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line | ({"kl": 0.25, "mystery": 1.5} if line["split"] == "train" else {}) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / metrics.LABELS).write_text(json.dumps(metrics.to_json([declared["kl"]])))

    def shown():
        """Heads of the table of runs, and titles of the panels with their axes."""
        drawn = []
        monkeypatch.setattr(curves, "draw_curves", lambda path, panels, *more: drawn.extend(panels))
        text = report.write_report(tmp_path / "r.md", [results.read_run(str(folder))])[0].read_text()
        return rows_of(text, r"\| label +\| of ")[0], [(metric.title, metric.unit) for metric in drawn]

    heads, panels = shown()
    assert heads[-2:] == ["divergence (nats per token) ↓", "mystery"] and heads.index("total loss (nats) ↓") == 3
    assert panels[-2:] == [("Divergence", "nats per token"), ("mystery", "")]  # nobody declared the last one
    assert log._summary(lines[0]).split(" grad ")[1] == "7 (clipped to 1) kl 0.25 20 tok/s 0.5 s/step"
    del declared["kl"]  # a process without the loss that declares it reads it from the run's folder
    assert set(shown()[1]) == set(panels)
    (folder / metrics.LABELS).unlink()
    assert ("kl", "") in shown()[1]


def test_two_metrics_of_one_name_are_refused():
    metrics.register(metrics.metric_of("loss"))
    with pytest.raises(ValueError, match="two metrics are named 'loss'"):
        metrics.register(metrics.Metric("loss", "another"))


def test_a_score_of_a_file_that_nobody_declared_is_in_the_tables(tmp_path):
    paths = [write_evaluation(tmp_path / f"{name}.json", {8: 0.5}) for name in "ab"]
    whole = json.loads(paths[0].read_text())
    values = whole["metrics"]["8 documents"]
    values["rouge"], values["interval"]["rouge"] = 0.75, [0.7, 0.8]
    paths[0].write_text(json.dumps(whole))
    evaluations = [results.read_evaluation(f"{path.stem}={path}") for path in paths]
    text = report.write_report(tmp_path / "r.md", (), evaluations)[0].read_text()
    assert rows_of(text, r"\| plain sub-EM / EM / F1 / rouge ")[2:] == [
        ["a", "0.50 / 0.50 / 0.50 / 0.75"],
        ["b", "0.50 / 0.50 / 0.50 / -"],
    ]
    drawn = report.write_report(tmp_path / "r.md", (), evaluations, metric="rouge")[0].read_text()
    assert rows_of(drawn, r"\| rouge ")[2:] == [["a", "0.75 [0.70, 0.80]"]]
    with refused("metric-unknown", "--metric bleu: ", "sub_em, "):
        report.write_report(tmp_path / "r.md", (), evaluations, metric="bleu")


@pytest.mark.parametrize("metric", ["sub_em", "gold_log_prob"])
def test_log_probs_of_gold_answers_have_their_own_axis_and_differences(tmp_path, monkeypatch, metric):
    figures = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.update({path.name: figure}))
    paths = [write_evaluation(tmp_path / f"{name}.json", {8: 0.5}, count=2) for name in "ab"]
    for path, mean in zip(paths, (-3.0, -2.0), strict=True):
        whole = json.loads(path.read_text())
        values = whole["metrics"]["8 documents"]
        values["gold_log_prob"], values["interval"]["gold_log_prob"] = mean, [mean - 1, mean + 1]
        path.write_text(json.dumps(whole))
        scores = [{"id": str(n), "length": "8 documents", "gold_log_prob": mean + n, "sub_em": 1.0} for n in (-1, 1)]
        results.predictions_path(path).write_text("".join(json.dumps(one) + "\n" for one in scores))
    evaluations = [results.read_evaluation(f"{path.stem}={path}") for path in paths]
    text = report.write_report(tmp_path / "r.md", (), evaluations, metric=metric)[0].read_text()
    assert rows_of(text, r"\| log-prob of the gold answer ")[2:] == [
        ["a", "-3.00 [-4.00, -2.00]"],
        ["b", "-2.00 [-3.00, -1.00]"],
    ]
    assert "+1.000 | [+1.000, +1.000]" in text and "plain sub-EM / EM / F1 / log-prob" not in text
    name = {"sub_em": "r-gold-log-prob.png", "gold_log_prob": "r-accuracy.png"}[metric]
    [axes] = figures[name].axes
    assert axes.get_ylabel() == "Log-prob of the gold answer (nats per token)" and axes.get_ylim()[0] < -4
