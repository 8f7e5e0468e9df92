"""The prompts of a run, on disk: memory holds their question ids and lengths only."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_solopo.data.schema import Message
from megatron_solopo.errors import UserError, system_reason


@dataclass(frozen=True)
class Prompt:
    """The prompt of a question: its chat and the prompt's token ids."""

    id: str
    messages: list[Message]
    ids: Sequence[int]


class Prompts:
    """A read-only sequence of prompts, read from disk at each access. Not thread-safe.

    Args:
        folder: where the temporary file is; it has no name there, so a killed run leaves nothing behind.
        prompts: in the order of the questions; token ids must fit into int32.

    Raises:
        UserError: the disk is full.

    Attributes:
        names: ids of the questions.
        lengths: of the prompts in tokens, int32.
    """

    def __init__(self, folder: Path, prompts: Iterable[Prompt]) -> None:
        self.names: list[str] = []
        self.lengths, self._offsets = array("i"), array("q")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)
        try:
            for prompt in prompts:
                self.names.append(prompt.id)
                self.lengths.append(len(prompt.ids))
                self._offsets.append(self._file.tell())
                pickle.dump((prompt.messages, array("i", prompt.ids)), self._file, pickle.HIGHEST_PROTOCOL)
            self._file.flush()
        except OSError as error:
            raise UserError(
                "write-failed", f"{folder}: the prompts cannot be written ({system_reason(error)}); free space"
            ) from None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._file.seek(self._offsets[index])
        return Prompt(self.names[index], *pickle.load(self._file))

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))
