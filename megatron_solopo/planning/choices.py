"""What a layout recomputes, tiles and keeps on the host, and its optimizer: the cheapest of these options that fit.

Options are combined as ways, which decide what layers keep, and optimizers, which decide what there is between steps.
Device memory is a way's and an optimizer's together, and so is the time of a step, so each is estimated once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_solopo.config import OWNER, Config
from megatron_solopo.config_checks import check
from megatron_solopo.data.tokenized.batches import pieces_multiple_of, prompts_multiple_of
from megatron_solopo.errors import UserError
from megatron_solopo.model.cost import windows_of
from megatron_solopo.model.tiles import check_tiles
from megatron_solopo.parallel.topology import stage_sizes
from megatron_solopo.planning.candidate import GIB, PROCESS_GIB, Candidate, Request
from megatron_solopo.planning.cost import seconds_of_packs, seconds_of_update
from megatron_solopo.planning.estimate import activations_on_host, peak
from megatron_solopo.planning.process import Process, Shape, Work
from megatron_solopo.planning.states import optimizer_bytes, saved, share, states_on_host

MARGIN = 1.02
"""A choice must fit with its estimate this many times."""

WORTH = 0.98
"""A choice that rounds or moves more than another is taken where its step takes less than this share of the other's."""

Options = dict[str, Any]
"""Values of options by name, beside those that the request has."""

RECOMPUTE = (
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules", "recompute_keep"),
)

REMAINDERS: Options = {"use_precision_aware_optimizer": True}
ROUNDED: Options = REMAINDERS | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
AWAY: Options = {"optimizer_cpu_offload": True}
OPTIMIZERS: tuple[Options, ...] = ({}, REMAINDERS, ROUNDED, AWAY, AWAY | ROUNDED)
"""Of them the first two and the one on the host compute the same steps; the others round moments to bfloat16."""

OFFLOADED: Options = {"activation_offload": True}
TILED: Options = {"mlp_tiles": "auto"}
KEPT: Options = {"recompute_keep": "core_attn"}
FULL: Options = {"recompute_granularity": "full"}
SELECTIVE: Options = {"recompute_granularity": "selective"}


def with_options(config: Config, options: Options) -> Config:
    """Returns a copy of a configuration with other values of the model's and of training's options."""
    parts: dict[str, Options] = {"model": {}, "training": {}}
    for name, value in options.items():
        parts[OWNER[name].section][name] = value
    changed = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items() if values}
    return dataclasses.replace(config, **changed) if changed else config


def optimizers(request: Request) -> list[Options]:
    """Returns the options of the optimizers that may be tried, the request's own first."""
    if not request.config.model.bf16:
        return [{}]
    on_host = request.machine.host is not None
    tried = (options for options in OPTIMIZERS if on_host or not options.get("optimizer_cpu_offload"))
    return [options for options in tried if _leaves_what_is_set(request, options)]


def _leaves_what_is_set(request: Request, options: Options) -> bool:
    return all(not request.fixed(name) or request.config.value(name) == value for name, value in options.items())


def ladders(request: Request, config: Config, shape: Shape) -> Iterator[list[Options]]:
    """Yields lists of ways for a layout. In a list memory falls and time rises; a later list rounds or moves more."""
    tiles = [{}] if request.fixed("mlp_tiles") else [{}, TILED]
    offloads = [{}] if request.fixed("activation_offload") or request.machine.host is None else [{}, OFFLOADED]
    if any(request.fixed(name) for name in RECOMPUTE):
        model = config.model
        whole = model.recompute_granularity == "full" and model.recompute_method == "uniform"
        for offload, tile in itertools.product(offloads if whole else [{}], tiles):
            yield [tile | offload]
        return
    sizes = stage_sizes(shape.layers, config.parallel)
    assert sizes is not None  # `check_layout` refuses others
    chunk = max(sizes) // config.parallel.num_virtual_stages_per_pipeline_rank
    blocks = [FULL | {"recompute_method": "block", "recompute_num_layers": layers} for layers in range(1, chunk)]
    for tile in tiles:
        yield [tile, *(tile | way for way in (*blocks, FULL))]
        if not tile:
            for module in ("moe",) if shape.experts else ("mlp_act", "mlp"):
                yield [SELECTIVE | {"recompute_modules": module}]
    for tile in tiles:
        yield [tile | KEPT | way for way in (*blocks, FULL)]
    for offload, keep, tile in itertools.product(offloads[1:], (KEPT, {}), tiles):
        yield [tile | keep | FULL | offload]


@dataclass(frozen=True)
class _Way:
    """A way of a layout, without an optimizer's state.

    Attributes:
        device, host: bytes of each key stage; seconds: of all packs.
    """

    options: Options
    device: list[float]
    host: list[float]
    seconds: float


@dataclass(frozen=True)
class _States:
    """An optimizer of a layout.

    Attributes:
        device: bytes of its state on each key stage; host: all bytes of states there, with what a save copies.
        seconds: of the update.
    """

    options: Options
    device: list[float]
    host: list[float]
    seconds: float


class Choices:
    """The choices of a request's layouts."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.shape = Shape.of(request.hf_config, request.config.model.make_vocab_size_divisible_by)
        self._optimizers = optimizers(request)
        self._accepted: dict[frozenset[Any], bool] = {}

    def cheapest(self, config: Config, groups: int, packs: int, limit: float | None = None) -> Candidate:
        """Returns the choice with the shortest forecast step of those that fit; where none does, one that fits the
        device and lacks least on the host, or else the one with least device memory.

        Args:
            config: of the layout, as training accepts it.
            groups: of a pack; packs: of a process and step.
            limit: bytes that the estimate may have; default: the request's.
        """
        training = dataclasses.replace(config.training, micro_batch_size=groups)
        layout = _Layout(self, dataclasses.replace(config, training=training), groups, packs)
        way, states = layout.choose((self.request.limit if limit is None else limit) / MARGIN)
        chosen = with_options(layout.config, way.options | states.options)
        process = Process(self.shape, chosen, layout.work, self.request.gpus)
        return Candidate(chosen, groups, process, way.seconds + states.seconds)

    def accepts(self, config: Config, options: Options) -> bool:
        """Whether training accepts options in a layout that it accepts; which layout makes no difference."""
        key = frozenset((name, value) for name, value in options.items() if name != "recompute_num_layers")
        if key not in self._accepted:
            try:
                tried = with_options(config, options)
                check(tried)
                check_tiles(self.request.hf_config, tried)
                self._accepted[key] = True
            except UserError:
                self._accepted[key] = not options
        return self._accepted[key]


class _Layout:
    """The ways and optimizers of one layout, estimated as they are asked for."""

    def __init__(self, choices: Choices, config: Config, groups: int, packs: int) -> None:
        self.choices, self.request, self.config = choices, choices.request, config
        multiples = pieces_multiple_of(config), prompts_multiple_of(config, "cuda")
        windows = windows_of(self.request.hf_config)
        self.work = Work.of(self.request.group, groups, packs, config.data.share_prompts, *multiples, windows)
        self._ways: dict[tuple[tuple[str, Any], ...], _Way] = {}

    def choose(self, limit: float) -> tuple[_Way, _States]:
        """Returns the cheapest way and optimizer that fit into ``limit`` bytes; see `Choices.cheapest`."""
        plain = self.way({})
        if self._fits(plain, self.states[0], limit):  # nothing is cheaper
            return plain, self.states[0]
        best: tuple[_Way, _States] | None = None
        least = self._least(limit)
        if not self._fits(*least, limit):
            return least
        for states in self.states:
            for ladder in self.ladders:
                seconds = sum(part.seconds for part in best) * WORTH if best else float("inf")
                if self.way(ladder[0]).seconds + states.seconds >= seconds:
                    continue
                way = self._first_that_fits(ladder, states, limit)
                if way is not None and way.seconds + states.seconds < seconds:
                    best = way, states
        return best or least

    def _least(self, limit: float) -> tuple[_Way, _States]:
        """Returns a choice that fits, if any does; see `Choices.cheapest`."""
        ends = [self.way(ladder[-1]) for ladder in self.ladders]
        pairs = [(way, states) for states in self.states for way in ends]
        on_device = [pair for pair in pairs if self._device(*pair) <= limit]
        if on_device:
            return min(on_device, key=lambda pair: self._host(*pair))
        return min(pairs, key=lambda pair: self._device(*pair))

    def _first_that_fits(self, ladder: Sequence[Options], states: _States, limit: float) -> _Way | None:
        low, high = 0, len(ladder) - 1
        if not self._fits(self.way(ladder[high]), states, limit):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(self.way(ladder[middle]), states, limit) else (middle + 1, high)
        return self.way(ladder[low])

    def _fits(self, way: _Way, states: _States, limit: float) -> bool:
        return self._device(way, states) <= limit and self._host(way, states) <= self.request.host_limit

    def _device(self, way: _Way, states: _States) -> float:
        return max(map(sum, zip(way.device, states.device, strict=True)))

    def _host(self, way: _Way, states: _States) -> float:
        return PROCESS_GIB * GIB + max(map(sum, zip(way.host, states.host, strict=True)))

    @cached_property
    def ladders(self) -> list[list[Options]]:
        every = ladders(self.request, self.config, self.choices.shape)
        accepted = ([way for way in ladder if self.choices.accepts(self.config, way)] for ladder in every)
        return [ladder for ladder in accepted if ladder]

    @cached_property
    def states(self) -> list[_States]:
        return [
            self._states(options) for options in self.choices._optimizers if self.choices.accepts(self.config, options)
        ]

    def _states(self, options: Options) -> _States:
        process = self._process(options)
        stages = process.key_stages
        return _States(
            options,
            [optimizer_bytes(process)[0] * share(process, stage) for stage in stages],
            [states_on_host(process, stage) + saved(process, stage) for stage in stages],
            seconds_of_update(process, self.request.machine),
        )

    def way(self, options: Options) -> _Way:
        """Returns the estimate of a way."""
        key = tuple(sorted(options.items()))
        if key not in self._ways:
            process = self._process(options)
            stages = process.key_stages
            state = optimizer_bytes(process)[0]  # of the request's own optimizer, which `peak` counts
            self._ways[key] = _Way(
                options,
                [peak(process, stage).total - state * share(process, stage) for stage in stages],
                [activations_on_host(process, stage) for stage in stages],
                seconds_of_packs(process, self.request.machine),
            )
        return self._ways[key]

    def _process(self, options: Options) -> Process:
        return Process(self.choices.shape, with_options(self.config, options), self.work, self.request.gpus)
