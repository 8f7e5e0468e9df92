"""A training step and an evaluation: megatron-core's schedule over packs, the loss's scale, and sums for the log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_solopo.config import Config, MethodConfig
from megatron_solopo.data.tokenized.batches import StepPlan, plan_step
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import TokenDataset
from megatron_solopo.errors import UserError
from megatron_solopo.losses.solopo import needs_tokens_per_group
from megatron_solopo.model.forward import segment_log_probs
from megatron_solopo.model.router import take_aux_loss
from megatron_solopo.pack import Pack
from megatron_solopo.parallel.platform import max_over_processes
from megatron_solopo.training.engine import Engine, data_parallel, gradients_are_finite
from megatron_solopo.training.objective import (
    group_losses,
    mean_chosen_length,
    mean_chosen_length_of,
    metric_names,
)


@dataclass
class StepSums:
    """Sums over the groups of a step, on every process after `reduce`.

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


def plan_of(engine: Engine, dataset: TokenDataset, indices: Sequence[int], config: Config) -> StepPlan:
    """The plan of the given examples over this run's data-parallel processes."""
    _, ranks = data_parallel()
    groups = [dataset.groups[i] for i in indices]
    return plan_step(groups, engine.hf_config.hidden_size, ranks, config, engine.platform.name)


def make_packs(
    engine: Engine, dataset: TokenDataset, indices: Sequence[int], config: Config, plan: StepPlan | None = None
) -> list[Pack]:
    """This process's packs of a step, in order; the same number on every process.

    Processes that share a model get the same packs; context parallelism cuts them later (model/forward.py).

    Args:
        plan: of the same examples, where it is known.
    """
    plan = plan or plan_of(engine, dataset, indices, config)
    rank, _ = data_parallel()
    chosen = ([indices[place] for place in share] for share in plan.shares[rank])
    return [
        build_pack(
            [dataset.groups[i] for i in some],
            some,
            config.data.share_prompts,
            plan.of_packs,
            plan.of_pieces,
            plan.of_prompts,
        ).to(engine.platform.device)
        for some in chosen
    ]


def run_packs(
    engine: Engine, packs: list[Pack], loss: Callable[[Tensor, Pack], tuple[Tensor, dict]], forward_only: bool
) -> list[dict]:
    """Runs megatron-core's schedule; returns what ``loss`` gave for each pack (last pipeline stage)."""

    def forward_step(packs_left: Iterator[Pack], model: torch.nn.Module):
        pack = next(packs_left)
        sums = segment_log_probs(model, pack, engine.head, engine.dtype)
        return sums, lambda output: loss(output, pack)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(packs) for _ in engine.chunks],  # every chunk computes every pack
        model=engine.chunks,
        num_microbatches=len(packs),
        seq_length=1,  # packs carry their own lengths
        micro_batch_size=1,
        forward_only=forward_only,
    )


def run_step(
    engine: Engine,
    packs: list[Pack],
    total_groups: int,
    method: MethodConfig,
    reference: Tensor | None,
    forward_only: bool = False,
    tokens_per_group: Tensor | None = None,
) -> StepSums:
    """Forward (and backward) of one step; gradients stand in the model's buffers afterwards.

    Every group weighs 1 / total_groups however it was packed: the schedule divides by the number of packs and DDP by
    the number of data-parallel processes, and the loss is multiplied by both.

    Args:
        tokens_per_group: [] the mean chosen length where the means are over more than this step, see
            `mean_chosen_length_of`; default: that of the step.
    """
    _, ranks = data_parallel()
    scale = len(packs) * ranks / total_groups
    each: list[tuple[Sequence[int], Tensor]] = []
    length = tokens_per_group
    if length is None and needs_tokens_per_group(method):
        length = mean_chosen_length(packs, total_groups, method, engine.platform.device)

    def loss(output: Tensor, pack: Pack) -> tuple[Tensor, dict]:
        result = group_losses(output, pack, reference, method, length)
        each.append((pack.groups, result.loss.detach()))
        total = result.loss.sum()
        # The schedule scales the loss in place, so the log keeps a copy.
        sums = {"loss": total.detach().clone()} | {name: value.sum() for name, value in result.metrics.items()}
        return total * scale, sums

    parts = run_packs(engine, packs, loss, forward_only)
    names = metric_names(method)
    on_last = parallel_state.is_pipeline_last_stage()
    totals = [sum(part[name].double() for part in parts) if on_last else 0.0 for name in names]
    counts = [sum(pack.tokens.numel() for pack in packs), sum(pack.padding for pack in packs)]
    flat = torch.tensor([*totals, *counts], dtype=torch.float64, device=engine.platform.device)
    *values, tokens, padding = over_the_layout(flat).tolist()
    summed = dict(zip(names, values, strict=True))
    settings = engine.models[0].config
    if settings.num_moe_experts and settings.moe_aux_loss_coeff and not forward_only:
        summed["moe_aux_loss"] = moe_aux_loss(engine, len(packs)) * total_groups
    named = [] if math.isfinite(values[0]) else _not_finite(each)
    return StepSums(total_groups, summed, int(tokens), int(padding), named)


def moe_aux_loss(engine: Engine, packs: int) -> float:
    """What balances the experts, without its coefficient: the mean over layers and all processes' packs; collective."""
    _, ranks = data_parallel()
    own = sum(take_aux_loss(model) for model in engine.models)
    total = torch.zeros((), dtype=torch.float64, device=engine.platform.device) + own
    dist.all_reduce(total)  # each layer of each part of each pack is on one process
    return total.item() / (engine.models[0].config.num_layers * packs * ranks)


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
        dist.broadcast(sums, last, group=parallel_state.get_pipeline_model_parallel_group())
    return sums


def own_segment_table(engine: Engine, names: tuple[str, ...], indices: Sequence[int], packs: list[Pack]) -> Tensor:
    """[len(indices), len(names)] float64 log-prob sums: rows of this process's packs filled (on the last pipeline
    stage), the others 0. No communication between data-parallel processes."""
    table = torch.zeros(len(indices), len(names), dtype=torch.float64, device=engine.platform.device)
    row_of = {index: row for row, index in enumerate(indices)}

    def keep(output: Tensor, pack: Pack) -> tuple[Tensor, dict]:
        rows = torch.tensor([row_of[index] for index in pack.groups], dtype=torch.int64, device=table.device)
        for column, role in enumerate(names):
            table[rows, column] = output[pack.role(role)].double()
        return output.sum(), {}

    with torch.no_grad():
        run_packs(engine, packs, keep, forward_only=True)
    return table


def segment_table(engine: Engine, names: tuple[str, ...], indices: Sequence[int], packs: list[Pack]) -> Tensor:
    """[len(indices), len(names)] float64 log-prob sums of the given examples, on every process."""
    return over_the_layout(own_segment_table(engine, names, indices, packs))


def train_step(
    engine: Any,
    optimizer: Any,
    scheduler: Any,
    dataset: Any,
    schedule: Any,
    step: int,
    config: Config,
    reference: Any,
    memory: Any,
) -> dict[str, Any]:
    """One optimizer step; returns its line of the log.

    Args:
        memory: the `PeakMemory` of the run.

    Raises:
        UserError: the loss or the gradient is not finite and --on-nonfinite is stop; the weights are still good.
    """
    begin = time.perf_counter()
    indices = schedule.step(step)
    engine.zero_gradients()
    optimizer.zero_grad()
    plan = plan_of(engine, dataset, indices, config)
    packs = make_packs(engine, dataset, indices, config, plan)
    sums = run_step(engine, packs, len(indices), config.method, reference)
    means = sums.means()
    scheduler.step(1)  # before the optimizer, see build_optimizer; a skipped step counts too
    problem = _why_not_finite(sums, dataset, indices, engine)
    if problem and config.training.on_nonfinite == "stop":
        raise UserError(f"step {step + 1}: {problem}; lower --lr, look at these examples, or --on-nonfinite skip")
    if problem:
        return {"step": step + 1, "split": "train", "skipped": problem, "loss": None, "groups": sums.groups}
    _, grad_norm, _ = optimizer.step()
    engine.platform.synchronize()
    seconds = time.perf_counter() - begin
    allocated = engine.platform.peak_allocated_gib()
    clip = config.training.clip_grad
    return {
        "step": step + 1,
        "split": "train",
        "epoch": round(min((step + 1) * schedule.global_batch_size, schedule.total) / schedule.examples, 4),
        **means,
        "grad_norm": float(grad_norm),
        **({"clip_grad": clip, "clipped": int(grad_norm > clip)} if clip else {}),
        "lr": optimizer.param_groups[0]["lr"],
        "groups": sums.groups,
        "tokens": sums.tokens,
        "tokens_per_second": round(sums.tokens / seconds, 1),
        "padding_share": sums.padding / max(sums.tokens, 1),
        "compute_imbalance": round(plan.imbalance, 6),
        "memory_gib": round(memory.of(), 3),
        **(
            {}
            if allocated is None
            else {"memory_allocated_gib": round(max_over_processes(allocated, engine.platform.device), 3)}
        ),
        "seconds": round(seconds, 4),
    }


def _why_not_finite(sums: Any, dataset: Any, indices: list[int], engine: Any) -> str | None:
    """What is not finite in this step, and in which examples; None where all is well. Collective."""

    def names(some: list[int]) -> str:
        return ", ".join(dataset.groups[i].id for i in some[:8]) + (", ..." if len(some) > 8 else "")

    if not math.isfinite(sums.values["loss"]):
        return f"the loss is not finite for the examples {names(sums.not_finite or indices)}"
    if not gradients_are_finite(engine):
        return f"the gradient is not finite for one of the examples {names(indices)}"
    return None


def evaluate(engine: Any, dataset: Any, config: Config, reference: Any) -> dict[str, float]:
    """Means of the loss and its metrics over all validation examples, and their number, ``groups``."""
    engine.eval()
    length = mean_chosen_length_of(dataset, config.method, engine.platform.device)
    totals: dict[str, float] = {}
    batch = config.training.global_batch_size
    with torch.no_grad():
        for first in range(0, len(dataset.groups), batch):
            indices = range(first, min(first + batch, len(dataset.groups)))
            packs = make_packs(engine, dataset, indices, config)
            for name, value in run_step(
                engine, packs, len(indices), config.method, reference, forward_only=True, tokens_per_group=length
            ).values.items():
                totals[name] = totals.get(name, 0.0) + value
    engine.train()
    return {name: value / len(dataset.groups) for name, value in totals.items()} | {"groups": len(dataset.groups)}
