"""Floating-point operations that a model needs for a step; the only place that counts them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_solopo.model.cost import query_widths, rule_operations
from megatron_solopo.model.families.fields import attention_window, linear_layers, windowed_layers
from megatron_solopo.pack import Pack
from megatron_solopo.planning.operators import causal_pairs, windowed_pairs
from megatron_solopo.planning.process import Shape

FLOPS_COUNTED = (
    "products of the layers: 2 operations a weight and token; attention: 2 for each pair of tokens that attend (causal "
    "pairs once, those in a layer's window), layer, and channel of keys and of values; recurrent layers: 6 a token "
    "and number of a state; output layer: 2 a weight and predicted token; padding is not counted; "
    "backward = 2 x forward, recomputing is not counted"
)


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward; see `FLOPS_COUNTED`.

    Attributes:
        products: of the layers' weights and of the output layer.
        attention: scores and their weighted sums.
    """

    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.attention


def flops_of(hf_config: PretrainedConfig, pieces: Iterable[tuple[int, int]], predicted: int) -> Flops:
    """Counts the operations of a step.

    Args:
        pieces: (tokens, tokens before them that they attend to) of each causal piece.
        predicted: tokens whose log-probs are computed.
    """
    shape = Shape.of(hf_config, 1)
    chosen = shape.chosen or 1
    layer = shape.attention + shape.hidden * (shape.experts + 3 * (shape.ffn * chosen + shape.shared))
    linear, window = linear_layers(hf_config), attention_window(hf_config) or 0
    full = windowed = tokens = pairs = 0  # channels of keys and of values of all layers
    kinds = zip(query_widths(hf_config), windowed_layers(hf_config), linear, strict=True)
    for width, has_window, is_recurrent in kinds:
        channels = 2 * width + shape.values - shape.queries  # which differ with latents alone
        windowed += channels * has_window
        full += channels * (not has_window and not is_recurrent)
    for length, before in pieces:
        tokens += length
        pairs += full * causal_pairs(length, before + length)
        pairs += windowed * windowed_pairs(length, before + length, window)
    products = 2 * shape.layers * layer * tokens + 2 * hf_config.vocab_size * shape.hidden * predicted
    rules = sum(linear) * tokens * rule_operations(hf_config)
    return Flops(3.0 * products, 3.0 * (2 * pairs + rules))


def flops_of_packs(hf_config: PretrainedConfig, packs: Sequence[Pack]) -> Flops:
    """Counts the operations of a step on these packs."""
    pieces = [
        (piece.length, 0 if piece.prompt is None else pack.pieces[piece.prompt].length)
        for pack in packs
        for piece in pack.pieces
    ]
    return flops_of(hf_config, pieces, sum(pack.targets.numel() for pack in packs))
