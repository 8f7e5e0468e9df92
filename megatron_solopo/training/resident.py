"""--reference resident: the reference's weights on the host, in the model's place while they score a step's groups.

For data that no cache can hold, since it streams or changes with every epoch. A step first scores its groups with the
reference, by the packs that it then trains on, so the log-probs are those of the cache bit for bit where the cache was
filled by the same packs.

Each rank keeps on the host the part of the reference that the distributed optimizer gives it of the policy: 1 / (data x
context parallel ranks) of its weights. It exchanges the two parts in place, by copies of bits, and the ranks gather the
weights as they do after an optimizer step. The optimizer's own state is not touched. A step moves four times a rank's
part over the bus (two exchanges, each in both directions) and gathers the weights once more, twice without
--overlap-param-gather.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import Schedule
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.losses.solopo import policy_scores, reference_context, reference_scores
from megatron_solopo.pack import Context, Pack
from megatron_solopo.parallel.device_pack import DevicePack, on_device
from megatron_solopo.training.ahead import Ahead
from megatron_solopo.training.engine import Engine
from megatron_solopo.training.objective import StepInputs
from megatron_solopo.training.segment_table import rows_compared
from megatron_solopo.training.step import run_packs
from megatron_solopo.training.step_work import StepWork, planned_packs, step_work

PIECE = 2**26
"""Bytes that are exchanged at a time: the size of the buffer on the device, and a power of two, to which torch rounds
each pinned block."""


class ResidentReference:
    """The reference's weights on the host, pinned where the model is on a GPU.

    Make it while the model has the starting weights. Collective methods are called by all ranks in one order.

    Args:
        dataset: the training examples with what the reference scores.
    """

    def __init__(self, engine: Engine, dataset: TokenDataset) -> None:
        self.engine, self.dataset = engine, dataset
        shards = [shard.detach() for shard in engine.own_parameters()]
        self._pieces = [piece for shard in shards for piece in shard.split(max(PIECE // shard.element_size(), 1))]
        self._host = [_copied_to_host(piece) for piece in self._pieces]

    @property
    def host_bytes(self) -> int:
        """Bytes of this rank's part of the reference."""
        return sum(piece.nbytes for piece in self._host)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model has the reference's weights, for forward passes without gradients; collective."""
        self._exchange()
        self.engine.own_parameters_changed()
        self.engine.eval()
        try:
            yield
        finally:
            self._exchange()
            self.engine.train()
            self.engine.own_parameters_changed()

    def _exchange(self) -> None:
        """Exchanges this rank's part of the model and of the host, bit for bit."""
        for here, there in zip(self._pieces, self._host, strict=True):
            before = here.clone()
            here.copy_(there, non_blocking=True)
            there.copy_(before, non_blocking=True)  # in the order of the stream, so behind the copy from it

    def log_probs(self, packs: list[DevicePack]) -> dict[int, Tensor]:
        """Returns id(pack.pack) -> [N] float64 log-probs of a pack's segments, on the device; nothing except on the
        last pipeline stage. Collective."""
        sums: dict[int, Tensor] = {}

        def keep(output: Tensor, pack: Pack) -> tuple[Tensor, dict]:
            sums[id(pack)] = output.detach().double()
            return output.sum(), {}

        with self.in_place(), torch.no_grad():
            run_packs(self.engine, packs, keep, forward_only=True)
        return sums


def _copied_to_host(piece: Tensor) -> Tensor:
    copy = torch.empty(piece.shape, dtype=piece.dtype, device="cpu", pin_memory=piece.device.type == "cuda")
    return copy.copy_(piece)


@dataclass(frozen=True)
class _Scored:
    """What `StepWork.score` computes: the loss inputs with the log-probs of the resident reference.

    Attributes:
        inputs: the step's loss inputs, without log-probs of a reference.
        packs: those of the reference, the same groups in each as in the step's.
        rows: [N] int64 of each pack, on the device: the reference's segment that a segment is compared with.
    """

    reference: ResidentReference
    inputs: StepInputs
    packs: list[DevicePack]
    rows: list[Tensor]

    def __call__(self) -> StepInputs:
        sums = self.reference.log_probs(self.packs)
        if not sums:
            return self.inputs
        compared = (sums[id(pack.pack)][rows] for pack, rows in zip(self.packs, self.rows, strict=True))
        each = [
            dataclasses.replace(one, compared=values) for one, values in zip(self.inputs.packs, compared, strict=True)
        ]
        return dataclasses.replace(self.inputs, packs=each)


def scored_work(
    reference: ResidentReference,
    dataset: TokenDataset,
    indices: list[int],
    config: Config,
    epochs: list[int] | None = None,
) -> StepWork:
    """Makes the work of a training step that first scores its examples with the resident reference."""
    engine, method = reference.engine, config.method
    work = step_work(engine, dataset, indices, config, None, epochs)
    packs = work.packs
    if reference_scores(method) != policy_scores(method):  # fewer or shorter sequences, which fit where the policy's do
        packs = planned_packs(engine, reference.dataset, work.plan, indices, config, epochs)
    return scored(reference, work, packs, config)


def scored(reference: ResidentReference, work: StepWork, packs: list[DevicePack], config: Config) -> StepWork:
    """Returns a step's work with the scoring of its examples by the resident reference before it.

    Args:
        packs: what the reference scores: for each of the work's packs one with the same examples.
    """
    engine, method = reference.engine, config.method
    contexts = [reference_context(context, method) for context in Context]
    rows = [
        on_device(rows_compared(pack.pack.scored, of.pack.scored, contexts), engine.platform.device)
        for pack, of in zip(work.packs, packs, strict=True)
    ]
    return dataclasses.replace(work, score=_Scored(reference, work.inputs, packs, rows))


def scored_training_work(
    reference: ResidentReference, dataset: TokenDataset, schedule: Schedule, config: Config
) -> Ahead[StepWork]:
    """Returns the work of the training steps, which are numbered from 0; see `step_work.training_work`."""
    return Ahead(
        lambda step: scored_work(reference, dataset, schedule.step(step), config, schedule.epochs(step)),
        schedule.steps,
        reference.engine.platform.device,
    )
