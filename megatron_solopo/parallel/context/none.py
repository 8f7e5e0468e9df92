"""Context parallelism of one rank: packs are not sharded; attention uses the kernels of --transformer-impl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
        """Returns `CUDNN_LENGTHS` for portable layers on CUDA, else 1.

        torch 2.11 runs causal attention on Hopper by cuDNN, which builds and keeps a plan for every new shape, so
        there should be few lengths. Completions, context parallelism and Transformer Engine use other kernels.
        """
        portable = config.model.transformer_impl == "portable"
        return math.lcm(self.piece_multiple(size), CUDNN_LENGTHS) if device == "cuda" and portable else 1

    def rows(self, pieces: Sequence[Piece], rank: int, size: int) -> np.ndarray:
        import numpy as np

        return np.arange(sum(piece.slot for piece in pieces))

    def share(self, rank: int, size: int) -> str:
        return "each sequence whole"

    def layout(
        self, pieces: Sequence[Piece], rank: int, size: int, group: dist.ProcessGroup | None, fused: bool
    ) -> RankLayout:
        from megatron_solopo.parallel.layout import block_layout, sequence_layout

        return sequence_layout(pieces) if fused else block_layout(pieces)


METHOD = Whole()
