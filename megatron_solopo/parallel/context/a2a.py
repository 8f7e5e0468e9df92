"""Ranks exchange parts of sequences for heads, in Transformer Engine's kernels."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_solopo.errors import UserError
from megatron_solopo.parallel.engine_method import EngineMethod


class HeadsForSequence(EngineMethod):
    about = "parts of sequences for heads, Transformer Engine's, with --no-share-prompts"

    def check_heads(self, heads: Mapping[str, int], size: int) -> None:
        for name, count in heads.items():
            if count % 2:  # Transformer Engine 2.20, dot_product_attention/utils.py:1368
                raise UserError(
                    "layout-not-divisible",
                    f"--cp-comm-type a2a: the model's {name} on a rank, {count}, is odd, and Transformer Engine has no "
                    "kernel for it; use p2p or all_gather",
                )
            if count % size:
                raise UserError(
                    "layout-not-divisible",
                    f"--cp-comm-type a2a: the model's {name} on a rank, {count}, is no multiple of "
                    f"--context-parallel-size {size}; lower it, or use p2p or all_gather",
                )


METHOD = HeadsForSequence()
