"""What a rehearsed step computes and exchanges: its operators and collectives, by part of the step.

torch's `FlopCounterMode` and runtime estimator do not serve (`planning.operators`); of the tools for collectives
`CollectiveOp` names the group of each, but sizes it by the tensor's storage, where gradients are views of one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_solopo.planning.fake import Repeats
from megatron_solopo.planning.memory import in_backward
from megatron_solopo.planning.operators import LINK, MEMORY_BOUND, ON_HOST, Operation, operation_of

TENSOR, CONTEXT, DATA, EXPERT, PIPELINE, OTHER = "tp", "cp", "dp", "ep", "pp", "other"
"""Kinds of process groups. Those that reduce gradients are `DATA`, over context-parallel ranks and of experts too."""

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = "all_reduce", "all_gather", "reduce_scatter", "all_to_all"
SEND, RECEIVE, BROADCAST = "send", "receive", "broadcast"

_COLLECTIVES = {
    "allreduce_": ALL_REDUCE,
    "allgather_": ALL_GATHER,
    "_allgather_base_": ALL_GATHER,
    "reduce_scatter_": REDUCE_SCATTER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "alltoall_": ALL_TO_ALL,
    "alltoall_base_": ALL_TO_ALL,
    "send": SEND,
    "recv_": RECEIVE,
    "broadcast_": BROADCAST,
}
"""torch's names of collectives -> ours."""


class Exchange(NamedTuple):
    """A kind of collective.

    Attributes:
        operation: such as `ALL_REDUCE`.
        kind: of the process group, such as `TENSOR`.
        ranks: of the group; of a send or a receive, the two that it is between.
    """

    operation: str
    kind: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind.

    Attributes:
        number: how many.
        bytes: of their complete messages: what an all-gather makes, a reduce-scatter takes, and a process has of an
            all-reduce or an all-to-all.
    """

    number: float = 0
    bytes: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.number + other.number, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.number * times, self.bytes * times)


@dataclass
class Tally:
    """What a part of a step computes and exchanges.

    Attributes:
        operations: how often each is called.
        exchanges: collectives in groups of more than one process.
    """

    operations: dict[Operation, float] = field(default_factory=dict)
    exchanges: dict[Exchange, Traffic] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        total = Tally(dict(self.operations), dict(self.exchanges))
        for operation, count in other.operations.items():
            total.operations[operation] = total.operations.get(operation, 0) + count
        for exchange, traffic in other.exchanges.items():
            total.exchanges[exchange] = total.exchanges.get(exchange, Traffic()) + traffic
        return total

    def __mul__(self, times: float) -> Tally:
        return Tally(
            {operation: count * times for operation, count in self.operations.items()},
            {exchange: traffic * times for exchange, traffic in self.exchanges.items()},
        )

    def flops(self, *kinds: str, dtype: str | None = None) -> float:
        """Returns the floating-point operations of these kinds of operators (all if none is given), in one dtype or
        all."""
        return sum(
            count * operation.flops
            for operation, count in self.operations.items()
            if (not kinds or operation.kind in kinds) and dtype in (None, operation.dtype)
        )

    @property
    def moved(self) -> float:
        """Bytes that memory-bound operators read and write."""
        return sum(count * each.bytes for each, count in self.operations.items() if each.kind == MEMORY_BOUND)

    @property
    def operators(self) -> float:
        """Operators that the host starts on the device."""
        return sum(count for each, count in self.operations.items() if each.kind not in (LINK, ON_HOST))

    def traffic(self, kind: str, operation: str | None = None) -> Traffic:
        """Returns the collectives in one kind of group, of one operation or all."""
        chosen = (
            traffic
            for exchange, traffic in self.exchanges.items()
            if exchange.kind == kind and operation in (None, exchange.operation)
        )
        return sum(chosen, Traffic())


@dataclass(frozen=True)
class Work:
    """What a process does in a step.

    Attributes:
        forward, backward: of one pack; what is recomputed is part of backward.
        update: once a step: zeroing gradients, their sums over copies of the model and their norm, the optimizer,
            gathering parameters, exchanging the weights with those of a resident reference.
        score: of one pack, the resident reference's forward pass.
    """

    forward: Tally
    backward: Tally
    update: Tally
    score: Tally = field(default_factory=Tally)

    def of_step(self, packs: int) -> Tally:
        """Returns what a step of this many packs computes and exchanges."""
        return (self.score + self.forward + self.backward) * packs + self.update


class Counts(TorchDispatchMode):
    """Counts operators on fake tensors, and collectives; create it when the process groups exist.

    Args:
        device: ``cuda`` or ``cpu``, on which the run computes.
        repeats: how often each operator is called for the one that is rehearsed.
    """

    def __init__(self, device: str, repeats: Repeats) -> None:
        super().__init__()
        self._kinds, self._device, self._repeats = _kinds(), device, repeats
        self._in_pack = self._scores = False
        self._forward, self._backward, self._update, self._score = Tally(), Tally(), Tally(), Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in collective_ops and func not in sync_ops:
            self._exchange(func, args)
        elif (operation := operation_of(func, args, kwargs, result, self._device)) is not None:
            operations = self._part().operations
            operations[operation] = operations.get(operation, 0) + self._repeats.times
        return result

    def _part(self) -> Tally:
        return self._update if not self._in_pack else self._of_pack()

    def _of_pack(self) -> Tally:
        return self._backward if in_backward() else self._score if self._scores else self._forward

    def _exchange(self, func: Any, args: Any) -> None:
        group = CollectiveOp.get_process_group(func, args)
        if group.size() == 1:
            return
        operation = _COLLECTIVES[func._opname]
        kind, ranks = self._kinds.get(group.group_name, OTHER), tuple(dist.get_process_group_ranks(group))
        part = self._update if kind == DATA else self._part()
        if operation in (SEND, RECEIVE):  # the first receive is before the first forward pass
            part = self._of_pack()
            ranks = tuple(sorted((dist.get_rank(), ranks[args[2]])))
        exchange = Exchange(operation, kind, ranks)
        part.exchanges[exchange] = part.exchanges.get(exchange, Traffic()) + Traffic(1, max(map(_bytes, args)))

    @contextmanager
    def following(self, engine: Any) -> Iterator[None]:
        """Within it, what follows the first forward pass is counted as part of packs, until gradients are complete."""
        settings = engine.models[0].config  # which the schedule reads
        finalize: Callable[..., Any] = settings.finalize_model_grads_func

        def begin(module: Any, args: Any) -> None:
            self._in_pack = True

        def finish(*args: Any, **kwargs: Any) -> Any:
            self._in_pack = False
            return finalize(*args, **kwargs)

        hooks = [chunk.register_forward_pre_hook(begin) for chunk in engine.chunks]
        settings.finalize_model_grads_func = finish
        try:
            yield
        finally:
            settings.finalize_model_grads_func = finalize
            for hook in hooks:
                hook.remove()

    def exchanging_weights(self, exchange: Callable[[], None]) -> Callable[[], None]:
        """Returns a function that brings a resident reference into the model's place and, called again, back: what
        follows the first call is counted as the reference's, the exchanges are part of the update."""

        def exchange_once_a_step() -> None:
            self._in_pack = False
            self._scores = not self._scores
            exchange()

        return exchange_once_a_step

    def work(self, packs: int) -> Work:
        """Returns what was counted of a step of this many packs."""
        of_pack = (part * (1 / packs) for part in (self._forward, self._backward))
        return Work(*of_pack, self._update, self._score * (1 / packs))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return math.prod(value.shape) * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _kinds() -> Mapping[str, str]:
    """Maps the name of each of megatron-core's process groups to its kind."""
    from megatron.core import parallel_state as state

    groups = {
        OTHER: [state.get_model_parallel_group()],
        TENSOR: [
            state.get_tensor_model_parallel_group(),
            state.get_tensor_and_context_parallel_group(),
            state.get_expert_tensor_parallel_group(),
        ],
        CONTEXT: [state.get_context_parallel_group()],
        EXPERT: [state.get_expert_model_parallel_group(), state.get_expert_tensor_and_model_parallel_group()],
        PIPELINE: [state.get_pipeline_model_parallel_group(), state.get_embedding_group(check_initialized=False)],
        DATA: [
            state.get_data_parallel_group(),
            state.get_data_parallel_group(with_context_parallel=True),
            state.get_expert_data_parallel_group(),
        ],
    }
    return {
        group.group_name: kind
        for kind, each in groups.items()
        for group in each
        if isinstance(group, dist.ProcessGroup)
    }
