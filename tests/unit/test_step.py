"""One step of the trainer in one process, against plain transformers: what a group weighs, and what is logged."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_models import SHAPE, write_model
from transformers import AutoModelForCausalLM

from megatron_solopo.config import Config, MethodConfig, ModelConfig, TrainingConfig
from megatron_solopo.data.tokenized.tokens import Continuation, Prompt, TokenDataset, TokenGroup
from megatron_solopo.losses import solopo_loss
from megatron_solopo.losses.solopo import reference_roles, roles

METHODS = {
    "solo": MethodConfig(beta=0.3, alignment_weight=1.5),
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


def draw(method: MethodConfig, count: int = GROUPS, seed: int = 3) -> TokenDataset:
    """Groups of very different lengths."""
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(SHAPE["vocab_size"]) for _ in range(draw.randint(1, most))]

    groups = []
    for number in range(count):
        prompts, responses = {"short": ids(9), "long": ids(40)}, {"chosen": ids(12), "rejected": ids(6)}
        kept = {context: [r for r in roles(method) if r.startswith(context)] for context in prompts}
        groups.append(
            TokenGroup(
                f"g{number}",
                tuple(
                    Prompt(prompts[context], tuple(Continuation(r, responses[r.split("_")[1]]) for r in names))
                    for context, names in kept.items()
                    if names
                ),
            )
        )
    return TokenDataset(groups, [], "")


def expected(hf: Any, dataset: TokenDataset, reference: torch.Tensor, method: MethodConfig) -> tuple[float, dict]:
    """Mean over groups of the loss of transformers' log-probs, and its gradient."""
    sums: dict[str, list[torch.Tensor]] = {}
    lengths: dict[str, list[float]] = {}
    for group in dataset.groups:
        for prompt in group.prompts:
            for continuation in prompt.continuations:
                ids = [*prompt.ids, *continuation.ids]
                scores = hf(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                picked = scores[range(len(ids) - 1), ids[1:]][len(prompt.ids) - 1 :]
                sums.setdefault(continuation.role, []).append(picked.sum())
                lengths.setdefault(continuation.role, []).append(float(len(continuation.ids)))
    n = {role: torch.tensor(values) for role, values in lengths.items()}
    table = {role: reference[:, column].float() for column, role in enumerate(reference_roles(method))}
    chosen = n["long_chosen" if method.context_mode == "long" else "short_chosen"]
    loss = solopo_loss({r: torch.stack(v) for r, v in sums.items()}, n, table, method, chosen.mean()).loss.mean()
    hf.zero_grad()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in hf.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_group_weighs_the_same_however_it_is_packed(trained: Any, name: str, micro_batch_size: int) -> None:
    from megatron_solopo.conversion.hf import named_entries
    from megatron_solopo.training.step import make_packs, run_step

    engine, hf = trained
    method = METHODS[name]
    config = Config(method=method, training=TrainingConfig(micro_batch_size=micro_batch_size))
    dataset = draw(method)
    table = -10 * torch.rand(GROUPS, len(reference_roles(method)), generator=torch.Generator().manual_seed(1))
    loss, gradient = expected(hf, dataset, table, method)
    engine.zero_gradients()
    packs = make_packs(engine, dataset, range(GROUPS), config)
    assert sorted(len(pack.groups) for pack in packs) == {1: [1] * 5, 2: [1, 2, 2], 5: [5]}[micro_batch_size]
    sums = run_step(engine, packs, GROUPS, method, table)
    assert sums.means()["loss"] == pytest.approx(loss, rel=1e-5)
    assert sums.tokens == sum(group.tokens(True) for group in dataset.groups) and sums.padding == 0
    for entry, names, parameter in named_entries(engine.models[0], engine.hf_config):
        for tensor, ours in zip(names, entry.operator.to_hf(parameter.main_grad), strict=True):
            assert (ours - gradient[tensor]).norm() <= 1e-5 * gradient[tensor].norm(), tensor


@pytest.mark.parametrize("seed", range(24))
def test_any_packing_gives_the_same_loss(double: Any, seed: int) -> None:
    """Random groups in random packs, some without groups, in any order, shared or separate, padded or not."""
    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.training.step import run_step, sent

    chance = random.Random(seed)
    method = METHODS[chance.choice(list(METHODS))]
    dataset = draw(method, chance.randint(1, 7), seed)
    count = len(dataset.groups)
    table = -10 * torch.rand(count, len(reference_roles(method)), dtype=torch.float64)

    def measure(packs: list[list[int]], share: bool, *multiples: int) -> tuple[float, list[torch.Tensor]]:
        built = [build_pack([dataset.groups[i] for i in some], some, share, *multiples) for some in packs]
        double.zero_gradients()
        sums = run_step(double, sent(double, built), count, method, table)
        return sums.means()["loss"], [p.main_grad.clone() for p in double.models[0].parameters()]

    loss, gradient = measure([[i] for i in range(count)], False)
    for _ in range(3):
        packs: list[list[int]] = [[] for _ in range(chance.randint(1, count + 2))]
        for i in chance.sample(range(count), count):
            chance.choice(packs).append(i)
        of_pieces = chance.choice([1, 2, 8])
        multiples = of_pieces * chance.choice([1, 3, 16]), of_pieces, of_pieces * chance.choice([1, 4, 16])
        found, found_gradient = measure(packs, chance.random() < 0.7, *multiples)
        assert found == pytest.approx(loss, rel=1e-12)
        for ours, theirs in zip(found_gradient, gradient, strict=True):
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm()
