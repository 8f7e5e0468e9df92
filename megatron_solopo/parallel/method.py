"""What a way to spread a pack over context-parallel ranks must say; each is a file of `parallel.context`.

Reading options needs these files, so they import neither torch nor numpy at their top.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch.distributed as dist

    from megatron_solopo.config import Config
    from megatron_solopo.pack import Piece
    from megatron_solopo.parallel.layout import RankLayout


class ContextMethod(ABC):
    """A --cp-comm-type, under the name of its file.

    The defaults are those of the zig-zag: every piece is cut into 2 x ranks chunks of one length, and each rank
    computes an early one and its late mate.

    Attributes:
        about: what --help says of it.
        kernels_of_layers: with --transformer-impl transformer_engine its attention is Transformer Engine's too, over
            the `SequenceLayout` that `layout` makes; otherwise every layer attends with the layout's own ``attend``.
    """

    about = ""
    kernels_of_layers = False

    def check(self, config: Config) -> None:  # noqa: B027 (most refuse nothing)
        """Refuses options that it cannot serve.

        Raises:
            UserError: naming the options.
        """

    def check_on_cuda(self, config: Config) -> None:  # noqa: B027
        """Refuses what only the CPU can do; called once the device is known."""

    def check_heads(self, heads: Mapping[str, int], size: int) -> None:  # noqa: B027
        """Refuses a model by its heads on a process (name in config.json -> number), for ``size`` ranks."""

    def piece_multiple(self, size: int) -> int:
        """Each piece is padded to a multiple of this, so that it can be cut over ``size`` ranks."""
        return 2 * size

    def prompt_multiple(self, size: int, config: Config, device: str) -> int:
        """The same of a piece that attends to itself alone, on ``device`` (``cuda`` or ``cpu``)."""
        return self.piece_multiple(size)

    def rows(self, pieces: Sequence[Piece], rank: int, size: int) -> np.ndarray:
        """[S / size] int64: the rows of the pack that a rank computes, in its order; as many on every rank."""
        from megatron_solopo.parallel.zigzag import rows_of

        return rows_of(pieces, rank, size)

    def share(self, rank: int, size: int) -> str:
        """For a person: which part of each sequence a rank computes."""
        from megatron_solopo.parallel.zigzag import chunk_places

        chunks = " and ".join(str(place + 1) for place in chunk_places(rank, size))
        return f"chunks {chunks} of {2 * size} of each sequence"

    @abstractmethod
    def layout(
        self, pieces: Sequence[Piece], rank: int, size: int, group: dist.ProcessGroup | None, fused: bool
    ) -> RankLayout:
        """What the attention of a rank needs to know of a pack, its tensors on the CPU.

        Args:
            group: the context-parallel ranks.
            fused: the layers are Transformer Engine's.
        """
