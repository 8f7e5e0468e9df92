"""The memory table of a run's own layout, from its own largest pack."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from megatron_solopo.config import Config, ParallelConfig
from megatron_solopo.data.tokenized.batches import plan_step
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.errors import system_reason
from megatron_solopo.model.cost import width_of_cost, windows_of
from megatron_solopo.parallel.topology import data_parallel_size, stage_sizes, world_size
from megatron_solopo.planning.memory import GRADIENTS, KINDS, OPTIMIZER, WEIGHTS
from megatron_solopo.planning.rehearse import Outcome
from megatron_solopo.planning.workers import Rehearsals, Task
from megatron_solopo.training.preflight import Preflight, RunInputs

UNITS = {"GiB": 2**30, "MiB": 2**20}

ALLOWANCE_GIB = 2.0
"""For what no rehearsal knows: the CUDA context, NCCL's buffers, kernels' workspaces. Assumed, not measured."""

MOST_STEPS = 1000
"""Steps that are searched for the largest pack; the table says so where a run has more."""


def memory_of_run(config: Config, plan: Preflight, device: str) -> list[str]:
    """Rehearses the first and the last pipeline stage of a run with its largest pack, and shows what they hold.

    Args:
        plan: of the run; device: ``cuda`` or ``cpu``, where it is to compute.
    """
    world, inputs = world_size(), plan.inputs
    if (why := not_rehearsed(config)) is not None:
        return [f"not rehearsed: {why}", *calculated(config, inputs.hf_config, world)]
    pack, packs = largest_pack(config, inputs, world, device)
    tasks = tasks_of(config, inputs.hf_config, pack, packs, world, device)
    outcomes = outcomes_of(tasks)
    if isinstance(outcomes, str):
        return [outcomes]
    searched = f" of the first {MOST_STEPS:,} steps" if inputs.schedule.steps > MOST_STEPS else ""
    tokens = f"{len(pack)} examples, {outcomes[0].tokens:,} tokens"
    return [
        f"a process at its peak, rehearsed, with the largest pack{searched}: {tokens}",
        *table(outcomes, world // config.parallel.pipeline_model_parallel_size),
        *(
            [f"and on a GPU fragmentation, and about {ALLOWANCE_GIB:g} GiB of the CUDA context and NCCL"]
            if device == "cuda"
            else []
        ),
    ]


def not_rehearsed(config: Config) -> str | None:
    """Returns why a run cannot be rehearsed, or None if it can."""
    if config.model.transformer_impl != "portable":
        return f"--transformer-impl {config.model.transformer_impl}: its layers are built on a GPU alone"
    if config.parallel.moe_token_dispatcher_type == "flex":
        return "--moe-token-dispatcher-type flex: DeepEP's kernels need a GPU"
    return None


def calculated(config: Config, hf_config: PretrainedConfig, world: int) -> list[str]:
    """Returns a line for each stage of `stages_that_matter`: memory besides activations of a run that cannot be
    rehearsed."""
    from megatron_solopo.planning.estimate import on_host  # which imports this module
    from megatron_solopo.planning.process import Process, Shape, Work
    from megatron_solopo.planning.states import fp8_copies, standing

    shape = Shape.of(hf_config, config.model.make_vocab_size_divisible_by)
    process = Process(shape, config, Work(0, 0, 0, 0.0, 1), world)
    lines = []
    for stage in stages_that_matter(hf_config.num_hidden_layers, config.parallel):
        held = standing(process, stage)
        parts = [f"{kind} {held[kind] / UNITS['GiB']:.2f}" for kind in (WEIGHTS, GRADIENTS, OPTIMIZER)]
        if host := on_host(process, stage):
            parts.append(f"on the host {host / UNITS['GiB']:.2f}")
        if config.model.fp8_format is not None:
            copies = fp8_copies(process, stage) / UNITS["GiB"]
            parts.append(f"FP8 copies of weights {copies:.2f}")
        lines.append(f"calculated: a process of stage {stage} holds, besides activations, GiB: {', '.join(parts)}")
    return lines


def outcomes_of(tasks: Sequence[Task]) -> list[Outcome] | str:
    """Returns the outcomes of rehearsals, or why there are none: the rest of a dry run holds without them."""
    try:
        with Rehearsals(len(tasks)) as rehearsals:
            return list(rehearsals.each(tasks))
    except Exception as error:  # fake tensors may fail where real ones would not
        return f"not known: the rehearsal failed ({type(error).__name__}: {system_reason(error)})"


def tasks_of(
    config: Config, hf_config: PretrainedConfig, pack: Sequence[TokenGroup], packs: int, world: int, device: str
) -> list[Task]:
    """Returns the rehearsals of `stages_that_matter`; processes of one stage differ in padding alone."""
    each = world // config.parallel.pipeline_model_parallel_size
    count = packs_that_matter(packs, config.parallel)
    stages = stages_that_matter(hf_config.num_hidden_layers, config.parallel)
    return [Task(config, hf_config, pack, count, stage * each, world, device) for stage in stages]


def stages_that_matter(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Returns the pipeline stages that hold most or compute longest: the first has the most packs in flight, the last
    has the head, and another may have more layers than both."""
    sizes = stage_sizes(num_layers, parallel)
    assert sizes is not None  # `check_layout` refuses others
    ends = {0, len(sizes) - 1}
    most = sizes.index(max(sizes))
    return sorted(ends if max(sizes[end] for end in ends) == sizes[most] else ends | {most})


def packs_that_matter(packs: int, parallel: ParallelConfig) -> int:
    """Counts the packs of a step after which a further one adds no memory: a stage holds at most as many as there are
    stages, and twice as many of the interleaved schedule's warm-up."""
    stages = parallel.pipeline_model_parallel_size
    most = 2 * stages if parallel.num_virtual_stages_per_pipeline_rank > 1 else stages
    return min(packs, max(most, 2))


def largest_pack(config: Config, inputs: RunInputs, world: int, device: str) -> tuple[list[TokenGroup], int]:
    """Returns the groups of the pack with the most tokens in the run's first steps, and the packs of a process then."""
    groups, copies = inputs.data.train.groups, data_parallel_size(config.parallel, world)
    share_prompts, width, windows = (
        config.data.share_prompts,
        width_of_cost(inputs.hf_config),
        windows_of(inputs.hf_config),
    )
    most, pack, packs = -1, list[TokenGroup](), 1
    for number in range(min(inputs.schedule.steps, MOST_STEPS)):
        step = [groups[index] for index in inputs.schedule.step(number)]
        plan = plan_step(step, width, copies, config, device, windows)
        for share in plan.shares:
            for places in share:
                rank_groups = [step[place] for place in places]
                tokens = sum(group.tokens(share_prompts, plan.of_pieces, plan.of_prompts) for group in rank_groups)
                if tokens > most:
                    most, pack, packs = tokens, rank_groups, len(share)
    return pack, packs


def table(outcomes: Sequence[Outcome], processes: int) -> list[str]:
    """Formats a line a stage: what it holds at its peak, by kind, what of it is on the host, and what it does then.

    Args:
        processes: of a stage.
    """
    unit = UNITS["GiB" if max(outcome.peak.total for outcome in outcomes) >= UNITS["GiB"] else "MiB"]
    shown = [kind for kind in KINDS if any(outcome.peak.held[kind] >= unit / 100 for outcome in outcomes)]
    host = ["host"] if any(outcome.host >= unit / 100 for outcome in outcomes) else []
    header = ["ranks", *shown, "peak", *host, "at"]
    rows = [
        [
            f"{outcome.rank}-{outcome.rank + processes - 1}" if processes > 1 else f"{outcome.rank}",
            *(f"{outcome.peak.held[kind] / unit:.2f}" for kind in shown),
            f"{outcome.peak.total / unit:.2f} {next(name for name, size in UNITS.items() if size == unit)}",
            *(f"{outcome.host / unit:.2f}" for _ in host),
            f"{outcome.peak.phase}: {outcome.peak.operation}",
        ]
        for outcome in outcomes
    ]
    return columns([header, *rows])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats rows of one width a column, figures to the right and the last column to the left."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(text if place == last else f"{text:>{widths[place]}}" for place, text in enumerate(row)).rstrip()
        for row in rows
    ]
