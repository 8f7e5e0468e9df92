"""Reading MuSiQue: what is yielded, what is left out and counted, and the line of every mistake."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_solopo.data.sources import read_musique, read_pool
from megatron_solopo.errors import UserError

GOOD = {
    "id": "2hop__1",
    "question": "Who?",
    "answer": "Ada",
    "answer_aliases": ["Ada L."],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "T", "paragraph_text": "Ada was first.", "is_supporting": True},
        {"idx": 1, "title": "U", "paragraph_text": "Rain fell.", "is_supporting": False},
    ],
}


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def changed(**fields: object) -> dict:
    return {**GOOD, **fields}


def paragraph(**fields: object) -> dict:
    return changed(paragraphs=[GOOD["paragraphs"][0], {**GOOD["paragraphs"][1], **fields}])


def without(key: str) -> dict:
    return {name: value for name, value in GOOD.items() if name != key}


def test_fields_arrive(tmp_path: Path) -> None:
    left_out: Counter[str] = Counter()
    (question,) = read_musique([write(tmp_path / "q.jsonl", GOOD)], left_out)
    assert question.answers == ("Ada", "Ada L.")
    assert [(p.title, p.text, p.is_supporting) for p in question.paragraphs] == [
        ("T", "Ada was first.", True),
        ("U", "Rain fell.", False),
    ]
    assert not left_out


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    left_out: Counter[str] = Counter()
    nothing_gold = changed(id="c", paragraphs=GOOD["paragraphs"][1:])
    path = write(
        tmp_path / "q.jsonl", changed(id="a", answerable=False), changed(id="b", answer="The"), nothing_gold, GOOD
    )
    assert [question.id for question in read_musique([path], left_out)] == ["2hop__1"]
    assert sorted(left_out.values()) == [1, 1, 1]
    assert "not answerable from its paragraphs" in left_out


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (without("answer"), "'answer' is missing"),
        (changed(question="  "), "'question' is empty"),
        (changed(answer=7), "'answer' must be str"),
        (changed(answer_aliases="Ada"), "'answer_aliases' must be a list of texts"),
        (changed(answerable="yes"), "'answerable' must be bool"),
        (changed(paragraphs=[]), "'paragraphs' is empty"),
        (changed(paragraphs=["text"]), "paragraphs[0]: expected an object, found str"),
        (paragraph(is_supporting=1), "paragraphs[1]: the field 'is_supporting' must be bool"),
        (paragraph(paragraph_text=""), "paragraphs[1]: the field 'paragraph_text' is empty"),
        (paragraph(title=None), "paragraphs[1]: the field 'title' must be str"),
        (changed(id="first"), "was used before at"),
    ],
)
def test_a_mistake_names_its_line(tmp_path: Path, record: dict, message: str) -> None:
    path = write(tmp_path / "q.jsonl", changed(id="first"), record)
    with pytest.raises(UserError) as error:
        list(read_musique([path], Counter()))
    assert str(error.value).startswith(f"{path}:2") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_ids_are_unique_over_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", GOOD)]
    with pytest.raises(UserError, match=r"b\.jsonl:1.*a\.jsonl:1"):
        list(read_musique(paths, Counter()))


def test_pool(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"title": "A", "text": "Some text."}, {"title": "B", "body": "?"})
    with pytest.raises(UserError, match=r"p\.jsonl:2: the field 'text' is missing"):
        list(read_pool([path]))


def test_real_musique(solopo_data: Path) -> None:
    left_out: Counter[str] = Counter()
    questions = list(read_musique([solopo_data / "musique" / "musique_ans_train_subset.jsonl"], left_out))
    assert len(questions) == 310 and not left_out
    assert all(2 <= sum(p.is_supporting for p in question.paragraphs) <= 4 for question in questions)
