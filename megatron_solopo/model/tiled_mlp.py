"""An MLP that is computed tile by tile of the tokens, forward and backward.

Gate, up and their product are 3 x the MLP's width a token, in backward as much again: the largest part of a layer's
working set. Here they exist for one tile at a time, and a layer keeps the MLP's input alone. Backward computes a tile's
gate, up and product again. The scheme is that of ALST (arXiv 2506.13996, section 3.3.2) and of Liger's
``LigerTiledMLPFunction``, with two differences:

- A weight gets one gradient, the sum over the tiles. A checkpoint a tile would give autograd one for each tile, and
  DDP's overlapped reduction counts them.
- ``linear_fc2`` of portable layers is not computed again: its gradients need its input alone. Where the layer is
  recomputed itself, that recomputation leaves the MLP out, so that full recomputation is cheaper with tiles.

With LoRA the matrices are frozen and the weights are those of the adapters, which a tile computes beside the matrices.

Under tensor parallelism a tile is a part of this rank's rows. With sequence parallelism each tile is gathered before
``linear_fc1`` and its result summed and scattered behind ``linear_fc2``, as the matrices do it anyway: a gather around
all tiles would hold all tokens, which is as much as the tiles save in a layer of many ranks. Messages are as many times
smaller as there are tiles.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_solopo.model.lora import adapter_of, drawn_again, random_states
from megatron_solopo.model.repeated import save_input, saved_input
from megatron_solopo.model.tiles import tiles_of
from megatron_solopo.parallel.products import add_product, added_gradient


def recomputed_alone(settings: TransformerConfig) -> bool:
    """Whether each layer that is recomputed is so for itself, so that nothing reads its result."""
    alone = settings.recompute_method == "block" or settings.recompute_num_layers == 1
    return settings.recompute_granularity == "full" and alone


class TiledMLP(MLP):
    """megatron-core's MLP, whose parameters and names it has, with --mlp-tiles ``tiles``."""

    tiles: str

    @classmethod
    def as_mlp_submodule(cls, *arguments: Any, tiles: str, **settings: Any) -> TiledMLP:
        """Builds it as megatron-core builds the MLP of a layer."""
        mlp = cast(TiledMLP, super().as_mlp_submodule(*arguments, **settings))
        mlp.tiles = tiles
        return mlp

    def forward(self, hidden_states: Tensor, **ignored: object) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # no experts
        """[S, 1, hidden] -> [S, 1, hidden], and no bias; S is this rank's rows with sequence parallelism."""
        recomputing = torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
        # A recomputation of the layer is for backward, which reads no result of its last operator.
        function = _Unread if recomputing and recomputed_alone(self.config) else _Tiled
        return cast(Tensor, function.apply(hidden_states, self, *self.parameters())), None

    @property
    def ranks(self) -> int:
        """The ranks that share each matrix."""
        return cast(Any, self.tp_group).size()

    @property
    def gathers(self) -> bool:
        """Whether a tile has rows of all ranks, which are gathered for it."""
        return self.config.sequence_parallel and self.ranks > 1

    def rows(self, x: Tensor) -> int:
        """Returns the rows of a tile of ``x``."""
        rows = len(x) * (self.ranks if self.config.sequence_parallel else 1)
        return -(-len(x) // tiles_of(self.tiles, rows, self.config.hidden_size))

    def trained(self) -> list[Tensor]:
        """Returns the parameters that have gradients; with LoRA those of the adapters."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def adds_to_main_grad(self) -> bool:
        """Whether products add the gradients of matrices to DDP's sums; portable layers not to sums in 16 bits, which
        would round the gradient of each tile."""
        matrix: Any = self.linear_fc2
        if not self.config.gradient_accumulation_fusion or not matrix.weight.requires_grad:
            return False
        return not isinstance(matrix, RowParallelLinear) or cast(Any, matrix.weight).main_grad.dtype == torch.float32

    def tile(self, x: Tensor) -> Tensor:
        """Computes a tile of rows, with megatron-core's MLP."""
        return super().forward(x)[0]

    def backward_of_tile(self, x: Tensor, grad: Tensor, sums: _Sums) -> Tensor:
        """Adds the gradients of the weights to ``sums`` and returns that of ``x``, from that of the tile's result."""
        first: Any = self.linear_fc1
        second: Any = self.linear_fc2
        if not isinstance(second, RowParallelLinear):
            return self.backward_by_autograd(x, grad, sums)
        if not second.weight.requires_grad:
            return self.backward_of_adapters(x, grad, sums)
        if self.gathers:
            x, grad = (gather_from_sequence_parallel_region(rows, group=self.tp_group) for rows in (x, grad))
        inputs = torch.matmul(x, first.weight.t()).requires_grad_()
        with torch.enable_grad():
            product = cast(Any, self.activation_func)(inputs)
        sums.add_product(second.weight, grad, product.detach())
        (of_inputs,) = torch.autograd.grad(product, inputs, grad @ second.weight)
        sums.add_product(first.weight, of_inputs, x)
        of_x = of_inputs @ first.weight
        if self.gathers:
            return reduce_scatter_to_sequence_parallel_region(of_x, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(of_x, group=self.tp_group)

    def backward_of_adapters(self, x: Tensor, grad: Tensor, sums: _Sums) -> Tensor:
        """`backward_of_tile` with frozen matrices, which have gradients of their inputs alone.

        Here too ``linear_fc2`` is not computed again: its input gets the gradient through the matrix as a product, and
        that through the adapters from what they add.
        """
        second: Any = self.linear_fc2
        adapter, trained, x = adapter_of(second), self.trained(), x.detach().requires_grad_()
        of_result = gather_from_sequence_parallel_region(grad, group=self.tp_group) if self.gathers else grad
        of_results = [of_result @ second.weight]
        with torch.enable_grad():
            results = [cast(Any, self.activation_func)(cast(Any, self.linear_fc1)(x)[0])]
            if adapter is not None:
                results.append(adapter.added(results[0]))
                of_results.append(grad)
        of_x, *gradients = torch.autograd.grad(results, [x, *trained], of_results)
        sums.add(trained, gradients)
        return of_x

    def backward_by_autograd(self, x: Tensor, grad: Tensor, sums: _Sums) -> Tensor:
        """`backward_of_tile` of other matrices than megatron-core's own, whose gradients are their own affair."""
        parameters, x = self.trained(), x.detach().requires_grad_()
        with torch.enable_grad():
            result = self.tile(x)
        of_x, *gradients = torch.autograd.grad(result, [x, *parameters], grad)
        sums.add(parameters, gradients)
        return of_x


class _Sums:
    """The gradients of an MLP's parameters, summed over its tiles.

    Those of matrices are in DDP's sums where products add them there; the others are summed in float32 at least.
    """

    def __init__(self, fused: bool) -> None:
        self.fused = fused
        self.sums: dict[Tensor, Tensor] = {}

    def _added(self, parameter: Tensor) -> bool:
        return self.fused and parameter.dim() == 2

    def add(self, parameters: list[Any], gradients: list[Tensor]) -> None:
        """Adds gradients that autograd computed."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if not self._added(parameter):
                self._sum(parameter).add_(gradient)

    def add_product(self, weight: Tensor, grad: Tensor, x: Tensor) -> None:
        """Adds the gradient of a weight, [out, in], from that of its result, [S, 1, out], and its input, [S, 1, in]."""
        total = cast(Any, weight).main_grad if self._added(weight) else self._sum(weight)
        add_product(total, grad.flatten(0, 1).t(), x.flatten(0, 1))

    def _sum(self, parameter: Tensor) -> Tensor:
        if parameter not in self.sums:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self.sums[parameter] = torch.zeros_like(parameter, dtype=wide)
        return self.sums[parameter]

    def total(self, parameter: Tensor) -> Tensor:
        """Returns what autograd gets for the parameter."""
        if self._added(parameter):
            return added_gradient(parameter)
        return self.sums.pop(parameter).to(parameter.dtype)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mlp: TiledMLP, *parameters: Tensor) -> Tensor:
        ctx.mlp, ctx.random = mlp, random_states(mlp)
        save_input(ctx, x)
        result, rows = torch.empty_like(x), mlp.rows(x)
        for tile, of_tile in zip(x.split(rows), result.split(rows), strict=True):
            of_tile.copy_(mlp.tile(tile))
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        (x,), mlp = saved_input(ctx), ctx.mlp
        of_x, rows, sums = torch.empty_like(x), mlp.rows(x), _Sums(mlp.adds_to_main_grad())
        with drawn_again(ctx.random):
            for tile, of_result, of_tile in zip(x.split(rows), grad.split(rows), of_x.split(rows), strict=True):
                of_tile.copy_(mlp.backward_of_tile(tile, of_result, sums))
        totals = (sums.total(parameter) if parameter.requires_grad else None for parameter in mlp.parameters())
        return of_x, None, *totals


class _Unread(_Tiled):
    """`_Tiled` whose result nothing reads: not a number, so that reading it would be noticed."""

    @staticmethod
    def forward(ctx, x: Tensor, mlp: TiledMLP, *parameters: Tensor) -> Tensor:
        ctx.mlp, ctx.random = mlp, random_states(mlp)
        save_input(ctx, x)
        return torch.full_like(x, torch.nan)
