"""A rehearsed step: bytes that arithmetic knows, every method and layout, and what it must notice."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import SHAPE
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.parallel.layouts import parse_layout
from megatron_solopo.planning.memory import ACTIVATIONS, GRADIENTS, LOG_PROBS, OPTIMIZER, WEIGHTS
from megatron_solopo.planning.rehearse import Outcome, example
from megatron_solopo.planning.table import largest_pack, outcomes_of, packs_that_matter
from megatron_solopo.planning.workers import Rehearsals, Task, outcome_of

HIDDEN, LAYERS, VOCABULARY = 64, 2, 1000
LLAMA = LlamaConfig(
    **SHAPE
    | dict(hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=8)
    | dict(num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=4096),
    tie_word_embeddings=False,
)
MOE = Qwen3MoeConfig(
    **SHAPE
    | dict(hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, head_dim=8)
    | dict(num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=4096)
    | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
    tie_word_embeddings=False,
)
FULL = ("--recompute-granularity", "full")


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[Rehearsals]:
    with Rehearsals(1) as rehearsals:
        yield rehearsals


def options(*flags: Any, layout: str = "1") -> Config:
    argv = ["--hf-path", "model", "--random-init", "--train-data", "x", "--save", "y", "--train-iters", 2, *flags]
    config, _ = config_load.load([*map(str, argv)])
    config.parallel = parse_layout(layout).applied(config.parallel)
    return config


def task(
    *flags: Any, layout: str = "1", model: PretrainedConfig = LLAMA, rank: int = 0, packs: int = 1, **more: Any
) -> Task:
    config = options(*flags, layout=layout)
    groups = [example(config.method, 30, 200, 12)]
    return Task(config, model, groups, packs, rank, parse_layout(layout).processes, **more)


def parameters(tensor: int = 1, stages: int = 1, last: bool = True) -> int:
    """Of the llama above on one process: matrices are cut, norms are not; the vocabulary is padded to 1,024."""
    matrices = 64 * 64 + 64 * 64 + 64 * 64 + 3 * 64 * 96  # query, keys and values, output, gate up and down
    ends = 2 if stages == 1 else 1
    return (
        LAYERS // stages * (matrices // tensor + 2 * HIDDEN) + ends * 1024 * HIDDEN // tensor + (HIDDEN if last else 0)
    )


@pytest.mark.parametrize(
    ("device", "layout", "rank", "count", "copies"),
    [
        ("cuda", "1", 0, parameters(), 1),
        ("cpu", "tp2 sp", 1, parameters(2), 1),
        ("cuda", "pp2", 0, parameters(stages=2, last=False), 1),
        ("cpu", "pp2", 1, parameters(stages=2), 1),
        ("cuda", "cp2", 0, parameters(), 2),
        ("cpu", "dp8", 5, parameters(), 8),
    ],
)
def test_what_stands_between_steps_is_what_arithmetic_says(
    rehearsals: Rehearsals, device: str, layout: str, rank: int, count: int, copies: int
) -> None:
    """Two bytes a weight, four a gradient, twelve a parameter of the optimizer's share; buffers are padded so that
    copies of the model share them evenly, and CUDA's blocks to 512 bytes."""
    [outcome] = rehearsals.each([task("--bf16", layout=layout, rank=rank, packs=2, device=device)])
    standing = outcome.standing
    room = 2 * 64 * copies * 128 if copies > 1 else 1024  # param_and_grad_buffer.py pads by lcm(copies, 128)
    rounded = 60 * 512 * 3 if device == "cuda" else 60 * 4  # each tensor of a moment, and Adam's count of steps
    assert 0 <= standing[WEIGHTS] - 2 * count <= 2 * room + 512
    assert 0 <= standing[GRADIENTS] - 4 * count <= 4 * room
    assert 0 <= standing[OPTIMIZER] - 12 * count // copies <= rounded + 12 * 128


def test_recomputation_keeps_the_inputs_of_layers(rehearsals: Rehearsals) -> None:
    kept, checkpoints = rehearsals.each([task(device="cpu"), task(*FULL, device="cpu")])
    # forward ends with the inputs of all layers and the output of the last, in float32
    assert checkpoints.peaks["forward"].held[ACTIVATIONS] >= LAYERS * checkpoints.tokens * HIDDEN * 4
    assert checkpoints.peaks["forward"].held[ACTIVATIONS] < 3 * LAYERS * checkpoints.tokens * HIDDEN * 4
    assert kept.peaks["forward"].held[ACTIVATIONS] > 10 * LAYERS * kept.tokens * HIDDEN * 4


METHODS_AND_LAYOUTS = [
    ("cuda", ("--preference-loss", "dpo", "--alignment-target", "both"), LLAMA, "tp2 sp cp2 pp2 dp2", ()),
    ("cuda", ("--preference-loss", "ipo", "--context-mode", "short"), LLAMA, "tp2", FULL),
    ("cuda", ("--preference-loss", "simpo", "--alignment-distance", "huber"), LLAMA, "pp2", FULL),
    ("cuda", ("--preference-loss", "orpo", "--context-mode", "long"), MOE, "tp2 sp dp2 ep4 etp1", FULL),
    ("cuda", ("--preference-loss", "longpo", "--context-mode", "long"), LLAMA, "cp2", FULL),
    ("cuda", ("--objective", "sft"), MOE, "dp2 ep2", ("--moe-aux-loss-coeff", 0.1)),
    ("cuda", ("--sft-weight", 0.5, "--sft-normalization", "token"), LLAMA, "dp2", ("--overlap-grad-reduce",)),
    ("cuda", ("--no-share-prompts",), LLAMA, "dp2", ("--overlap-grad-reduce", "--overlap-param-gather")),
    ("cpu", ("--preference-loss", "dpo"), LLAMA, "tp2 sp cp2 pp2 dp2", FULL),
    ("cpu", ("--preference-loss", "orpo"), MOE, "tp2 sp dp2 ep2", ()),
]


def test_every_method_and_layout_is_rehearsed(rehearsals: Rehearsals) -> None:
    """No read of a value, and no host tensor among those of the device, in any of them."""
    tasks = []
    for device, method, model, layout, flags in METHODS_AND_LAYOUTS:
        packs = 2 if "pp" in layout else 1
        tasks.append(task(*method, "--bf16", *flags, layout=layout, model=model, packs=packs, device=device))
    for outcome in rehearsals.each(tasks):
        assert outcome.peak.total > sum(outcome.standing.values())


def test_the_largest_pack_of_a_run_is_the_one_rehearsed() -> None:
    config = options("--micro-batch-size", 2, "--global-batch-size", 4, layout="dp2 pp2")
    lengths = [9, 50, 7, 8, 60, 61, 5, 6]
    groups = [example(config.method, 3, length, 2) for length in lengths]
    schedule = SimpleNamespace(steps=2, step=lambda number: range(4 * number, 4 * number + 4))
    inputs: Any = SimpleNamespace(data=SimpleNamespace(train=SimpleNamespace(groups=groups)), schedule=schedule)
    inputs.hf_config = LLAMA
    pack, packs = largest_pack(config, inputs, 4, "cpu")
    longest = sorted(len(prompt.ids) for group in pack for prompt in group.prompts)
    assert 61 in longest and longest[0] == 3 and packs == 1
    assert packs_that_matter(9, config.parallel) == 2  # each stage holds as many packs as there are stages


def leaking(given: Task) -> Outcome:
    """A rehearsal of a product that computes the logits of all tokens at once, and keeps them."""
    from megatron_solopo.model import forward

    kept: list[Any] = []
    head = forward.response_log_probs

    def leak(states: Any, weight: Any, *rest: Any) -> Any:
        kept.append(states.detach() @ weight.detach().t())
        return head(states, weight, *rest)

    forward.response_log_probs = leak
    try:
        return outcome_of(given)
    finally:
        forward.response_log_probs = head


def test_a_tensor_of_all_logits_is_noticed(rehearsals: Rehearsals) -> None:
    """The head holds logits of a chunk alone; where all of them are kept, each byte is in the peaks behind that."""
    config = options("--bf16", "--logprob-chunk-size", 4)
    given = Task(config, LLAMA, [example(config.method, 30, 200, 120)])
    [clean] = rehearsals.each([given])
    leaked = rehearsals.run(leaking, given).result()
    logits = 3 * 120 * 1024 * 2
    assert clean.peaks["forward"].held[LOG_PROBS] < logits / 4
    for phase in ("backward", "update"):
        assert leaked.peaks[phase].total - clean.peaks[phase].total == logits, phase


def test_a_failed_rehearsal_is_a_line_of_the_dry_run() -> None:
    without_groups = Task(Config(), LLAMA, [])
    assert "not known: the rehearsal failed (" in outcomes_of([without_groups])
