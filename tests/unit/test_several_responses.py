"""Groups of several chosen and rejected responses: from build-pairs to token ids, packs and inspect-data."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pair_files import build, contexts, main, responses
from refusals import refused
from segment_names import names_in
from tiny_models import write_lines, write_model
from token_data import encoded, tokenize

from megatron_solopo.data.inspection import inspect_data
from megatron_solopo.data.pairing.policies import Scored, several, words
from megatron_solopo.data.schema import read_groups
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.token_store import BOTH_PAIRS, SHORT_PAIR
from megatron_solopo.data.tokenized.token_table import SCHEMAS, TokenTable, record_batch

RIGHT = ["Rome", "It is Rome", "I think that it is Rome , yes", "in Rome", "Rome"]
WRONG = ["Bern", "It is Oslo now", "I believe that it must be Bern , or not", "Kiel", "Bern", "no idea"]


def test_a_side_that_fits_is_kept_and_the_other_balanced() -> None:
    """Each response of the side that is kept takes in turn the nearest in words."""
    draw = random.Random(3)
    for _ in range(200):
        right, wrong = (
            [Scored(" ".join([side] * draw.randint(1, 9)), 0.0) for _ in range(draw.randint(1, 9))] for side in "rw"
        )
        texts = [sorted({response.text for response in side}) for side in (right, wrong)]
        most = draw.randint(1, 4), draw.randint(1, 8)
        chosen, rejected = several(right, wrong, random.Random(draw.random()), *most)
        for kept, side, limit in zip((chosen, rejected), texts, most, strict=True):
            names = [response.text for response in kept]
            assert len(set(names)) == len(names) == min(limit, len(side)) and set(names) <= set(side)
        fits = [len(side) <= limit for side, limit in zip(texts, most, strict=True)]
        if fits[0] == fits[1]:
            continue
        kept, taken, left = (chosen, rejected, texts[1]) if fits[0] else (rejected, chosen, texts[0])
        left = {words(text) for text in left}
        for number, response in enumerate(taken):
            aim = words(kept[number % len(kept)].text)
            assert abs(words(response.text) - aim) == min(abs(length - aim) for length in left)
            left.remove(words(response.text))  # texts of one side differ in their length alone


def test_a_text_that_is_right_and_wrong_is_in_no_group() -> None:
    one, other, both = Scored("a", 1.0), Scored("b", 0.0), Scored("c", 0.5)
    assert several([one, both], [other, both], random.Random(0), 4, 4) == ([one], [other])
    assert several([both], [both, other], random.Random(0), 4, 4)[0] == []


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    answers = {"q0": ["Rome"], "q1": ["Rome"], "q2": ["Rome"]}
    sampled = {"q0": RIGHT + WRONG, "q1": ["Rome", "Bern", "Bern"], "q2": ["Rome"]}
    return [
        "--contexts",
        str(contexts(tmp_path / "c.jsonl", answers)),
        "--responses",
        str(responses(tmp_path / "r.jsonl", sampled)),
        "--policy",
        "all",
    ]


def test_policy_all_makes_one_group_of_distinct_texts(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many, one = build(files, tmp_path)
    assert many.id == "q0" and set(many.chosen) == set(RIGHT) and len(many.chosen) == 4
    assert len(many.rejected) == 4 and set(many.rejected) <= set(WRONG)
    assert {name: score for name, score in many.scores.items() if name != "share_right"} == {
        **{name: 1.0 for name in ("chosen", "chosen_1", "chosen_2", "chosen_3")},
        **{name: 0.0 for name in ("rejected", "rejected_1", "rejected_2", "rejected_3")},
    }
    assert (one.chosen, one.rejected) == (["Rome"], ["Bern"])  # lists, so that a table's column has one type
    assert "responses of a group: 5.00 (mean)" in capsys.readouterr().out
    (two, _) = build(files, tmp_path, "--max-chosen", "2", "--max-rejected", "1")
    assert (len(two.chosen), len(two.rejected)) == (2, 1)
    assert main([*files, "--output", str(tmp_path / "g.parquet")]) == 0
    assert list(read_groups(tmp_path / "g.parquet")) == [many, one]


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["--max-chosen", "0"], "option-value", "--max-chosen 0"),
        (["--policy", "random", "--max-rejected", "2"], "option-unused", "--max-rejected 2"),
        (["--pairs-per-question", "2"], "option-unused", "--pairs-per-question 2"),
    ],
)
def test_options_without_effect_are_refused(
    files: list[str], tmp_path: Path, more: list[str], code: str, named: str
) -> None:
    with refused(code, named):
        main([*files, "--output", str(tmp_path / "g.jsonl"), *more])


def group(**fields: Any) -> dict[str, Any]:
    short, long = ([{"role": "user", "content": text}] for text in ("w1 w2", "w1 w2 w3 w4 w5 w6"))
    return {"id": "g", "short_messages": short, "long_messages": long, **fields}


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"chosen": ["a", "b"], "rejected": ["b"]}, "pair-without-preference", "the same text"),
        ({"chosen": ["a", "a"], "rejected": ["b"]}, "pair-without-preference", "two chosen responses"),
        ({"chosen": ["a", " "], "rejected": ["b"]}, "pair-without-preference", "'chosen' is empty"),
        ({"chosen": ["a", 3], "rejected": ["b"]}, "field-type", "'chosen'"),
        ({"chosen": [], "rejected": "b"}, "field-type", "'chosen'"),
        ({"chosen": ["a", "c"], "rejected": "b", "chosen_ids": [[1]]}, "field-value", "'chosen_ids'"),
        ({"chosen": "a", "rejected": "b", "chosen_ids": [1, "2"]}, "field-type", "'chosen_ids[1]'"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "field-value", "'chosen'"),
    ],
)
def test_what_is_no_group_is_named(tmp_path: Path, fields: dict[str, Any], code: str, named: str) -> None:
    write_lines(tmp_path / "g.jsonl", [group(**fields)])
    with refused(code, f"{tmp_path}/g.jsonl:1: ", named):
        list(read_groups(tmp_path / "g.jsonl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf"))


TURNS = [
    {"role": "assistant", "content": "w3 w4"},
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6"},
]


def test_every_response_is_one_piece_behind_a_prompt_that_is_there_once(folder: Path, tmp_path: Path) -> None:
    """From a file, through the store, to the pack; what is not the assistant's is context."""
    path, tokenizer = tmp_path / "g.jsonl", load_tokenizer(folder)
    write_lines(
        path,
        [group(chosen=["w7 w8", TURNS], rejected=["w9", "w1", "w2 w3"]), group(id="h", chosen="w1", rejected="w2")],
    )
    stored, (many, one) = tokenize(path, tokenizer, BOTH_PAIRS, 64), encoded(path, tokenizer, BOTH_PAIRS)
    assert list(stored.groups) == [many, one]
    assert names_in(many) == [
        *("short_chosen", "short_chosen_1", "short_rejected", "short_rejected_1", "short_rejected_2"),
        *("long_chosen", "long_chosen_1", "long_rejected", "long_rejected_1", "long_rejected_2"),
    ]
    assert stored.segment_counts()[:, 0, :2].tolist() == [[2, 3], [1, 1]]
    turns = many.prompts[0].completions[1]
    trained = np.asarray(turns.ids)[np.asarray(turns.loss_mask)]
    assert tokenizer.decode(trained).split() == ["w3", "w4", tokenizer.eos_token, "w6", tokenizer.eos_token]
    assert turns.trained_tokens == len(trained) < len(turns.ids)
    lengths = [(3, 2), (3, 2), (3, 3), (5, 2), (5, 2), (5, 3), (2, 2)]
    assert stored.chosen_rejected_lengths() == lengths
    pack = build_pack([many], [0])
    prompts = sum(len(prompt.ids) for prompt in many.prompts)
    assert len(pack.tokens) == prompts + sum(len(c.ids) - 1 for _, c in many.segments()) == many.tokens(True)
    assert pack.scored.lengths.tolist() == [3, 5, 2, 2, 3] * 2
    plain = tokenize(path, tokenizer, SHORT_PAIR, 64)
    write_lines(
        path,
        [group(chosen=["w7 w8", TURNS[:1]], rejected=["w9", "w1", "w2 w3"]), group(id="h", chosen="w1", rejected="w2")],
    )
    assert plain.fingerprint != tokenize(path, tokenizer, SHORT_PAIR, 64).fingerprint


def test_masks_are_part_of_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    """The same ids with another mask are other data, whose reference log-probs another cache holds."""
    write_lines(tmp_path / "g.jsonl", [group(chosen=TURNS, rejected="w9")])
    (one,) = encoded(tmp_path / "g.jsonl", load_tokenizer(folder), SHORT_PAIR)
    (prompt,) = one.prompts
    whole = replace(prompt, completions=tuple(replace(c, loss_mask=None) for c in prompt.completions))
    prints = set()
    for number, each in enumerate((one, replace(one, prompts=(whole,)))):
        path = tmp_path / str(number)
        with pa.ipc.new_stream(path, SCHEMAS["preference"]) as out:
            out.write_batch(record_batch([each], "preference"))
        table = TokenTable(path, "preference")
        prints.add(table.fingerprint(np.arange(1), SHORT_PAIR))
        assert table.masked(np.arange(1)) == (number == 0)
        assert table.group(0, SHORT_PAIR) == each
    assert len(prints) == 2


def test_equal_ids_within_a_group_are_refused(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "g.jsonl", [group(chosen=["w1", "w2"], rejected=["w3", " w2 "])])
    with refused("responses-equal", "group 'g': ", "chosen_1 and rejected_1 "):
        encoded(tmp_path / "g.jsonl", load_tokenizer(folder), BOTH_PAIRS)


def test_tokens_beyond_the_shortest_response_have_the_tail_weight(folder: Path, tmp_path: Path) -> None:
    """In whatever order and layout; counted among trained tokens."""
    write_lines(tmp_path / "g.jsonl", [group(chosen=["w7 w8 w9 w1", TURNS], rejected=["w9 w1"])])
    (many,) = encoded(tmp_path / "g.jsonl", load_tokenizer(folder), BOTH_PAIRS)
    assert many.shortest_response == 3  # two words and the end of turn
    for share in (True, False):
        pack = build_pack([many, many.only(SHORT_PAIR)], [0, 1], share, tail_weight=0.25)
        assert pack.weights is not None
        each = [pack.weights[pack.segments == number].tolist() for number in range(len(pack.scored))]
        wanted = [[1, 1, 1, 0.25, 0.25], [1, 1, 1, 0.25, 0.25], [1, 1, 1]]
        assert each == wanted * 3
        assert build_pack([many], [0], share).weights is None


def test_inspect_data_shows_all_responses_and_the_mask(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps(group(chosen=["w7 w8", TURNS], rejected=["w9", "w1"], answers=["w7"])) + "\n")
    argv = ["--data", str(path), "--tokenizer", str(folder)]
    assert inspect_data.main(argv) == 0
    shown = capsys.readouterr().out
    for part in ("chosen", "chosen_1", "rejected_1", "[user] w5", "short_chosen_1", "long_chosen_1", "5 of "):
        assert part in shown, part
    assert "(w5)" in shown.replace(" ", "")  # in parentheses: not trained
    assert inspect_data.main([*argv, "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "chosen_1" in page and "not trained" in page
