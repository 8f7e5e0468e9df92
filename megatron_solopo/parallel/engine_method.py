"""Common part of the context-parallel methods of Transformer Engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_solopo.errors import UserError
from megatron_solopo.parallel.method import ContextMethod

if TYPE_CHECKING:
    import torch.distributed as dist

    from megatron_solopo.config import Config
    from megatron_solopo.pack import Piece
    from megatron_solopo.parallel.kernels import Kernels
    from megatron_solopo.parallel.layout import RankLayout


class EngineMethod(ContextMethod):
    """Every piece is a sequence of its own; Transformer Engine's zig-zag of the lengths is that of `zigzag`."""

    kernels_of_layers = True

    def check(self, config: Config) -> None:
        name = config.parallel.cp_comm_type
        if config.model.transformer_impl != "transformer_engine":
            raise UserError(
                "option-conflict",
                f"--cp-comm-type {name} is Transformer Engine's: add --transformer-impl transformer_engine, or use "
                "all_gather",
            )
        if config.data.share_prompts:
            raise UserError(
                "option-conflict",
                f"--cp-comm-type {name}: Transformer Engine's context parallelism does not support completions that "
                "share a prompt; add --no-share-prompts, or use all_gather",
            )

    def layout(
        self,
        pieces: Sequence[Piece],
        rank: int,
        size: int,
        group: dist.ProcessGroup | None,
        kernels: Kernels,
        window: int | None = None,
    ) -> RankLayout:
        """Returns the layout of the complete pack: Transformer Engine divides the lengths itself."""
        from megatron_solopo.parallel.sequences import sequence_layout

        layout = sequence_layout(pieces)
        if window is not None:
            raise ValueError("windows are refused with this method (`hf_config.check_attention_on_cuda`)")
        if layout.keys is not None:
            raise ValueError("Transformer Engine's context parallelism has no shared prompts")
        return layout
