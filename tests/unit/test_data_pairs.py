"""Pairs: what is right and wrong, which questions count as what, and the same choice on every run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_solopo.data.pairs import main
from megatron_solopo.data.schema import PreferenceGroup, read_groups
from megatron_solopo.errors import UserError


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
        "yield, a right and a wrong answer: 1 (16.7%)",
        "all right: 2 (33.3%), all wrong: 1 (16.7%), no usable response: 2 (33.3%)",
        "2 responses dropped: empty",
        "1 responses dropped: not ended",
        "responses scored: 10, right: 60.0%",
    ):
        assert line in printed


def test_unfinished_responses_by_choice(files: list[str], tmp_path: Path) -> None:
    groups = build(files, tmp_path, "--keep-unfinished")
    assert [(group.id, group.rejected) for group in groups][1:] == [("cut", "Basel and then")]


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
