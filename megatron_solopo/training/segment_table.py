"""The flat table of one number for each scored segment of a data set, and the segments' places in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.pack import Context, Pack, Segments, Side, segment_name


@dataclass(frozen=True)
class SegmentPlaces:
    """The places of T segments, sorted by example, context, side and number of the response.

    Attributes:
        counts: [examples, contexts, sides] int64, number of responses.
    """

    counts: Tensor

    @classmethod
    def of_dataset(cls, dataset: TokenDataset) -> SegmentPlaces:
        return cls(dataset.segment_counts())

    @cached_property
    def size(self) -> int:
        """T, the number of segments."""
        return int(self.counts.sum())

    @cached_property
    def _starts(self) -> Tensor:
        """[examples, contexts, sides] int64, place of the first response."""
        flat = self.counts.flatten()
        return (flat.cumsum(0) - flat).reshape(self.counts.shape)

    def of_pack(self, pack: Pack, contexts: Tensor | None = None) -> Tensor:
        """Returns [N] int64, the place of each segment of a pack.

        Args:
            contexts: [N] int64, contexts to look up instead of the segments' contexts.

        Raises:
            IndexError: the table has no such segment.
        """
        scored = pack.scored
        examples = torch.tensor(pack.groups, dtype=torch.int64)[scored.groups]
        key = examples, scored.contexts if contexts is None else contexts, scored.sides
        if bool((scored.responses >= self.counts[key]).any()):
            raise IndexError("the table has no log-prob of a segment of the pack")
        return self._starts[key] + scored.responses

    def of_examples(self, chosen: Tensor) -> Tensor:
        """Returns [T] bool, the places of the chosen examples, [examples] bool."""
        return chosen.repeat_interleave(self.counts.sum((1, 2)))

    def segment_at(self, place: int) -> tuple[int, str]:
        """Returns (example, name of the segment) of a place."""
        row = int((self._starts.flatten() <= place).nonzero()[-1])  # a row without segments starts where the next does
        example, kind = divmod(row, len(Context) * len(Side))
        return example, segment_name(*divmod(kind, len(Side)), place - int(self._starts.flatten()[row]))


@dataclass(frozen=True)
class ReferenceLogProbs:
    """The reference model's log-prob sums of a data set.

    Attributes:
        places: places of its segments.
        values: [T] float64, nats.
    """

    places: SegmentPlaces
    values: Tensor

    def of_pack(self, pack: Pack, contexts: Sequence[Context]) -> Tensor:
        """Returns [N] float64, the value that each segment of a pack is compared with.

        Args:
            contexts: for each context of a segment, the reference's context.
        """
        reference_contexts = torch.tensor(contexts, dtype=torch.int64)[pack.scored.contexts]
        return self.values[self.places.of_pack(pack, reference_contexts)]


def rows_compared(scored: Segments, reference: Segments, contexts: Sequence[Context]) -> Tensor:
    """Returns [N] int64, for each of N segments the row of the reference's segment that it is compared with.

    Args:
        scored, reference: segments of the same groups, as the policy and as the reference scores them.
        contexts: for each context of a segment, the reference's context.

    Raises:
        KeyError: the reference has no such segment.
    """

    def keys(segments: Segments) -> zip[tuple[int, int, int, int]]:
        columns = segments.groups, segments.contexts, segments.sides, segments.responses
        return zip(*(column.tolist() for column in columns), strict=True)

    rows = {key: row for row, key in enumerate(keys(reference))}
    at = [rows[group, contexts[context], side, response] for group, context, side, response in keys(scored)]
    return torch.tensor(at, dtype=torch.int64)
