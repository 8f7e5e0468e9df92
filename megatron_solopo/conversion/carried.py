"""What a folder holds beside the language model that is trained: its names there, and tensors that an export has as
they were.

A model that also reads images holds its language model under a prefix, and an encoder and a projector beside it. Layers
of multi-token prediction are beside the model too (`Family.carried`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PretrainedConfig

from megatron_solopo.model.families.registry import family_of

if TYPE_CHECKING:
    from megatron_solopo.conversion.hf_folder import TensorReader

FORMS = (
    (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    (("model.", "model.language_model."),),
)
"""How folders of models with images name the language model: a name's beginning in a table -> in the folder. The first
is that of published folders, and of transformers 5 for those; the second that of later families."""

OUTPUT = "lm_head."


@dataclass(frozen=True)
class Names:
    """The names of a folder's tensors.

    Attributes:
        form: one of `FORMS`; () for a folder whose names are those of the tables.
    """

    form: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, names: Collection[str]) -> Names:
        """Returns the form of a folder's names."""
        return cls(next((form for form in FORMS if any(name.startswith(form[0][1]) for name in names)), ()))

    def stored(self, name: str) -> str:
        """Returns the folder's name of a tensor that a table names."""
        for ours, theirs in self.form:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def plain(self, name: str) -> str | None:
        """Returns a table's name of a folder's tensor; None if it is outside the language model."""
        for ours, theirs in self.form:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name if not self.form or name.startswith(OUTPUT) else None


def carried_names(reader: TensorReader, hf_config: PretrainedConfig) -> list[str]:
    """Returns the folder's names of the tensors that are carried through, sorted."""
    beginnings = family_of(hf_config).carried(hf_config)
    return sorted({*reader.others, *(reader.stored(name) for name in reader.names() if name.startswith(beginnings))})


def carried_tensors(reader: TensorReader, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields (the folder's name, tensor as it is stored)."""
    for name in names:
        yield name, reader.get_stored(name)
