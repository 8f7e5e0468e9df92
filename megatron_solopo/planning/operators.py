"""What one call of an operator costs: floating-point operations, and bytes read and written.

Formulas of matrix products are torch's (`torch.utils.flop_counter`). Those of attention are not, since they count all
pairs where a causal kernel skips most of the upper half. Bytes come from the schema of the operator: each operand is
read once, each result written once, and views cost nothing. torch's runtime estimator
(`torch.distributed._tools.runtime_estimator`) does the same, but divides by the rates of the GPU that it runs on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

PRODUCTS, EXPERTS, MEMORY_BOUND = "products", "expert products", "memory-bound"
ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention forward", "attention backward"
ON_HOST, LINK = "on the host", "to the host and back"

_FORWARD = {
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._flash_attention_forward,
    aten._efficient_attention_forward,
}
_BACKWARD = {
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
    aten._flash_attention_backward,
    aten._efficient_attention_backward,
}
_ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
_IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
"""Products that torch's registry of operations does not have under this name."""
_FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
"""Operators beside views that neither read nor write."""
_NOT_READ = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"}
"""Operators that write their first operand without reading it."""
_READ_ROWS = {"embedding", "gather", "index", "index_select", "masked_select"}
"""Operators that read of their first operand as much as they write."""
_WRITE_ROWS = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_"}
"""Operators that change of their first operand as much as their last one holds."""
_COPIES = {"copy_", "_to_copy"}
_NOT_WRITTEN = {"_fused_adam_": {1}, "_fused_adamw_": {1}}
"""Operands that a schema calls written and that are not: gradients, which are not scaled here."""


class Operation(NamedTuple):
    """One call of an operator.

    Attributes:
        kind: `PRODUCTS`, `EXPERTS` (grouped products), `ATTENTION_FORWARD`, `ATTENTION_BACKWARD` or `MEMORY_BOUND`; in
            a GPU's run also `ON_HOST`, what the host's cores compute, and `LINK`, copies between GPU and host.
        dtype: of its first operand, as torch names it; of products that of their factors, whatever they are added to.
        flops: floating-point operations, a multiplication and an addition being two; 0 where memory bounds it.
        bytes: read and written; of `LINK` those that move.
    """

    kind: str
    dtype: str
    flops: int
    bytes: int


def operation_of(
    func: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any, device: str = "cpu"
) -> Operation | None:
    """Returns the cost of a call that a dispatch mode saw; None for what costs nothing, and for tensors that are not
    part of the step.

    Args:
        device: ``cuda`` or ``cpu``, on which the run computes.
    """
    if _is_free(func):
        return None
    tensors = list(_tensors((args, result)))
    if not tensors:
        return None
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    places = {tensor.device.type for tensor in tensors}
    if device == "cuda" and places == {"cpu"}:
        return Operation(ON_HOST, dtype, 0, _bytes(func, args, kwargs, result))
    if len(places) > 1 and func._opname in _COPIES:
        return Operation(LINK, dtype, 0, _size(result))
    kind, flops = _products(func, args, kwargs, result)
    if kind in (PRODUCTS, EXPERTS):  # the last factor; addmm's first operand is a sum, grouped products end with ids
        factors = (tensor for tensor in _tensors(args) if tensor.is_floating_point())
        dtype = str([*factors][-1].dtype).removeprefix("torch.")
    return Operation(kind, dtype, flops, _bytes(func, args, kwargs, result))


@cache
def _is_free(func: torch._ops.OpOverload) -> bool:
    return func.is_view or func.namespace != "aten" or func._opname in _FREE


def _products(func: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any) -> tuple[str, int]:
    """Returns the kind of an operator and its floating-point operations."""
    packet = func.overloadpacket
    if packet in _FORWARD or packet in _BACKWARD:
        named = _by_name(func, args, kwargs)
        # forward: scores and output; backward: scores again and the four gradients
        products = 2 if packet in _FORWARD else 5
        pairs_of_heads, head_dim = _pairs(packet, named), named["query"].shape[-1]
        kind = ATTENTION_FORWARD if packet in _FORWARD else ATTENTION_BACKWARD
        return kind, products * 2 * pairs_of_heads * head_dim
    if packet is aten._grouped_mm:  # [M, K] x [G, K, N] by rows, or [M, K] x [K, N] by groups of K
        rows, columns = args[0], args[1]
        groups = rows.shape[0] if rows.dim() > columns.dim() else 1  # or [G, M, K] x [K, N] by columns
        return EXPERTS, 2 * rows.numel() * columns.shape[-1] // groups
    packet = _IN_PLACE.get(packet, packet)
    if packet in flop_registry:
        operands = [value for value in args if not isinstance(value, torch.dtype)]  # of mm and addmm, the result's
        return PRODUCTS, int(flop_registry[packet](*operands, **kwargs, out_val=result))
    return MEMORY_BOUND, 0


def _by_name(func: torch._ops.OpOverload, args: Any, kwargs: Any) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def _pairs(packet: Any, named: dict[str, Any]) -> int:
    """Counts the pairs of a query and a key that a kernel computes, over all sequences and query heads."""
    query, key, causal = named["query"], named["key"], bool(named["is_causal"])
    if named.get("max_q") and query.dim() == 3:
        # Packed sequences [tokens, heads, head_dim]; `fake.rehearsal` keeps the values of what is sent to the device.
        with _disable_current_modes():
            lengths = [named[name].host_values.diff().tolist() for name in ("cum_seq_q", "cum_seq_k")]
        if named.get("window_size_left") is not None:
            return query.shape[1] * sum(
                windowed_pairs(*each, named["window_size_left"] + 1) for each in zip(*lengths, strict=True)
            )
        return query.shape[1] * sum(map(causal_pairs if causal else mul, *lengths))
    sequences, heads, queries, _ = query.shape
    keys = key.shape[2]
    if packet in (aten._flash_attention_forward, aten._flash_attention_backward):
        queries, heads, keys = query.shape[1], query.shape[2], key.shape[1]
    if not causal:
        return sequences * heads * queries * keys
    return sequences * heads * (blocked_pairs(queries, keys) if packet in _ON_CPU else causal_pairs(queries, keys))


def causal_pairs(queries: int, keys: int) -> int:
    """Counts the pairs of queries that are the last positions of ``keys``. What a kernel computes beyond them in the
    tiles of the diagonal counts as part of its efficiency."""
    return queries * keys - queries * (queries - 1) // 2


def windowed_pairs(queries: int, keys: int, window: int) -> int:
    """`causal_pairs` where each query attends to the last ``window`` keys up to its own."""
    hidden = max(0, keys - window)  # of the last query; of each query before it one less
    rows = min(queries, hidden)
    return causal_pairs(queries, keys) - rows * hidden + rows * (rows - 1) // 2


def blocked_pairs(queries: int, keys: int) -> int:
    """Counts the pairs that torch's kernel on CPU computes of a causal piece (2.11, aten/src/ATen/native/cpu/
    FlashAttentionKernel.cpp): blocks of queries, and for each all blocks of 512 keys up to its last query."""
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return sum(
        (min(begin + rows, queries) - begin) * min(-(-min(begin + rows, keys) // 512) * 512, keys)
        for begin in range(0, queries, rows)
    )


def _bytes(func: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any) -> int:
    name = func._opname
    if name in _WRITE_ROWS:
        return 3 * _size(args[-1] if isinstance(args[-1], Tensor) else args[-2])
    reads, writes = _roles(func)
    operands = [*args, *kwargs.values()] if kwargs else args
    written = _size(result) if writes == () else 0
    total = written
    for place, value in enumerate(operands):
        size = _size(value)
        if place == 0 and name in _READ_ROWS:
            size = min(size, written)
        if place not in reads:
            size = 0
        total += size + (_size(value) if place in writes else 0)
    return total


@cache
def _roles(func: torch._ops.OpOverload) -> tuple[frozenset[int] | range, tuple[int, ...]]:
    """Returns the places of the operands that are read, and of those that are written; () where the result is a new
    tensor."""
    arguments = func._schema.arguments
    writes = tuple(
        place
        for place, argument in enumerate(arguments)
        if argument.is_write and place not in _NOT_WRITTEN.get(func._opname, ())
    )
    unread = {0} if func._opname in _NOT_READ else {place for place in writes if arguments[place].is_out}
    return frozenset(range(len(arguments))) - unread, writes


def _size(value: Any) -> int:
    """Counts the bytes of the fake tensors in a value; what is expanded is read once."""
    if isinstance(value, FakeTensor):
        lengths = (size for size, step in zip(value.shape, value.stride(), strict=True) if step or size == 0)
        return prod(lengths) * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _tensors(values: Any) -> Iterator[FakeTensor]:
    for value in values:
        if isinstance(value, FakeTensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
