"""--lora-dropout: PEFT's, in training alone, and drawn again where a pass is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_model_parity import CONFIGS, random_group, run_pack
from test_recompute import FULL, LORA, built, options
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers_in_double import load

from megatron_solopo.data.tokenized.packs import build_pack

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE, SEED = 0.3, 7
DROPPED = (*LORA, "--lora-dropout", RATE)
TILES = ("--mlp-tiles", 3)


def log_prob(model: Any, prompts: Any = ((20, (6,)),)) -> Tensor:
    """Of the responses after one prompt, with what is drawn after `SEED`."""
    torch.manual_seed(SEED)
    pack = build_pack([random_group(1, prompts)], [0])
    return run_pack(CONFIGS["qwen3"], model, pack, torch.float64).sum()


def test_gradients_are_pefts(engine: Any, tmp_path: Path) -> None:
    """PEFT's model draws the same: its projections in the same order, from the same generator."""
    from megatron_solopo.conversion.adapters import adapter_entries, start_adapters
    from megatron_solopo.conversion.hf_weights import HfWeights
    from megatron_solopo.model.build import build_model

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS["qwen3"]).save_pretrained(tmp_path / "hf")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, lora_dropout=RATE, target_modules=ALL)
    theirs: Any = peft.get_peft_model(load(tmp_path / "hf"), settings).double()
    trained = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapters")
    flags = options("--lora-path", tmp_path / "adapters", "--lora-dropout", RATE)
    ours = build_model(CONFIGS["qwen3"], flags, torch.float64).train()
    HfWeights(tmp_path / "hf", [ours], CONFIGS["qwen3"]).fill_all()
    start_adapters([ours], CONFIGS["qwen3"], flags.model, 0)

    value = log_prob(ours)
    value.backward()
    [prompt] = random_group(1, ((20, (6,)),)).prompts
    ids = torch.tensor([*prompt.ids, *prompt.completions[0].ids])[None]
    torch.manual_seed(SEED)
    scores = theirs.train()(ids[:, :-1]).logits[0].log_softmax(-1)  # a pack too ends before the last token
    expected = scores.gather(1, ids[0, 1:, None])[len(prompt.ids) - 1 :].sum()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    entries = [(name, parameter.grad) for _, (name,), parameter in adapter_entries(ours, CONFIGS["qwen3"])]
    assert {name for name, _ in entries} == trained.keys()
    for name, gradient in entries:
        torch.testing.assert_close(gradient, trained[name].grad, rtol=1e-10, atol=1e-10)


def test_nothing_is_dropped_but_in_training(engine: Any) -> None:
    """Nor by the reference, which is computed in any mode; and what is drawn there would move the generators."""
    from megatron_solopo.model.lora import without_adapters

    model, plain = built("qwen3", *DROPPED), built("qwen3", *LORA)
    torch.manual_seed(SEED)
    seeded = torch.get_rng_state()
    with torch.no_grad():
        expected = log_prob(plain)
        assert log_prob(model) != expected and log_prob(model.eval()) == expected
        with without_adapters([model.train()]):
            assert log_prob(model) != expected
    assert torch.equal(seeded, torch.get_rng_state())


@pytest.mark.parametrize("flags", [TILES, (*TILES, *FULL)], ids=["tiles", "full"])
def test_tiles_drop_backward_what_they_dropped_forward(engine: Any, flags: tuple[Any, ...]) -> None:
    """The gradient is the slope, in a direction of all adapters, of the log-prob with the same draws."""
    model = built("qwen3", *DROPPED, *flags)
    prompts = ((37, (5, 3)), (61, (5,)))
    log_prob(model, prompts).backward()
    draw = torch.Generator().manual_seed(3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ways = [torch.randn(one.shape, generator=draw, dtype=one.dtype) for one in trained]
    slope = sum(float((one.grad * way).sum()) for one, way in zip(trained, ways, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):  # from one side of where it was to the other
            for one, way in zip(trained, ways, strict=True):
                one.add_(way, alpha=step)
            values.append(float(log_prob(model, prompts)))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_ranks_with_other_inputs_draw_apart(engine: Any) -> None:
    """From the generator that each tensor-parallel rank has alone; the shared one stays where it is."""
    adapter = built("qwen3", *DROPPED).decoder.layers[0].mlp.linear_fc2_lora
    x = torch.ones(50, 1, adapter.down_proj_a.shape[1], dtype=torch.float64)
    shared = torch.get_rng_state()
    adapter.draws_apart = True
    first = adapter.inner(x)
    assert torch.equal(shared, torch.get_rng_state()) and not torch.equal(first, adapter.inner(x))


def test_what_a_pack_draws_follows_from_its_place(engine: Any) -> None:
    from megatron_solopo.training.engine import seed_pack

    def drawn(*place: int) -> float:
        seed_pack(*place)
        return float(torch.rand(()))

    places = [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(1, 1, 0, 0) == drawn(1, 1, 0, 0)
