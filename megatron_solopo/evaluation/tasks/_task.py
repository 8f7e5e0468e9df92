"""What a task is, and prompts of a wanted length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.building.selection import TOKEN_TOLERANCE, CannotBuild
from megatron_solopo.data.schema import Message
from megatron_solopo.data.text.chat import prompt_ids
from megatron_solopo.data.text.tokenizer import encode
from megatron_solopo.evaluation.items import Depths, Item

SAMPLES = 100
"""Samples of a generated task where --limit is not set."""


@dataclass(frozen=True)
class Setting:
    """What a task is asked with.

    Attributes:
        sizes: ascending lengths in tokens of prompt and response.
        limit: of questions; None: all of a file, `SAMPLES` of a generated task.
        depths: see `items.Depths`.
        max_new_tokens: tokens of a size that are left for the response.
    """

    tokenizer: PreTrainedTokenizerBase
    sizes: Sequence[int]
    seed: int
    limit: int | None
    depths: Depths
    max_new_tokens: int
    system_prompt: str | None = None

    def chat(self, content: str) -> list[Message]:
        """Returns a chat with one message of the user."""
        chat: list[Message] = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*chat, {"role": "user", "content": content}]

    def ids(self, content: str, prefix: str = "") -> list[int]:
        """Returns the token ids of `chat`, and of the start of the response."""
        ids = prompt_ids(self.tokenizer, self.chat(content))
        return ids + encode(self.tokenizer, prefix) if prefix else ids

    def prompts(
        self, build: Callable[[int], tuple[str, str]], fewest: int, available: int | None = None
    ) -> list[list[int]]:
        """Returns the prompt of every size, of 98 % to 100 % of it where units are small enough.

        Args:
            build: (number of units) -> (message, start of the response); each unit adds about the same tokens.
            fewest: units of the shortest prompt.
            available: units that there are; None: any number.

        Raises:
            CannotBuild: the fewest units are longer than a size, or all of them shorter.
        """
        prompts = []
        for size in self.sizes:
            prompt, fewest = self._longest(build, fewest, available, size - self.max_new_tokens)
            prompts.append(prompt)
        return prompts

    def _longest(
        self, build: Callable[[int], tuple[str, str]], fits: int, available: int | None, most: int
    ) -> tuple[list[int], int]:
        """Returns a prompt of at most ``most`` tokens, and its number of units.

        The number is estimated from the prompts so far, so a prompt of 128K tokens is tokenized a few times and not
        at each step of a binary search.
        """
        best = self.ids(*build(fits))
        if len(best) > most:
            raise CannotBuild(f"its text without filler is longer than {most} tokens")
        enough = (1 - TOKEN_TOLERANCE) * most
        more = min(fits + 8, available or fits + 8)
        per_unit = max(1.0, (len(self.ids(*build(more))) - len(best)) / max(more - fits, 1))
        too_many = None if available is None else available + 1
        while len(best) < enough and (too_many is None or too_many - fits > 1):
            units = fits + max(1, int((most - len(best)) / per_unit))
            units = units if too_many is None else min(units, too_many - 1)
            ids = self.ids(*build(units))
            if len(ids) > most:
                per_unit, too_many = (len(ids) - len(best)) / (units - fits), units
            else:
                fits, best = units, ids
        if len(best) < enough and fits == available:
            raise CannotBuild(f"the file's {available:,} documents are shorter than {most:,} tokens")
        return best, fits


Build = Callable[[Setting, str | None, "Counter[str]"], "list[Item]"]
"""(setting, file, counts) -> items; questions that cannot be asked are added to ``counts`` by reason."""


@dataclass(frozen=True)
class Task:
    """A task of a benchmark.

    Attributes:
        name: for --tasks.
        metrics: the scores of its answers (`scorers`, `data.scoring`); the first is the benchmark's.
        max_new_tokens: the benchmark's.
        build: makes its questions.
        file: what FILE of NAME=FILE is; "": it reads none.
        by_depth: whether --depths moves its evidence.
        sized: whether --context-tokens sets the length of its prompts.
    """

    name: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    build: Build
    file: str = ""
    by_depth: bool = False
    sized: bool = True
