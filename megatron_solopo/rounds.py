"""Rounds of a recipe: iterative training, in which each round samples from the model of the round before.

    rounds:
      count: 3
      model: /models/base             # $previous of the first round
      result: round-$round/hf         # the model of a round: $model there, $previous in the next
      stages:                         # of each round: round-1.responses, round-1.pairs, ...
        responses:
          sample-responses: {contexts: contexts.jsonl, model: $previous, seed: $round, output: round-$round/r.jsonl}
        pairs:
          build-pairs: {contexts: contexts.jsonl, responses: round-$round/r.jsonl, output: round-$round/groups.jsonl}
        train:
          train: {hf_path: $previous, train_data: round-$round/groups.jsonl, save_hf: $model, ...}
        report:
          report: {runs: [round-$each=round-$each/run], output: round-$round/report.md}

The stages of all rounds follow those of ``stages:``, so that the run resumes, skips and restarts them like any other.
Each depends on the stages alone whose outputs it reads.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_solopo.errors import UserError
from megatron_solopo.variables import filled, filled_stage

if TYPE_CHECKING:
    from megatron_solopo.recipe import Stage

EACH = re.compile(r"(?<!\$)\$(?:each\b|\{each\})")
"""The variable of a list's item that is repeated for each round so far."""


@dataclass(frozen=True)
class Rounds:
    """The rounds of a recipe.

    Attributes:
        where: its ``file:line``.
        count: number of rounds.
        model: Hugging Face folder that the first round starts from.
        result: folder of a round's model, in which ``$round`` is the number of the round.
        stages: those of each round.
    """

    where: str
    count: int
    model: str
    result: str
    stages: Sequence[Stage]

    def unrolled(self, seed: int | None = None) -> list[Stage]:
        """Returns the stages of all rounds.

        Args:
            seed: replaces every ``seed`` of the first round's stages; ``seed + 1`` those of the second, and so on.

        Raises:
            UserError: an option has an unknown variable, or no stage writes the model of a round.
        """
        previous, stages = self.model, []
        for number in range(1, self.count + 1):
            model = self._filled("result", self.result, {"round": str(number)})
            variables = {"round": str(number), "previous": previous, "model": model}
            of_round = [self._of_round(stage, number, variables) for stage in self.stages]
            if seed is not None:
                of_round = [stage.with_seed(seed + number - 1) for stage in of_round]
            written = {os.path.normpath(output) for stage in of_round for output in stage.named_outputs}
            if os.path.normpath(model) not in written:
                raise UserError(
                    "recipe-value",
                    f"{self.where}: rounds: result: {model}: no stage of round {number} writes it; set save_hf: $model",
                )
            stages += of_round
            previous = model
        return stages

    def _filled(self, name: str, value: str, variables: dict[str, str]) -> str:
        text, unknown = filled(value, variables)
        if unknown or text == value:
            raise UserError(
                "recipe-variable", f"{self.where}: rounds: {name}: {value}: must hold $round and no other variable"
            )
        return str(text)

    def _of_round(self, stage: Stage, number: int, variables: dict[str, str]) -> Stage:
        options = {name: (_repeated(value, number), where) for name, (value, where) in stage.options.items()}
        stage = dataclasses.replace(stage, options=options)
        stage, problem = filled_stage(stage, f"round-{number}.{stage.name}", "a round", variables)
        if problem:
            raise UserError("recipe-variable", problem)
        return stage


def _repeated(value: object, number: int) -> object:
    """Returns a list in which each item with ``$each`` is repeated for the rounds 1 to ``number``."""
    if not isinstance(value, list):
        return value
    items = []
    for item in value:
        each = isinstance(item, str) and EACH.search(item)
        items += [EACH.sub(str(one), item) for one in range(1, number + 1)] if each else [item]
    return items
