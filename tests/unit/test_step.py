"""One step of the trainer in one process, against plain transformers: what a group weighs, and what is logged."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from segment_names import SEGMENTS, loss_by_name, only
from tiny_models import SHAPE, write_model
from transformers import AutoModelForCausalLM

from megatron_solopo.config import Config, MethodConfig, ModelConfig, TrainingConfig
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenDataset, TokenGroup
from megatron_solopo.losses.solopo import all_scores, pair_context, policy_scores, reference_scores
from megatron_solopo.pack import Context, Side, segment_name

METHODS = {
    "solo": MethodConfig(beta=0.3, alignment_weight=1.5),
    "both": MethodConfig(beta=0.3, alignment_weight=1.5, alignment_target="both"),
    "short reference": MethodConfig(beta=0.3, alignment_weight=1.5, alignment_reference="short"),
    "tokens": MethodConfig(beta=0.3, context_mode="short", sft_weight=2.0, sft_normalization="token"),
    "longpo": MethodConfig(preference_loss="longpo", context_mode="long", beta=0.3, sft_normalization="token"),
}
GROUPS = 5


@pytest.fixture(scope="module")
def trained(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.engine import build_engine

    folder = write_model(tmp_path_factory.mktemp("model"))
    config = Config(model=ModelConfig(hf_path=str(folder)))
    return build_engine(engine, read_hf_config(folder), config), AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def double(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same in float64, where only another formula differs by more than 1e-10."""
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.engine import build_engine

    folder = write_model(tmp_path_factory.mktemp("double"))
    config = Config(model=ModelConfig(hf_path=str(folder)))
    return build_engine(engine, read_hf_config(folder), config, torch.float64)


def draw(method: MethodConfig, count: int = GROUPS, seed: int = 3, most: int = 1) -> TokenDataset:
    """Groups of very different lengths, with up to ``most`` responses of a side."""
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(SHAPE["vocab_size"]) for _ in range(draw.randint(1, most))]

    groups = []
    for number in range(count):
        prompts = {Context.SHORT: ids(9), Context.LONG: ids(40)}
        responses = [(Side.CHOSEN, k, ids(12)) for k in range(draw.randint(1, most))]
        responses += [(Side.REJECTED, k, ids(6)) for k in range(draw.randint(1, most))]
        completions = tuple(Completion(side, tokens, None, k) for side, k, tokens in responses)
        groups.append(TokenGroup(f"g{number}", tuple(Prompt(c, tokens, completions) for c, tokens in prompts.items())))
    return only(TokenDataset(groups, [], ""), all_scores(method))


def reference_of(dataset: TokenDataset, method: MethodConfig) -> Any:
    """Random numbers for what the reference would score."""
    from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces

    places = SegmentPlaces.of_dataset(only(dataset, reference_scores(method)))
    values = -10 * torch.rand(places.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ReferenceLogProbs(places, values)


def expected(hf: Any, dataset: TokenDataset, reference: torch.Tensor, method: MethodConfig) -> tuple[float, dict]:
    """The mean over groups of the mean over their pairs of the loss of transformers' log-probs, and its gradient.

    ``reference``: numbers of the segments in the order of examples, contexts, sides and responses.
    """
    numbers = iter(reference.float())
    compared = {}
    for example, group in enumerate(only(dataset, reference_scores(method)).groups):
        for context, side, k in sorted((context, c.side, c.response) for context, c in group.segments()):
            compared[example, segment_name(context, side), k] = next(numbers)[None]
    lengths_of, losses = [], []
    for group in only(dataset, policy_scores(method)).groups:
        chosen = [c for context, c in group.segments() if (context, c.side) == (pair_context(method), Side.CHOSEN)]
        lengths_of.append(sum(len(c.ids) for c in chosen) / len(chosen))
    mean_length = torch.tensor(sum(lengths_of) / len(lengths_of))
    for example, group in enumerate(only(dataset, policy_scores(method)).groups):
        sums, lengths = {}, {}
        for prompt in group.prompts:
            for c in prompt.completions:
                ids = [*prompt.ids, *c.ids]
                scores = hf(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                key = segment_name(prompt.context, c.side), c.response
                sums[key] = scores[range(len(ids) - 1), ids[1:]][len(prompt.ids) - 1 :].sum()[None]
                lengths[key] = torch.tensor([float(len(c.ids))])
        counts = [1 + max(c.response for _, c in group.segments() if c.side == side) for side in Side if side < 2]
        pairs = []
        for which in product(*map(range, counts)):

            def of(values: dict, *example: int, which: Any = which) -> dict:
                one = {name: (*example, name, which["rejected" in name]) for name in SEGMENTS if name != "response"}
                return {name: values[key] for name, key in one.items() if key in values}

            table = of(compared, example) or None
            pairs.append(loss_by_name(of(sums), of(lengths), table, method, mean_length).loss)
        losses.append(torch.cat(pairs).mean())
    loss = torch.stack(losses).mean()
    hf.zero_grad()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in hf.named_parameters()}


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_group_weighs_the_same_however_it_is_packed(
    trained: Any, name: str, micro_batch_size: int, most: int
) -> None:
    """And a pair 1 / (groups x its group's pairs), with up to ``most`` chosen and as many rejected responses."""
    from megatron_solopo.conversion.hf import named_entries
    from megatron_solopo.training.step import run_step
    from megatron_solopo.training.step_work import make_packs

    engine, hf = trained
    method = METHODS[name]
    config = Config(method=method, training=TrainingConfig(micro_batch_size=micro_batch_size))
    everything = draw(method, most=most)
    dataset, reference = only(everything, policy_scores(method)), reference_of(everything, method)
    loss, gradient = expected(hf, everything, reference.values, method)
    engine.zero_gradients()
    packs = make_packs(engine, dataset, range(GROUPS), config)
    assert sorted(len(pack.groups) for pack in packs) == {1: [1] * 5, 2: [1, 2, 2], 5: [5]}[micro_batch_size]
    sums = run_step(engine, packs, GROUPS, method, reference)
    assert sums.means()["loss"] == pytest.approx(loss, rel=1e-5)
    assert sums.tokens == sum(group.tokens(True) for group in dataset.groups) and sums.padding == 0
    for entry, names, parameter in named_entries(engine.models[0], engine.hf_config):
        for tensor, ours in zip(names, entry.operator.to_hf(parameter.main_grad), strict=True):
            assert (ours - gradient[tensor]).norm() <= 1e-5 * gradient[tensor].norm(), tensor


def test_layers_return_free_pages(engine: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each layer of each pack whose hidden states are large."""
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training import engine as engines
    from megatron_solopo.training.step import make_packs, run_step

    calls: list[None] = []
    model = ModelConfig(hf_path=str(write_model(tmp_path)))
    config = Config(method=METHODS["tokens"], model=model, training=TrainingConfig(micro_batch_size=2))
    here = replace(engine, return_pages=lambda: calls.append(None))
    built = engines.build_engine(here, read_hf_config(tmp_path), config)
    dataset = draw(config.method)
    reference = reference_of(dataset, config.method)
    packs = make_packs(built, only(dataset, policy_scores(config.method)), range(GROUPS), config)
    sizes = [len(pack.pack.tokens) * SHAPE["hidden_size"] * 4 for pack in packs]
    monkeypatch.setattr(engines, "LARGE", max(sizes))
    run_step(built, packs, GROUPS, config.method, reference)
    assert len(calls) == SHAPE["num_hidden_layers"] * sizes.count(max(sizes)) < SHAPE["num_hidden_layers"] * len(sizes)


def test_the_reference_table_has_a_place_for_every_segment(double: Any) -> None:
    """In any packs and order of the examples, each number is at the place of its segment, also by name."""
    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces
    from megatron_solopo.training.step import segment_table
    from megatron_solopo.training.step_work import sent

    dataset = draw(METHODS["both"], 6, most=3)
    places = SegmentPlaces.of_dataset(dataset)
    names = [
        (example, segment_name(*one))
        for example, group in enumerate(dataset.groups)
        for one in sorted((context, c.side, c.response) for context, c in group.segments())
    ]
    assert places.size == len(names) and [places.segment_at(place) for place in range(places.size)] == names
    packs = [build_pack([dataset.groups[i] for i in indices], indices) for indices in ([5, 0], [3], [4, 1, 2])]
    table = segment_table(double, places, sent(double, packs))
    assert (table < 0).all()
    one_by_one = [segment_table(double, places, sent(double, [build_pack([dataset.groups[i]], [i])])) for i in range(6)]
    torch.testing.assert_close(table, sum(one_by_one), rtol=1e-12, atol=1e-12)
    for i, alone in enumerate(one_by_one):
        chosen = torch.arange(6) == i
        assert torch.equal(alone != 0, places.of_examples(chosen))
    short = ReferenceLogProbs(places, table).of_pack(packs[2], [Context.SHORT, Context.SHORT])
    of_pack = ReferenceLogProbs(places, table).of_pack(packs[2], list(Context))
    on_short = packs[2].scored.contexts == Context.SHORT
    assert torch.equal(short[on_short], of_pack[on_short]) and not (short[~on_short] == of_pack[~on_short]).any()
    with pytest.raises(IndexError, match="no log-prob"):
        SegmentPlaces.of_dataset(draw(METHODS["both"], 6)).of_pack(packs[0])


@pytest.mark.parametrize("seed", range(24))
def test_any_packing_has_the_same_loss(double: Any, seed: int) -> None:
    """Random groups in random packs, empty ones among them, in any order, shared or separate, padded or not."""
    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.training.step import run_step
    from megatron_solopo.training.step_work import sent

    chance = random.Random(seed)
    method = METHODS[chance.choice(list(METHODS))]
    everything = draw(method, chance.randint(1, 7), seed, chance.choice([1, 3]))
    dataset, reference = only(everything, policy_scores(method)), reference_of(everything, method)
    count = len(dataset.groups)

    def measure(packs: list[list[int]], share: bool, *multiples: int) -> tuple[float, list[torch.Tensor]]:
        built = [build_pack([dataset.groups[i] for i in indices], indices, share, *multiples) for indices in packs]
        double.zero_gradients()
        sums = run_step(double, sent(double, built), count, method, reference)
        return sums.means()["loss"], [p.main_grad.clone() for p in double.models[0].parameters()]

    loss, gradient = measure([[i] for i in range(count)], False)
    for _ in range(3):
        packs: list[list[int]] = [[] for _ in range(chance.randint(1, count + 2))]
        for i in chance.sample(range(count), count):
            chance.choice(packs).append(i)
        of_pieces = chance.choice([1, 2, 8])
        multiples = of_pieces * chance.choice([1, 3, 16]), of_pieces, of_pieces * chance.choice([1, 4, 16])
        measured, measured_gradient = measure(packs, chance.random() < 0.7, *multiples)
        assert measured == pytest.approx(loss, rel=1e-12)
        for ours, theirs in zip(measured_gradient, gradient, strict=True):
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm()
