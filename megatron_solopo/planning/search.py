"""All layouts of a model on so many GPUs: refused by training's own checks, estimated, the best of them rehearsed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from megatron_solopo.config import Config, ParallelConfig
from megatron_solopo.config_checks import check, check_on_cuda
from megatron_solopo.data.tokenized.batches import pieces_multiple_of, prompts_multiple_of
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.errors import UserError
from megatron_solopo.parallel import context
from megatron_solopo.parallel.topology import data_parallel_size, stage_sizes
from megatron_solopo.planning.cost import seconds_of_step
from megatron_solopo.planning.estimate import Process, Shape, Work, peak
from megatron_solopo.planning.forecast import Forecast, forecast
from megatron_solopo.planning.machines import Machine
from megatron_solopo.planning.memory import Moment
from megatron_solopo.planning.rehearse import Outcome
from megatron_solopo.planning.table import tasks_of
from megatron_solopo.planning.workers import Rehearsals, Task
from megatron_solopo.training.preflight import check_cut

MARGIN = 1.02
"""The least recomputation whose estimate, this many times, fits is chosen."""

MOST_GROUPS = 8
"""Largest --micro-batch-size that is tried."""

NEAREST = 4
"""Layouts that are rehearsed where none fits by its estimate."""


@dataclass(frozen=True)
class Request:
    """What a plan is made for.

    Attributes:
        config: of the run, not resolved for a layout; what is explicit in it is not varied.
        group: the longest example.
        limit: bytes that a process may hold.
    """

    hf_config: PretrainedConfig
    config: Config
    group: TokenGroup
    gpus: int
    limit: int
    machine: Machine

    def fixed(self, name: str) -> bool:
        return name in self.config.explicit


@dataclass
class Candidate:
    """A layout that training would accept, with --micro-batch-size and recomputation.

    Attributes:
        groups: of a pack; packs: of a process and step.
        estimated: the largest peak of `table.stages_that_matter`, in closed form.
        seconds: of a step, in closed form.
        outcomes: of the rehearsed stages; forecast: of a step, from them.
    """

    config: Config
    groups: int
    packs: int
    process: Process
    estimated: Moment
    seconds: float
    outcomes: list[Outcome] = field(default_factory=list)
    forecast: Forecast | None = None

    @property
    def step(self) -> Forecast:
        """The forecast of a layout that was rehearsed."""
        assert self.forecast is not None
        return self.forecast

    @property
    def peak(self) -> Moment:
        """The largest moment of all rehearsed stages; the estimated one of a layout that was not rehearsed."""
        return max((outcome.peak for outcome in self.outcomes), key=lambda it: it.total, default=self.estimated)

    @property
    def name(self) -> str:
        """``tp4 sp cp2 pp2 dp4``, as `parallel.layouts` reads it, then what no such name has."""
        parallel, model = self.config.parallel, self.config.model
        first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
        recomputed = model.recompute_granularity or "none"
        if model.recompute_granularity and model.recompute_method == "block":
            recomputed = f"block {model.recompute_num_layers}"
        recomputed += f" {model.recompute_modules}" if model.recompute_modules else ""
        recomputed += f" keeping {model.recompute_keep}" if model.recompute_keep else ""
        recomputed += " offloaded" if model.activation_offload else ""
        return (
            layout_name(parallel, self.process.copies // self.process.context)
            + (f" (stages of {', '.join(map(str, self.process.sizes))})" if first or last else "")
            + f", micro-batch {self.groups}, recompute {recomputed}"
        )

    @property
    def error(self) -> float:
        """How far the estimated peak is from the rehearsed one, relative to it."""
        return self.estimated.total / self.peak.total - 1


def layout_name(parallel: ParallelConfig, copies: int) -> str:
    """Returns the name of a layout with ``copies`` of the model; see `parallel.layouts`."""
    tensor = parallel.tensor_model_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size
    parts = [
        ("tp", tensor),
        ("sp", "" if parallel.sequence_parallel else 1),
        ("cp", parallel.context_parallel_size),
        ("pp", parallel.pipeline_model_parallel_size),
        ("vpp", parallel.num_virtual_stages_per_pipeline_rank),
        ("dp", copies),
        ("ep", parallel.expert_model_parallel_size),
    ]
    words = [f"{kind}{size}" for kind, size in parts if size != 1]
    if expert_tensor is not None and expert_tensor != tensor:
        words.append(f"etp{expert_tensor}")
    return " ".join(words) or "1"


def layouts(request: Request) -> Iterator[ParallelConfig]:
    """Yields every layout of the GPUs whose tensor-parallel ranks are on one node; training may refuse it."""
    base, hf_config, gpus = request.config.parallel, request.hf_config, request.gpus
    layers, experts = hf_config.num_hidden_layers, getattr(hf_config, "num_experts", None)

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


def _experts(request: Request, ranks: int, tensor: int, experts: int | None) -> Iterator[tuple[int | None, int]]:
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
    """

    layouts: int
    refused: Counter[str]
    fitting: list[Candidate]
    others: list[Candidate]


def search(request: Request) -> SearchResult:
    """Refuses or estimates every layout; rehearses nothing."""
    shape = Shape.of(request.hf_config, request.config.model.make_vocab_size_divisible_by)
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
            check_cut(request.hf_config, config, request.gpus)
        except UserError as error:
            refused[error.message] += 1
            continue
        for groups in _micro_batches(request, parallel):
            candidate = _least_recomputed(request, shape, config, groups)
            fits = candidate.estimated.total <= request.limit
            (fitting if fits else others).append(candidate)
    fitting.sort(key=lambda candidate: candidate.seconds)
    others.sort(key=lambda candidate: candidate.estimated.total)
    return SearchResult(number, refused, fitting, others)


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


def _least_recomputed(request: Request, shape: Shape, config: Config, groups: int) -> Candidate:
    """Returns the candidate with the least recomputation that fits, or with all where none does."""
    multiples = pieces_multiple_of(config), prompts_multiple_of(config, "cuda")
    packs = packs_of_step(config, groups, request.gpus)
    work = Work.of(request.group, groups, packs, config.data.share_prompts, *multiples)
    options = _recomputations(request, config)
    low, high = 0, len(options) - 1
    while low < high:  # memory falls from one option to the next
        middle = (low + high) // 2
        candidate = _candidate(request, shape, config, options[middle], groups, work)
        low, high = (low, middle) if candidate.estimated.total * MARGIN <= request.limit else (middle + 1, high)
    return _candidate(request, shape, config, options[low], groups, work)


def _recomputations(request: Request, config: Config) -> list[dict[str, object]]:
    """Returns the options of recomputation, none first, all layers last."""
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    if any(request.fixed(name) for name in names):
        return [{}]
    sizes = stage_sizes(request.hf_config.num_hidden_layers, config.parallel)
    assert sizes is not None
    chunk = max(sizes) // config.parallel.num_virtual_stages_per_pipeline_rank
    blocks = [dict[str, object](zip(names, ("full", "block", layers), strict=True)) for layers in range(1, chunk)]
    return [{}, *blocks, {"recompute_granularity": "full"}]


def _candidate(
    request: Request, shape: Shape, config: Config, recompute: dict[str, object], groups: int, work: Work
) -> Candidate:
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **recompute),
        training=dataclasses.replace(config.training, micro_batch_size=groups),
    )
    process = Process(shape, config, work, request.gpus)
    moments = [peak(process, stage) for stage in process.key_stages]
    largest = max(moments, key=lambda moment: moment.total)
    return Candidate(config, groups, work.packs, process, largest, seconds_of_step(process, request.machine))


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
    fitting = [candidate for candidate in best if candidate.peak.total <= request.limit]
    return Plan(searched, best, sorted(fitting, key=lambda candidate: candidate.step.seconds))


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
