"""--stretch-positions: long positions at the cost of short prompts.

Positions of a prompt jump at the boundaries of its documents by random gaps, so that training meets positions and
distances of a prompt that is much longer. The idea is PoSE's (arXiv 2309.10400), which extends language models by it.
Every token is computed and attends as before: positions are data of a pack, and only RoPE reads them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_solopo.losses.solopo import reference_scores
from megatron_solopo.pack import Context, Scored, Side

if TYPE_CHECKING:
    from megatron_solopo.config import Config
    from megatron_solopo.data.schema import DocumentSpan
    from megatron_solopo.data.tokenized.tokens import Prompt, TokenGroup

_BLANK_LINES = re.compile(r"\n\s*\n")


class Jump(NamedTuple):
    """Positions from this token of a prompt on are larger by the gap."""

    token: int
    gap: int


def boundary_places(content: str, spans: Sequence[DocumentSpan]) -> list[int]:
    """Returns the characters of a message at which positions may jump: where each document starts and the last one
    ends; where documents are not known, where each paragraph starts (a text without blank lines: each line)."""
    if spans:
        return [*(start for start, _, _ in spans), spans[-1][1]]
    ends = [match.end() for match in _BLANK_LINES.finditer(content)]
    return ends or [place for place, character in enumerate(content, 1) if character == "\n"]


def is_stretched(context: Context, side: Side) -> bool:
    """Whether responses of this kind follow a prompt that is stretched: the long one, or that of a conversation."""
    return context == Context.LONG or side == Side.PLAIN


def stretched_scores(scored: Scored) -> Scored:
    """Returns the segments that follow a stretched prompt."""
    return frozenset(one for one in scored if is_stretched(*one))


def reference_is_stretched(config: Config) -> bool:
    """Whether the log-probs of the run's reference depend on stretched positions."""
    return config.data.stretch_positions is not None and bool(stretched_scores(reference_scores(config.method)))


@dataclass(frozen=True)
class Stretch:
    """How the positions of a data set are stretched.

    Attributes:
        length: the most positions of a prompt with its longest response.
        fraction: the probability that an example is stretched.
        seed: of all draws.
        by_epoch: whether each epoch draws anew; log-probs in a cache are those of one draw.
    """

    length: int
    fraction: float
    seed: int
    by_epoch: bool

    @classmethod
    def of(cls, config: Config) -> Stretch | None:
        """Returns that of a run's training data, or None."""
        length, fraction = config.data.stretch_positions, config.data.stretch_fraction
        if length is None:
            return None
        one_draw = config.method.reference == "cached" and reference_is_stretched(config)
        return cls(length, fraction, config.training.seed, not one_draw)

    def __str__(self) -> str:
        share = "" if self.fraction == 1 else f", {self.fraction:g} of the examples"
        draws = "anew in each epoch" if self.by_epoch else "once, for the cached reference log-probs"
        return f"long prompts with a response span up to {self.length:,} positions{share}; gaps are drawn {draws}"

    def of_group(self, group: TokenGroup, epoch: int) -> TokenGroup:
        """Returns a group with stretched prompts. The gaps depend on the seed, the prompt's token ids and the epoch
        alone, so every process, layout and resumed run draws the same."""
        prompts = (
            self._of_prompt(prompt, epoch) if is_stretched(prompt.context, prompt.completions[0].side) else prompt
            for prompt in group.prompts
        )
        return replace(group, prompts=tuple(prompts))

    def _of_prompt(self, prompt: Prompt, epoch: int) -> Prompt:
        """Draws the total of the gaps uniformly, then divides it among the boundaries uniformly."""
        boundaries = np.asarray(prompt.boundaries, np.int64)
        spare = self.length - len(prompt.ids) - max(len(completion.ids) for completion in prompt.completions)
        ids = np.ascontiguousarray(np.asarray(prompt.ids, "<i4"))
        words = np.frombuffer(hashlib.sha256(ids.tobytes()).digest(), "<u4")
        draw = np.random.default_rng([self.seed, epoch if self.by_epoch else 0, *words.tolist()])
        if draw.random() >= self.fraction or not len(boundaries):
            return prompt
        total = int(draw.random() * (spare + 1))
        inner = np.sort(draw.random(len(boundaries) - 1)) * (total + 1)
        gaps = np.diff([0, *inner.astype(np.int64), total])
        jumps = (Jump(token, gap) for token, gap in zip(boundaries.tolist(), gaps.tolist(), strict=True) if gap)
        return replace(prompt, jumps=tuple(jumps))
