"""Models of many experts are rehearsed with fewer layers, and the others are added as differences of these rehearsals.

What a process holds at a moment, and what it computes and exchanges, is a sum over its layers, which repeat. A
rehearsal takes as long as the host needs for each parameter, and a layer may have hundreds of experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from megatron_solopo.config import Config
from megatron_solopo.model.families.fields import linear_layers, windowed_layers
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.parallel.topology import expert_count, stage_sizes
from megatron_solopo.planning.counts import Work
from megatron_solopo.planning.memory import Moment
from megatron_solopo.planning.rehearse import Outcome

MANY = 64
"""Experts of a process, of all its layers together, from which on fewer layers are rehearsed."""


def with_fewer_layers(
    config: Config, hf_config: PretrainedConfig, rehearse: Callable[[Config, PretrainedConfig], Outcome]
) -> Outcome | None:
    """Returns the outcome of a process by rehearsals of fewer layers; None where the complete model must be rehearsed.

    Args:
        rehearse: returns the outcome of a model.
    """
    repeated = _repeated(config, hf_config)
    if repeated is None:
        return None
    least, more = repeated

    def outcome(layers: Sequence[int]) -> Outcome:
        return rehearse(*_cut(config, hf_config, *layers))

    base = outcome(least)
    changes: list[tuple[Outcome, float]] = []
    for place, (period, times) in enumerate(more):
        if times:
            other = outcome([count + period * (place == at) for at, count in enumerate(least)])
            if {phase: moment.operation for phase, moment in other.peaks.items()} != {
                phase: moment.operation for phase, moment in base.peaks.items()
            }:
                return None  # of so few layers the peak is elsewhere
            changes.append((other, times))
    return _sum(base, changes)


def _sum(base: Outcome, changes: Sequence[tuple[Outcome, float]]) -> Outcome:
    """Returns the first outcome and so many times what each of the others has more."""

    def held(of: Callable[[Outcome], dict[str, int]]) -> dict[str, int]:
        before = of(base)
        return {
            kind: size + sum(round(times * (of(other)[kind] - size)) for other, times in changes)
            for kind, size in before.items()
        }

    peaks: dict[str, Moment] = {
        phase: replace(moment, held=held(lambda outcome, phase=phase: outcome.peaks[phase].held))
        for phase, moment in base.peaks.items()
    }
    parts = vars(base.work)
    for other, times in changes:
        parts = {
            name: part + getattr(other.work, name) * times + getattr(base.work, name) * -times
            for name, part in parts.items()
        }
    host = held(lambda outcome: {"": outcome.host})[""]
    return replace(base, standing=held(lambda outcome: outcome.standing), peaks=peaks, work=Work(**parts), host=host)


def _repeated(
    config: Config, hf_config: PretrainedConfig
) -> tuple[tuple[int, int], tuple[tuple[int, int], tuple[int, int]]] | None:
    """Returns of the layers of a chunk that are recomputed, and of the others, how many are rehearsed at least; and of
    both how many more a second rehearsal has, and how often these are missing. None where layers do not repeat, or are
    few."""
    parallel, model, experts = config.parallel, config.model, expert_count(hf_config)
    stages = stage_sizes(hf_config.num_hidden_layers, parallel)
    assert stages is not None  # `check_layout` refuses others
    chunks, layers = parallel.num_virtual_stages_per_pipeline_rank, max(stages)
    full, uniform = model.recompute_granularity == "full", model.recompute_method == "uniform"
    if layers * experts // parallel.expert_model_parallel_size < MANY or min(stages) != layers:
        return None
    if full and uniform and model.recompute_num_layers != 1:
        return None  # several layers together
    of_chunk, pattern = layers // chunks, _pattern(hf_config)
    if pattern is None or (len(stages) * chunks > 1 and of_chunk % pattern[1]):
        return None
    beginning, period = pattern
    recomputed = 0 if not full else of_chunk if uniform else min(model.recompute_num_layers, of_chunk)
    counts = recomputed, of_chunk - recomputed
    # The peak may be in the backward pass of the last layer but one.
    floors = beginning + 2, 2 if recomputed else beginning + 2
    times = [max(count - floor, 0) // period for count, floor in zip(counts, floors, strict=True)]
    least = counts[0] - times[0] * period, counts[1] - times[1] * period
    rehearsed = sum(least) * (1 + sum(map(bool, times))) + period * sum(map(bool, times))
    return (least, ((period, times[0]), (period, times[1]))) if rehearsed < of_chunk else None


def _pattern(hf_config: PretrainedConfig) -> tuple[int, int] | None:
    """Returns (first layers that are unlike the others, layers after which the others repeat)."""
    count = hf_config.num_hidden_layers
    lists = [value for value in family_of(hf_config).transformer_options(hf_config).values() if isinstance(value, list)]
    lists = [value for value in lists if len(value) == count]
    kinds: list[tuple[Any, ...]] = [
        *zip(windowed_layers(hf_config), linear_layers(hf_config), *lists, strict=True)
    ]  # what distinguishes layers: experts, a window, a recurrent state, RoPE
    both = ((beginning, whole - beginning) for whole in range(1, count // 2 + 1) for beginning in range(whole))
    return next(((first, size) for first, size in both if kinds[first + size :] == kinds[first:-size]), None)


def _cut(config: Config, hf_config: PretrainedConfig, recomputed: int, others: int) -> tuple[Config, PretrainedConfig]:
    """Returns the config of a run, and of its model, with so many layers in each chunk."""
    parallel, model = config.parallel, config.model
    chunks = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    cut, before, count = copy.deepcopy(hf_config), hf_config.num_hidden_layers, (recomputed + others) * chunks
    for name, value in vars(hf_config).items():
        if isinstance(value, list) and len(value) == before:
            setattr(cut, name, value[:count])
    cut.num_hidden_layers = count
    if model.recompute_method == "block":
        config = replace(config, model=replace(model, recompute_num_layers=recomputed))
    return config, cut
