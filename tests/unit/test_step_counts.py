"""What a rehearsed step computes and exchanges, against closed forms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny_models import SHAPE
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from megatron_solopo import config_load
from megatron_solopo.parallel.layouts import parse_layout
from megatron_solopo.planning.counts import Tally
from megatron_solopo.planning.operators import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    EXPERTS,
    LINK,
    ON_HOST,
    PRODUCTS,
    blocked_pairs,
    causal_pairs,
)
from megatron_solopo.planning.rehearse import example
from megatron_solopo.planning.workers import Rehearsals, Task

HIDDEN, WIDTH, LAYERS, HEADS, VOCABULARY = 64, 96, 2, 8, 1024
SIZES = dict(hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
SIZES |= dict(num_key_value_heads=4, head_dim=8, vocab_size=1000, max_position_embeddings=4096)
LLAMA = LlamaConfig(**SHAPE | SIZES, tie_word_embeddings=False)
EXPERT = 32
ROUTED = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=EXPERT, norm_topk_prob=True)
MOE = Qwen3MoeConfig(**SHAPE | SIZES | ROUTED, tie_word_embeddings=False)
SHORT, LONG, RESPONSE = 30, 200, 12
TRAINED = 3 * RESPONSE
"""Two short responses and a long one."""
ATTENTION = HIDDEN * HIDDEN + HIDDEN * HIDDEN + HIDDEN * HIDDEN
"""Weights of query, of keys and values (half of the heads each), and of the output."""
MATRICES = ATTENTION + 3 * HIDDEN * WIDTH
FULL = ("--recompute-granularity", "full")


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[Rehearsals]:
    with Rehearsals(1) as rehearsals:
        yield rehearsals


def task(
    *flags: str, layout: str = "1", device: str = "cpu", model: PretrainedConfig = LLAMA, packs: int = 1, rank: int = 0
) -> Task:
    argv = ["--hf-path", "model", "--random-init", "--train-data", "x", "--save", "y", "--train-iters", "2", *flags]
    config, _ = config_load.load(argv)
    config.parallel = parse_layout(layout).applied(config.parallel)
    world = parse_layout(layout).processes
    return Task(config, model, [example(config.method, SHORT, LONG, RESPONSE)], packs, rank, world, device)


def products(tokens: int, layers: float = LAYERS, head: bool = True, cut: int = 1) -> tuple[int, int]:
    """Of forward and backward: 2 per weight and token; backward twice as many, as forward keeps so few logits."""
    of_layers = round(2 * tokens * layers * MATRICES) // cut
    rows = VOCABULARY // cut
    real = min(rows, SIZES["vocab_size"])  # of the first rank; backward leaves out what pads the vocabulary
    of_head, back = (2 * TRAINED * HIDDEN * count if head else 0 for count in (rows, 2 * real))
    return of_layers + of_head, 2 * of_layers + back


def attention(pairs: int, cut: int = 1) -> tuple[int, int]:
    """Of forward and backward: 4 and 10 per pair and element of a head."""
    return 4 * LAYERS * HIDDEN * pairs // cut, 10 * LAYERS * HIDDEN * pairs // cut


def counted(tally: Tally) -> tuple[float, float, float]:
    return tally.flops(PRODUCTS), tally.flops(ATTENTION_FORWARD), tally.flops(ATTENTION_BACKWARD)


def test_operations_are_those_of_the_closed_form(rehearsals: Rehearsals) -> None:
    """Of one process; on CUDA prompts are padded to 128 tokens and attention skips what is masked, the CPU's kernel
    computes whole blocks."""
    slot = RESPONSE - 1  # the last token of a response predicts nothing
    tokens = {"cpu": SHORT + LONG + 3 * slot, "cuda": 128 + 256 + 3 * slot}
    on_cuda = causal_pairs(128, 128) + causal_pairs(256, 256)
    on_cuda += 2 * causal_pairs(slot, SHORT + slot) + causal_pairs(slot, LONG + slot)
    on_cpu = SHORT**2 + LONG**2 + 2 * slot * (SHORT + slot) + slot * (LONG + slot)
    pairs = {"cpu": on_cpu, "cuda": on_cuda}
    for outcome, device in zip(rehearsals.each([task("--bf16", device="cuda"), task()]), ("cuda", "cpu"), strict=True):
        assert outcome.tokens == tokens[device]
        forward, backward = products(tokens[device])
        attends, attends_back = attention(pairs[device])
        assert counted(outcome.work.forward) == (forward, attends, 0)
        assert counted(outcome.work.backward) == (backward, 0, attends_back)
        assert outcome.work.update.flops() == 0
        dtype = "bfloat16" if device == "cuda" else "float32"
        assert outcome.work.forward.flops(PRODUCTS, dtype=dtype) == forward
        assert outcome.work.backward.flops(PRODUCTS, dtype=dtype) == backward  # though gradients are float32 sums
        # the update reads and writes weights, gradients, masters and moments of each parameter
        assert outcome.work.update.moved > 28 * PARAMETERS


def test_recomputation_adds_one_forward_pass_of_the_layers(rehearsals: Rehearsals) -> None:
    plain, full = rehearsals.each([task(), task(*FULL)])
    assert counted(full.work.forward) == counted(plain.work.forward)
    forward, attends, _ = counted(plain.work.forward)
    more = [one - other for one, other in zip(counted(full.work.backward), counted(plain.work.backward), strict=True)]
    assert more == [forward - 2 * TRAINED * VOCABULARY * HIDDEN, attends, 0]


PARAMETERS = LAYERS * (MATRICES + 2 * HIDDEN) + 2 * VOCABULARY * HIDDEN + HIDDEN
PADDING = 2**14
"""Bytes: DDP's buffers end at a multiple of some elements."""


def moved(tally: Tally, kind: str) -> float:
    return sum(count * operation.bytes for operation, count in tally.operations.items() if operation.kind == kind)


def test_a_resident_reference_scores_each_pack_and_changes_places_twice(rehearsals: Rehearsals) -> None:
    resident = ("--reference", "resident")
    of_short = (*resident, "--alignment-reference", "short")
    tasks = [task("--bf16", *flags, device="cuda", packs=2) for flags in ((), resident, of_short)]
    cached, same, short = rehearsals.each(tasks)
    assert cached.work.score.flops() == 0
    for outcome in (same, short):
        assert counted(outcome.work.forward) == counted(cached.work.forward)
        assert counted(outcome.work.backward) == counted(cached.work.backward)
        assert 0 <= moved(outcome.work.update, LINK) - 4 * 2 * PARAMETERS <= 4 * PADDING  # twice, both ways
        assert 0 <= outcome.host - cached.host - 2 * PARAMETERS <= PADDING
        assert outcome.peaks["score"].total > sum(outcome.standing.values())
    assert counted(same.work.score) == counted(cached.work.forward)
    assert 0 < short.work.score.flops() < 0.5 * same.work.score.flops()  # without the long prompt
    more = same.work.of_step(2).flops() - cached.work.of_step(2).flops()
    assert more == 2 * cached.work.forward.flops()


def test_an_optimizer_on_the_host_computes_there(rehearsals: Rehearsals) -> None:
    """Gradients of 4 bytes come and weights of 2 go; Adam reads 16 bytes a parameter, writes 12, and rounds 4 to 2."""
    plain, away = rehearsals.each(
        [task("--bf16", *flags, device="cuda") for flags in ((), ("--optimizer-cpu-offload",))]
    )
    assert moved(plain.work.update, LINK) == 0 == moved(plain.work.forward, LINK)
    assert moved(away.work.update, LINK) == 6 * PARAMETERS
    assert 34 * PARAMETERS <= moved(away.work.update, ON_HOST) <= 34 * PARAMETERS + PADDING
    assert away.work.update.moved < plain.work.update.moved - 28 * PARAMETERS


def test_frozen_matrices_have_no_gradients(rehearsals: Rehearsals) -> None:
    """With LoRA backward has one product a frozen weight and token instead of two, and none before the first adapter;
    of the log-prob head, which keeps its logits, the gradient of the states."""
    rank = 4
    [outcome] = rehearsals.each([task("--lora-rank", str(rank))])
    grouped = HIDDEN // 2  # rows of keys, and of values
    inputs = 3 * HIDDEN + HIDDEN + 2 * HIDDEN + WIDTH  # of q, k and v; o; gate and up; down
    outputs = (HIDDEN + 2 * grouped) + HIDDEN + 2 * WIDTH + HIDDEN
    first = HIDDEN * (HIDDEN + 2 * grouped) + rank * 3 * HIDDEN  # the input of the first layer has no gradient
    of_head = 2 * TRAINED * SIZES["vocab_size"] * HIDDEN  # without what pads the vocabulary
    tokens = outcome.tokens
    adapters = 2 * tokens * LAYERS * rank * (inputs + outputs)
    assert outcome.work.forward.flops(PRODUCTS) == products(tokens)[0] + adapters
    assert outcome.work.backward.flops(PRODUCTS) == (2 * tokens * (LAYERS * MATRICES - first) + 2 * adapters + of_head)


def test_separate_prompts_are_computed_for_each_response(rehearsals: Rehearsals) -> None:
    [outcome] = rehearsals.each([task("--no-share-prompts")])
    slot = RESPONSE - 1
    tokens = 2 * (SHORT + slot) + LONG + slot
    pairs = 2 * blocked_pairs(SHORT + slot, SHORT + slot) + blocked_pairs(LONG + slot, LONG + slot)
    assert outcome.tokens == tokens
    assert counted(outcome.work.forward) == (products(tokens)[0], attention(pairs)[0], 0)


def test_blocks_of_the_cpu_kernel() -> None:
    """Timed: a causal piece of 2,048 tokens takes 0.62 of a complete one, of 1,024 tokens 0.72 to 0.75, of 512 all."""
    assert blocked_pairs(512, 512) == 512**2
    assert blocked_pairs(1024, 1024) == 512 * 512 + 512 * 1024
    assert blocked_pairs(2048, 2048) / 2048**2 == 0.625
    assert blocked_pairs(30, 30) == 900


def test_a_layout_cuts_the_work_and_a_pipeline_divides_the_layers(rehearsals: Rehearsals) -> None:
    tasks = [
        task(layout="tp2 sp"),
        task(layout="pp2", packs=3),
        task(layout="pp2", packs=3, rank=1),
        task(layout="cp2"),
    ]
    tensor, first, last, context = rehearsals.each(tasks)
    assert counted(tensor.work.forward)[0] == products(tensor.tokens, cut=2)[0]
    assert counted(tensor.work.backward)[0] == products(tensor.tokens, cut=2)[1]
    assert counted(first.work.forward)[0] == products(first.tokens, 1, head=False)[0]
    assert counted(last.work.forward)[0] == products(last.tokens, 1)[0]
    assert last.work.of_step(5).flops(PRODUCTS) == 5 * sum(products(last.tokens, 1))
    # both halves of a context-parallel pack have the same tokens; trained ones are where they are
    assert counted(context.work.forward)[0] < products(context.tokens // 2)[0]
    assert counted(context.work.forward)[0] >= products(context.tokens // 2, head=False)[0]


def test_collectives_of_tensor_and_sequence_parallelism(rehearsals: Rehearsals) -> None:
    """Megatron's: two gathers and two reductions a layer and direction, backward gathers inputs again; the embedding
    reduces and the head gathers."""
    [outcome] = rehearsals.each([task(layout="tp2 sp")])
    message, forward, backward = outcome.tokens * HIDDEN * 4, outcome.work.forward, outcome.work.backward
    for tally, operation, number in (
        (forward, "all_gather", 2 * LAYERS + 1),
        (forward, "reduce_scatter", 2 * LAYERS + 1),
        (backward, "all_gather", 4 * LAYERS + 1),
        (backward, "reduce_scatter", 2 * LAYERS),
    ):
        traffic = tally.traffic("tp", operation)
        assert (traffic.number, traffic.bytes) == (number, number * message), operation
    # the head: largest logit, target's logit and sum of each trained token, then the gradient of their states
    assert forward.traffic("tp", "all_reduce").bytes == 3 * TRAINED * 4
    assert backward.traffic("tp", "all_reduce").bytes == TRAINED * HIDDEN * 4


def test_collectives_of_context_data_and_pipeline_parallelism(rehearsals: Rehearsals) -> None:
    tasks = [
        task("--bf16", layout="cp2", device="cuda"),
        task(layout="dp4"),
        task("--bf16", "--overlap-grad-reduce", "--ddp-bucket-size", "50000", layout="dp4", device="cuda"),
        task(layout="pp2", packs=3, rank=1),
    ]
    context, copies, buckets, last = rehearsals.each(tasks)
    keys = context.tokens * HIDDEN // 2 * 2  # half of the heads, two bytes
    gathered, reduced = (context.work.backward.traffic("cp", each) for each in ("all_gather", "reduce_scatter"))
    assert context.work.forward.traffic("cp", "all_gather").bytes == 2 * LAYERS * keys
    assert gathered.bytes == 2 * LAYERS * keys and reduced.bytes == 2 * gathered.bytes  # gradients in float32
    for outcome, size in ((copies, 4), (buckets, 2)):
        of_gradients = outcome.work.update.traffic("dp", "reduce_scatter")
        of_parameters = outcome.work.update.traffic("dp", "all_gather")
        padding = of_gradients.number * 4 * 128
        assert 0 <= of_gradients.bytes / 4 - PARAMETERS <= padding
        assert of_parameters.bytes / size == of_gradients.bytes / 4
    assert copies.work.update.traffic("dp", "reduce_scatter").number == 1
    assert buckets.work.update.traffic("dp", "reduce_scatter").number > 1
    assert [exchange.ranks for exchange in copies.work.update.exchanges] == [(0, 1, 2, 3)] * 2
    state = last.tokens * HIDDEN * 4
    for operation in ("send", "receive"):
        total = (last.work.forward + last.work.backward).traffic("pp", operation)
        assert (total.number, total.bytes) == (1, state)


def test_tokens_travel_to_experts_and_back(rehearsals: Rehearsals) -> None:
    one, spread = rehearsals.each([task(model=MOE), task(model=MOE, layout="dp2 ep2")])
    of_experts = 3 * HIDDEN * EXPERT * 2 + HIDDEN * 8  # two of eight a token, and the router
    forward = 2 * one.tokens * LAYERS * (ATTENTION + of_experts) + 2 * TRAINED * VOCABULARY * HIDDEN
    assert one.work.forward.flops(PRODUCTS, EXPERTS) == forward
    # as many tokens of others: of 526 rows an expert gets 65 or 66, those of the first process 66
    more = LAYERS * (8 * 66 - 2 * one.tokens) * 2 * 3 * HIDDEN * EXPERT
    assert spread.work.forward.flops(PRODUCTS, EXPERTS) == forward + more
    # to the experts and back, two rows a token; the weights of the routes beside them
    travelled = spread.work.forward.traffic("ep", "all_to_all").bytes
    rows = 2 * LAYERS * 2 * spread.tokens * HIDDEN * 4
    assert rows <= travelled < 1.1 * rows


def test_counts_are_the_same_every_time(rehearsals: Rehearsals) -> None:
    first, second = rehearsals.each([task(*FULL), task(*FULL)])
    assert first.work == second.work
