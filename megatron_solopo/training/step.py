"""A training step and an evaluation: megatron-core's schedule over packs, the loss's scale, and sums for the log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_solopo.config import Config, MethodConfig
from megatron_solopo.data.tokenized.batches import Schedule, StepPlan, plan_step
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.errors import Diverged
from megatron_solopo.losses.solopo import needs_mean_chosen_length
from megatron_solopo.model.forward import device_pack, segment_log_probs
from megatron_solopo.model.router import take_aux_loss
from megatron_solopo.pack import Pack
from megatron_solopo.parallel.device_pack import DevicePack
from megatron_solopo.training.ahead import Ahead
from megatron_solopo.training.engine import Engine, data_parallel, squared_gradient_norm, update, whole_norm
from megatron_solopo.training.memory import PeakMemory
from megatron_solopo.training.objective import (
    StepInputs,
    group_losses,
    mean_chosen_length,
    mean_chosen_length_of,
    step_inputs,
)
from megatron_solopo.training.readings import of_all_processes
from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces


@dataclass
class StepSums:
    """Sums over the groups of a step, of all processes.

    Attributes:
        groups: groups in the step.
        values: name -> sum over groups.
        tokens: tokens computed, padding included.
        padding: those of them that belong to no group.
        not_finite: the examples whose loss is not finite, where the sum is not.
    """

    groups: int
    values: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    padding: int = 0
    not_finite: list[int] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        return {name: value / self.groups for name, value in self.values.items()}


@dataclass(frozen=True)
class StepWork:
    """What a process computes in a step: the examples of all processes, their plan, its own packs, and what the loss
    reads of them."""

    indices: Sequence[int]
    plan: StepPlan
    packs: list[DevicePack]
    inputs: StepInputs


def step_work(
    engine: Engine,
    dataset: TokenDataset,
    indices: Sequence[int],
    config: Config,
    reference: ReferenceLogProbs | None,
) -> StepWork:
    """The work of a training step on the given examples."""
    plan, packs = _planned(engine, dataset, indices, config)
    inputs = step_inputs([pack.pack for pack in packs], reference, config.method, engine.platform.device)
    return StepWork(indices, plan, packs, inputs)


def _planned(
    engine: Engine, dataset: TokenDataset, indices: Sequence[int], config: Config
) -> tuple[StepPlan, list[DevicePack]]:
    """The packs of the given examples over this run's data-parallel processes, on their devices.

    As many packs on every process; processes that share a model get the same ones, each its part of them.
    """
    rank, ranks = data_parallel()
    groups = [dataset.groups[i] for i in indices]
    plan = plan_step(groups, engine.hf_config.hidden_size, ranks, config, engine.platform.name)
    packs = [
        build_pack(
            [groups[place] for place in places],
            [indices[place] for place in places],
            config.data.share_prompts,
            plan.of_packs,
            plan.of_pieces,
            plan.of_prompts,
        )
        for places in plan.shares[rank]
    ]
    return plan, sent(engine, packs)


def sent(engine: Engine, packs: Sequence[Pack]) -> list[DevicePack]:
    """This process's parts of packs, on its device."""
    return [device_pack(pack, engine.models[0].config, engine.platform.device) for pack in packs]


def make_packs(engine: Engine, dataset: TokenDataset, indices: Sequence[int], config: Config) -> list[DevicePack]:
    """This process's packs of the given examples."""
    return _planned(engine, dataset, indices, config)[1]


def training_work(
    engine: Engine,
    dataset: TokenDataset,
    schedule: Schedule,
    config: Config,
    reference: ReferenceLogProbs | None,
) -> Ahead[StepWork]:
    """The work of each training step, by its number from 0."""
    return Ahead(
        lambda step: step_work(engine, dataset, schedule.step(step), config, reference),
        schedule.steps,
        engine.platform.device,
    )


def run_packs(
    engine: Engine, packs: list[DevicePack], loss: Callable[[Tensor, Pack], tuple[Tensor, dict]], forward_only: bool
) -> list[dict]:
    """Runs megatron-core's schedule; returns what ``loss`` gave for each pack (last pipeline stage)."""

    def forward_step(packs_left: Iterator[DevicePack], model: torch.nn.Module):
        pack = next(packs_left)
        sums = segment_log_probs(model, pack, engine.head, engine.dtype)
        return sums, lambda output: loss(output, pack.pack)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(packs) for _ in engine.chunks],  # every chunk computes every pack
        model=list[torch.nn.Module](engine.chunks),
        num_microbatches=len(packs),
        seq_length=1,  # packs carry their own lengths
        micro_batch_size=1,
        forward_only=forward_only,
    )


@dataclass(frozen=True)
class StepParts:
    """What one process has of a step before the processes exchange it.

    Attributes:
        groups: groups in the step, of all processes.
        scalars: name -> [] on the device, what the processes' values add up to.
        numbers: the same of numbers that the host knows.
        losses: (examples, their losses) of each pack.
    """

    groups: int
    scalars: dict[str, Tensor]
    numbers: dict[str, float]
    losses: list[tuple[Sequence[int], Tensor]]

    def sums(self, everyone: Mapping[str, Sequence[float]]) -> StepSums:
        """Of all processes, from `of_all_processes`; collective where the loss is not finite."""
        values = {name: sum(everyone[name]) for name in self.scalars}
        tokens, padding = (int(sum(everyone[name])) for name in ("tokens", "padding"))
        named = [] if math.isfinite(values["loss"]) else _not_finite(self.losses)
        return StepSums(self.groups, values, tokens, padding, named)


def run_step(
    engine: Engine,
    packs: list[DevicePack],
    total_groups: int,
    method: MethodConfig,
    reference: ReferenceLogProbs | None,
    forward_only: bool = False,
    tokens_per_group: Tensor | None = None,
) -> StepSums:
    """`run_parts`, and the sums of all processes; collective."""
    inputs = step_inputs([pack.pack for pack in packs], reference, method, engine.platform.device)
    parts = run_parts(engine, packs, inputs, total_groups, method, forward_only, tokens_per_group)
    return parts.sums(of_all_processes(parts.scalars, parts.numbers, engine.platform.device))


def run_parts(
    engine: Engine,
    packs: list[DevicePack],
    inputs: StepInputs,
    total_groups: int,
    method: MethodConfig,
    forward_only: bool = False,
    tokens_per_group: Tensor | None = None,
) -> StepParts:
    """Forward (and backward) of one step; gradients stand in the model's buffers afterwards.

    Every group weighs 1 / total_groups however it was packed: the schedule divides by the number of packs and DDP by
    the number of data-parallel processes, and the loss is multiplied by both.

    Args:
        inputs: of the same packs.
        tokens_per_group: [] the mean chosen length where the means are over more than this step, see
            `mean_chosen_length_of`; default: that of the step.
    """
    _, ranks = data_parallel()
    scale = len(packs) * ranks / total_groups
    device = engine.platform.device
    each: list[tuple[Sequence[int], Tensor]] = []
    length = tokens_per_group
    if length is None and needs_mean_chosen_length(method):
        length = mean_chosen_length([pack.pack for pack in packs], total_groups, method, device)

    of_pack = {id(pack.pack): one for pack, one in zip(packs, inputs.packs, strict=True)}

    def loss(output: Tensor, pack: Pack) -> tuple[Tensor, dict]:
        result = group_losses(output, of_pack[id(pack)], method, length)
        each.append((pack.groups, result.loss.detach()))
        total = result.loss.sum()
        # The schedule scales the loss in place, so the log keeps a copy.
        sums = {"loss": total.detach().clone()} | {name: value.sum() for name, value in result.metrics.items()}
        return total * scale, sums

    parts = run_packs(engine, packs, loss, forward_only)
    reports = _reports()
    zero = torch.zeros((), dtype=torch.float64, device=device)
    scalars = {name: sum((part[name].double() for part in parts if reports), zero) for name in inputs.names}
    settings = engine.models[0].config
    if settings.num_moe_experts and settings.moe_aux_loss_coeff and not forward_only:
        # Each layer of each part of each pack is on one process; the mean is over all layers and packs.
        own = sum(take_aux_loss(model) for model in engine.models)
        scalars["moe_aux_loss"] = (zero + own) * (total_groups / (settings.num_layers * len(packs) * ranks))
    numbers: dict[str, float] = {
        "tokens": reports * sum(pack.tokens for pack in packs),
        "padding": reports * sum(pack.pack.padding for pack in packs),
    }
    return StepParts(total_groups, scalars, numbers, each)


def _reports() -> bool:
    """Whether this process, of those that share a model, has the losses and counts its packs."""
    others = parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank()
    return parallel_state.is_pipeline_last_stage() and not others


def _not_finite(each: list[tuple[Sequence[int], Tensor]]) -> list[int]:
    """The examples whose loss is not finite, from the (examples, losses) of every process; collective."""
    own = {
        i for groups, losses in each for i, loss in zip(groups, losses.tolist(), strict=True) if not math.isfinite(loss)
    }
    everyone: list[set[int]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return sorted(set().union(*everyone))


def over_the_layout(sums: Tensor) -> Tensor:
    """The last pipeline stage's sums, added over data-parallel processes, on every process."""
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        group = cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())
        dist.broadcast(sums, last, group=group)
    return sums


def own_segment_table(engine: Engine, places: SegmentPlaces, packs: list[DevicePack]) -> tuple[Tensor, Tensor]:
    """The log-prob sums of this process's packs. No communication between data-parallel processes.

    Returns:
        [K] int64 places in a table and [K] float64 sums, on the CPU; K is 0 but on the last pipeline stage.
    """
    at: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    sums: list[Tensor] = [torch.zeros(0, dtype=torch.float64, device=engine.platform.device)]

    def keep(output: Tensor, pack: Pack) -> tuple[Tensor, dict]:
        at.append(places.of_pack(pack))
        sums.append(output.detach().double())
        return output.sum(), {}

    with torch.no_grad():
        run_packs(engine, packs, keep, forward_only=True)
    return torch.cat(at), torch.cat(sums).cpu()


def segment_table(engine: Engine, places: SegmentPlaces, packs: list[DevicePack]) -> Tensor:
    """[T] float64 log-prob sums of the packs of all processes, on every process; 0 for segments that are in none."""
    table = torch.zeros(places.size, dtype=torch.float64)
    at, sums = own_segment_table(engine, places, packs)
    table[at] = sums
    return over_the_layout(table.to(engine.platform.device)).cpu()


def train_step(
    engine: Engine,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    dataset: TokenDataset,
    schedule: Schedule,
    work: Ahead[StepWork],
    step: int,
    config: Config,
    memory: PeakMemory,
    stop: Callable[[], int] = lambda: 0,
) -> tuple[dict[str, Any], int]:
    """One optimizer step; returns its line of the log, and the largest ``stop`` of all processes.

    The processes exchange all that the host decides by in one collective, between backward and the optimizer, and the
    host reads the device there and nowhere else. So the memory of the line is the peak up to there, and on CUDA the
    optimizer's time, which nothing waits for, is in the seconds of the step behind it.

    Args:
        work: of all steps, see `training_work`.
        memory: of the run.
        stop: asked for a number above 0 where this process wants the run to stop, see `StopRequests.own`.

    Raises:
        Diverged: the loss or the gradient is not finite and --on-nonfinite is stop; the weights are still good.
    """
    begin = time.perf_counter()
    own = work.take(step)
    engine.zero_gradients()
    optimizer.zero_grad()
    parts = run_parts(engine, own.packs, own.inputs, len(own.indices), config.method)
    allocated = engine.platform.peak_allocated_gib()
    everyone = of_all_processes(
        parts.scalars | {"squared_norm": squared_gradient_norm(optimizer)},
        parts.numbers | {"stop": stop(), "memory": memory.own(), "allocated": allocated or 0.0},
        engine.platform.device,
    )
    sums, grad_norm = parts.sums(everyone), whole_norm(everyone["squared_norm"])
    agreed = int(max(everyone["stop"]))
    scheduler.step(1)  # before the optimizer, see build_optimizer; a skipped step counts too
    problem = _why_not_finite(sums, grad_norm, dataset, own.indices)
    if problem and config.training.on_nonfinite == "stop":
        raise Diverged(f"step {step + 1}: {problem}; lower --lr, look at these examples, or --on-nonfinite skip")
    if problem:
        return {"step": step + 1, "split": "train", "skipped": problem, "loss": None, "groups": sums.groups}, agreed
    update(optimizer, grad_norm)
    seconds = time.perf_counter() - begin
    clip = config.training.clip_grad
    line = {
        "step": step + 1,
        "split": "train",
        "epoch": round(min((step + 1) * schedule.global_batch_size, schedule.total) / schedule.examples, 4),
        **sums.means(),
        "grad_norm": grad_norm,
        **({"clip_grad": clip, "clipped": int(grad_norm > clip)} if clip else {}),
        "lr": optimizer.param_groups[0]["lr"],
        "groups": sums.groups,
        "tokens": sums.tokens,
        "tokens_per_second": round(sums.tokens / seconds, 1),
        "padding_share": sums.padding / max(sums.tokens, 1),
        "compute_imbalance": round(own.plan.imbalance, 6),
        "memory_gib": round(max(everyone["memory"]), 3),
        **({} if allocated is None else {"memory_allocated_gib": round(max(everyone["allocated"]), 3)}),
        "seconds": round(seconds, 4),
    }
    return line, agreed


def _why_not_finite(sums: StepSums, grad_norm: float, dataset: TokenDataset, indices: Sequence[int]) -> str | None:
    """What is not finite in this step, and in which examples; None where all is well."""

    def names(some: Sequence[int]) -> str:
        return ", ".join(dataset.groups[i].id for i in some[:8]) + (", ..." if len(some) > 8 else "")

    if not math.isfinite(sums.values["loss"]):
        return f"the loss is not finite for the examples {names(sums.not_finite or indices)}"
    if not math.isfinite(grad_norm):
        return f"the gradient is not finite for one of the examples {names(indices)}"
    return None


def evaluate(
    engine: Engine, dataset: TokenDataset, config: Config, reference: ReferenceLogProbs | None
) -> dict[str, float]:
    """Means of the loss and its metrics over all validation examples, and their number, ``groups``."""
    engine.eval()
    length = mean_chosen_length_of(dataset, config.method, engine.platform.device)
    totals: dict[str, float] = {}
    examples, batch = len(dataset.groups), config.training.global_batch_size
    batches = [range(first, min(first + batch, examples)) for first in range(0, examples, batch)]

    def work(number: int) -> list[DevicePack]:
        return make_packs(engine, dataset, batches[number], config)

    with torch.no_grad(), Ahead(work, len(batches), engine.platform.device) as ahead:
        for number, indices in enumerate(batches):
            sums = run_step(engine, ahead.take(number), len(indices), config.method, reference, True, length)
            for name, value in sums.values.items():
                totals[name] = totals.get(name, 0.0) + value
    engine.train()
    return {name: value / examples for name, value in totals.items()} | {"groups": examples}
