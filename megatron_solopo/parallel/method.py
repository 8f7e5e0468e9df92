"""The interface of context-parallel methods, which shard a pack; each is a file of `parallel.context`.

Reading options imports these files, so they import neither torch nor numpy at their top.
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
    from megatron_solopo.parallel.kernels import Kernels
    from megatron_solopo.parallel.layout import RankLayout


class ContextMethod(ABC):
    """A --cp-comm-type, named as its file.

    The default methods implement the zig-zag: every piece is divided into 2 x ranks chunks of one length, and each
    rank computes an early chunk and the late one that balances it.

    Attributes:
        about: its help text.
        kernels_of_layers: with --transformer-impl transformer_engine the attention is Transformer Engine's too, over
            the `SequenceLayout` that `layout` makes; otherwise every layer calls the layout's ``attend``.
    """

    about = ""
    kernels_of_layers = False

    def check(self, config: Config) -> None:  # noqa: B027 (most refuse nothing)
        """Refuses options that the method does not support.

        Raises:
            UserError: an option is not supported.
        """

    def check_on_cuda(self, config: Config) -> None:  # noqa: B027
        """Refuses options that are supported on the CPU only; called once the device is known."""

    def check_heads(self, heads: Mapping[str, int], size: int) -> None:  # noqa: B027
        """Refuses a model by its heads on a rank (name in config.json -> number), for ``size`` ranks."""

    def piece_multiple(self, size: int) -> int:
        """Returns the multiple that each piece is padded to, so that it can be sharded over ``size`` ranks."""
        return 2 * size

    def prompt_multiple(self, size: int, config: Config, device: str) -> int:
        """Returns the multiple for pieces that attend to themselves alone, on ``device`` (``cuda`` or ``cpu``)."""
        return self.piece_multiple(size)

    def rows(self, pieces: Sequence[Piece], rank: int, size: int) -> np.ndarray:
        """Returns [S / size] int64, the rows of the pack that a rank computes, in its order."""
        from megatron_solopo.parallel.zigzag import rows_of

        return rows_of(pieces, rank, size)

    def share(self, rank: int, size: int) -> str:
        """Describes in words which part of each sequence a rank computes."""
        from megatron_solopo.parallel.zigzag import chunk_places

        chunks = " and ".join(str(place + 1) for place in chunk_places(rank, size))
        return f"chunks {chunks} of {2 * size} of each sequence"

    @abstractmethod
    def layout(
        self,
        pieces: Sequence[Piece],
        rank: int,
        size: int,
        group: dist.ProcessGroup | None,
        kernels: Kernels,
        window: int | None = None,
    ) -> RankLayout:
        """Makes a rank's attention layout of a pack, with tensors on the CPU.

        Args:
            group: the group of the context-parallel ranks.
            kernels: those of the layers for a pack that is not sharded.
            window: tokens that a query attends to at most, itself and those before it; given for models with windows
                only.
        """
