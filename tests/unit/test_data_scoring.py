"""Scores against hand-worked cases and against SQuAD's published evaluation, restated."""

from __future__ import annotations

import re
import string
import subprocess
import sys
from collections import Counter

import pytest

from megatron_solopo.data.scoring import em, f1, normalise, sub_em


def squad_f1(prediction: str, truth: str) -> float:
    """SQuAD's own script, step by step."""

    def tokens(text: str) -> list[str]:
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    found, gold = tokens(prediction), tokens(truth)
    same = sum((Counter(found) & Counter(gold)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(found), same / len(gold)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("a U.S. co-op,\nan Analysis", "us coop analysis"),
        ("Theatre and Anna", "theatre and anna"),
        ("Łódź, 1,960", "łódź 1960"),
        ("The", ""),
        ("?!", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_sub_em_takes_any_answer_as_a_substring() -> None:
    assert sub_em("Thus the answer is: the City of Paris.", ["Lyon", "city of Paris"]) == 1.0
    assert sub_em("It was 1960s music.", ["1960"]) == 1.0  # a substring, not a word: the metric's definition
    assert sub_em("Par is", ["Paris"]) == 0.0
    assert sub_em("", ["Paris"]) == 0.0


@pytest.mark.parametrize("score", [sub_em, em, f1])
def test_an_answer_without_words_matches_nothing(score) -> None:
    assert score("anything at all", ["The", "?", ""]) == 0.0
    assert score("", ["The"]) == 0.0
    assert score("Paris", ["?", "paris"]) == 1.0


def test_em_needs_the_whole_text() -> None:
    assert em("The Paris.", ["paris"]) == 1.0
    assert em("Paris, France", ["paris"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers"),
    [
        ("the cat sat on the mat", ["a cat on a mat"]),
        ("New York New York", ["York", "New York City"]),
        ("nothing", ["in common"]),
        ("same words", ["words, same!"]),
    ],
)
def test_f1_is_squads_best_over_answers(prediction: str, answers: list[str]) -> None:
    assert f1(prediction, answers) == pytest.approx(max(squad_f1(prediction, answer) for answer in answers))


def test_scores_and_contexts_and_pairs_need_no_torch() -> None:
    """They run in worker processes and in commands that should start at once."""
    modules = "megatron_solopo.data.pairing.build_pairs, megatron_solopo.data.building.contexts"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
