"""Packed linear layers against the layers that they replace, and transformers' greedy ids."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_models import END, FAMILIES, command, folder, tiny_model

from megatron_solopo.data.sampling.decoding import decode, shares_prompts
from megatron_solopo.data.sampling.packing import PackedLinear, pack_linears
from megatron_solopo.data.sampling.sample_responses import main

__all__ = ["folder"]  # a fixture
pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")),
    reason="linear layers are packed on x86 CPUs with AVX2 only",
)


def packed(layer: torch.nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_the_same(family: str) -> None:
    model = tiny_model(family)
    plain: Any = tiny_model(family)
    pack_linears(model, 4)
    assert packed(model) == [name for name, part in plain.named_modules() if type(part) is torch.nn.Linear] != []
    assert shares_prompts(model)
    ids = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-5)
    job = ids[0].tolist(), torch.zeros(2, 40)
    [(_, sampled)] = decode(model, [job], rows=4, draw=lambda logits, _: logits.argmax(-1), stops={END})
    expected = plain.generate(ids, do_sample=False, max_new_tokens=40, repetition_penalty=1.0)
    assert sampled == [expected[0, 11:].tolist()] * 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (2, 5, 24), (300, 24), (0, 24), (2, 0, 24)])
def test_any_number_of_rows(shape: tuple[int, ...], bias: bool) -> None:
    """Also none, as an expert without tokens has, and a slice."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40, bias=bias)
    layer = PackedLinear(linear, 64)
    inputs = torch.randn(*shape[:-1], 48)[..., ::2]
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), linear(inputs), atol=1e-5, rtol=1e-5)
    assert layer.weight.equal(linear.weight)


def test_what_is_packed() -> None:
    """Not another type, and no subclass; a weight that is not an embedding too is freed."""

    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = tiny_model("qwen3")
    kept = Doubled(32, 48)
    model.set_submodule("model.layers.1.mlp.up_proj", kept)
    model.get_submodule("model.layers.0.mlp.gate_proj").bfloat16()
    weight = weakref.ref(model.get_submodule("model.layers.0.mlp.up_proj").weight)
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight
    embedding = copy.deepcopy(model.model.embed_tokens.weight)
    pack_linears(model, 64)
    names = packed(model)
    assert model.get_submodule("model.layers.1.mlp.up_proj") is kept
    assert "model.layers.0.mlp.gate_proj" not in names
    assert "model.layers.0.mlp.up_proj" in names and weight() is None
    assert "lm_head" in names and model.model.embed_tokens.weight.equal(embedding)


def test_sampling_in_process_packs_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = PackedLinear.forward

    def watched(layer: PackedLinear, inputs: torch.Tensor) -> torch.Tensor:
        calls.append(len(inputs))
        return forward(layer, inputs)

    monkeypatch.setattr(PackedLinear, "forward", watched)
    assert main(command(folder, tmp_path / "a.jsonl", "--limit", "2")) == 0
    assert max(calls) == 12
