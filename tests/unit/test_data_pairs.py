"""Pairs: which questions count as what, and the same choice on every run."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest
from pair_files import build, contexts, main, responses
from refusals import refused
from tiny_models import write_model

from megatron_solopo.data.pairing.lengths import Lengths
from megatron_solopo.data.schema import read_groups


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


def test_contexts_and_responses_are_never_replaced(files: list[str], tmp_path: Path) -> None:
    before = {path: Path(path).read_bytes() for path in files if path.startswith(str(tmp_path))}
    for flag, path in zip(("--contexts", "--responses"), before, strict=True):
        with refused("file-overlap", f"--output {path}: ", f" {flag} "):
            main([*files, "--output", path])
    assert {path: Path(path).read_bytes() for path in before} == before


def test_counts_and_the_one_group(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (group,) = build(files, tmp_path, "--counts-output", str(tmp_path / "counts.json"))
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts == {
        "scorer": "sub_em", "questions": 6, "sampled": 5, "paired": 1, "all_right": 2, "all_wrong": 1, "undecided": 0,
        "no_response": 1, "groups": 1, "responses": 10, "right_responses": 6,
    }  # fmt: skip
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


def test_the_most_frequent_answers_are_paired(tmp_path: Path) -> None:
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


def test_fields_of_the_contexts_are_copied_to_the_groups(tmp_path: Path) -> None:
    """Question, documents' places and sampled ids; in any order of the responses, to either kind of file."""
    source, asked = tmp_path / "c.jsonl", tmp_path / "r.jsonl"
    contexts(source, {f"q{n}": ["Rome"] for n in range(9)})
    spans = {"short_spans": [[0, 5, True]], "long_spans": [[0, 4, True], [5, 6, False]]}
    source.write_text("".join(json.dumps(json.loads(r) | spans) + "\n" for r in source.read_text().splitlines()))
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
    groups = build(["--contexts", str(source), "--responses", str(asked)], tmp_path)
    assert [(g.id, g.chosen_ids, g.rejected_ids) for g in groups] == [
        (f"q{n}", [n + 1, 2], None if n == 8 else [n + 7]) for n in range(9) if n != 4
    ]
    assert {g.question for g in groups} == {"?"} and groups[3].long_spans == [(0, 4, True), (5, 6, False)]
    asked.write_text("".join(json.dumps(record) + "\n" for record in reversed(records)))
    assert main(["--contexts", str(source), "--responses", str(asked), "--output", str(tmp_path / "g.parquet")]) == 0
    assert list(read_groups(tmp_path / "g.parquet")) == groups


def test_a_length_bias_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = contexts(tmp_path / "c.jsonl", {f"q{n}": ["Rome"] for n in range(30)})
    asked = responses(tmp_path / "r.jsonl", {f"q{n}": ["It is Rome , I think", "Bern"] for n in range(30)})
    folder = write_model(tmp_path / "hf")
    build(["--contexts", str(source), "--responses", str(asked), "--tokenizer", str(folder)], tmp_path)
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


def test_unfinished_responses_are_used_on_request(files: list[str], tmp_path: Path) -> None:
    groups = build(files, tmp_path, "--keep-unfinished")
    assert [(group.id, group.rejected) for group in groups][1:] == [("cut", "Basel and then")]


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
    with refused("pairs-none", "2 questions: 0 all right, 1 all wrong, 1 without ", " 4 more were not sampled"):
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
    for group in build(files, tmp_path, "--gold-template", "It is {answer}"):
        assert group.chosen == f"It is {group.answers[0]}" and group.rejected.startswith("It is ")


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        (
            '{"id": "stranger", "responses": ["x"]}',
            "responses-other-contexts",
            ("responses.jsonl: 1 ids ", "contexts.jsonl ", "'stranger'"),
        ),
        ('{"id": "mixed", "responses": "x"}', "field-type", ("responses.jsonl:1: ", "'responses'", "list")),
        (
            '{"id": "mixed", "responses": ["x"], "finished": []}',
            "field-value",
            ("responses.jsonl:1: ", "'finished'", "'responses' (1)"),
        ),
        (
            '{"id": "mixed", "responses": ["x"]}\n{"id": "mixed", "responses": ["x"]}',
            "id-twice",
            ("responses.jsonl:2: ", "'mixed'"),
        ),
        ('{"id": "mixed", "responses": ["Lyon"]}', "pairs-none", ("1 questions: 0 all right, 1 all wrong, ",)),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_output(
    files: list[str], tmp_path: Path, text: str, code: str, named: tuple[str, ...]
) -> None:
    (tmp_path / "responses.jsonl").write_text(text + "\n")
    with refused(code, *named):
        build(files, tmp_path)
    assert not (tmp_path / "groups.jsonl").exists()
