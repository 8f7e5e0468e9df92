"""Scores against hand-worked cases and against SQuAD's published evaluation, restated."""

from __future__ import annotations

import itertools
import random
import re
import string
import subprocess
import sys
from collections import Counter

import pytest

from megatron_solopo.data.answers import find_in_document, find_in_response, golds, normalise, normalised_places
from megatron_solopo.data.scoring import em, f1, sub_em, sub_em_plain


def squad_f1(prediction: str, truth: str) -> float:
    """SQuAD's script, step by step."""

    def tokens(text: str) -> list[str]:
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    predicted, gold = tokens(prediction), tokens(truth)
    same = sum((Counter(predicted) & Counter(gold)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
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


@pytest.mark.parametrize("score", [sub_em, sub_em_plain])
def test_sub_em_takes_any_answer_as_a_substring(score) -> None:
    assert score("Thus the answer is: the City of Paris.", ["Lyon", "city of Paris"]) == 1.0
    assert score("In the 1960s Sgt Peppers came out.", ["Sgt. Pepper"]) == 1.0
    assert score("Par is", ["Paris"]) == 0.0
    assert score("", ["Paris"]) == 0.0


REASONED = "They met in Leeds. " * 20
SALAD = "spirit yes 4 water music river stone " * 10

# (gold answer, responses that contain it, responses that do not)
SHORT = [
    (
        "no",
        ["Answer: No", "answer: **no**", "The answer is no.", "No, they are both dead.", "Answer: No they are not",
         "Answer: No\u2014one is Irish", "Answer:\n\nNO.\n", "No Bono is Irish.", "<think>Answer: yes</think>No",
         "There is no doubt. Answer: no", "Final answer : No", "Answer: \uff2e\uff2f", "No - both are."],
        ["I do not know", "Nothing. Answer: yes", "Answer: yes and no", "Answer: Yes/No", "no yes",
         "Answer: yes maybe no", "Answer: there is no information", "Answer: no one", "Answer: no-one", "Answer: No. 5",
         "Answer:", "",
         "No. They are. Answer: they are", SALAD, "notary nose"],
    ),
    (
        "Yes",
        ["Yes", "Answer: Yes, there is no doubt", "Answer: the answer is 'yes'.", REASONED + "So yes.", "the band Yes"],
        ["Answer: eyes", "yesterday", "Yes, so. Answer: no", "yes or no", SALAD, "yes no maybe", "Answer: no, yes"],
    ),
    (
        "a spirit",
        ["a spirit", "Answer: Spirit.", "It is the spirit's name.", REASONED + "He is a spirit.", "water/spirit"],
        ["spirituality", "inspirited spirits", "A spirit came. Answer: ghost", SALAD, REASONED + "Spirit. " + REASONED],
    ),
    (
        "4",
        ["Answer: 4", "It has 4 doors.", "Answer: 3-4", "Answer: 4, as Document 7 says"],
        ["Document 4 says it. Answer: 5", "Answer: 14", "Answer: 4.5", "Answer: 1,400", "4th", "Answer: 1 2 3 4 5 6",
         "Answer: 1, 2, 3, 4, 5 and 6", SALAD],
    ),
    ("U.S.", ["Answer: the US", "the U.S. army"], ["Answer: Russia", "the muse", "Answer: just a muse"]),
    ("1,960", ["Answer: 1960", "about 1,960 men"], ["19,600", "Answer: 1960s"]),
    ("drums", ["Answer: guitar, drums and bass"], ["Answer: guitar, bass, drums, vocals, keyboards, harmonica"]),
    ("5", ["\u7b54\u3048: 5\u500b", "\uff15"], ["25\u500b", "\uff12\uff15"]),
    # Not short: anywhere in the response, but never in the middle of a number.
    ("June 1", ["On June 1, 1990, he came. Answer: he came", "June 1"], ["June 15", "June 1990"]),
    ("5 albums", ["5 albums", "2-5 albums"], ["25 albums"]),
    ("in 1990", ["from Leeds in 1990-1995"], ["in 19905"]),
    # Numbers with a point, a hyphen or a slash inside.
    ("12.5", ["12.5", "Answer: about 12.5 km.", "12,5"], ["125", "Answer: 1.25", "12.55"]),
    ("1960", ["1960", "1,960"], ["19.60", "196.0"]),
    ("21", ["21"], ["2-1", "2.1"]),
    ("10/11", ["10/11", "10-11"], ["1011"]),
    ("$1.25 million", ["It cost 1.25 million dollars."], ["It cost $125 million."]),
    ("1,234 people", ["There were 1234 people.", "1,234 people"], ["12.34 people"]),
    # Articles or punctuation alone.
    ("The The", ["The The", "Answer: the band the The."], ["bathe the", "the theatre", "the", "A The"]),
    ("A", ["A", "Answer: (a)"], ["It is a dog.", "Answer: a dog", ""]),
    ("!!!", ["!!!", "Answer: !!!"], ["Stop! Now!", "Stop!!!", ""]),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "right", "wrong"), SHORT, ids=[gold for gold, _, _ in SHORT])
def test_short_answers_count_as_whole_words_of_the_answer_part(gold: str, right: list[str], wrong: list[str]) -> None:
    for response in right:
        assert sub_em(response, ["not there at all", gold]) == 1.0, response
        assert find_in_response(response, [gold]), response
    for response in wrong:
        assert sub_em(response, [gold]) == 0.0, response
        assert not find_in_response(response, [gold]), response


def test_the_plain_form_is_the_papers() -> None:
    assert sub_em_plain("I do not know", ["no"]) == sub_em_plain("Document 4. Answer: 5", ["4"]) == 1.0
    assert sub_em_plain("It was 1960s music.", ["1960"]) == 1.0
    assert sub_em_plain("The The", ["The The"]) == sub_em_plain("O\u2019Brien", ["O'Brien"]) == 0.0


SPELLINGS = [
    ("O'Brien", "O\u2019Brien", "OBrien"),
    ('"Heroes" album', "\u201cHeroes\u201d album", "\u00abHeroes\u00bb album"),
    ("1892-94", "1892\u201394", "1892\u201494"),
    ("co-op bank", "co\u2011op bank", "co\u00adop bank"),
    ("Caf\u00e9 \u0141\u00f3d\u017a", "Cafe\u0301 \u0141o\u0301dz\u0301", "caf\u00e9\u00a0\u0141\u00d3D\u0179"),
    ("\uc11c\uc6b8\uc2dc", "\u1109\u1165\u110b\u116e\u11af\u1109\u1175", "\uc11c\uc6b8\u200b\uc2dc"),
    ("2011", "\uff12\uff10\uff11\uff11", "2011\ufeff"),
    ("office 5", "o\ufb03ce 5", "\uff2fffice \uff15"),
    ("Hawai'i", "Hawai\u02bbi", "Hawai\u00b4i"),
    ("-5 C", "\u22125 C", "\u20135 C"),
    ("1/2 mile", "\u00bd mile", "1\u20442 mile"),
]


@pytest.mark.parametrize("spelled", SPELLINGS, ids=[spelled[0] for spelled in SPELLINGS])
def test_spellings_of_one_text_are_equal(spelled: tuple[str, ...]) -> None:
    for gold in spelled:
        for text in spelled:
            assert [score(f"{text}.", [gold]) for score in (sub_em, em, f1)] == [1.0] * 3, (text, gold)
            assert sub_em(f"Thus.\nAnswer: {text}", [gold]) == 1.0
            assert find_in_document(f"x {text} y", [gold])
    assert em(spelled[1], [spelled[0]], False) == 0.0  # SQuAD's form


def test_similar_answers_stay_different() -> None:
    for one, other in (("caf\u00e9", "cafe"), ("\u0141od", "Lod"), ("na\u00efve", "naive")):
        assert em(one, [other]) == sub_em(one, [other]) == 0.0


@pytest.mark.parametrize("score", [em, f1])
def test_answers_of_articles_or_punctuation_can_be_matched(score) -> None:
    assert score("the  The", ["The The"]) == score("a", ["A"]) == score("!!!", ["!!!"]) == 1.0
    assert score("The", ["The The"]) < 1.0 and score("the who", ["The"]) < 1.0


def hotpot_f1(prediction: str, truth: str) -> float:
    """HotpotQA's hotpot_evaluate_v1.py, f1_score, step by step."""

    def normal(text: str) -> str:
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    predicted, gold = normal(prediction), normal(truth)
    if predicted in ("yes", "no", "noanswer") and predicted != gold:
        return 0.0
    if gold in ("yes", "no", "noanswer") and predicted != gold:
        return 0.0
    return squad_f1(prediction, truth)


@pytest.mark.parametrize(
    "prediction", ["yes", "Yes.", "no", "yes no", "yes they are", "no answer", "noanswer", "The no"]
)
def test_f1_of_yes_and_no_is_hotpotqas(prediction: str) -> None:
    for truth in ("yes", "no", "noanswer", "yes they can", "No Doubt"):
        assert f1(prediction, [truth]) == pytest.approx(hotpot_f1(prediction, truth)), truth
    assert f1("yes they are", ["yes"]) == f1("no", ["no doubt"]) == 0.0


LETTERS = (
    "aAbe  .,'-:/1290\n\u2019\u201c\u2013\u00e9e\u0301\u00bd\uff11\ufb01\u200b\u4e2d\u3002\uc11c\u1109\u1165\u0130"
)


@pytest.mark.parametrize("seed", range(20))
def test_places_are_those_of_the_normalised_text(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(30):
        text = "".join(draw.choices([*LETTERS, "the ", " a ", "an", "June 1"], k=draw.randint(0, 40)))
        for keep in ("words", "articles", "all"):
            for spaced, fold in itertools.product((False, True), repeat=2):
                places = normalised_places(text, fold, keep, spaced)
                assert "".join(c for c, _, _ in places) == normalise(text, fold, keep, spaced), ascii(text)
                assert all(0 <= start <= end <= len(text) for _, start, end in places)
        cut = sorted(draw.choices(range(len(text) + 1), k=2))
        gold = text[slice(*cut)]
        spans = find_in_response(text, [gold])
        assert bool(spans) == bool(sub_em(text, [gold])), (text, gold)
        assert all(a < b <= c < d for (a, b), (c, d) in itertools.pairwise(spans))


def test_places_in_a_text() -> None:
    def marked(places: list[tuple[int, int]], text: str) -> list[str]:
        return [text[start:end] for start, end in places]

    year = "\uff12\uff10\uff11\uff11"
    text = f"An O\u2019Brien, the \u201cPat\u201d O'Brien and Pat  the Cafe\u0301 {year}. Answer: PAT O\u2019BRIEN"
    assert marked(find_in_response(text, ["Pat O'Brien"]), text) == ["Pat\u201d O'Brien", "PAT O\u2019BRIEN"]
    assert marked(find_in_document(text, ["caf\u00e9 2011", "no", "a"]), text) == [
        "Cafe\u0301 \uff12\uff10\uff11\uff11"
    ]
    for response, gold, expected in (
        ("no, no information. Answer: No, no one", "no", ["No"]),
        ("4 of 4. Answer: 4 or (4)", "4", ["4", "4"]),
        ("The theatre. Answer: The The", "The The", ["The The"]),
    ):
        assert marked(find_in_response(response, [gold]), response) == expected


def test_which_answers_are_short() -> None:
    short = ["yes", "No.", "a spirit", "US", "1,234,567", "98%", "The The", "The", "5.1", "\u4e2d", "\uc11c\uc6b8"]
    assert all(gold.short for gold in golds(short)) and len(golds(short)) == len(short)
    assert not any(gold.short for gold in golds(["Lake Erie", "American", "\u6771\u4eac", "5 albums", "yes and no"]))
    assert golds(["", " ", "\u200b"]) == []


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
