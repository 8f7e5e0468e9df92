"""LoRA (arXiv 2106.09685): low-rank adapters beside the frozen matrices of a model's layers.

An adapter adds ``scale x B A x`` to what a matrix makes of its input x. megatron-core holds several projections of
Hugging Face in one matrix (``linear_qkv``, ``linear_fc1``); here each projection has A and B of its own, as in PEFT,
so that they are PEFT's numbers. The adapters of a matrix are one module beside it, which a forward hook calls: the
matrix keeps its class, parameters and names.

Of t tensor-parallel ranks each holds 1/t of B's rows where the matrix is cut by rows (column parallel), with all of A;
or 1/t of A's columns where it is cut by columns (row parallel), with all of B. Communication is of the rank's width:

- Column parallel: the gradient of A x is a sum over ranks. With sequence parallelism A x of this rank's tokens is
  gathered instead of x, and A's gradient is of these tokens, so it is summed over ranks as that of a norm.
- Row parallel: A x is a sum over ranks; with sequence parallelism each keeps its tokens of it, and B's gradient is of
  these tokens.

An expert's matrices have adapters of their own too. Its tokens are gathered before the first matrix and summed behind
the second by megatron-core's dispatcher, so only gradients of what each of its ranks has whole are summed here.

With --lora-dropout A's input is dropped out, of each projection anew, as in PEFT, in training alone. The generators are
those that megatron-core's recomputation sets back; `training.engine.seed_pack` seeds them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    random,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from transformers import PretrainedConfig

from megatron_solopo.config import ModelConfig
from megatron_solopo.lora_options import alpha_of
from megatron_solopo.model.families.projections import Adapted, adapted

SUFFIX = "_lora"
"""Name of the adapters of a matrix: that of the matrix and this."""


def lora_scale(model: ModelConfig) -> float:
    """Returns the factor of B A x: alpha / r, or rank-stabilised alpha / sqrt(r) (arXiv 2312.03732)."""
    assert model.lora_rank is not None
    return alpha_of(model) / (sqrt(model.lora_rank) if model.use_rslora else model.lora_rank)


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a key of a checkpoint, is an adapter's."""
    return f"{SUFFIX}." in name


@dataclass(frozen=True)
class Rows:
    """The rows of a projection in its matrix: in each of ``groups`` equal parts those from ``first``.

    Attributes:
        size: rows in each part.
    """

    groups: int
    first: int
    size: int

    def of(self, output: Tensor) -> Tensor:
        """[..., groups x part] -> [all leading x groups, size], a view."""
        return output.unflatten(-1, (self.groups, -1)).narrow(-1, self.first, self.size).flatten(0, -2)


class Adapter(nn.Module):
    """The adapters of one matrix.

    Parameters are ``q_proj_a`` [r, in] and ``q_proj_b`` [out, r] of each projection, cut as the module's text says.

    Args:
        group: the ranks that share the matrix.
        expert: whether it is one of an expert.
        projections: name -> its rows in the matrix, on this rank.
        column: whether the matrix is cut by rows (column parallel), else by columns.
        inputs: width of the matrix's input on this rank.
        rank: r, of each projection.
        scale: see `lora_scale`.
        dropout: --lora-dropout.

    Attributes:
        enabled: False where the model is computed without adapters.
    """

    def __init__(
        self,
        settings: TransformerConfig,
        group: dist.ProcessGroup,
        expert: bool,
        projections: dict[str, Rows],
        column: bool,
        inputs: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.projections, self.column, self.rank, self.scale = projections, column, rank, scale
        self.group, self.expert, self.enabled = group, expert, True
        self.sequence_parallel = settings.sequence_parallel and not expert
        # Of the same input every tensor-parallel rank draws the same.
        self.dropout = dropout
        self.draws_apart = group.size() > 1 and (self.sequence_parallel or not column)
        device = None if settings.use_cpu_initialization else torch.cuda.current_device()
        for name, rows in projections.items():
            for part, shape in (("a", (rank, inputs)), ("b", (rows.groups * rows.size, rank))):
                parameter = nn.Parameter(torch.zeros(shape, dtype=settings.params_dtype, device=device))
                if (part == "b") == column:
                    set_tensor_model_parallel_attributes(parameter, True, 0 if column else 1, 1)
                else:
                    setattr(parameter, "sequence_parallel", self.sequence_parallel)
                self.register_parameter(f"{name}_{part}", parameter)

    def matrices(self, part: str) -> list[Tensor]:
        """Returns A or B of every projection; of an expert what its ranks have whole sums its gradient over them."""
        each = [cast(Tensor, getattr(self, f"{name}_{part}")) for name in self.projections]
        if self.expert and (part == "a") == self.column:
            return [copy_to_tensor_model_parallel_region(one, group=self.group) for one in each]
        return each

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Returns the matrix's ``output`` [..., out] for its input x [..., in] with what the adapters add."""
        if not self.enabled:
            return output
        if self.column:
            inner = self.inner(x)
            into = _same if self.expert else gather_from_sequence_parallel_region if self.sequence_parallel else _copied
            return _AddLowRank.apply(output, into(inner), self.scale, [*self.projections.values()], *self.matrices("b"))
        return output + self.added(x)

    def added(self, x: Tensor) -> Tensor:
        """Returns what the adapter of a matrix cut by columns adds to its output, for its input x [..., in]."""
        (b,) = self.matrices("b")
        into = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else _summed
        into = _same if self.expert else into
        return _product(into(self.inner(x)), b) * self.scale

    def inner(self, x: Tensor) -> Tensor:
        """[..., in] -> A x of every projection, [..., r of all]; with dropout each of another x."""
        if not self.training or not self.dropout:
            return _product(x, torch.cat(self.matrices("a")))
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork() if self.draws_apart else contextlib.nullcontext():
            return torch.cat([_product(F.dropout(x, self.dropout), a) for a in self.matrices("a")], -1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns megatron-core's description of the parameters for checkpoints."""
        part, dimension = ("b", 0) if self.column else ("a", 1)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {f"{name}_{part}": dimension for name in self.projections},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """[..., in] -> [..., out]. Of more dimensions than two torch would round otherwise without gradients, as in the
    first pass of a recomputed layer, than with them (`should_fold` of its matmul)."""
    return F.linear(x.flatten(0, -2), matrix).view(*x.shape[:-1], len(matrix))


def _same(inner: Tensor) -> Tensor:
    return inner


def _copied(inner: Tensor) -> Tensor:
    return copy_to_tensor_model_parallel_region(inner)


def _summed(inner: Tensor) -> Tensor:
    return reduce_from_tensor_model_parallel_region(inner)


class _AddLowRank(torch.autograd.Function):
    """Adds scale x B z of each projection to its rows of a matrix's output, in place.

    A sum beside the output, and a view of the output that autograd follows, would each hold another output: at 128K
    tokens that of gate and up is 10 GB in a 7B model.
    """

    @staticmethod
    def forward(ctx, output: Tensor, inner: Tensor, scale: float, places: Sequence[Rows], *bs: Tensor) -> Tensor:
        ctx.save_for_backward(inner, *bs)
        ctx.scale, ctx.places = scale, places
        for rows, z, b in zip(places, inner.flatten(0, -2).chunk(len(bs), -1), bs, strict=True):
            target = rows.of(output)
            if rows.groups == 1:
                target.addmm_(z, b.t(), alpha=scale)
            else:
                target.add_((z @ b.t()).view(target.shape), alpha=scale)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch annotates any number
        inner, *bs = ctx.saved_tensors
        z = inner.flatten(0, -2)
        parts, of_bs = [], []
        for rows, part, b in zip(ctx.places, z.chunk(len(bs), -1), bs, strict=True):
            of_rows = rows.of(grad).reshape(len(z), rows.groups * rows.size)  # an expert may have no token
            parts.append((of_rows @ b).mul_(ctx.scale))
            of_bs.append((of_rows.t() @ part).mul_(ctx.scale))
        return grad, torch.cat(parts, -1).view(inner.shape), None, None, *of_bs


def attach_adapters(model: GPTModel, hf_config: PretrainedConfig, options: ModelConfig) -> None:
    """Freezes a model's weights and adds the adapters of --lora-rank, all zeros.

    With recomputation a chunk of layers has no gradient at all unless its input has one (torch's reentrant
    checkpoints), which frozen embeddings do not make.
    """
    assert options.lora_rank is not None
    model.requires_grad_(False)
    matrices, settings = adapted(hf_config, options), model.config
    of_all = cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())
    of_experts = cast(dist.ProcessGroup, parallel_state.get_expert_tensor_parallel_group())
    for layer in model.decoder.layers:
        for each in matrices:
            group = of_experts if each.entry.of_experts else of_all
            for owner, expert in each.owners(layer):
                matrix: Any = getattr(owner, each.name)
                rows, inputs = matrix.weight.shape
                column = not isinstance(matrix, RowParallelLinear)
                numbers = options.lora_rank, lora_scale(options), options.lora_dropout
                projections = _rows(each, rows, group.size())
                adapter = Adapter(settings, group, expert is not None, projections, column, inputs, *numbers)
                owner.register_module(each.name + SUFFIX, adapter)
                matrix.register_forward_hook(_Adding(adapter))
    if model.pre_process:
        model.embedding.register_forward_hook(_foldable)
        if settings.recompute_granularity is not None:
            model.embedding.register_forward_hook(_with_gradient)


def _foldable(module: nn.Module, inputs: object, embeddings: Tensor) -> Tensor:
    """Returns embeddings [tokens, 1, h] with the strides of a new tensor.

    megatron-core transposes [1, tokens, h], and the stride of the dimension of size 1 stays that of all tokens. A
    product of such a tensor with a frozen matrix, the first of layer 0, is not folded into one of two matrices
    (`should_fold` of torch's matmul): torch multiplies each token alone, and on a CPU copies the matrix for each.
    """
    return embeddings.flatten(0, 1).view(embeddings.shape)


def _rows(matrix: Adapted, rows: int, ranks: int) -> dict[str, Rows]:
    """Returns the rows of each projection among the ``rows`` of its matrix on one of so many ranks."""
    parts = matrix.entry.operator.parts()
    groups = max(parts.groups // ranks, 1)
    unit = rows // groups // sum(parts.shares)
    return {
        name: Rows(groups, sum(parts.shares[:place]) * unit, parts.shares[place] * unit)
        for name, place in matrix.projections.items()
    }


class _Adding:
    """The forward hook of a matrix that calls its adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, matrix: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> Any:
        return self.adapter(inputs[0], output[0]), output[1]


def adapter_of(matrix: nn.Module) -> Adapter | None:
    """Returns the adapter beside a matrix, if it has one."""
    hooks = (hook for hook in matrix._forward_hooks.values() if isinstance(hook, _Adding))
    return next((hook.adapter for hook in hooks), None)


def _with_gradient(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def adapters(models: Iterable[nn.Module]) -> Iterator[Adapter]:
    """Yields the adapters of models."""
    for model in models:
        yield from (module for module in model.modules() if isinstance(module, Adapter))


def has_adapters(models: Iterable[nn.Module]) -> bool:
    """Whether models have adapters, so that their other weights are frozen."""
    return next(adapters(models), None) is not None


@contextlib.contextmanager
def without_adapters(models: Sequence[nn.Module]) -> Iterator[None]:
    """Computes the models without their adapters, inside the block."""
    for adapter in adapters(models):
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters(models):
            adapter.enabled = True


def random_states(module: nn.Module) -> Any:
    """Returns what `drawn_again` needs for a module whose adapters have dropout; None of another."""
    return random._get_all_rng_states() if any(adapter.dropout for adapter in adapters([module])) else None


@contextlib.contextmanager
def drawn_again(states: Any) -> Iterator[None]:
    """Draws what was drawn after `random_states`, inside the block, as megatron-core's recomputation does."""
    if states is None:
        yield
        return
    with random._fork_rng():
        random._set_all_rng_states(*states)
        yield
