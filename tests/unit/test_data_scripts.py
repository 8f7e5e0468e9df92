"""Texts of scripts without spaces: search of answers, lengths, questions and evidence."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_solopo.data.answers import find_in_document, golds, mentions
from megatron_solopo.data.building.contexts import build_contexts
from megatron_solopo.data.building.evidence import mark, rank_by_bm25
from megatron_solopo.data.building.pool import DistractorPool
from megatron_solopo.data.building.split import near_duplicates
from megatron_solopo.data.inspection.blocks import stretches
from megatron_solopo.data.inspection.view import highlighted
from megatron_solopo.data.pairing.lengths import Lengths
from megatron_solopo.data.pairing.policies import Scored, length_matched_pairs, shortest_correct_pairs, words
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.text.prompt import PromptFormat

NOVEL = Paragraph("家", "长篇小说《家》发表于一九三三年，作者巴金生于四川成都。", True)
MUSEUM = Paragraph("现代文学馆", "现代文学馆由巴金倡议建立，位于北京。")
VILLAGES = tuple(Paragraph(f"村庄{i}", f"第{i}号村庄有一条河流，河水向东流。") for i in range(6))
QUESTION = Question("zh", "小说《家》的作者是谁？", "巴金", (), (MUSEUM, *VILLAGES[:3], NOVEL))


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("作者巴金生于四川", "巴金", True),
        ("東京はソウルより大きい", "東京", True),
        ("서울은 수도이다", "서울", True),
        ("он жил в сша", "сша", True),
        ("вывешал", "еша", False),
        ("使用ai技术", "ai", True),
        ("was said of it", "ai", False),
        ("在25年后", "5年", False),
        ("在5年后", "5年", True),
        ("status of us", "us", True),
        ("a “us” army", "us", True),
    ],
)
def test_a_short_answer_is_found_at_word_boundaries(text: str, answer: str, expected: bool) -> None:
    assert mentions(text, golds([answer])[0]) is expected
    kinds = [
        names for part, names, _ in stretches(highlighted(text, find_in_document(text, [answer]))) if part == answer
    ]
    assert (["answer"] in kinds) is expected


def test_a_distractor_never_names_the_answer() -> None:
    prompt_format = PromptFormat()
    pool = DistractorPool.of([*QUESTION.paragraphs, *VILLAGES], prompt_format)
    (context,) = build_contexts(QUESTION, pool, [7], prompt_format=prompt_format, seed=0)
    assert set(context.paragraphs) == {NOVEL, *VILLAGES}


def test_evidence_is_found() -> None:
    unmarked = Question("zh", QUESTION.question, "巴金", (), (*VILLAGES[:3], NOVEL, *VILLAGES[3:]))
    ranking = rank_by_bm25(unmarked)
    assert ranking[0] == 3
    assert [p.is_supporting for p in mark(unmarked, ranking, 1).paragraphs].index(True) == 3
    assert mark(unmarked, [0, 1, 2, 4, 5, 6, 3], 1).paragraphs[3].is_supporting


def test_lengths_count_characters_where_nothing_parts_words() -> None:
    assert words("two  words") == 2 and words("巴金生于四川") == 6 and words("写于 1931 年") == 4
    short, long = Scored("答案是巴金。", 1.0), Scored("小说《家》的作者出生在四川成都，他就是巴金。", 1.0)
    wrong = [Scored("作者是鲁迅，他出生在浙江绍兴，后来去了北京。", 0.0), Scored("是鲁迅。", 0.0)]
    assert next(shortest_correct_pairs([long, short], wrong, random.Random(0)))[0] is short
    for seed in range(5):
        chosen, rejected = next(length_matched_pairs([long, short], wrong, random.Random(seed)))
        assert rejected is wrong[chosen is short]
    lengths = Lengths.of("words", [(words(long.text), words(short.text))] * 20)
    assert "longer" in lengths.bias()


def test_questions_that_differ_in_a_character_are_near_duplicates() -> None:
    asked = ["小说《家》的作者是在哪一年的什么地方出生的？", "小说《家》的作者是在哪一年的什么地方出生的呢？"]
    assert near_duplicates([*asked, "第一条河流有多长？"]) == [0, 0, 2]


def test_spaced_texts_have_the_words_that_spaces_part(solopo_data: Path) -> None:
    for line in (solopo_data / "musique/musique_ans_train_subset.jsonl").open(encoding="utf-8"):
        question = json.loads(line)["question"]
        assert words(question) == len(question.split())
    assert words(" a b\n\u00a0c, d-e ") == 4
