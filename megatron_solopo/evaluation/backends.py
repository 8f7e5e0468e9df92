"""Where the model of an evaluation answers: in this process, or behind a server (`server.FromServer`)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import transformers

from megatron_solopo.data.files.records import Record
from megatron_solopo.data.hf_model import check_device, load_model, weight_facts
from megatron_solopo.evaluation.generation import Response, choose, generate
from megatron_solopo.evaluation.items import Item


class Backend(Protocol):
    """Answers questions greedily.

    Attributes:
        settings: what determines an answer beside prompts and numbers of tokens; after `prepare`.
        notes: further facts for the file of the results; after `prepare`.
    """

    settings: Record
    notes: Record

    def prepare(self, asked: Mapping[str, Sequence[Item]]) -> None:
        """Gets ready to answer items, by the option that they come from.

        Raises:
            UserError: the model cannot be used, or cannot answer them.
        """
        ...

    def generate(
        self,
        items: Sequence[Item],
        index: int,
        max_new_tokens: int,
        label: str,
        before: Mapping[int, Response],
        add: Callable[[dict[int, Response]], None],
    ) -> list[Response]:
        """Returns the response to the prompt ``index`` of each item.

        Args:
            label: the name of the length.
            before: responses of an earlier call, by the number of their items; they are not generated again.
            add: called with responses as they are there.
        """
        ...

    def choose(
        self,
        items: Sequence[Item],
        index: int,
        label: str,
        before: Mapping[int, int],
        add: Callable[[dict[int, int]], None],
    ) -> list[int]:
        """Returns the number of each item's choice that has the highest log-prob after the prompt ``index``; see
        `generate`."""
        ...


class InProcess:
    """The model of the folder --model, run by transformers in this process.

    Raises:
        UserError: ``cuda`` without a GPU.
    """

    def __init__(self, options: argparse.Namespace, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        check_device(options.device)
        self._options, self._tokenizer = options, tokenizer

    def prepare(self, asked: Mapping[str, Sequence[Item]]) -> None:  # noqa: ARG002  # any items
        options = self._options
        self._model = load_model(options.model, options.device, options.dtype)
        self.settings: Record = {"weights": weight_facts(options.model), "dtype": str(self._model.dtype)}
        self.notes: Record = {
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": self._model.device.type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def generate(
        self,
        items: Sequence[Item],
        index: int,
        max_new_tokens: int,
        label: str,
        before: Mapping[int, Response],
        add: Callable[[dict[int, Response]], None],
    ) -> list[Response]:
        prompts, batch_tokens = [item.prompts[index] for item in items], self._options.batch_tokens
        golds = [item.gold for item in items] if items[0].gold else None
        return generate(self._model, self._tokenizer, prompts, max_new_tokens, batch_tokens, label, before, add, golds)

    def choose(
        self,
        items: Sequence[Item],
        index: int,
        label: str,
        before: Mapping[int, int],
        add: Callable[[dict[int, int]], None],
    ) -> list[int]:
        prompts, choices = [item.prompts[index] for item in items], [item.choices for item in items]
        return choose(self._model, prompts, choices, self._options.batch_tokens, label, before, add)
