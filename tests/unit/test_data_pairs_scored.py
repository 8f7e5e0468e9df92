"""Pairs by score: user functions, thresholds, and short gold answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pair_files import build, contexts, responses
from refusals import refused

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
    """Responses that start with their grade, and a module `grades` in the current folder that reads it."""
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
    source = contexts(tmp_path / "contexts.jsonl", {name: ["gold"] for name in sampled})
    asked = responses(tmp_path / "responses.jsonl", sampled)
    return ["--contexts", str(source), "--responses", str(asked), "--scorer", "grades:grade"]


def test_graded_scores_by_threshold_and_policy(
    graded: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--correct-threshold", "0.6", "--incorrect-threshold", "0.4"]
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


JUDGE = """
def grade(response, answers):
    with open("asked.txt", "a") as asked:
        asked.write(response + "\\n")
    if response == BROKEN:
        raise ConnectionError("the judge is busy")
    return int(response.split()[0]) / 10
"""


def test_scores_of_a_user_function_are_kept_until_the_pairs_are_written(
    graded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge that fails is asked again for the question it failed on; other options and files cost no score."""

    def run(broken: str | None, *more: str) -> list[str]:
        monkeypatch.delitem(sys.modules, "judge", raising=False)
        Path("judge.py").write_text(f"BROKEN = {broken!r}\n" + JUDGE)
        Path("asked.txt").write_text("")
        if broken is None:
            build([*graded[:4], "--scorer", "judge:grade"], tmp_path, *more)
        else:
            with refused("scorer-raises", "--scorer judge:grade: ", "ConnectionError: the judge is busy", repr(broken)):
                build([*graded[:4], "--scorer", "judge:grade"], tmp_path, *more)
        return Path("asked.txt").read_text().splitlines()

    partial = Path("groups.jsonl.partial")
    assert run(None, "--policy", "best_worst")[0] == "9 best"
    whole = Path("groups.jsonl").read_bytes()
    assert run("7 good") == ["9 best", "7 good"] and not partial.exists()  # no question was scored
    assert run("8 fine")[-1] == "8 fine" and partial.is_file()
    lines = Path("contexts.jsonl").read_text().splitlines()
    Path("contexts.jsonl").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert run("2 bad", "--correct-threshold", "0.6") == ["5 so so", "5 or so", "1 bad", "1 worse", "2 bad"]
    Path("contexts.jsonl").write_text("\n".join(lines))
    with refused("unfinished-other-settings", f"{partial.resolve()}: ", "scorer = 'judge:grade', now 'grades:grade'"):
        build(graded, tmp_path)
    capsys.readouterr()
    assert run(None, "--policy", "best_worst") == ["9 best", "7 good", "8 fine", "2 bad", "1 worst"]
    notice = (
        "resuming: 3 questions were scored before; the code of judge:grade has changed (delete groups.jsonl.partial "
    )
    assert notice in capsys.readouterr().out.replace(f"{tmp_path}/", "")
    assert Path("groups.jsonl").read_bytes() == whole and not partial.exists()


WRONG_OPTIONS = {
    "unknown": ("--scorer bleu", "option-value", "--scorer bleu: ", "sub_em, sub_em_plain, em, f1,", "module:function"),
    "no module": ("--scorer absent:f", "module-import", "--scorer absent:f: ", "absent "),
    "no function": ("--scorer grades:f", "function-missing", "--scorer grades:f: f ", "grades.py"),
    "a number": ("--scorer grades:number", "function-missing", "number ", "grades.py"),
    "raises": ("--scorer grades:raises", "scorer-raises", "grades:raises: ", "KeyError: 'no such grade'", "'9 best'"),
    "None": ("--scorer grades:nothing", "scorer-value", "grades:nothing: ", " None ", "'9 best'"),
    "not a number": ("--scorer grades:nan", "scorer-value", "grades:nan: ", " nan ", "'9 best'"),
    "both at once": (
        "--correct-threshold 0.3 --incorrect-threshold 0.4",
        *("option-conflict", "--incorrect-threshold 0.4 ", "--correct-threshold 0.3:"),
    ),
    "no finite number": ("--incorrect-threshold=-inf", "option-value", "--incorrect-threshold -inf: "),
    "no rank": ("--all-right ranked --scorer em", "option-conflict", "--all-right ranked ", "--scorer em: "),
    "no answer": ("--all-wrong gold --gold-template answer", "option-value", "--gold-template answer: ", "{answer}"),
    "no gold": ("--gold-template {answer}", "option-unused", "--gold-template {answer} ", "--all-wrong gold"),
    "no rank in the plain form": (
        "--all-wrong ranked --scorer sub_em_plain",
        *("option-conflict", "--all-wrong ranked ", "--scorer sub_em_plain: "),
    ),
    "one normalisation": (
        "--scorer sub_em_plain --normalisation squad",
        *("option-unused", "--normalisation squad ", "--scorer sub_em_plain,"),
    ),
    "normalisation of a user function": (
        "--normalisation squad",
        "option-unused",
        "--normalisation squad ",
        "--scorer grades:grade,",
    ),
    "no pairs": ("--pairs-per-question 0", "option-value", "--pairs-per-question 0: ", "1"),
    "no folder": ("--tokenizer absent", "folder-missing", "absent: "),
    "nothing": ("--correct-threshold 2", "pairs-none", "5 questions: 0 all "),
}
"""Case -> (options, code, what the message names)."""


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_are_one_line_and_leave_no_output(graded: list[str], case: str, tmp_path: Path) -> None:
    flags, code, *named = WRONG_OPTIONS[case]
    with refused(code, *named):
        build([*graded, *flags.split()], tmp_path)
    assert not (tmp_path / "groups.jsonl").exists()


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
            "right only as whole words of a response's answer part, yes and no only where it has not both; 7 of their "
            "12 responses are judged otherwise than by --scorer sub_em_plain",
        ),
        (
            ["--scorer", "sub_em_plain"],
            {"yes": {0}, "long": {0}},
            "found inside other words too ('no' in 'not'); 7 of their 12 responses are judged otherwise than by "
            "--scorer sub_em",
        ),
        (
            ["--scorer", "f1", "--correct-threshold", "0.6", "--incorrect-threshold", "0.6"],
            {},
            "scored as all others, by --scorer f1",
        ),
    ],
)
def test_short_answers_are_judged_by_the_answer_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], right: dict[str, set[int]], line: str
) -> None:
    source = contexts(tmp_path / "c.jsonl", {name: answers for name, (answers, _) in YES_AND_NO.items()})
    asked = responses(tmp_path / "r.jsonl", {name: texts for name, (_, texts) in YES_AND_NO.items()})
    files = ["--contexts", str(source), "--responses", str(asked), "--pairs-per-question", "9", *flags]
    groups = build(files, tmp_path)
    chosen = {
        name: {YES_AND_NO[name][1].index(g.chosen) for g in groups if g.id.startswith(name)} for name in YES_AND_NO
    }
    if right:
        assert {name: response for name, response in chosen.items() if response} == right
    printed = capsys.readouterr().out
    assert (
        "short gold answers: yes or no 2 (40.0%), one short word or a number 2 (40.0%)" in printed and line in printed
    )
