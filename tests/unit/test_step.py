"""One step of the trainer in one process, against plain transformers: what a group weighs, and what is logged."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_models import SHAPE, write_model
from transformers import AutoModelForCausalLM

from megatron_solopo.config import Config, MethodConfig, ModelConfig, TrainingConfig
from megatron_solopo.data.tokens import Continuation, Prompt, TokenDataset, TokenGroup
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
    from megatron_solopo.model.build import read_hf_config
    from megatron_solopo.training.engine import build_engine

    folder = write_model(tmp_path_factory.mktemp("model"))
    config = Config(model=ModelConfig(hf_path=str(folder)))
    return build_engine(engine, read_hf_config(folder), config), AutoModelForCausalLM.from_pretrained(folder)


def draw(method: MethodConfig) -> TokenDataset:
    """Groups of very different lengths."""
    draw = random.Random(3)

    def ids(most: int) -> list[int]:
        return [draw.randrange(SHAPE["vocab_size"]) for _ in range(draw.randint(1, most))]

    groups = []
    for number in range(GROUPS):
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
