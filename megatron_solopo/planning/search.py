"""All layouts of a model on so many GPUs: refused by training's own checks, estimated, the best of them rehearsed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_solopo.config import Config, ParallelConfig
from megatron_solopo.config_checks import check, check_on_cuda
from megatron_solopo.errors import UserError
from megatron_solopo.model.hf_config import check_attention_on_cuda
from megatron_solopo.parallel import context
from megatron_solopo.parallel.topology import data_parallel_size, expert_count
from megatron_solopo.planning.candidate import Candidate, Request
from megatron_solopo.planning.choices import Choices
from megatron_solopo.planning.forecast import forecast
from megatron_solopo.planning.table import tasks_of
from megatron_solopo.planning.workers import Rehearsals, Task
from megatron_solopo.training.preflight import check_cut

MOST_GROUPS = 8
"""Largest --micro-batch-size that is tried."""

NEAREST = 4
"""Layouts that are rehearsed where none fits by its estimate."""


def layouts(request: Request) -> Iterator[ParallelConfig]:
    """Yields every layout of the GPUs whose tensor-parallel ranks are on one node; training may refuse it."""
    base, hf_config, gpus = request.config.parallel, request.hf_config, request.gpus
    layers, experts = hf_config.num_hidden_layers, expert_count(hf_config)

    def sizes(name: str, of: int, most: int) -> list[int]:
        if request.fixed(name):
            return [getattr(base, name)]
        return [size for size in range(1, min(of, most) + 1) if of % size == 0]

    for tensor in sizes("tensor_model_parallel_size", gpus, request.machine.gpus_per_node):
        sequence = base.sequence_parallel if request.fixed("sequence_parallel") else tensor > 1
        for stages in sizes("pipeline_model_parallel_size", max(1, gpus // tensor), layers):
            ends = _ends(request, stages)
            chunks = [1] if stages == 1 or layers % stages else _divisors(layers // stages)
            if request.fixed("num_virtual_stages_per_pipeline_rank"):
                chunks = [base.num_virtual_stages_per_pipeline_rank]
            for ranks in sizes("context_parallel_size", max(1, gpus // tensor // stages), gpus):
                methods = [base.cp_comm_type] if ranks == 1 or request.fixed("cp_comm_type") else context.choices()
                for expert_tensor, expert in _experts(request, gpus // stages, tensor, experts):
                    for method in methods:
                        for count in chunks:
                            yield dataclasses.replace(
                                base,
                                device="cuda",
                                tensor_model_parallel_size=tensor,
                                sequence_parallel=sequence,
                                pipeline_model_parallel_size=stages,
                                num_virtual_stages_per_pipeline_rank=count,
                                context_parallel_size=ranks,
                                cp_comm_type=method,
                                expert_model_parallel_size=expert,
                                expert_tensor_parallel_size=expert_tensor,
                                **ends,
                            )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _ends(request: Request, stages: int) -> dict[str, int]:
    """Returns fewer layers for the first and the last stage, which have the vocabulary, where stages cannot be
    alike."""
    layers, names = request.hf_config.num_hidden_layers, ("first", "last")
    options = [f"decoder_{name}_pipeline_num_layers" for name in names]
    if layers % stages == 0 or stages < 3 or any(request.fixed(option) for option in options):
        return {}
    left = layers - (stages - 2) * math.ceil(layers / stages)
    return dict(zip(options, (left // 2, left - left // 2), strict=True)) if left >= 2 else {}


def _experts(request: Request, ranks: int, tensor: int, experts: int) -> Iterator[tuple[int | None, int]]:
    """Yields (expert tensor parallel size, expert parallel size) on ``ranks`` processes of a stage."""
    base = request.config.parallel
    if not experts:
        yield base.expert_tensor_parallel_size, base.expert_model_parallel_size
        return
    tensors: list[int | None] = [None] if tensor == 1 else [None, 1]
    if request.fixed("expert_tensor_parallel_size"):
        tensors = [base.expert_tensor_parallel_size]
    for expert_tensor in tensors:
        sizes = _divisors(math.gcd(experts, max(1, ranks // (expert_tensor or tensor))))
        if request.fixed("expert_model_parallel_size"):
            sizes = [base.expert_model_parallel_size]
        yield from ((expert_tensor, size) for size in sizes)


@dataclass
class SearchResult:
    """What a search of all layouts yields.

    Attributes:
        layouts: how many were looked at.
        refused: training's message -> layouts that it refuses.
        fitting: by the estimate, the cheapest first.
        others: the least memory first.
        choices: of the layouts.
    """

    layouts: int
    refused: Counter[str]
    fitting: list[Candidate]
    others: list[Candidate]
    choices: Choices


def search(request: Request) -> SearchResult:
    """Refuses or estimates every layout; rehearses nothing."""
    choices = Choices(request)
    refused: Counter[str] = Counter()
    fitting: list[Candidate] = []
    others: list[Candidate] = []
    number = 0
    for parallel in layouts(request):
        number += 1
        config = dataclasses.replace(request.config, parallel=parallel)
        try:
            check(config)
            check_on_cuda(config)
            check_attention_on_cuda(request.hf_config, config)
            check_cut(request.hf_config, config, request.gpus)
        except UserError as error:
            refused[error.message] += 1
            continue
        for groups in _micro_batches(request, parallel):
            candidate = choices.cheapest(config, groups, packs_of_step(config, groups, request.gpus))
            (fitting if candidate.fits(request) else others).append(candidate)
    fitting.sort(key=lambda candidate: candidate.seconds)
    others.sort(key=lambda candidate: candidate.estimated.total)
    return SearchResult(number, refused, fitting, others, choices)


def _micro_batches(request: Request, parallel: ParallelConfig) -> list[int]:
    training = request.config.training
    if request.fixed("micro_batch_size"):
        return [training.micro_batch_size]
    share = math.ceil(training.global_batch_size / data_parallel_size(parallel, request.gpus))
    return [size for size in (1, 2, 4, 8) if size <= min(share, MOST_GROUPS)]


def packs_of_step(config: Config, groups: int, gpus: int) -> int:
    """Counts the packs of a process in a step of equal examples (`batches.plan`)."""
    parallel = config.parallel
    share = math.ceil(config.training.global_batch_size / data_parallel_size(parallel, gpus))
    packs = math.ceil(share / groups)
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    return packs + (-packs % parallel.pipeline_model_parallel_size if interleaved else 0)


@dataclass
class Plan:
    """A search whose best layouts were rehearsed.

    Attributes:
        best: rehearsed; the nearest where none fits by its estimate.
        fitting: those of ``best`` that fit, the fastest first.
    """

    searched: SearchResult
    best: list[Candidate]
    fitting: list[Candidate]

    @property
    def nearest(self) -> Candidate:
        """The rehearsed layout with the least memory."""
        return min(self.best, key=lambda candidate: candidate.peak.total)


def plan(request: Request, top: int, rehearsals: Rehearsals, searched: SearchResult | None = None) -> Plan:
    """Searches, and rehearses the ``top`` best.

    Args:
        searched: `search` of this request, where it was made before.

    Raises:
        UserError: see `forecast`.
    """
    searched = searched or search(request)
    best = searched.fitting[:top] or searched.others[:NEAREST]
    rehearsed(request, best, rehearsals)
    best = _chosen_again(request, searched, best, rehearsals)
    fitting = [candidate for candidate in best if candidate.fits(request)]
    return Plan(searched, best, sorted(fitting, key=lambda candidate: candidate.step.seconds))


def _chosen_again(
    request: Request, searched: SearchResult, candidates: Sequence[Candidate], rehearsals: Rehearsals
) -> list[Candidate]:
    """Chooses and rehearses again those whose estimate fits and whose rehearsal does not, by the estimate's error."""
    others: dict[int, Candidate] = {}
    for candidate in candidates:
        if candidate.estimated.total <= request.limit < candidate.peak.total:
            limit = request.limit * candidate.estimated.total / candidate.peak.total
            config = dataclasses.replace(request.config, parallel=candidate.config.parallel)
            other = searched.choices.cheapest(config, candidate.groups, candidate.packs, limit)
            if other.estimated.total <= limit and other.config != candidate.config:
                others[id(candidate)] = other
    rehearsed(request, list(others.values()), rehearsals)
    return [others.get(id(candidate), candidate) for candidate in candidates]


def rehearsed(request: Request, candidates: Sequence[Candidate], rehearsals: Rehearsals) -> None:
    """Rehearses the stages of each candidate that matter, several at once, and forecasts a step."""
    tasks: list[Task] = []
    counts: list[int] = []
    for candidate in candidates:
        pack = [request.group] * candidate.groups
        each = tasks_of(candidate.config, request.hf_config, pack, candidate.packs, request.gpus, "cuda")
        tasks += each
        counts.append(len(each))
    outcomes = rehearsals.each(tasks)
    for candidate, count in zip(candidates, counts, strict=True):
        candidate.outcomes = [next(outcomes) for _ in range(count)]
        candidate.forecast = forecast(
            candidate.outcomes, candidate.config, request.gpus, candidate.packs, request.machine
        )
