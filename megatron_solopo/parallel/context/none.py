"""Context parallelism of one rank: packs are not sharded; attention uses the kernels of --transformer-impl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_solopo.parallel.kernels import PLANNED, Kernels, kernels_for
from megatron_solopo.parallel.method import ContextMethod

if TYPE_CHECKING:
    import numpy as np
    import torch.distributed as dist

    from megatron_solopo.config import Config
    from megatron_solopo.pack import Piece
    from megatron_solopo.parallel.layout import RankLayout

CUDNN_LENGTHS = 128
"""On CUDA lengths of prompts are rounded up to a multiple of this: 64 different ones up to 8K tokens."""


class Whole(ContextMethod):
    kernels_of_layers = True

    def piece_multiple(self, size: int) -> int:
        return 1

    def prompt_multiple(self, size: int, config: Config, device: str) -> int:
        """Returns `CUDNN_LENGTHS` where prompts run on cuDNN, else 1.

        torch 2.11 runs causal attention on Hopper by cuDNN, which builds and keeps a plan for every new shape, so
        there should be few lengths. Completions, float32, context parallelism and Transformer Engine use other kernels.
        """
        model = config.model
        engine = model.transformer_impl != "portable"
        kernels = kernels_for(
            engine, device == "cuda", model.bf16, model.attention_backend, config.training.deterministic_mode
        )
        return math.lcm(self.piece_multiple(size), CUDNN_LENGTHS) if kernels in PLANNED else 1

    def rows(self, pieces: Sequence[Piece], rank: int, size: int) -> np.ndarray:
        import numpy as np

        return np.arange(sum(piece.slot for piece in pieces))

    def share(self, rank: int, size: int) -> str:
        return "each sequence whole"

    def layout(
        self,
        pieces: Sequence[Piece],
        rank: int,
        size: int,
        group: dist.ProcessGroup | None,
        kernels: Kernels,
        window: int | None = None,
    ) -> RankLayout:
        from megatron_solopo.parallel.cpu_attention import cpu_layout
        from megatron_solopo.parallel.layout import block_layout
        from megatron_solopo.parallel.sequences import prompt_layout, sequence_layout

        if kernels is Kernels.CPU:
            return cpu_layout(pieces, window=window)
        if kernels is Kernels.BLOCKS and window is None:
            return block_layout(pieces)
        if kernels in PLANNED and window is None:
            return prompt_layout(pieces, kernels is Kernels.CUDNN)
        return sequence_layout(pieces, window=window)


METHOD = Whole()
