"""Every example once an epoch, and a plan for every step that loses nothing and keeps its limits."""

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from segment_names import prompt_of
from tiny_models import SHAPE
from transformers import Gemma4TextConfig, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from megatron_solopo.benchmark.flops import flops_of
from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import _order, attention_cost, make_schedule, plan
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.model.cost import attention_weights, width_of_cost, windows_of
from megatron_solopo.pack import Windows
from megatron_solopo.planning import cost
from megatron_solopo.planning.operators import windowed_pairs
from megatron_solopo.planning.process import Process, Shape, Work


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_once_an_epoch(seed, shuffle):
    draw = random.Random(seed)
    examples, batch, epochs = draw.randint(1, 50), draw.randint(1, 60), draw.randint(1, 4)
    schedule = make_schedule(examples, batch, None, float(epochs), seed, shuffle)
    steps = [schedule.step(number) for number in range(schedule.steps)]
    order = [example for step in steps for example in step]
    assert len(order) == examples * epochs == schedule.total
    assert [epoch for n in range(schedule.steps) for epoch in schedule.epochs(n)] == [
        place // examples for place in range(schedule.total)
    ]
    for epoch in range(epochs):
        assert sorted(order[epoch * examples : (epoch + 1) * examples]) == list(range(examples))
    assert {len(step) for step in steps[:-1]} <= {batch}
    assert len(steps[-1]) == (schedule.total - 1) % batch + 1  # the last step takes what is left, and is never empty
    assert schedule.step(schedule.steps) == []
    if not shuffle:
        assert order == list(range(examples)) * epochs


def test_epochs_and_seeds_have_different_orders():
    first = make_schedule(100, 100, None, 2.0, 1, True)
    assert first.step(0) != first.step(1) != list(range(100))
    assert make_schedule(100, 100, None, 2.0, 2, True).step(0) != first.step(0)


@pytest.mark.parametrize("seed", range(10))
def test_a_step_does_not_depend_on_the_steps_before_it(seed):
    """What a resumed run sees at step k is what the unbroken run saw, though its caches are empty."""
    draw = random.Random(seed)
    sizes = draw.randint(1, 30), draw.randint(1, 40), draw.randint(2, 12), None, seed, True
    unbroken = [make_schedule(*sizes).step(number) for number in range(sizes[2])]
    for number in draw.sample(range(sizes[2]), sizes[2]):
        _order.cache_clear()
        assert make_schedule(*sizes).step(number) == unbroken[number]


def test_iterations_are_full_steps_and_epochs_may_be_fractions():
    schedule = make_schedule(10, 4, 7, None, 0, True)
    assert schedule.steps == 7 and all(len(schedule.step(number)) == 4 for number in range(7))
    assert make_schedule(10, 4, None, 0.5, 0, True).total == 5
    assert make_schedule(10, 4, None, 0.001, 0, True).total == 1  # at least one example


def draw_step(seed):
    """Random costs, tokens and limits of one step."""
    draw = random.Random(seed)
    count, ranks, most_groups = draw.randint(0, 40), draw.randint(1, 6), draw.randint(1, 9)
    tokens = [draw.randint(1, 100) if draw.random() < 0.8 else draw.randint(100, 400) for _ in range(count)]
    costs = (
        [t + draw.random() * t * t / 50 for t in tokens]
        if draw.random() < 0.8
        else [float(draw.randint(0, 1)) for _ in tokens]
    )
    return costs, tokens, ranks, most_groups, draw.choice([None, 50, 200, 1000])


@pytest.mark.parametrize("block", range(10))
def test_a_plan_has_every_group_once_within_its_limits(block):
    for seed in range(block * 60, block * 60 + 60):
        costs, tokens, ranks, most_groups, most_tokens = draw_step(seed)
        result = plan(costs, tokens, ranks, most_groups, most_tokens)
        assert Counter(item for rank in result for pack in rank for item in pack) == Counter(range(len(costs)))
        assert len(result) == ranks and len({len(rank) for rank in result}) == 1 and len(result[0]) >= 1
        for pack in itertools.chain.from_iterable(result):
            assert len(pack) <= most_groups
            assert most_tokens is None or len(pack) <= 1 or sum(tokens[i] for i in pack) <= most_tokens
        largest_share = max(sum(map(len, rank)) for rank in result)
        if most_tokens is None:
            assert len(result[0]) == max(1, math.ceil(largest_share / most_groups))
        assert len(result[0]) <= max(1, largest_share)
        assert result == plan(list(costs), list(tokens), ranks, most_groups, most_tokens)


@pytest.mark.parametrize("block", range(10))
def test_no_process_has_much_more_than_its_share(block):
    """Graham's bound for a greedy schedule: no load is above the mean plus (1 - 1/ranks) of the dearest group."""
    for seed in range(block * 60, block * 60 + 60):
        costs, tokens, ranks, most_groups, most_tokens = draw_step(seed)
        result = plan(costs, tokens, ranks, most_groups, most_tokens)
        loads = [sum(costs[i] for pack in rank for i in pack) for rank in result]
        assert max(loads) <= sum(costs) / ranks + (1 - 1 / ranks) * max(costs, default=0) + 1e-6


def test_balance_is_within_four_thirds_of_the_best():
    """Longest processing time first is at most 4/3 - 1/(3 ranks) of the optimum, here by exhaustive search."""
    draw = random.Random(0)
    for _ in range(40):
        count, ranks = draw.randint(1, 7), draw.randint(2, 3)
        costs = [draw.uniform(1, 100) for _ in range(count)]
        best = min(
            max(sum(c for c, r in zip(costs, choice, strict=True) if r == rank) for rank in range(ranks))
            for choice in itertools.product(range(ranks), repeat=count)
        )
        loads = [sum(costs[i] for pack in rank for i in pack) for rank in plan(costs, [1] * count, ranks, 8, None)]
        assert max(loads) <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9


def test_fewer_groups_than_processes_leave_empty_packs():
    result = plan([3.0, 1.0], [5, 5], 4, 8, None)
    assert sorted(result) == [[[]], [[]], [[0]], [[1]]]
    assert plan([], [], 2, 8, None) == [[[]], [[]]]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_interleaved_schedule_gets_whole_rounds_of_packs(stages):
    """Nothing is lost, the limits hold, and there are at most one round's packs more than needed."""
    for seed in range(200):
        costs, tokens, ranks, most_groups, most_tokens = draw_step(seed)
        result = plan(costs, tokens, ranks, most_groups, most_tokens, stages)
        assert Counter(item for rank in result for pack in rank for item in pack) == Counter(range(len(costs)))
        assert len(result) == ranks and len({len(rank) for rank in result}) == 1 and len(result[0]) % stages == 0
        for pack in itertools.chain.from_iterable(result):
            assert len(pack) <= most_groups
            assert most_tokens is None or len(pack) <= 1 or sum(tokens[i] for i in pack) <= most_tokens
        if most_tokens is None:
            assert len(result[0]) < len(plan(costs, tokens, ranks, most_groups, None)[0]) + stages
    assert plan([1.0], [5], 1, 8, None, 4) == [[[0], [], [], []]]


def test_a_group_above_the_token_limit_is_a_pack_by_itself():
    packs = plan([9.0, 1.0, 1.0], [500, 10, 10], 1, 8, 100)[0]
    assert sorted(map(sorted, packs)) == [[0], [1, 2]]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("hidden", [64, 4096])
def test_cost_counts_tokens_and_attended_pairs(share, hidden):
    """Against the pairs counted in the pack that is really computed: 24 h^2 a token, 4 h a pair, per 24 h^2."""
    group = TokenGroup(
        "g",
        (
            prompt_of([0] * 300, {"short_chosen": [0] * 40, "short_rejected": [0] * 60}),
            prompt_of([0] * 900, {"long_chosen": [0] * 40}),
        ),
    )
    pack = build_pack([group], [0], share)
    pairs = sum(
        piece.length * (0 if piece.prompt is None else pack.pieces[piece.prompt].length)
        + piece.length * (piece.length + 1) / 2
        for piece in pack.pieces
    )
    counted = (24 * hidden**2 * len(pack.tokens) + 4 * hidden * pairs) / (24 * hidden**2)
    assert attention_cost(group, hidden, share) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("model", [LlamaConfig, Qwen3MoeConfig])
def test_pairs_and_tokens_cost_as_in_the_planners_forecast(model):
    """On a machine with one rate for all operations and no memory to wait for."""
    shape = SHAPE | dict(
        hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, head_dim=16
    )
    if model is Qwen3MoeConfig:
        shape |= dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
    hf_config = model(**shape, tie_word_embeddings=False)
    config = Config()
    shape = Shape.of(hf_config, 128)

    def seconds(tokens, pairs):
        process = Process(shape, config, Work(tokens, tokens, 0, pairs, 1), 1)
        return cost._pack(process, machine, 0)

    rate = SimpleNamespace(products=(1, 1), attention=(1, 1), memory=(1, 1), collectives=(1, 1))
    machine = SimpleNamespace(
        achieved=rate, peak=lambda dtype: 1.0, memory_gb_per_s=math.inf, launch_us=(0, 0), network_gb_per_s=1
    )
    a_token, a_pair = seconds(1000, 0) / 1000, (seconds(1000, 10**6) - seconds(1000, 0)) / 10**6
    assert a_token / a_pair == pytest.approx(6 * width_of_cost(hf_config))


def test_a_window_bounds_the_pairs_that_cost():
    """Packs are balanced by pairs inside the windows, the planner's operations are counted by them."""
    windows = Windows(size=8, share=0.25)
    for length, before in ((5, 0), (5, 4), (5, 40), (30, 0), (30, 3), (30, 40)):
        pairs = sum(min(before + place + 1, 8) for place in range(length))
        assert windowed_pairs(length, before + length, 8) == pairs
        full = length * before + length**2 / 2
        inside = windows.pairs(length, before)
        # of the first tokens of a sequence each has half a pair less, those in a full window none
        half = sum(before + place < 8 for place in range(length)) / 2
        assert inside == pytest.approx(0.75 * full + 0.25 * (pairs - half))
        assert Windows().pairs(length, before) == full


def test_a_models_windows_are_a_share_of_its_layers():
    shape = SHAPE | dict(num_hidden_layers=4)
    hf_config = Qwen2Config(**shape, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    assert windows_of(hf_config) == Windows(32, 0.75) and windows_of(Qwen2Config(**shape)) == Windows(0, 0.0)
    attention = flops_of(hf_config, [(100, 0), (10, 100)], 0).attention
    full = flops_of(Qwen2Config(**shape), [(100, 0), (10, 100)], 0).attention
    inside, all_pairs = sum(min(i + 1, 32) for i in range(110)), 110 * 111 // 2
    assert attention / full == (inside * 3 + all_pairs) / (4 * all_pairs)


def test_layers_with_heads_of_their_own_count_with_them():
    """Three layers with a window and heads of 16, and one of 48 whose only key head is its value head too."""
    hf_config = Gemma4TextConfig(
        **SHAPE
        | dict(num_hidden_layers=4, sliding_window=32, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
        **dict(head_dim=16, global_head_dim=48, num_global_key_value_heads=1, attention_k_eq_v=True),
        hidden_size_per_layer_input=0,
    )
    assert windows_of(hf_config) == Windows(32, 0.5)
    weights = 3 * (2 * 4 * 16 + 2 * 2 * 16) + 2 * 4 * 48 + 48
    assert attention_weights(hf_config) == SHAPE["hidden_size"] * weights // 4
    inside, all_pairs = sum(min(i + 1, 32) for i in range(110)), 110 * 111 // 2
    attention = flops_of(hf_config, [(100, 0), (10, 100)], 0).attention
    assert attention == 3 * 4 * 4 * (3 * 16 * inside + 48 * all_pairs)
