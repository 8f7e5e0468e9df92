"""Reads the weights of a Hugging Face folder, one parameter of the model at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from megatron_solopo.conversion.hf import all_names, local_part, named_entries
from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.conversion.new_tokens import NewRows
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.operators import Entry, PadRows
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.hf_config import read_hf_config
from megatron_solopo.progress import ProgressBar

OUTPUT = "lm_head.weight"
"""Name of the output matrix; a folder with tied embeddings may hold it too."""


class HfWeights:
    """A folder's weights for the chunks of a model, split for this process, in the parameters' dtype.

    The constructor checks all tensors (`check_tensors`); `fill` reads those of a parameter.

    Args:
        new_rows: rows of tokens that the folder's model does not have.

    Raises:
        UserError: see `check_tensors`.
    """

    def __init__(
        self,
        folder: str | Path,
        models: Sequence[GPTModel],
        hf_config: PretrainedConfig,
        new_rows: NewRows | None = None,
    ) -> None:
        self._reader, self._new_rows = TensorReader(folder), new_rows
        check_tensors(self._reader, hf_config, models[0].vocab_size)
        self._sources: dict[int, tuple[Entry, tuple[str, ...]]] = {}
        self._parameters = []
        for model in models:
            for entry, names, parameter in named_entries(model, hf_config):
                self._sources[id(parameter)] = entry, names
                self._parameters.append(parameter)
        self._parameters.sort(key=self._files)

    def _files(self, parameter: torch.nn.Parameter) -> list[str]:
        """Returns the files that hold a parameter; in their order, each ``.bin`` that cannot be mapped is loaded
        once."""
        return sorted({self._reader.file_of(name) for name in self._sources[id(parameter)][1]})

    def _fill(self, target: Tensor, entry: Entry, tensors: list[Tensor], part: tuple[int, int, int | None]) -> None:
        if self._new_rows is not None and isinstance(entry.operator, PadRows):
            tensors = [self._new_rows.grown(tensor) for tensor in tensors]
        entry.operator.fill(target, tensors, *part)

    @torch.no_grad()
    def fill(self, parameter: torch.nn.Parameter) -> None:
        """Copies a parameter's tensors into it."""
        entry, names = self._sources[id(parameter)]
        self._fill(parameter, entry, [self._reader.get(name) for name in names], local_part(entry, parameter))

    def fill_all(self) -> None:
        """Fills every parameter of the model."""
        for parameter in ProgressBar(self._parameters, desc="reading weights", unit="parameter", leave=False):
            self.fill(parameter)


def check_tensors(reader: TensorReader, hf_config: PretrainedConfig, padded_vocab_size: int) -> None:
    """Refuses a folder whose tensors do not match its config.json, by the headers of its files where they suffice.

    Args:
        hf_config: of the trained model, whose vocabulary may be larger than the folder's (--add-special-tokens).

    Raises:
        UserError: a tensor is missing or left over, has another shape or an unsupported dtype, or an untied output
            matrix would be lost.
    """
    table = family_of(hf_config).table(hf_config, padded_vocab_size)
    expected = {name for entry in table for name in all_names(entry, hf_config)}
    if missing := expected - reader.names():
        reader.shape(min(missing))  # raises
    beginnings = family_of(hf_config).carried(hf_config)
    left_over = {name for name in reader.names() - expected if not name.startswith(beginnings)}
    if hf_config.tie_word_embeddings and OUTPUT in left_over and _is_embedding(reader, OUTPUT):
        left_over.remove(OUTPUT)
    if left_over == {OUTPUT}:
        raise UserError(
            "tensor-not-tied",
            f"{reader.folder}: {OUTPUT} is not the embedding, though config.json ties them, and training "
            'would lose it; set "tie_word_embeddings": false there, or remove the tensor',
        )
    if left_over:
        raise UserError(
            "tensor-left-over",
            f"{reader.folder}: the tensor {min(left_over)!r} is not part of {hf_config.model_type} "
            f"({len(left_over)} such); training would lose it",
        )
    shapes = stored_shapes(read_hf_config(reader.folder))
    for name in sorted(expected):
        reader.dtype_of(name)  # raises for an unsupported one
        if reader.shape(name) != shapes[name]:
            raise UserError(
                "tensor-shape",
                f"{reader.folder}: the tensor {name!r} has the shape {tuple(reader.shape(name))}, config.json makes it "
                f"{tuple(shapes[name])}; the two do not belong together, or the copy is damaged",
            )


def _is_embedding(reader: TensorReader, name: str) -> bool:
    """Whether a tensor equals the embedding; like transformers 5, which ties only equal tensors."""
    output, embedding = reader.get(name), reader.get("model.embed_tokens.weight")
    return output.dtype == embedding.dtype and torch.equal(output, embedding)


def stored_shapes(hf_config: PretrainedConfig) -> dict[str, torch.Size]:
    """Name -> shape of every tensor that transformers writes for this model.

    The model is built on the meta device. transformers reverts its conversions, which stack experts on loading.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return {name: tensor.shape for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}
