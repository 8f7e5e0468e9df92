"""The attention of one layer by its settings: window, RoPE, scale, sinks; against the whole score matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn_packs import draw_pack, visible
from test_context_parallel import SCALE, dense
from tiny_models import SHAPE
from torch import Tensor
from transformers import LlamaConfig

from megatron_solopo.model.rope import RotaryFrequencies, rotate
from megatron_solopo.parallel.device_pack import cut
from megatron_solopo.parallel.kernels import Kernels
from megatron_solopo.parallel.method import ContextMethod

WINDOW = 6
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "window of this layer": {"window_size": (WINDOW - 1, 0), "window_attn_skip_freq": [0, 1]},
    "window of the other layer": {"window_size": (WINDOW - 1, 0), "window_attn_skip_freq": [1, 0]},
    "no RoPE here": {"no_rope_freq": [0, 1]},
    "no RoPE there": {"no_rope_freq": [1, 0]},
    "sinks": {"softmax_type": "learnable"},
    "sinks and window": {
        "softmax_type": "learnable",
        "window_size": (WINDOW - 1, 0),
        "window_attn_skip_freq": [0, 1],
    },
}


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_attends_as_its_settings_say(engine: Any, name: str, keeps: bool) -> None:
    """The second of two layers; ``keeps``: recomputed, with what the kernels returned the first time."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_solopo.model.attention import PackedAttention, pack_layout, window_of
    from megatron_solopo.parallel.context import method_of

    options = CASES[name]
    settings = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, params_dtype=torch.float64, **options
    )
    attention: Any = PackedAttention(settings, 2, None, "self", softmax_scale=SCALE)  # pyright: ignore
    attention.keeps = keeps
    pack, generator = draw_pack(11, 1), torch.Generator().manual_seed(0)
    query, key, value, weight = (
        torch.randn(len(pack.tokens), heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 4)
    )
    method: ContextMethod = method_of(1, "all_gather")
    part = cut(pack, method, Kernels.CPU, window=window_of(settings))
    frequencies = RotaryFrequencies(LlamaConfig(**SHAPE))
    layout = pack_layout(part.layout, pack.positions, frequencies, torch.float64, windowed=part.windowed)
    cos, sin = frequencies(pack.positions, torch.float64)
    window = WINDOW if options.get("window_attn_skip_freq") == [0, 1] else None
    sinks = [attention.softmax_offset] if "softmax_type" in options else []
    for sink in sinks:
        torch.nn.init.normal_(sink)

    def expected(query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        if options.get("no_rope_freq") != [0, 1]:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return dense(query, key, value, torch.from_numpy(visible(pack, window)), *sinks)

    def computed(*inputs: Tensor) -> Tensor:
        if keeps:
            with torch.no_grad():
                attention(*inputs[:3], None, packed_seq_params=layout)
        return attention(*inputs[:3], None, packed_seq_params=layout).view(weight.shape)

    results = []
    for function in (computed, expected):
        inputs = [x.detach().clone().requires_grad_() for x in (query, key, value)] + sinks
        output = function(*inputs)
        results.append([output, *torch.autograd.grad((output * weight).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_window_that_hides_nothing_has_no_layout() -> None:
    """So that prompts run on the kernels of full attention."""
    from megatron_solopo.parallel.context import method_of

    pack = draw_pack(11, 1)
    for window, hides in ((None, False), (pack.longest, False), (pack.longest - 1, True)):
        part = cut(pack, method_of(1, "all_gather"), Kernels.CPU, window=window)
        assert (part.windowed is not None) == hides
