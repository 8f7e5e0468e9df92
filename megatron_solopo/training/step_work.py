"""The work of a training step: its plan, this rank's packs on the device, and the inputs of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import Schedule, StepPlan, plan_step
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.losses.solopo import tail_weight
from megatron_solopo.model.cost import width_of_cost, windows_of
from megatron_solopo.model.forward import device_pack
from megatron_solopo.pack import Pack
from megatron_solopo.parallel.device_pack import DevicePack
from megatron_solopo.training.ahead import Ahead
from megatron_solopo.training.engine import Engine, data_parallel
from megatron_solopo.training.objective import StepInputs, step_inputs
from megatron_solopo.training.segment_table import ReferenceLogProbs


@dataclass(frozen=True)
class StepWork:
    """The work of a rank in a step: the examples of all ranks, their plan, this rank's packs, and the loss inputs.

    Attributes:
        score: returns the loss inputs with log-probs that the step computes itself, see resident.py; collective.
    """

    indices: Sequence[int]
    plan: StepPlan
    packs: list[DevicePack]
    inputs: StepInputs
    score: Callable[[], StepInputs] | None = None


def step_work(
    engine: Engine,
    dataset: TokenDataset,
    indices: Sequence[int],
    config: Config,
    reference: ReferenceLogProbs | None,
    epochs: Sequence[int] | None = None,
) -> StepWork:
    """Makes the work of a training step on the examples ``indices``; see `planned_packs` for ``epochs``."""
    plan, packs = _planned(engine, dataset, indices, config, epochs)
    inputs = step_inputs([pack.pack for pack in packs], reference, config.method, engine.platform.device)
    return StepWork(indices, plan, packs, inputs)


def _planned(
    engine: Engine,
    dataset: TokenDataset,
    indices: Sequence[int],
    config: Config,
    epochs: Sequence[int] | None = None,
) -> tuple[StepPlan, list[DevicePack]]:
    """Returns the plan of the examples ``indices``, and `planned_packs` of it."""
    _, ranks = data_parallel()
    groups = [dataset.groups[i] for i in indices]
    width, windows = width_of_cost(engine.hf_config), windows_of(engine.hf_config)
    plan = plan_step(groups, width, ranks, config, engine.platform.name, windows)
    return plan, planned_packs(engine, dataset, plan, indices, config, epochs)


def planned_packs(
    engine: Engine,
    dataset: TokenDataset,
    plan: StepPlan,
    indices: Sequence[int],
    config: Config,
    epochs: Sequence[int] | None = None,
) -> list[DevicePack]:
    """Returns this rank's packs of the examples ``indices``, on its device.

    Every rank has the same number of packs; ranks that share a model replica get the same packs, each its part.

    Args:
        epochs: that of each example, which decides its positions where they are stretched; default: the first.
    """
    rank, _ = data_parallel()
    of_examples = epochs or [0] * len(indices)
    packs = [
        build_pack(
            [dataset.of_epoch(indices[place], of_examples[place]) for place in places],
            [indices[place] for place in places],
            config.data.share_prompts,
            plan.of_packs,
            plan.of_pieces,
            plan.of_prompts,
            tail_weight(config.method),
        )
        for places in plan.shares[rank]
    ]
    return sent(engine, packs)


def sent(engine: Engine, packs: Sequence[Pack]) -> list[DevicePack]:
    """Returns this rank's parts of packs, on its device."""
    return [device_pack(pack, engine.models[0].config, engine.platform.device) for pack in packs]


def make_packs(engine: Engine, dataset: TokenDataset, indices: Sequence[int], config: Config) -> list[DevicePack]:
    """Returns this rank's packs of the examples ``indices``."""
    return _planned(engine, dataset, indices, config)[1]


def training_work(
    engine: Engine,
    dataset: TokenDataset,
    schedule: Schedule,
    config: Config,
    reference: ReferenceLogProbs | None,
) -> Ahead[StepWork]:
    """Returns the work of the training steps, which are numbered from 0."""
    return Ahead(
        lambda step: step_work(engine, dataset, schedule.step(step), config, reference, schedule.epochs(step)),
        schedule.steps,
        engine.platform.device,
    )
