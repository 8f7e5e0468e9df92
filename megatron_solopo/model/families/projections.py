"""Which matrices of a layer LoRA's adapters are beside, by the family's table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.config import ModelConfig
from megatron_solopo.lora_options import MIXTRALS, MLP, PROJECTIONS, adapts_experts, modules_of
from megatron_solopo.model.families.llama import MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.parallel.topology import expert_count


@dataclass(frozen=True)
class Adapted:
    """A matrix of some layers that has adapters.

    Attributes:
        entry: of the matrix in its family's table.
        projections: our name of each projection with an adapter -> its place among the entry's tensors.
    """

    entry: Entry
    projections: dict[str, int]

    def owners(self, layer: Any) -> Iterator[tuple[Any, int | None]]:
        """Yields (the module that has the matrix, None) of a layer, if it has it; with experts each of this process and
        its number in the model."""
        if self.entry.layers is not None and layer.layer_number - 1 not in self.entry.layers:
            return
        if self.entry.of_experts:
            yield from zip(layer.mlp.experts.local_experts, layer.mlp.local_expert_indices, strict=True)
        else:
            yield layer.get_submodule(self.path.rpartition(".")[0]), None

    @property
    def path(self) -> str:
        """The matrix in a layer, such as ``mlp.linear_fc1``."""
        return self.entry.megatron.removeprefix(MEGATRON_LAYER).removesuffix(".weight")

    @property
    def name(self) -> str:
        """The matrix in the module that has it."""
        return self.path.rpartition(".")[2]


def projection_of(name: str) -> str:
    """Returns our name of the projection whose weight has this name in a folder; another one of other tensors."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return MIXTRALS.get(last, last) if ".experts." in name else last


def chosen_projections(hf_config: PretrainedConfig, options: ModelConfig) -> tuple[str, ...]:
    """Returns the projections of --lora-modules; by default all of them, of a model with experts those of attention."""
    chosen = modules_of(options)
    if options.lora_modules is None and expert_count(hf_config):
        return tuple(name for name in chosen if name not in MLP)
    return chosen


def adapted(hf_config: PretrainedConfig, options: ModelConfig | None = None) -> list[Adapted]:
    """Returns the matrices that have adapters by --lora-modules, or without ``options`` may have some; none of a
    projection for which the family's folders have no tensor."""
    chosen, matrices = PROJECTIONS if options is None else chosen_projections(hf_config, options), []
    experts = options is None or adapts_experts(options)
    for entry in family_of(hf_config).table(hf_config, hf_config.vocab_size):
        names = [projection_of(name) for name in entry.hf]
        projections = {name: place for place, name in enumerate(names) if name in chosen}
        if projections and entry.megatron.endswith(".weight") and (experts or not entry.of_experts):
            matrices.append(Adapted(entry, projections))
    return matrices


def projections_of(hf_config: PretrainedConfig) -> tuple[str, ...]:
    """Returns the projections for which the family's folders have tensors."""
    matrices = adapted(hf_config)
    return tuple(name for name in PROJECTIONS if any(name in matrix.projections for matrix in matrices))
