"""The questions of a run as they are asked, on disk: memory holds their ids and lengths."""

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
    """A question as it is asked: its chat and the token ids of its prompt."""

    id: str
    messages: list[Message]
    ids: Sequence[int]


class Prompts:
    """Prompts that are read when they are looked at; not by several threads.

    Args:
        folder: where there is room for them; the file has no name there, so that nothing is left of a killed run.
        prompts: in the order of the questions; their ids are small numbers.

    Raises:
        UserError: the disk is full.

    Attributes:
        names: the questions' ids.
        lengths: of the prompts, in tokens.
    """

    def __init__(self, folder: Path, prompts: Iterable[Prompt]) -> None:
        self.names: list[str] = []
        self.lengths, self._places = array("i"), array("q")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)
        try:
            for prompt in prompts:
                self.names.append(prompt.id)
                self.lengths.append(len(prompt.ids))
                self._places.append(self._file.tell())
                pickle.dump((prompt.messages, array("i", prompt.ids)), self._file, pickle.HIGHEST_PROTOCOL)
            self._file.flush()
        except OSError as error:
            raise UserError(
                "write-failed", f"{folder}: no room for the prompts ({system_reason(error)}); make room"
            ) from None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._file.seek(self._places[index])
        return Prompt(self.names[index], *pickle.load(self._file))

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))
