"""Answers from passes that verify drafts, and the best evaluation of a run; without a model."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from refusals import refused

from megatron_solopo.training import answers, best, retention
from megatron_solopo.training.best import Best

END = 0


def next_token(prompt: list[int], answer: list[int]) -> int:
    """A model: the token after a prompt and an answer."""
    return random.Random(str((prompt, answer))).randrange(6)


def greedy(prompt: list[int], most: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < most and answer[-1:] != [END]:
        answer.append(next_token(prompt, answer))
    return answer


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Replaces the forward pass by `next_token`; the sequences of each pass."""
    made: list[list[Any]] = []

    def likeliest(engine: Any, sequences: list[Any], config: Any) -> list[list[int]]:
        made.append(sequences)
        return [[next_token(prompt, answer[:n]) for n in range(len(answer) + 1)] for prompt, answer in sequences]

    monkeypatch.setattr(answers, "_pass", likeliest)
    return made


PROMPTS = [[number, number + 1] for number in range(12)]


def answer(drafts: dict[int, list[int]] | None = None, most: int = 9) -> list[list[int]]:
    return answers.greedy_answers(None, PROMPTS, frozenset({END}), most, None, drafts)  # pyright: ignore[reportArgumentType]


def test_without_drafts_there_is_a_pass_for_each_token_of_the_longest_answer(passes: list[Any]) -> None:
    expected = [greedy(prompt, 9) for prompt in PROMPTS]
    assert answer() == expected
    assert len(passes) == max(map(len, expected))
    assert [len(sequences) for sequences in passes] == [sum(len(e) > n for e in expected) for n in range(len(passes))]


def test_right_drafts_are_verified_in_one_pass(passes: list[Any]) -> None:
    expected = [greedy(prompt, 9) for prompt in PROMPTS]
    assert answer(dict(enumerate(expected))) == expected and len(passes) == 1


@pytest.mark.parametrize("seed", range(8))
def test_any_draft_leads_to_the_greedy_answer(passes: list[Any], seed: int) -> None:
    rng = random.Random(seed)
    expected = [greedy(prompt, 7) for prompt in PROMPTS]
    drafts = {}
    for index, right in enumerate(expected):
        draft = [token if rng.random() < 0.7 else rng.randrange(6) for token in right]
        drafts[index] = draft[: rng.randint(0, 9)] + [rng.randrange(6) for _ in range(rng.randint(0, 5))]
    assert answer(drafts, most=7) == expected
    assert len(passes) <= 7


def test_a_changed_token_costs_one_pass_more(passes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    long = next(index for index, prompt in enumerate(PROMPTS) if len(greedy(prompt, 9)) >= 4)
    expected = greedy(PROMPTS[long], 9)
    draft = [*expected[:2], 5 if expected[2] != 5 else 4, *expected[3:]]
    monkeypatch.setattr(answers, "_pass", answers._pass)
    [reply] = answers.greedy_answers(None, [PROMPTS[long]], frozenset({END}), 9, None, {0: draft})  # pyright: ignore[reportArgumentType]
    assert reply == expected and len(passes) == 2


def line(step: int, split: str = "valid", **values: float) -> dict[str, Any]:
    return {"step": step, "split": split, **values}


def test_the_best_step_follows_the_metrics_direction() -> None:
    for metric, values, step in (("loss", [3, 1, 2, 1], 1), ("accuracy", [0.3, 0.1, 0.5, 0.5], 2)):
        kept = Best(metric)
        better = [kept.read(line(number, **{metric: value})) for number, value in enumerate(values)]
        assert (kept.step, better[0], better[step], better[-1]) == (step, True, True, False)
    kept = Best("loss")
    assert not kept.read(line(1, "train", loss=0.1)) and not kept.read(line(1, accuracy=1)) and kept.step is None
    assert not kept.read(line(1, loss=math.nan)) and kept.read(line(2, "generate", loss=5.0))


def test_a_run_is_exhausted_after_its_patience() -> None:
    kept = Best("accuracy", patience=2)
    seen = []
    for number, value in enumerate([0.5, 0.5, 0.6, 0.6, 0.2]):
        kept.read(line(number, accuracy=value))
        seen.append(kept.exhausted)
    assert seen == [False, False, False, False, True]
    again = Best("accuracy", patience=2)
    again.replay([line(number, accuracy=value) for number, value in enumerate([0.5, 0.5, 0.6, 0.6, 0.2])])
    assert again.exhausted and (again.step, again.value) == (2, 0.6)
    assert not Best("accuracy").exhausted


def test_the_best_is_written_for_people_and_for_a_later_start(tmp_path: Any) -> None:
    kept = Best("accuracy", patience=1)
    kept.read(line(3, accuracy=0.25))
    kept.write(tmp_path)
    assert json.loads((tmp_path / best.FILE).read_text()) == {
        "step": 3,
        "metric": "accuracy",
        "value": 0.25,
        "stopped": None,
    }
    assert best.stopped_early(tmp_path) is None and best.stopped_early(tmp_path / "none") is None
    kept.write(tmp_path, stopped=4)
    assert best.stopped_early(tmp_path) == 4


def test_a_metric_without_a_better_direction_is_refused() -> None:
    best.check_metric("sub_em_long", answers.ANSWER_METRICS)
    for metric in ("sub_em_long", "tokens", "reward_chosen"):
        with refused("metric-unknown", f"--save-best {metric}: ", "accuracy"):
            best.check_metric(metric, ("loss", "accuracy", "reward_chosen"))


def test_the_best_checkpoint_is_never_surplus(tmp_path: Any) -> None:
    from megatron_solopo.conversion.manifest import MANIFEST, checkpoint_folder

    for number in (2, 4, 6, 8):
        folder = checkpoint_folder(tmp_path, number)
        folder.mkdir(parents=True)
        (folder / MANIFEST).touch()
    surplus = [checkpoint_folder(tmp_path, number) for number in (2, 6)]
    assert retention.surplus(tmp_path, 8, 1, None, best=4) == surplus
