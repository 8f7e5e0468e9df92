#!/usr/bin/env python3
"""Time of the gated delta rule, forward and backward, against transformers' torch implementation, on one CPU thread.

    python examples/benchmarks/delta_rule.py [--tokens 2048] [--key-heads 4] [--value-heads 8] [--width 128]

Both compute one sequence in float32, with the same inputs, in turn; of each the fastest of --repeats counts, in CPU
seconds. Ours repeats keys and queries for their value heads itself, which transformers' layer does before the call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from megatron_solopo.model.delta_rule import gated_delta_rule
from megatron_solopo.pack import Piece
from megatron_solopo.parallel.recurrence import recurrent_layout

Rule = Callable[[list[Tensor]], Tensor]


def ours(tokens: int) -> Rule:
    """The rule of this package over a pack of one prompt."""
    layout = recurrent_layout((Piece(0, tokens),), 1, [np.arange(tokens)])
    return lambda tensors: gated_delta_rule(*(layout.in_chunks(tensor) for tensor in tensors), layout)


def theirs(tensors: list[Tensor]) -> Tensor:
    """transformers' rule."""
    repeats = tensors[2].shape[1] // tensors[0].shape[1]
    query, key, *others = (tensor[None] for tensor in tensors)
    repeated = (x.repeat_interleave(repeats, 2) for x in (query, key))
    return torch_chunk_gated_delta_rule(*repeated, *others, use_qk_l2norm_in_kernel=True)[0][0]


def seconds(rule: Rule, tensors: list[Tensor]) -> tuple[float, float]:
    """CPU seconds of forward and of backward."""
    started = time.process_time()
    output = rule(tensors)
    middle = time.process_time()
    torch.autograd.grad(output.square().sum(), tensors)
    return middle - started, time.process_time() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--value-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, keys, values, width = options.tokens, options.key_heads, options.value_heads, options.width
    shapes = [(keys, width), (keys, width), (values, width), (values,), (values,)]
    tensors = [torch.randn(tokens, *shape) for shape in shapes]
    tensors[3], tensors[4] = -tensors[3].exp(), tensors[4].sigmoid()
    tensors = [tensor.requires_grad_() for tensor in tensors]
    rules: dict[str, Rule] = {"ours": ours(tokens), "transformers": theirs}
    difference = (rules["ours"](tensors) - theirs(tensors)).abs().max().item()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rules}
    for _ in range(options.repeats):
        for name, rule in rules.items():
            times[name].append(seconds(rule, tensors))
    best = {name: min(each, key=sum) for name, each in times.items()}
    for name, (forward, backward) in best.items():
        print(f"{name}: forward {forward:.3f} s, backward {backward:.3f} s")
    print(f"transformers over ours: {sum(best['transformers']) / sum(best['ours']):.2f}")
    print(f"largest difference of an output: {difference:.1e}")


if __name__ == "__main__":
    main()
