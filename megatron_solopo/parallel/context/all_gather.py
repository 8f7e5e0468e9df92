"""Keys and values of all ranks are gathered for one layer at a time, on torch's flash kernel (`parallel.spans`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_solopo.errors import UserError
from megatron_solopo.parallel.method import ContextMethod

if TYPE_CHECKING:
    import torch.distributed as dist

    from megatron_solopo.config import Config
    from megatron_solopo.pack import Piece
    from megatron_solopo.parallel.layout import RankLayout


class AllGather(ContextMethod):
    about = "those of one layer at a time, with shared prompts too"

    def layout(
        self, pieces: Sequence[Piece], rank: int, size: int, group: dist.ProcessGroup | None, fused: bool
    ) -> RankLayout:
        from megatron_solopo.parallel.spans import span_layout

        return span_layout(pieces, rank, size, group)

    def check_on_cuda(self, config: Config) -> None:
        if not config.model.bf16:
            raise UserError(
                "option-conflict",
                f"--context-parallel-size {config.parallel.context_parallel_size} with --device cuda needs --bf16: its "
                "attention merges parts of a sequence by the flash kernel's log-sum-exps, and that kernel takes 16 "
                "bits",
            )


METHOD = AllGather()
