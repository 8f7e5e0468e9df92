"""--max-tokens-per-rank auto: the largest pack that fits, from rehearsals of two packs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from option_lines import last_wins
from refusals import refused
from segment_names import prompt_of
from tiny_models import SHAPE
from transformers import LlamaConfig

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import most_tokens_of_a_pack
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.planning import budget
from megatron_solopo.planning.plan import read_options

GIB = 2**30


def group(name: str, prompt: int) -> TokenGroup:
    return TokenGroup(name, (prompt_of([1] * prompt, {"short_chosen": [1] * 5, "short_rejected": [1] * 5}),))


GROUPS = [group(f"g{number}", 100 + 10 * number) for number in range(6)]


def inputs(groups: list[TokenGroup] = GROUPS, valid: list[TokenGroup] | None = None) -> Any:
    data = SimpleNamespace(
        train=SimpleNamespace(groups=groups), valid=None if valid is None else SimpleNamespace(groups=valid)
    )
    return SimpleNamespace(hf_config=LlamaConfig(**SHAPE, tie_word_embeddings=False), data=data)


def config(*flags: str) -> Config:
    argv = ["--hf-path", "x", "--train-data", "x", "--save", "y", "--train-iters", "1", "--context-mode", "short"]
    return config_load.load(last_wins([*argv, "--seq-length", "128", "--max-tokens-per-rank", "auto", *flags]))[0]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the memory of a process, GiB, where 200 tokens need 1 GiB and 1,000 need 5."""
    monkeypatch.setattr(budget, "_rehearsed", lambda *arguments: ((200, GIB), (1000, 5 * GIB)))
    return lambda gib: monkeypatch.setattr(budget, "_room", lambda device: int(gib * GIB))


@pytest.mark.parametrize(
    ("gib", "number", "words"),
    [
        (8, 1000, "1,000, the largest pack of --micro-batch-size 8, which needs 5.0 of 8.0 GiB for a process"),
        (5, 1000, "the largest pack"),
        (3, 600, "600, of 3.0 GiB for a process: 200 tokens need 1.0 and 1,000 need 5.0"),
        (1, 200, "200, of 1.0 GiB"),
    ],
)
def test_the_largest_pack_that_fits(room: Any, gib: float, number: int, words: str) -> None:
    room(gib)
    chosen, why = budget.token_budget(config(), inputs(), "cpu")
    assert chosen == number and words in why


def test_what_does_not_fit_is_refused(room: Any) -> None:
    room(0.9)
    with refused("memory-too-small", "the largest example alone, 200 tokens", "needs 1.0 of 0.9 GiB", "--seq-length"):
        budget.token_budget(config(), inputs(), "cpu")
    room(1.5)
    with refused("memory-too-small", "300 tokens", "fewer than --seq-length 400"):
        budget.token_budget(config("--seq-length", "400"), inputs(), "cpu")


def test_what_cannot_be_rehearsed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = config("--transformer-impl", "transformer_engine", "--bf16")
    with refused("option-conflict", "--max-tokens-per-rank auto", "transformer_engine", "set a number"):
        budget.token_budget(engine, inputs(), "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("option-conflict", "--max-tokens-per-rank auto", "no GPU here"):
        budget.token_budget(config(), inputs(), "cuda")
    monkeypatch.setattr(budget, "outcomes_of", lambda tasks: "the rehearsal failed (OSError)")
    with refused("option-conflict", "--max-tokens-per-rank auto: the rehearsal failed (OSError)"):
        budget.token_budget(config(), inputs(), "cpu")


def test_a_process_has_its_part_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.environment, "memory_gib", lambda: {"total": 64.0, "available": 20.0})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert budget._room("cpu") == 4 * GIB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=82 * GIB))
    assert budget._room("cuda") == int(0.95 * 80 * GIB)


def test_the_smallest_memory_of_all_processes_counts(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    room(8)
    monkeypatch.setattr(budget.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(budget, "from_all_ranks", lambda value: [("a", value), ("b", 3 * GIB)])
    monkeypatch.setattr(budget, "shared", lambda make, name: make())
    assert budget.token_budget(config(), inputs(), "cpu")[0] == 600


def test_the_two_packs_are_the_largest_example_and_as_many_as_a_pack_may_have() -> None:
    few = config("--micro-batch-size", "3")
    assert [g.id for g in budget._largest_groups(few, inputs(), "cpu")] == ["g5", "g4", "g3"]
    assert [g.id for g in budget._largest_groups(few, inputs(valid=[group("v", 145)]), "cpu")] == ["g5", "v", "g4"]
    few.training.global_batch_size = 2
    assert len(budget._largest_groups(few, inputs(), "cpu")) == 2


def test_memory_between_two_packs_is_below_the_line_through_them() -> None:
    """Rehearsed, with logits that outweigh a small pack's layers: then more tokens cost nothing at first."""
    wide = inputs()
    wide.hf_config.vocab_size = 50_000
    ordered = budget._largest_groups(config(), wide, "cpu")
    (low, least), (high, most) = budget._rehearsed(config(), wide, [ordered[:1], ordered], "cpu")
    _, (middle, between) = budget._rehearsed(config(), wide, [ordered[:1], ordered[:3]], "cpu")
    assert low == 150 + 2 * 4 and high == sum(100 + 10 * n + 8 for n in range(6)) and low < middle < high
    assert least <= between <= least + (most - least) * (middle - low) / (high - low)


def test_auto_is_refused_by_name_where_no_run_starts() -> None:
    with refused("option-conflict", "--max-tokens-per-rank auto", "only training", "set one"):
        most_tokens_of_a_pack(config())
    with refused("option-conflict", "--max-tokens-per-rank auto"):
        read_options(["--model", "x", "--gpus", "1", "--long-tokens", "1024", "--max-tokens-per-rank", "auto"])
