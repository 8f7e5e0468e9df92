"""Training step and evaluation: megatron-core's schedule over packs, the scale of the loss, and sums for the log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_solopo.config import Config, MethodConfig
from megatron_solopo.data.tokenized.batches import Schedule
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.errors import Diverged
from megatron_solopo.losses.solopo import needs_log_squares, needs_mean_chosen_length
from megatron_solopo.model.forward import LogProbHead, segment_log_probs
from megatron_solopo.model.router import take_aux_loss
from megatron_solopo.pack import Pack
from megatron_solopo.parallel.device_pack import DevicePack
from megatron_solopo.training.ahead import Ahead
from megatron_solopo.training.engine import Engine, data_parallel, seed_pack, squared_gradient_norm, total_norm, update
from megatron_solopo.training.memory import PeakMemory
from megatron_solopo.training.objective import (
    StepInputs,
    group_losses,
    mean_chosen_length,
    mean_chosen_length_of,
    step_inputs,
)
from megatron_solopo.training.readings import gather_from_all_ranks
from megatron_solopo.training.segment_table import ReferenceLogProbs, SegmentPlaces
from megatron_solopo.training.step_work import StepWork, make_packs


@dataclass
class StepSums:
    """Sums over the groups of a step, of all ranks.

    Attributes:
        groups: number of groups in the step.
        values: name -> sum over groups.
        tokens: number of computed tokens, padding included.
        padding: number of computed tokens that belong to no group.
        not_finite: the examples whose loss is not finite, if the sum is not.
    """

    groups: int
    values: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    padding: int = 0
    not_finite: list[int] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        return {name: value / self.groups for name, value in self.values.items()}


Forward = Callable[[torch.nn.Module, DevicePack, LogProbHead, torch.dtype], Tensor]
"""(model, pack, head, dtype) -> what the last pipeline stage computes of a pack; see `segment_log_probs`."""


def run_packs(
    engine: Engine,
    packs: list[DevicePack],
    loss: Callable[[Tensor, Pack], tuple[Tensor, dict]],
    forward_only: bool,
    squares: bool = False,
    begin: Callable[[int, int], None] | None = None,
    forward: Forward | None = None,
) -> list[dict]:
    """Runs megatron-core's schedule; returns the dict that ``loss`` returned for each pack (last pipeline stage).

    Args:
        squares: see `segment_log_probs`.
        begin: is called before each forward pass, with the numbers of its pack and of its model chunk.
        forward: runs a pack; default: `segment_log_probs`.
    """
    forward = forward or partial(segment_log_probs, squares=squares)

    def forward_step(packs_left: Iterator[tuple[int, DevicePack]], model: torch.nn.Module):
        number, pack = next(packs_left)
        if begin is not None:
            begin(number, engine.chunks.index(cast(Any, model)))
        result = forward(model, pack, engine.head, engine.dtype)
        return result, lambda output: loss(output, pack.pack)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(enumerate(packs)) for _ in engine.chunks],  # every chunk computes every pack
        model=list[torch.nn.Module](engine.chunks),
        num_microbatches=len(packs),
        seq_length=1,  # the lengths are in the packs
        micro_batch_size=1,
        forward_only=forward_only,
    )


@dataclass(frozen=True)
class StepParts:
    """One rank's part of a step's sums, before the ranks exchange them.

    Attributes:
        groups: number of groups in the step, of all ranks.
        scalars: name -> [] on the device; the result is the sum over ranks.
        numbers: name -> number on the host; the result is the sum over ranks.
        losses: (examples, their losses) of each pack.
    """

    groups: int
    scalars: dict[str, Tensor]
    numbers: dict[str, float]
    losses: list[tuple[Sequence[int], Tensor]]

    def sums(self, of_ranks: Mapping[str, Sequence[float]]) -> StepSums:
        """Returns the sums over all ranks from `gather_from_all_ranks`; collective where the loss is not finite."""
        values = {name: sum(of_ranks[name]) for name in self.scalars}
        tokens, padding = (int(sum(of_ranks[name])) for name in ("tokens", "padding"))
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
    """Calls `run_parts` and returns the sums of all ranks; collective."""
    inputs = step_inputs([pack.pack for pack in packs], reference, method, engine.platform.device)
    parts = run_parts(engine, packs, inputs, total_groups, method, forward_only, tokens_per_group)
    return parts.sums(gather_from_all_ranks(parts.scalars, parts.numbers, engine.platform.device))


def run_parts(
    engine: Engine,
    packs: list[DevicePack],
    inputs: StepInputs,
    total_groups: int,
    method: MethodConfig,
    forward_only: bool = False,
    tokens_per_group: Tensor | None = None,
    begin: Callable[[int, int], None] | None = None,
) -> StepParts:
    """Runs forward (and backward) of one step; afterwards the gradients are in the model's buffers.

    Every group has the weight 1 / total_groups however it was packed: the schedule divides by the number of packs and
    DDP by the number of data-parallel ranks, and the loss is multiplied by both.

    Args:
        inputs: loss inputs of the same packs.
        tokens_per_group: [] mean chosen length where the means are over more than this step, see
            `mean_chosen_length_of`; default: that of the step.
        begin: see `run_packs`.
    """
    _, ranks = data_parallel()
    scale = len(packs) * ranks / total_groups
    device = engine.platform.device
    each: list[tuple[Sequence[int], Tensor]] = []
    length = tokens_per_group
    if length is None and needs_mean_chosen_length(method):
        length = mean_chosen_length(inputs, total_groups, device)

    of_pack = {id(pack.pack): one for pack, one in zip(packs, inputs.packs, strict=True)}

    def loss(output: Tensor, pack: Pack) -> tuple[Tensor, dict]:
        result = group_losses(output, of_pack[id(pack)], method, length)
        each.append((pack.groups, result.loss.detach()))
        total = result.loss.sum()
        # The schedule scales the loss in place, so the log keeps a copy.
        sums = {"loss": total.detach().clone()} | {name: value.sum() for name, value in result.metrics.items()}
        return total * scale, sums

    parts = run_packs(engine, packs, loss, forward_only, needs_log_squares(method), begin)
    reports = _reports()
    zero = torch.zeros((), dtype=torch.float64, device=device)
    scalars = {name: sum((part[name].double() for part in parts if reports), zero) for name in inputs.names}
    settings = engine.models[0].config
    if settings.num_moe_experts and settings.moe_aux_loss_coeff and not forward_only:
        # Each layer of each part of each pack is on one rank; the mean is over all layers with experts and packs.
        aux_loss, kinds = sum(take_aux_loss(model) for model in engine.models), settings.moe_layer_freq
        layers = sum(kinds) if isinstance(kinds, list) else settings.num_layers
        scalars["moe_aux_loss"] = (zero + aux_loss) * (total_groups / (layers * len(packs) * ranks))
    numbers: dict[str, float] = {
        "tokens": reports * sum(pack.tokens for pack in packs),
        "padding": reports * sum(pack.pack.padding for pack in packs),
    }
    return StepParts(total_groups, scalars, numbers, each)


def _reports() -> bool:
    """Whether this rank, of those that share a model replica, has the losses and counts the packs."""
    others = parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank()
    return parallel_state.is_pipeline_last_stage() and not others


def _not_finite(each: list[tuple[Sequence[int], Tensor]]) -> list[int]:
    """Returns the examples whose loss is not finite, from the (examples, losses) of every rank; collective."""
    examples = {
        i for groups, losses in each for i, loss in zip(groups, losses.tolist(), strict=True) if not math.isfinite(loss)
    }
    of_ranks: list[set[int]] = [set()] * dist.get_world_size()
    dist.all_gather_object(of_ranks, examples)
    return sorted(set().union(*of_ranks))


def reduce_to_all_ranks(sums: Tensor) -> Tensor:
    """Adds the last pipeline stage's sums over data-parallel ranks; returns the result on every rank."""
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        group = cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())
        dist.broadcast(sums, last, group=group)
    return sums


def local_segment_sums(engine: Engine, places: SegmentPlaces, packs: list[DevicePack]) -> tuple[Tensor, Tensor]:
    """Computes the log-prob sums of this rank's packs, without communication between data-parallel ranks.

    Returns:
        [K] int64 places in a table and [K] float64 sums, on the CPU; K is 0 except on the last pipeline stage.
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
    """Returns [T] float64 log-prob sums of the packs of all ranks, on every rank; 0 for segments of no pack."""
    table = torch.zeros(places.size, dtype=torch.float64)
    at, sums = local_segment_sums(engine, places, packs)
    table[at] = sums
    return reduce_to_all_ranks(table.to(engine.platform.device)).cpu()


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
    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    counted: Callable[[Sequence[float]], AbstractContextManager[None]] = lambda loads: nullcontext(),
) -> tuple[dict[str, Any], int]:
    """Runs one optimizer step; returns its line of the log, and the largest ``stop`` of all ranks.

    The ranks exchange everything that the host needs in one collective, between backward and the optimizer, where the
    host reads the device once. So the line's memory is the peak until then, and on CUDA the optimizer's time, which
    nothing waits for, is part of the next step's seconds.

    Args:
        work: work of all steps, see `training_work`.
        memory: peak memory of the run.
        stop: returns a number above 0 where this rank requests the run to stop, see `StopRequests.on_this_rank`.
        phase: names a part of the step in profiles, see `Profiler.phase`.
        counted: times the passes of the step, given the loads of the data-parallel ranks, see `RankTimes.counted`.

    Raises:
        Diverged: the loss or the gradient is not finite and --on-nonfinite is stop; the weights are unchanged.
    """
    start = time.perf_counter()
    with phase("data"):
        current = work.take(step)
    waited = time.perf_counter() - start
    inputs = current.inputs
    if current.score is not None:
        with phase("reference"):
            inputs = current.score()
    engine.zero_gradients()
    optimizer.zero_grad()
    begin = partial(seed_pack, config.training.seed, step) if config.model.lora_dropout else None
    with counted(current.plan.loads):
        parts = run_parts(engine, current.packs, inputs, len(current.indices), config.method, begin=begin)
    allocated = engine.platform.peak_allocated_gib()
    of_ranks = gather_from_all_ranks(
        parts.scalars | {"squared_norm": squared_gradient_norm(optimizer)},
        parts.numbers
        | {"stop": stop(), "memory": memory.on_this_rank(), "allocated": allocated or 0.0, "waited": waited},
        engine.platform.device,
    )
    longest_wait = max(of_ranks["waited"])
    sums, grad_norm = parts.sums(of_ranks), total_norm(of_ranks["squared_norm"])
    agreed = int(max(of_ranks["stop"]))
    scheduler.step(1)  # before the optimizer, see build_optimizer; a skipped step counts too
    problem = _divergence(sums, grad_norm, dataset, current.indices)
    if problem and config.training.on_nonfinite == "stop":
        remedy = "lower --lr, check these examples, or --on-nonfinite skip"
        raise Diverged(problem.code, f"step {step + 1}: {problem}; {remedy}")
    if problem:
        skipped = problem.message
        return {"step": step + 1, "split": "train", "skipped": skipped, "loss": None, "groups": sums.groups}, agreed
    with phase("optimizer"):
        update(optimizer, grad_norm)
    seconds = time.perf_counter() - start
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
        "compute_imbalance": round(current.plan.imbalance, 6),
        "memory_gib": round(max(of_ranks["memory"]), 3),
        **({} if allocated is None else {"memory_allocated_gib": round(max(of_ranks["allocated"]), 3)}),
        "seconds": round(seconds, 4),
        "data_seconds": round(longest_wait, 4),
        "data_rank": of_ranks["waited"].index(longest_wait),
    }
    return line, agreed


def _divergence(sums: StepSums, grad_norm: float, dataset: TokenDataset, indices: Sequence[int]) -> Diverged | None:
    """Returns what is not finite in this step, and in which examples; None where everything is finite."""

    def names(examples: Sequence[int]) -> str:
        return ", ".join(dataset.groups[i].id for i in examples[:8]) + (", ..." if len(examples) > 8 else "")

    if not math.isfinite(sums.values["loss"]):
        examples = names(sums.not_finite or indices)
        return Diverged("loss-not-finite", f"the loss is not finite for the examples {examples}")
    if not math.isfinite(grad_norm):
        return Diverged("gradient-not-finite", f"the gradient is not finite for one of the examples {names(indices)}")
    return None


def evaluate(
    engine: Engine,
    dataset: TokenDataset,
    config: Config,
    reference: ReferenceLogProbs | None,
    must_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Returns the means of the loss and its metrics over all validation examples, and their number, ``groups``.

    Args:
        must_stop: called before each batch; where it returns True, the same on every rank, the result is None.
    """
    engine.eval()
    length = mean_chosen_length_of(dataset, config.method, engine.platform.device)
    totals: dict[str, float] = {}
    examples, batch = len(dataset.groups), config.training.global_batch_size
    batches = [range(first, min(first + batch, examples)) for first in range(0, examples, batch)]

    def work(number: int) -> list[DevicePack]:
        return make_packs(engine, dataset, batches[number], config)

    with torch.no_grad(), Ahead(work, len(batches), engine.platform.device) as ahead:
        for number, indices in enumerate(batches):
            if must_stop():
                engine.train()
                return None
            sums = run_step(engine, ahead.take(number), len(indices), config.method, reference, True, length)
            for name, value in sums.values.items():
                totals[name] = totals.get(name, 0.0) + value
    engine.train()
    return {name: value / examples for name, value in totals.items()} | {"groups": examples}
