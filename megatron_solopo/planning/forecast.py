"""The time of a step, forecast from a rehearsal and a machine file.

A forecast, never a measurement: operators take their floating-point operations or their bytes by the machine's rates,
whichever is longer, one after another. docs/planning.md states the rules of overlap and what is not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_solopo.config import Config
from megatron_solopo.parallel.topology import data_parallel_size
from megatron_solopo.planning.counts import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    BROADCAST,
    CONTEXT,
    DATA,
    EXPERT,
    OTHER,
    PIPELINE,
    RECEIVE,
    REDUCE_SCATTER,
    SEND,
    TENSOR,
    Exchange,
    Tally,
    Traffic,
)
from megatron_solopo.planning.machines import Machine
from megatron_solopo.planning.operators import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    LINK,
    MEMORY_BOUND,
    ON_HOST,
    Operation,
)
from megatron_solopo.planning.rehearse import Outcome

PRODUCTS, ATTENTION, LAUNCHES = "products", "attention", "launches"
BUBBLE, OPTIMIZER, HOST = "pipeline bubble", "optimizer", "host"
PARTS = {
    PRODUCTS: "matrix products, those of experts and of the log-prob head included",
    ATTENTION: "attention kernels, forward and backward",
    MEMORY_BOUND: "operators that memory bandwidth bounds: norms, activations, rotations, sums of gradients",
    LAUNCHES: "what the host needs to start operators beyond the time in which they run",
    TENSOR: "collectives of tensor and sequence parallelism",
    CONTEXT: "collectives of context parallelism",
    EXPERT: "tokens to experts and back",
    PIPELINE: "states between pipeline stages",
    DATA: "gradients and parameters between copies of the model, without what other work hides",
    OTHER: "other collectives",
    BUBBLE: "stages that wait while the pipeline fills and empties",
    OPTIMIZER: "zeroing gradients, their norm, and the update",
    HOST: "copies to main memory and back that no computing hides, and the update of what is there",
}
"""Parts of a step's time and what each is."""

Seconds = dict[str, float]


@dataclass(frozen=True)
class Forecast:
    """The time of a step.

    Attributes:
        low, high: seconds of the step, with the high and the low fractions of the machine's rates.
        parts: seconds of each of `PARTS` that takes any; their sum is `seconds`.
        tokens: of the step, of all processes, padding included.
    """

    low: float
    high: float
    parts: Seconds
    tokens: int

    @property
    def seconds(self) -> float:
        """The middle of the range."""
        return (self.low + self.high) / 2

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def forecast(outcomes: Sequence[Outcome], config: Config, world: int, packs: int, machine: Machine) -> Forecast:
    """Forecasts a step.

    Args:
        outcomes: rehearsals of pipeline stages, those that are slowest among them (`table.tasks_of`); every pack of
            the step is like the rehearsed one.
        world: processes of the run.
        packs: packs of a process and step.

    Raises:
        UserError: the machine has no rate for a dtype that the step computes in, or no host where it keeps something.
    """
    if uses_host(config) and any(outcome.host for outcome in outcomes):  # 0 on a CPU
        machine.host_share()

    def slowest(rates: _Rates) -> Seconds:
        steps = [rates.step(outcome, config, packs) for outcome in outcomes]
        return max(steps, key=lambda step: sum(step.values()))

    fast, slow = slowest(_Rates(machine, 1)), slowest(_Rates(machine, 0))
    parts = {name: (fast[name] + slow[name]) / 2 for name in PARTS if fast[name] + slow[name] > 0}
    tokens = outcomes[0].tokens * packs * data_parallel_size(config.parallel, world)
    return Forecast(sum(fast.values()), sum(slow.values()), parts, tokens)


def uses_host(config: Config) -> bool:
    """Returns whether a run keeps states or activations of a GPU in main memory."""
    offloads = config.training.optimizer_cpu_offload or config.model.activation_offload
    return offloads or config.method.reference == "resident"


def calibrated(
    outcomes: Sequence[Outcome], config: Config, world: int, packs: int, machine: Machine, seconds: float, name: str
) -> Machine:
    """Returns the machine on which `forecast` says ``seconds``: every range becomes one value, all scaled by one
    factor.

    Raises:
        UserError: see `Machine.scaled`.
    """
    middle = machine.scaled(1.0, name)
    return machine.scaled(forecast(outcomes, config, world, packs, middle).seconds / seconds, name)


@dataclass(frozen=True)
class _Rates:
    """A machine at one end of its ranges.

    Attributes:
        end: 1 for the high rates, 0 for the low ones.
    """

    machine: Machine
    end: int

    def step(self, outcome: Outcome, config: Config, packs: int) -> Seconds:
        """Returns the seconds of each of `PARTS` in a step of one process."""
        parallel, work = config.parallel, outcome.work
        tallies = work.score, work.forward, work.backward, work.update
        score, forward, backward, update = map(self.computing, tallies)
        pack = self.exchanging(work.score + work.forward + work.backward)
        stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
        for name in forward:
            pack[name] = score[name] + forward[name] + backward[name]
        for tally, computing in ((work.forward, forward), (work.backward, backward)):  # --activation-offload
            pack[HOST] += _beyond(self.on_link(tally), sum(computing.values()))
        if chunks > 1:  # the interleaved schedule sends while it computes
            pack[PIPELINE] = _beyond(pack[PIPELINE], sum(forward.values()) + sum(backward.values()))
        once = self.exchanging(work.update)
        step = {name: packs * pack[name] + once[name] for name in PARTS}
        # Narayanan et al. 2021 (arXiv 2104.04473), section 2.2: (stages - 1) / (packs x chunks) of the packs' time
        step[BUBBLE] = sum(pack.values()) * (stages - 1) / chunks
        step[OPTIMIZER] = sum(update.values())
        copying, on_host = self.on_link(work.update), self.on_host(work.update)
        overlaps = config.training.optimizer_cpu_offload and config.training.overlap_cpu_optimizer_d2h_h2d
        step[HOST] += max(copying, on_host) if overlaps else copying + on_host
        reduced = _only(work.update, REDUCE_SCATTER)
        gathered = _only(work.update, ALL_GATHER)
        step[DATA] -= self._hidden(reduced, parallel.overlap_grad_reduce, sum(backward.values()))
        step[DATA] -= self._hidden(gathered, parallel.overlap_param_gather, sum(forward.values()))
        return step

    def computing(self, tally: Tally) -> Seconds:
        """Returns the seconds of its operators by part."""
        seconds: Seconds = dict.fromkeys((PRODUCTS, ATTENTION, MEMORY_BOUND, LAUNCHES), 0.0)
        for operation, count in tally.operations.items():
            kind = operation.kind
            if kind in (LINK, ON_HOST):
                continue
            attends = kind in (ATTENTION_FORWARD, ATTENTION_BACKWARD)
            part = ATTENTION if attends else MEMORY_BOUND if kind == MEMORY_BOUND else PRODUCTS
            seconds[part] += count * self._operation(operation)
        launches = tally.operators * self.machine.launch_us[1 - self.end] / 1e6
        seconds[LAUNCHES] = _beyond(launches, sum(seconds.values()))
        return seconds

    def on_link(self, tally: Tally) -> float:
        """Returns the seconds of copies between GPU and host, one after another."""
        return self._on_host(tally, LINK, "link_gb_per_s")

    def on_host(self, tally: Tally) -> float:
        """Returns the seconds of what the host computes, which its memory bounds."""
        return self._on_host(tally, ON_HOST, "memory_gb_per_s")

    def _on_host(self, tally: Tally, kind: str, rate: str) -> float:
        if self.machine.host is None:  # which only a run may lack that keeps nothing there but some numbers
            return 0.0
        host = self.machine.host_share()
        moved = sum(count * operation.bytes for operation, count in tally.operations.items() if operation.kind == kind)
        return moved / (getattr(host, rate) * 1e9 * host.achieved[self.end])

    def _operation(self, operation: Operation) -> float:
        machine, achieved = self.machine, self.machine.achieved
        moving = operation.bytes / (machine.memory_gb_per_s * 1e9 * achieved.memory[self.end])
        if operation.kind == MEMORY_BOUND:
            return moving
        attends = operation.kind in (ATTENTION_FORWARD, ATTENTION_BACKWARD)
        share = (achieved.attention if attends else achieved.products)[self.end]
        return max(moving, operation.flops / (machine.peak(operation.dtype) * share))

    def exchanging(self, tally: Tally) -> Seconds:
        """Returns the seconds of its collectives by part, as if nothing else ran."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for exchange, traffic in tally.exchanges.items():
            seconds[exchange.kind] += self._collective(exchange, traffic)
        return seconds

    def _collective(self, exchange: Exchange, traffic: Traffic) -> float:
        if exchange.operation == SEND:  # while the other direction, counted as a receive, is in use
            return 0.0
        machine = self.machine
        ranks, of_node = len(exchange.ranks), Counter(rank // machine.gpus_per_node for rank in exchange.ranks)
        share, bandwidth = (ranks - 1) / ranks, machine.node_gb_per_s
        if exchange.operation in (RECEIVE, BROADCAST):
            share = 1.0
        elif exchange.operation == ALL_REDUCE:
            share *= 2
        if len(of_node) > 1:
            here = min(of_node.values())
            if exchange.operation == ALL_TO_ALL:
                share, here = (ranks - here) / ranks, 1
            elif exchange.operation == RECEIVE:
                here = 1
            # A ring leaves a node once, over the network adapters of all its ranks there.
            bandwidth = min(bandwidth, here * machine.network_gb_per_s)
        sending = traffic.bytes * share / (bandwidth * 1e9 * machine.achieved.collectives[self.end])
        return sending + traffic.number * machine.collective_us[1 - self.end] / 1e6

    def _hidden(self, tally: Tally, overlapped: bool, computing: float) -> float:
        """Returns the seconds of collectives that run beside the computing of one pack: all but the last bucket's."""
        if not overlapped:
            return 0.0
        total, number = self.exchanging(tally)[DATA], tally.traffic(DATA).number
        return min(total * (1 - 1 / number) if number else 0.0, computing)


def _only(tally: Tally, operation: str) -> Tally:
    chosen = {
        one: traffic for one, traffic in tally.exchanges.items() if (one.operation, one.kind) == (operation, DATA)
    }
    return Tally({}, chosen)


def _beyond(seconds: float, hidden_by: float) -> float:
    return max(0.0, seconds - hidden_by)
