"""Keys and values of all ranks are gathered for one layer at a time (`sequences.GatheredLayout`)."""

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


class AllGather(ContextMethod):
    about = "those of one layer at a time, with shared prompts too"

    def check(self, config: Config) -> None:
        if config.model.attention_backend == "fused":
            raise UserError(
                "option-conflict",
                "--attention-backend fused with --cp-comm-type all_gather: its attention is the flash kernel's; "
                "use flash or auto",
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
        from megatron_solopo.parallel.cpu_attention import cpu_layout
        from megatron_solopo.parallel.kernels import Kernels
        from megatron_solopo.parallel.sequences import sequence_layout

        if kernels is Kernels.CPU:
            return cpu_layout(pieces, rank, size, group, window)
        return sequence_layout(pieces, rank, size, group, window=window)

    def check_on_cuda(self, config: Config) -> None:
        if not config.model.bf16:
            raise UserError(
                "option-conflict",
                f"--context-parallel-size {config.parallel.context_parallel_size} with --device cuda needs --bf16: its "
                "attention is the flash kernel's, which takes 16 bits",
            )


METHOD = AllGather()
