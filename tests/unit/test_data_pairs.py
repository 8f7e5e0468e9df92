"""Pairs: what is right and wrong, which questions count as what, and the same choice on every run."""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
from option_lines import last_wins_in
from tiny_models import write_model

from megatron_solopo.data.pairing import build_pairs
from megatron_solopo.data.pairing.lengths import Lengths
from megatron_solopo.data.schema import PreferenceGroup, read_groups
from megatron_solopo.errors import UserError

main = last_wins_in(build_pairs.main)


def contexts(path: Path, answers: dict[str, list[str]]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        for question_id, accepted in answers.items():
            short, long = ([{"role": "user", "content": f"{size} {question_id}"}] for size in ("short", "long"))
            out.write(
                json.dumps(
                    {
                        "id": question_id,
                        "question": "?",
                        "answers": accepted,
                        "short_messages": short,
                        "long_messages": long,
                        "short_tokens": 3,
                        "long_tokens": 9,
                        "source": "test",
                    }
                )
                + "\n"
            )
    return path


def responses(path: Path, records: dict[str, list[str]], **finished: list[bool]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        for question_id, texts in records.items():
            marks = {"finished": finished[question_id]} if question_id in finished else {}
            out.write(json.dumps({"id": question_id, "responses": texts, **marks}) + "\n")
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    answers = {
        "mixed": ["Paris", "City of Light"],
        "right": ["Rome"],
        "wrong": ["Oslo"],
        "cut": ["Bern"],
        "none": ["Riga"],
        "absent": ["Kiel"],
    }
    sampled = {
        "mixed": ["It is Paris.", "the city of light, I think so", "Lyon", "It is Lyon I believe", "", "Paris"],
        "right": ["Rome", "rome!"],
        "wrong": ["Bergen", "no answer"],
        "cut": ["Bern", "Basel and then"],
        "none": ["  "],
    }
    return [
        "--contexts",
        str(contexts(tmp_path / "contexts.jsonl", answers)),
        "--responses",
        str(responses(tmp_path / "responses.jsonl", sampled, cut=[True, False])),
    ]


def build(files: list[str], tmp_path: Path, *more: str) -> list[PreferenceGroup]:
    assert main([*files, "--output", str(tmp_path / "groups.jsonl"), *more]) == 0
    return list(read_groups(tmp_path / "groups.jsonl"))


def test_contexts_and_responses_are_never_replaced(files: list[str], tmp_path: Path) -> None:
    before = {path: Path(path).read_bytes() for path in files if path.startswith(str(tmp_path))}
    for flag, path in zip(("--contexts", "--responses"), before, strict=True):
        with pytest.raises(UserError, match=f"--output {path}: is the file of {flag} too; give another"):
            main([*files, "--output", path])
    assert {path: Path(path).read_bytes() for path in before} == before


def test_counts_and_the_one_group(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (group,) = build(files, tmp_path)
    assert group.id == "mixed" and group.answers == ["Paris", "City of Light"] and group.source == "test"
    assert group.short_messages[0]["content"] == "short mixed" and group.long_messages[0]["content"] == "long mixed"
    assert group.chosen in ("It is Paris.", "the city of light, I think so", "Paris")
    assert group.rejected in ("Lyon", "It is Lyon I believe")
    assert group.scores == {"chosen": 1.0, "rejected": 0.0, "share_right": 0.6}
    printed = capsys.readouterr().out
    for line in (
        "questions: 6",
        "  not sampled: 1; shares are of the other 5",
        "yield, a right and a wrong answer: 1 (20.0%)",
        "all right: 2 (40.0%), all wrong: 1 (20.0%), no usable response: 1 (20.0%)",
        "2 responses dropped: empty",
        "1 responses dropped: not ended",
        "responses scored: 10, right: 60.0%",
    ):
        assert line in printed


GRADES = """
def grade(response, answers):
    return int(response.split()[0]) / 10

def with_question(response, answers, question):
    return question == "?" and response in answers

def flag(response, answers):
    return response in answers

def raises(response, answers):
    raise KeyError("no such grade")

def nothing(response, answers):
    return None

def nan(response, answers):
    return float("nan")

number = 3
"""


@pytest.fixture
def graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Responses that begin with their own grade, and a module `grades` in the current folder that reads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "grades", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "grades.py").write_text(GRADES)
    sampled = {
        "both": ["9 best", "7 good", "5 so so", "2 bad", "1 worst", "3 poor"],
        "high": ["9 best", "7 good", "8 fine"],
        "low": ["2 bad", "1 worst"],
        "even": ["1 bad", "1 worse"],
        "between": ["5 so so", "5 or so"],
    }
    made = contexts(tmp_path / "contexts.jsonl", {name: ["gold"] for name in sampled})
    asked = responses(tmp_path / "responses.jsonl", sampled)
    return ["--contexts", str(made), "--responses", str(asked), "--scorer", "grades:grade"]


def test_graded_scores_by_threshold_and_policy(
    graded: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--right-above", "0.6", "--wrong-below", "0.4"]
    drawn = {(g.chosen, g.rejected) for s in range(40) for g in build(graded, tmp_path, *limits, "--seed", str(s))}
    assert drawn == {(c, r) for c in ("9 best", "7 good") for r in ("2 bad", "1 worst", "3 poor")}
    capsys.readouterr()
    groups = build(graded, tmp_path, *limits, "--policy", "best_worst", "--pairs-per-question", "9")
    assert [(g.chosen[0], g.rejected[0]) for g in groups] == [tuple(p) for p in ("91", "92", "71", "72", "93", "73")]
    assert groups[0].scores == {"chosen": 0.9, "rejected": 0.1, "share_right": round(2 / 6, 4)}
    printed = capsys.readouterr().out
    assert "all right: 1 (20.0%), all wrong: 2 (40.0%), no usable response: 0" in printed
    assert "neither right nor wrong: 1 (20.0%)" in printed and "undecided: 20.0%" in printed


def test_questions_all_right_or_all_wrong_by_choice(
    graded: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(*more: str) -> dict[str, tuple[str, str]]:
        return {g.id: (g.chosen, g.rejected) for g in build(graded, tmp_path, *more) if g.id != "both"}

    assert chosen() == {}
    assert chosen("--all-right", "ranked") == {"high": ("9 best", "7 good")}
    assert chosen("--all-wrong", "ranked") == {"low": ("2 bad", "1 worst")}  # even: no score is above another
    capsys.readouterr()
    files = ["--scorer", "grades:flag", "--all-wrong", "gold"]
    groups = build([*graded[:4], *files], tmp_path)
    assert [(g.id, g.chosen, g.scores["chosen_is_gold"]) for g in groups] == [
        (name, "The answer is gold.", 1.0) for name in ("both", "high", "low", "even", "between")
    ]
    printed = capsys.readouterr().out
    assert "all wrong, paired with the gold answer in a sentence: 5 (100.0%); the model did not sample it" in printed


def test_a_scorer_may_ask_for_the_question(graded: list[str], tmp_path: Path) -> None:
    responses(tmp_path / "responses.jsonl", {"both": ["gold", "lead"]})
    (group,) = build([*graded[:4], "--scorer", "grades:with_question"], tmp_path)
    assert (group.chosen, group.rejected) == ("gold", "lead")


WRONG_OPTIONS = {
    "unknown": (
        ["--scorer", "bleu"],
        r"--scorer bleu: give sub_em, sub_em_plain, em, f1, or a function of your own as module:f",
    ),
    "no module": (["--scorer", "absent:f"], r"--scorer absent:f: the module absent cannot be imported \(Module"),
    "no function": (["--scorer", "grades:f"], r"--scorer grades:f: f is not there in .*grades.py$"),
    "a number": (["--scorer", "grades:number"], r"number is not a function in .*grades.py$"),
    "raises": (["--scorer", "grades:raises"], r"raised KeyError: 'no such grade' for the response '9 best'$"),
    "None": (["--scorer", "grades:nothing"], r"returned None for the response '9 best'; a score is a finite number"),
    "not a number": (["--scorer", "grades:nan"], r"returned nan for the response '9 best'; a score is a finite"),
    "both at once": (
        ["--right-above", "0.3", "--wrong-below", "0.4"],
        r"--wrong-below 0.4 is above --right-above 0.3: a response could be both",
    ),
    "no rank": (["--all-right", "ranked", "--scorer", "em"], r"--all-right ranked with --scorer em: its scores are 0"),
    "no rank in the plain form": (
        ["--all-wrong", "ranked", "--scorer", "sub_em_plain"],
        r"its scores are 0 and 1 only",
    ),
    "one normalisation": (
        ["--scorer", "sub_em_plain", "--normalisation", "squad"],
        r"--normalisation squad has no effect with --scorer sub_em_plain, which compares texts in its own way; leave",
    ),
    "own normalisation": (
        ["--normalisation", "squad"],
        r"--normalisation squad has no effect with --scorer grades:grade",
    ),
    "no pairs": (["--pairs-per-question", "0"], r"--pairs-per-question 0: give a number of at least 1$"),
    "no folder": (["--tokenizer", "absent"], r"absent: no such folder; give a Hugging Face folder with a tokenizer$"),
    "nothing": (["--right-above", "2"], r"no question has both a right and a wrong response \(5 questions: 0 all"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_are_one_line_and_leave_no_output(graded: list[str], case: str, tmp_path: Path) -> None:
    flags, pattern = WRONG_OPTIONS[case]
    with pytest.raises(UserError, match=pattern) as caught:
        build([*graded, *flags], tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "groups.jsonl").exists()


def test_the_commonest_answers_are_paired(tmp_path: Path) -> None:
    texts = ["A. Answer: Rome", "B. Answer: Roma", "C. Answer: Rome.", "D. Answer: Oslo", "E. Answer: oslo", "Bern"]
    files = [
        "--contexts",
        str(contexts(tmp_path / "c.jsonl", {"q": ["Rome", "Roma"]})),
        "--responses",
        str(responses(tmp_path / "r.jsonl", {"q": texts})),
    ]
    drawn = {
        (g.chosen[0], g.rejected[0])
        for seed in range(20)
        for g in build(files, tmp_path, "--policy", "most_frequent", "--seed", str(seed))
    }
    assert drawn == {("A", "D"), ("A", "E"), ("C", "D"), ("C", "E")}


def test_what_a_question_came_with_goes_on(tmp_path: Path) -> None:
    """Question, documents' places and sampled ids; in any order of the responses, to either kind of file."""
    made, asked = tmp_path / "c.jsonl", tmp_path / "r.jsonl"
    contexts(made, {f"q{n}": ["Rome"] for n in range(9)})
    spans = {"short_spans": [[0, 5, True]], "long_spans": [[0, 4, True], [5, 6, False]]}
    made.write_text("".join(json.dumps(json.loads(r) | spans) + "\n" for r in made.read_text().splitlines()))
    records = [
        {
            "id": f"q{n}",
            "responses": ["", "Rome", f"Bern {n}"],
            "token_ids": [[], [n + 1, 2], None if n == 8 else [n + 7]],
        }
        for n in range(9)
        if n != 4
    ]
    asked.write_text("".join(json.dumps(record) + "\n" for record in records))
    groups = build(["--contexts", str(made), "--responses", str(asked)], tmp_path)
    assert [(g.id, g.chosen_ids, g.rejected_ids) for g in groups] == [
        (f"q{n}", [n + 1, 2], None if n == 8 else [n + 7]) for n in range(9) if n != 4
    ]
    assert {g.question for g in groups} == {"?"} and groups[3].long_spans == [(0, 4, True), (5, 6, False)]
    asked.write_text("".join(json.dumps(record) + "\n" for record in reversed(records)))
    assert main(["--contexts", str(made), "--responses", str(asked), "--output", str(tmp_path / "g.parquet")]) == 0
    assert list(read_groups(tmp_path / "g.parquet")) == groups


def test_a_length_bias_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = contexts(tmp_path / "c.jsonl", {f"q{n}": ["Rome"] for n in range(30)})
    asked = responses(tmp_path / "r.jsonl", {f"q{n}": ["It is Rome , I think", "Bern"] for n in range(30)})
    folder = write_model(tmp_path / "hf")
    build(["--contexts", str(made), "--responses", str(asked), "--tokenizer", str(folder)], tmp_path)
    printed = capsys.readouterr().out
    for unit in ("words", "tokens"):
        assert f"length in {unit}: chosen mean 6.0, median 6, 6 to 6; rejected mean 1.0, median 1, 1 to 1" in printed
    assert printed.count("warning: chosen answers have 6.0 words, rejected ones 1.0 (chosen longer in 100%") == 1


@pytest.mark.parametrize("seed", range(10))
def test_lengths_are_those_of_the_statistics_module(seed: int) -> None:
    draw = random.Random(seed)
    pairs = [(draw.randint(0, 30), draw.randint(0, 9)) for _ in range(draw.randint(1, 50))]
    chosen, rejected = zip(*pairs, strict=True)
    line = Lengths.of("words", pairs).line()
    for which, values in (("chosen", chosen), ("rejected", rejected)):
        assert (
            f"{which} mean {statistics.mean(values):.1f}, median {statistics.median_low(values)}, "
            f"{min(values)} to {max(values)}"
        ) in line
    assert f"chosen longer in {sum(c > r for c, r in pairs) / len(pairs):.1%}" in line


def test_unfinished_responses_by_choice(files: list[str], tmp_path: Path) -> None:
    groups = build(files, tmp_path, "--keep-unfinished")
    assert [(group.id, group.rejected) for group in groups][1:] == [("cut", "Basel and then")]


YES_AND_NO = {
    "no": (
        ["no"],
        ["Answer: No", "It is not known. Answer: yes", "nothing, Answer: yes and no", "Answer: no evidence"],
    ),
    "yes": (["Yes"], ["Answer: yes", "Answer: no"]),
    "spirit": (["a spirit"], ["Answer: a spirit", "Spirits of spirituality", "spirit soul ghost " * 30]),
    "number": (["4"], ["Document 4 has it. Answer: 4", "Document 4 says five. Answer: 5", "Answer: 1 2 3 4 5 6 7"]),
    "long": (["Lake Ontario"], ["By Lake Ontario, they say. Answer: Ontario", "Answer: Erie"]),
}


@pytest.mark.parametrize(
    ("flags", "right", "line"),
    [
        (
            [],
            {"no": {0}, "yes": {0}, "spirit": {0}, "number": {0}, "long": {0}},
            "right only as whole words of a response's answer part, yes and no only where it says not both; 7 of their "
            "12 responses are judged otherwise than by --scorer sub_em_plain",
        ),
        (
            ["--scorer", "sub_em_plain"],
            {"yes": {0}, "long": {0}},
            "found inside other words too ('no' in 'not'); 7 of their 12 responses are judged otherwise than by "
            "--scorer sub_em",
        ),
        (
            ["--scorer", "f1", "--right-above", "0.6", "--wrong-below", "0.6"],
            {},
            "scored as all others, by --scorer f1",
        ),
    ],
)
def test_short_answers_are_judged_by_the_answer_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], right: dict[str, set[int]], line: str
) -> None:
    made = contexts(tmp_path / "c.jsonl", {name: answers for name, (answers, _) in YES_AND_NO.items()})
    asked = responses(tmp_path / "r.jsonl", {name: texts for name, (_, texts) in YES_AND_NO.items()})
    files = ["--contexts", str(made), "--responses", str(asked), "--pairs-per-question", "9", *flags]
    groups = build(files, tmp_path)
    chosen = {
        name: {YES_AND_NO[name][1].index(g.chosen) for g in groups if g.id.startswith(name)} for name in YES_AND_NO
    }
    if right:
        assert {name: found for name, found in chosen.items() if found} == right
    printed = capsys.readouterr().out
    assert (
        "short gold answers: yes or no 2 (40.0%), one short word or a number 2 (40.0%)" in printed and line in printed
    )


def test_questions_never_sampled_are_outside_the_yield(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after sample-responses --limit; a question that was sampled and has no usable response counts."""
    asked = tmp_path / "responses.jsonl"
    asked.write_text("".join(asked.read_text().splitlines(keepends=True)[:1]))
    build(files, tmp_path)
    printed = capsys.readouterr().out
    assert "questions: 6\n  not sampled: 5; shares are of the other 1\n" in printed
    assert "yield, a right and a wrong answer: 1 (100.0%)" in printed and "no usable response: 0 (0.0%)" in printed
    responses(asked, {"mixed": [], "wrong": ["Bergen"]})
    with pytest.raises(
        UserError, match=r"\(2 questions: 0 all right, 1 all wrong, 1 without a usable .*; 4 more were not"
    ):
        build(files, tmp_path)


def test_policies(files: list[str], tmp_path: Path) -> None:
    for seed in range(8):
        (shortest,) = build(files, tmp_path, "--policy", "shortest_correct", "--seed", str(seed))
        assert shortest.chosen == "Paris"
        (matched,) = build(files, tmp_path, "--policy", "length_matched", "--seed", str(seed))
        assert matched.rejected == ("Lyon" if matched.chosen == "Paris" else matched.rejected)
        if matched.chosen.startswith("the city"):
            assert matched.rejected == "It is Lyon I believe"
    drawn = Counter((g.chosen, g.rejected) for seed in range(40) for g in build(files, tmp_path, "--seed", str(seed)))
    assert len(drawn) == 6  # random reaches every combination


def test_several_pairs_a_question_are_different(files: list[str], tmp_path: Path) -> None:
    groups = build(files, tmp_path, "--pairs-per-question", "9")
    assert [group.id for group in groups] == ["mixed", *(f"mixed#{number}" for number in range(2, 7))]
    assert len({(group.chosen, group.rejected) for group in groups}) == 6


def test_the_choice_does_not_depend_on_other_questions(files: list[str], tmp_path: Path) -> None:
    alone = [
        "--contexts",
        str(contexts(tmp_path / "c.jsonl", {"before": ["x"], "mixed": ["Paris", "City of Light"]})),
        "--responses",
        str(
            responses(
                tmp_path / "r.jsonl",
                {
                    "before": ["x", "y"],
                    "mixed": [
                        "It is Paris.",
                        "the city of light, I think so",
                        "Lyon",
                        "It is Lyon I believe",
                        "",
                        "Paris",
                    ],
                },
            )
        ),
    ]
    for seed in "12345":
        assert build(alone, tmp_path, "--seed", seed)[1:] == build(files, tmp_path, "--seed", seed)


def test_gold_is_a_dry_run_without_a_model(tmp_path: Path) -> None:
    answers = {f"q{index}": [f"Answer {index}", "alias"] for index in range(9)} | {"other": ["is"]}
    files = ["--contexts", str(contexts(tmp_path / "c.jsonl", answers)), "--responses", "gold"]
    groups = build(files, tmp_path)
    assert [group.id for group in groups] == [
        f"q{index}" for index in range(9)
    ]  # "is" is in every sentence: nothing is wrong
    for group in groups:
        assert group.chosen == f"The answer is {group.answers[0]}."
        assert group.rejected != group.chosen and group.rejected.startswith("The answer is ")
    assert len({group.rejected for group in groups}) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "stranger", "responses": ["x"]}', "1 ids are not in"),
        ('{"id": "mixed", "responses": "x"}', "responses.jsonl:1: the field 'responses' must be list"),
        (
            '{"id": "mixed", "responses": ["x"], "finished": []}',
            "responses.jsonl:1: the field 'finished' must be a list as long",
        ),
        (
            '{"id": "mixed", "responses": ["x"]}\n{"id": "mixed", "responses": ["x"]}',
            "responses.jsonl:2: the id 'mixed' was used before",
        ),
        ('{"id": "mixed", "responses": ["Lyon"]}', "no question has both a right and a wrong response"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_output(
    files: list[str], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "responses.jsonl").write_text(text + "\n")
    with pytest.raises(UserError) as error:
        build(files, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "groups.jsonl").exists()
