"""Pairs of repeated responses: none that exists is missed, and their groups' ids differ."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from refusals import refused

from megatron_solopo.data.pairing.build_pairs import main
from megatron_solopo.data.pairing.policies import POLICIES, Pair, Scored, distinct
from megatron_solopo.data.schema import read_groups

RIGHT = [Scored("best", 1.0)] * 30 + [Scored("second right", 0.9)]
WRONG = [Scored("worst", 0.0)] * 30 + [Scored("bad", 0.1)]


def texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(chosen.text, rejected.text) for chosen, rejected in pairs]


def drawn(policy: str, wanted: int, seed: int, right: list[Scored] = RIGHT, wrong: list[Scored] = WRONG) -> list:
    return texts(distinct(POLICIES[policy](right, wrong, random.Random(seed)), wanted, right, wrong))


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 9])
def test_best_and_worst_are_chosen_among_repetitions(wanted: int) -> None:
    order = [("best", "worst"), ("best", "bad"), ("second right", "worst"), ("second right", "bad")]
    for seed in range(10):
        assert drawn("best_worst", wanted, seed) == order[:wanted]


def test_other_policies_miss_few_pairs() -> None:
    """A pair of two rare responses is one draw in 961; before it was looked for 80 times."""
    for policy in ("random", "shortest_correct"):
        assert sum(len(drawn(policy, 4, seed)) == 4 for seed in range(40)) >= 38
    right = [Scored("short", 1.0)] * 100 + [Scored("a longer one", 1.0)]
    assert drawn("shortest_correct", 2, 0, right, [Scored("w", 0.0)]) == [("short", "w"), ("a longer one", "w")]


def test_a_seed_draws_the_same_pairs() -> None:
    """The first pairs of a seed, by the policies' definitions on other responses."""
    right, wrong = ([Scored(f"{side} " * (1 + i % 5) + str(i), 1 - i / 99) for i in range(9)] for side in "rw")
    for seed in range(5):
        rng = random.Random(seed)
        plain = [(rng.choice(right).text, rng.choice(wrong).text) for _ in range(3)]
        assert drawn("random", 3, seed, right, wrong) == list(dict.fromkeys(plain))[:3]
        rng = random.Random(seed)
        chosen = rng.choice(right)
        nearest = min(
            rng.sample(wrong, 9), key=lambda response: abs(len(response.text.split()) - len(chosen.text.split()))
        )
        assert drawn("length_matched", 1, seed, right, wrong) == [(chosen.text, nearest.text)]


def write(folder: Path, ids: list[str], responses: list[str]) -> list[str]:
    chat = [{"role": "user", "content": "?"}]
    record = {"question": "?", "answers": ["Rome"], "short_messages": chat, "long_messages": chat}
    record |= {"short_tokens": 1, "long_tokens": 1}
    for name, fields in (("c", record), ("r", {"responses": responses})):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"id": one, **fields}) + "\n" for one in ids))
    paths = [str(folder / name) for name in ("c.jsonl", "r.jsonl", "g.jsonl")]
    return [part for pair in zip(("--contexts", "--responses", "--output"), paths, strict=True) for part in pair]


@pytest.mark.parametrize("ids", [["x", "x#2"], ["x#2", "x"]])
def test_colliding_ids_are_refused(tmp_path: Path, ids: list[str]) -> None:
    argv = write(tmp_path, ids, ["Rome", "in Rome", "Bern"])
    with refused("id-twice", "--pairs-per-question 2: 'x#2' ", "c.jsonl", "r.jsonl"):
        main([*argv, "--pairs-per-question", "2"])
    assert not (tmp_path / "g.jsonl").exists()
    main(argv)
    assert sorted(group.id for group in read_groups(tmp_path / "g.jsonl")) == ["x", "x#2"]


def test_a_scorer_may_return_numpy_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("numpy_scorer.py").write_text(
        "import numpy as np\n"
        "def truth(response, answers): return np.bool_(answers[0] in response)\n"
        "def single(response, answers): return np.float32(answers[0] in response)\n"
        "def text(response, answers): return np.str_('1')\n"
    )
    argv = write(tmp_path, ["x"], ["Rome", "Bern"])
    for name in ("truth", "single"):
        main([*argv, "--scorer", f"numpy_scorer:{name}"])
        (group,) = read_groups("g.jsonl")
        assert (group.chosen, group.scores["chosen"], group.scores["rejected"]) == ("Rome", 1.0, 0.0)
    with refused("scorer-value", "--scorer numpy_scorer:text: ", "'1'", "'Rome'"):
        main([*argv, "--scorer", "numpy_scorer:text"])
