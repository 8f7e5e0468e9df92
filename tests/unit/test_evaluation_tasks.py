"""Tasks of benchmarks: their prompts, and the scores of their answers beside the benchmarks' formulas."""

import json
import random
import re
import string
from collections import Counter

import pytest
from benchmark_files import (
    byte_model,
    byte_tokenizer,
    write_hotpotqa,
    write_longbench,
    write_longbench_v2,
    write_squad,
)
from refusals import refused
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, normalize_answer

from megatron_solopo.evaluation import evaluate, report
from megatron_solopo.evaluation.scorers import score_answer
from megatron_solopo.evaluation.tasks import Setting, tasks
from megatron_solopo.evaluation.tasks._documents import read_squad
from megatron_solopo.evaluation.tasks.multiple_choice import question_text

ESSAY = "It rained for days. The harbor was quiet. Nobody came by; the shops stayed shut! Was it a holiday? " * 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "essay.txt").write_text(ESSAY)
    return {
        "essay": folder / "essay.txt",
        "squad": write_squad(folder / "squad.json"),
        "hotpotqa": write_hotpotqa(folder / "hotpot.json"),
        "longbench": write_longbench(folder / "hotpotqa.jsonl"),
        "longbench_v2": write_longbench_v2(folder / "data.json"),
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def asked(name, tokenizer, file=None, sizes=(2048,), depths=(None,), limit=3, seed=0):
    """The items of a task, with their prompts as texts, and the counts of those left out."""
    task, counts = tasks()[name], Counter()
    setting = Setting(tokenizer, list(sizes), seed, limit, depths, task.max_new_tokens)
    items = task.build(setting, None if file is None else str(file), counts)
    return [(item, [tokenizer.decode(prompt) for prompt in item.prompts]) for item in items], counts


NEEDLE_TASKS = [
    ("ruler_niah_single_1", None, 1, r"\d{7}", [1, 1]),
    ("ruler_niah_single_2", "essay", 1, r"\d{7}", [1, 1]),
    ("ruler_niah_single_3", "essay", 1, r"[0-9a-f-]{36}", [1, 1]),
    ("ruler_niah_multikey_1", "essay", 1, r"\d{7}", [4, 4]),
    ("ruler_niah_multikey_2", None, 1, r"\d{7}", [15, 40]),
    ("ruler_niah_multikey_3", None, 1, r"[0-9a-f-]{36}", [10, 30]),
    ("ruler_niah_multivalue", "essay", 4, r"\d{7}", [4, 4]),
    ("ruler_niah_multiquery", "essay", 4, r"\d{7}", [4, 4]),
]


@pytest.mark.parametrize(("name", "file", "answers", "value", "needles"), NEEDLE_TASKS)
def test_needles_are_hidden_and_asked_for_as_rulers_are(tokenizer, files, name, file, answers, value, needles):
    items, counts = asked(name, tokenizer, files.get(file))
    assert len(items) == 3 and not counts
    for item, [prompt] in items:
        assert len(item.answers) == len(set(item.answers)) == answers
        assert all(re.fullmatch(value, answer) for answer in item.answers)
        hidden = re.findall(rf"One of the special magic \w+ for (\S+) is: ({value})\.", prompt)
        assert needles[0] <= len(hidden) <= needles[1] and {of for _, of in hidden} >= set(item.answers)
        # The keys that are asked for are the keys of the answers.
        keys = {key for key, of in hidden if of in item.answers}
        question = prompt.split("mentioned in the provided text")[0].rsplit(" for ", 1)[1]
        assert set(re.split(r",? and |, ", question.strip())) == keys
        one = answers == 1
        assert prompt.startswith("<user>A special magic" if one else "<user>Some special magic")
        assert prompt.endswith("mentioned in the provided text " + ("is" if one else "are"))
        # Prompt and response fill 98 % to 100 % of the length, or no further sentence fits.
        assert 0.9 * (2048 - 128) <= len(item.prompts[0]) <= 2048 - 128
    again, _ = asked(name, tokenizer, files.get(file))
    other, _ = asked(name, tokenizer, files.get(file), seed=1)
    assert [item.prompts for item, _ in again] == [item.prompts for item, _ in items]
    assert [item.answers for item, _ in other] != [item.answers for item, _ in items]


def test_a_needle_lies_at_the_depth_that_is_asked_for(tokenizer, files):
    items, _ = asked("ruler_niah_single_2", tokenizer, files["essay"], (1024, 4096), (0.0, 0.5, 1.0), limit=2)
    assert [item.depth for item, _ in items] == [0.0, 0.5, 1.0] * 2
    assert items[0][0].answers == items[2][0].answers != items[3][0].answers
    for item, prompts in items:
        for prompt in prompts:
            context = prompt.split("\n")[1]
            place = context.index("One of the special") / len(
                context.replace(re.search("One of.*?\\d\\.", context)[0], "")
            )
            assert place == pytest.approx(item.depth, abs=0.06)


def test_variables_are_tracked_through_a_chain(tokenizer):
    items, _ = asked("ruler_vt", tokenizer)
    for item, [prompt] in items:
        example, question = prompt.split("<user>")[1].rsplit("Memorize and track", 1)
        assert re.search(r"are: ( ?[A-Z]{3}){5}\n\n$", example)  # a solved example comes first
        assignments = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", question))
        value = re.search(r"assigned the value (\d+) in the text", question)[1]

        def resolved(name, assignments=assignments):
            return name if name.isdigit() else resolved(assignments[name])

        assert {name for name in assignments if resolved(name) == value} == set(item.answers)
        assert len(item.answers) == 5 and len(item.prompts[0]) <= 2048 - 30


@pytest.mark.parametrize(("name", "file"), [("ruler_qa_squad", "squad"), ("ruler_qa_hotpotqa", "hotpotqa")])
def test_rulers_questions_have_their_documents_among_others(tokenizer, files, name, file):
    items, _ = asked(name, tokenizer, files[file], (1100, 2048))
    assert len(items) == 3
    for item, prompts in items:
        counts = []
        for size, prompt in zip((1100, 2048), prompts, strict=True):
            assert item.answers[0] in prompt and item.question in prompt and prompt.endswith("Answer:")
            numbers = [int(number) for number in re.findall(r"^Document (\d+):$", prompt, re.M)]
            assert numbers == list(range(1, len(numbers) + 1))
            counts.append(len(numbers))
            assert len(item.prompts[prompts.index(prompt)]) <= size - 32
        assert counts[0] < counts[1]
    items, counts = asked(name, tokenizer, files[file], (200_000,))
    assert not items and "documents are shorter than" in str(counts)


@pytest.mark.parametrize(("name", "file"), [("niah_plus_single", "squad"), ("niah_plus_multi", "hotpotqa")])
def test_niah_plus_moves_the_evidence_and_has_no_other_answer(tokenizer, files, name, file):
    items, _ = asked(name, tokenizer, files[file], (1024,), (0.0, 1.0))
    assert [item.depth for item, _ in items] == [0.0, 1.0] * 3
    for item, [prompt] in items:
        assert prompt.count(item.answers[0]) == 1
        place = prompt.index(item.answers[0]) / len(prompt)
        assert place < 0.45 if item.depth == 0 else place > 0.55
        assert 0.98 * (1024 - 64) <= len(item.prompts[0]) <= 1024 - 64


def test_squads_impossible_questions_are_not_asked(files):
    questions = read_squad(str(files["squad"]))
    assert len(questions) == 48 and all(question.id.startswith("q") for question in questions)
    assert all(sum(paragraph.is_supporting for paragraph in question.paragraphs) == 1 for question in questions)


def test_longbench_is_cut_in_the_middle(tokenizer, files):
    items, _ = asked("longbench_hotpotqa", tokenizer, files["longbench"], (1000, 4096))
    for item, (cut, whole) in items:
        number = item.id[1:]
        assert f"{number}w0 " in whole and f" {number}w150 " in whole and f" {number}w299" in whole
        assert f"{number}w0 " in cut and f" {number}w150 " not in cut and f" {number}w299" in cut
        assert cut.endswith(f"Question: {item.question}\nAnswer:<assistant>")
        assert 990 <= len(item.prompts[0]) <= 1000 and len(item.answers) == 2


def test_longbench_v2_asks_for_a_letter(tokenizer, files):
    items, _ = asked("longbench_v2", tokenizer, files["longbench_v2"])
    for number, (item, [prompt]) in enumerate(items):
        assert item.answers == ["ABCD"[number]] and f"A text {{of}} {number}. A text" in prompt
        assert re.search(rf"Which {number}\?\nChoices:\n\(A\) choice A {number}\n\(B\) choice B {number}\n", prompt)


def _normalised(text):
    kept = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _official(name, prediction, answers):
    """The benchmarks' formulas, written again."""
    if name == "longbench_f1":
        best = 0.0
        for answer in answers:
            p, g = _normalised(prediction), _normalised(answer)
            same = sum((Counter(p) & Counter(g)).values())
            if same:
                precision, recall = same / len(p), same / len(g)
                best = max(best, 2 * precision * recall / (precision + recall))
        return best
    if name == "longbench_v2":
        text = prediction.replace("*", "")
        match = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(
            r"The correct answer is ([A-D])", text
        )
        return float(match is not None and match[1] == answers[0])
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    found = [1.0 if answer.lower() in text else 0.0 for answer in answers]
    return sum(found) / len(found) if name == "ruler_all" else max(found)


def _generated_answers(name, count=200):
    rng = random.Random(name)
    words = "The a an red fox Fox, fox. no yes Yes! 12 1,200 O'Brien O\u2019Brien café Paris paris-on-sea the".split()
    for _ in range(count):
        answers = [" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 4))]
        prediction = rng.choice(["", "\x07", "\n\t"]) + " ".join(rng.choices([*words, *answers], k=rng.randint(0, 6)))
        if name == "longbench_v2":
            answers = [rng.choice("ABCD")]
            letter = rng.choice("ABCDE")
            stated = [
                "The correct answer is ({})",
                "The correct answer is {}",
                "**The correct answer is ({})**",
                "({})",
                "{}",
            ]
            prediction = " ".join(
                rng.choice(stated).format(letter) for letter in rng.choices("ABCDE", k=rng.randint(0, 2))
            )
            prediction += f" the correct answer is ({letter})"
        yield prediction, answers


@pytest.mark.parametrize("name", ["ruler_all", "ruler_part", "longbench_f1", "longbench_v2"])
def test_scores_are_the_benchmarks_own_on_generated_answers(name):
    values = set()
    for prediction, answers in _generated_answers(name):
        expected = _official(name, prediction, answers)
        assert score_answer(name, prediction, answers, "unicode") == pytest.approx(expected, abs=1e-12), (
            prediction,
            answers,
        )
        values.add(expected)
    assert {0.0, 1.0} <= values


@pytest.mark.parametrize(("name", "official"), [("em", compute_exact), ("f1", compute_f1)])
def test_em_and_f1_are_squads_on_generated_answers(name, official):
    """In SQuAD's normalisation; answers of articles alone count here, and yes and no follow HotpotQA's rule."""
    compared = set()
    for prediction, answers in _generated_answers(name, 500):
        texts = [normalize_answer(text) for text in (prediction, *answers)]
        if all(texts[1:]) and not {"yes", "no"} & set(texts):
            expected = max(float(official(answer, prediction)) for answer in answers)
            assert score_answer(name, prediction, answers, "squad") == pytest.approx(expected, abs=1e-12)
            compared.add((prediction, expected))
    assert len(compared) > 200 and {0.0, 1.0} <= {value for _, value in compared}


@pytest.mark.parametrize(
    ("name", "prediction", "answers", "expected"),
    [
        ("ruler_all", "They are 1234567 and 7654321.", ["1234567", "7654321", "1111111", "2222222"], 0.5),
        ("ruler_all", "abcde", ["ABCDE"], 1.0),
        ("ruler_part", "It is in Oslo", ["Lima", "oslo"], 1.0),
        ("longbench_f1", "The red fox", ["red fox", "a wolf"], 1.0),
        ("longbench_f1", "no", ["no, never"], 2 / 3),  # HotpotQA's F1 would be 0
        ("longbench_f1", "", ["the"], 0.0),
        ("longbench_v2", "The correct answer is B. Or: the correct answer is (C)", ["B"], 1.0),
        ("longbench_v2", "The correct answer is A, no: The correct answer is (C)", ["C"], 1.0),
        ("longbench_v2", "B", ["B"], 0.0),
        ("choice", "B", ["B"], 1.0),
    ],
)
def test_scores_of_known_answers(name, prediction, answers, expected):
    assert score_answer(name, prediction, answers, None) == pytest.approx(expected)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [byte_model(folder / name, seed) for seed, name in enumerate(("one", "two"))]


def run(model, output, *extra):
    argv = ["--model", str(model), "--output", str(output), "--device", "cpu", "--limit", "3", *map(str, extra)]
    return evaluate.main(argv)


def test_tasks_are_evaluated_reported_and_compared(models, files, tmp_path, capsys):
    chosen = [f"niah_plus_single={files['squad']}", "ruler_vt", f"longbench_v2={files['longbench_v2']}"]
    lengths = ("--context-tokens", "2048,3072", "--depths", "0,0.5,1", "--max-new-tokens", "4")
    for model in models:
        assert run(model, tmp_path / f"{model.name}.json", "--tasks", *chosen, *lengths) == 0
    assert "niah_plus_single: 3 questions at each length and at 3 depths, 0 left out" in capsys.readouterr().out
    results = json.loads((tmp_path / "one.json").read_text())
    names = ("niah_plus_single", "ruler_vt", "longbench_v2")
    assert list(results["metrics"]) == [f"{name}: {size} tokens" for name in names for size in (2048, 3072)]
    assert list(results["metrics"]["ruler_vt: 2048 tokens"]["interval"]) == ["ruler_all"]
    rows = [json.loads(line) for line in (tmp_path / "one.predictions.jsonl").read_text().splitlines()]
    at = [row for row in rows if row["length"] == "niah_plus_single: 3072 tokens"]
    assert [row["depth"] for row in at] == [0, 0.5, 1] * 3
    depths = results["metrics"]["niah_plus_single: 3072 tokens"]["depths"]["f1"]
    assert depths["0.5"] == pytest.approx(sum(row["f1"] for row in at if row["depth"] == 0.5) / 3)
    assert results["metrics"]["niah_plus_single: 3072 tokens"]["count"] == 3
    files_of = [str(tmp_path / f"{model.name}.json") for model in models]
    assert report.main(["--output", str(tmp_path / "r.md"), "--evaluations", *files_of]) == 0
    text = (tmp_path / "r.md").read_text()
    for name in names:
        assert f"### {name}\n" in text and (tmp_path / f"r-accuracy-{name}.png").is_file()
    assert "](r-depth-niah_plus_single.png)" in text and "r-depth-ruler_vt" not in text
    assert (tmp_path / "r-depth-niah_plus_single.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("Differences from one on the same questions") == 3
    assert re.search(r"\| two +\| 2,048 tokens +\| +3 \|", text)


def test_answers_of_tasks_on_disk_are_not_generated_again(models, files, tmp_path, monkeypatch, capsys):
    from megatron_solopo.data.files.jobs import Jobs

    chosen = (
        "--tasks",
        "ruler_vt",
        f"longbench_v2={files['longbench_v2']}",
        "--max-new-tokens",
        "3",
        "--batch-tokens",
        "1",
    )
    run(models[0], tmp_path / "whole.json", *chosen, "--context-tokens", "2048")
    add, calls = Jobs.add, []

    def add_or_stop(*arguments):
        calls.append(arguments)
        if len(calls) > 4:
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Jobs, "add", add_or_stop)
        run(models[0], tmp_path / "r.json", *chosen, "--context-tokens", "2048")
    with refused("unfinished-other-settings", "asked"):
        run(models[0], tmp_path / "r.json", *chosen, "--context-tokens", "2049")
    capsys.readouterr()
    run(models[0], tmp_path / "r.json", *chosen, "--context-tokens", "2048")
    assert "resuming: 4 of 6 answers were generated before" in capsys.readouterr().out
    assert (tmp_path / "r.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


QUESTIONS = [
    {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "high_school_mathematics"},
    {"question": "Sky?", "choices": ["green", "blue"], "answer": "B"},
    {"question": "Opposite of up?", "choices": ["down", "left", "right", "in"], "answer": 0, "subject": "words"},
]


def test_multiple_choice_is_the_letter_with_the_highest_log_prob(models, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    assert run(models[0], tmp_path / "r.json", "--tasks", f"multiple_choice={path}", "--batch-tokens", "300") == 0
    rows = [json.loads(line) for line in (tmp_path / "r.predictions.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[0]), AutoTokenizer.from_pretrained(models[0])
    for row, record in zip(rows, QUESTIONS, strict=True):
        prompt = tokenizer(question_text(record["question"], record["choices"], record.get("subject", "")))["input_ids"]
        scores = []
        for letter in "ABCD"[: len(record["choices"])]:
            ids = tokenizer(f" {letter}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_probs = model(torch.tensor([[*prompt, *ids]])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            scores.append(float(sum(log_probs[place, token] for place, token in enumerate(ids))))
        assert row["prediction"] == "ABCD"[max(range(len(scores)), key=scores.__getitem__)]
    [(label, metrics)] = json.loads((tmp_path / "r.json").read_text())["metrics"].items()
    assert label == "multiple_choice: 4 choices"
    right = ["B", "B", "A"]
    assert metrics["choice"] == sum(row["prediction"] == letter for row, letter in zip(rows, right, strict=True)) / 3


def test_mmlus_csv_has_its_subject_in_the_name(tokenizer, tmp_path):
    path = tmp_path / "world_history_test.csv"
    path.write_text('"When, roughly?",1,2,3,4,C\nWho?,"a, b",c,d,e,A\n')
    items, _ = asked("multiple_choice", tokenizer, path)
    assert [item.answers for item, _ in items] == [["C"], ["A"]]
    assert items[1][1] == [
        "The following are multiple choice questions (with answers) about world history.\n\nWho?\nA. a, b\nB. c\nC. d"
        "\nD. e\nAnswer:"
    ]


def test_questions_of_the_training_data_are_left_out(models, files, tmp_path, capsys):
    first, second, third = (question.question for question in read_squad(str(files["squad"]))[:3])
    group = {"short_messages": [{"role": "user", "content": f"Documents.\n\nQuestion:  {second.upper()}\n\nGo."}]}
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": first.replace("?", " ?!")}) + "\n")
    (tmp_path / "groups.jsonl").write_text(json.dumps(group | {"chosen": third, "rejected": third}) + "\n")
    chosen = ("--tasks", f"niah_plus_single={files['squad']}", "--context-tokens", "1024", "--max-new-tokens", "2")
    trained = ("--training-data", tmp_path / "questions.jsonl", tmp_path / "groups.jsonl")
    run(models[0], tmp_path / "r.json", *chosen, *trained)
    assert (
        "1 questions at each length, 2 left out\n  2 left out: its question is in --training-data"
        in capsys.readouterr().out
    )
    rows = [json.loads(line) for line in (tmp_path / "r.predictions.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [third]
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["left_out"] == {
        "its question is in --training-data": 2
    }


@pytest.mark.parametrize(
    ("extra", "code", "named"),
    [
        (("--tasks", "ruler_vtt"), "option-value", ["--tasks ruler_vtt: ", "did you mean ruler_vt?"]),
        (("--tasks", "ruler_vt", "ruler_vt"), "option-value", ["twice"]),
        (("--tasks", "niah_plus_single"), "option-missing", ["niah_plus_single=FILE", "SQuAD's JSON"]),
        (("--tasks", "ruler_vt=x.json"), "option-unused", ["ruler_vt reads no file"]),
        (("--tasks", "niah_plus_single=none.json"), "file-missing", ["niah_plus_single=none.json: "]),
        (("--tasks", "ruler_vt"), "option-missing", ["--tasks ruler_vt: --context-tokens"]),
        (("--tasks", "ruler_vt", "--context-documents", "2"), "option-unused", ["--context-documents"]),
        (("--tasks", "ruler_vt", "--context-tokens", "900", "--depths", "0"), "option-unused", ["--depths"]),
        (("--tasks", "ruler_vt", "--context-tokens", "900", "--pool", "p"), "option-unused", ["--pool"]),
        (("--tasks", "ruler_vt", "--context-tokens", "9999"), "prompt-beyond-positions", ["--context-tokens 9999"]),
        (
            ("--tasks", "ruler_vt", "--context-tokens", "100"),
            "questions-unusable",
            ["--tasks ruler_vt: ", "without filler is longer than 70"],
        ),
        (
            ("--tasks", "niah_plus_single={squad}", "--context-tokens", "900", "--depths", "2"),
            "option-value",
            ["--depths 2"],
        ),
        (("--tasks", "niah_plus_single={essay}", "--context-tokens", "900"), "not-json", ["essay.txt"]),
        (
            ("--tasks", "niah_plus_single={longbench_v2}", "--context-tokens", "900"),
            "field-missing",
            ["'data'", "SQuAD"],
        ),
        (("--tasks", "multiple_choice={longbench_v2}", "--context-tokens", "9"), "option-unused", ["--context-tokens"]),
    ],
)
def test_what_tasks_cannot_do_is_refused_by_name(models, files, tmp_path, extra, code, named):
    with refused(code, *named):
        run(models[0], tmp_path / "r.json", *(part.format(**files) for part in extra))
    assert not (tmp_path / "r.json").exists()
