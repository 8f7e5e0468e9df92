"""Runs a pack through the model: summed log-probs of each segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_solopo.model.attention import attention_kernels, pack_layout, window_of
from megatron_solopo.model.delta_net import taps_of
from megatron_solopo.model.log_probs import most_likely, response_log_probs, segment_sums
from megatron_solopo.model.rope import RotaryFrequencies
from megatron_solopo.model.router import padding_mask
from megatron_solopo.pack import Pack
from megatron_solopo.parallel.context import method_of
from megatron_solopo.parallel.device_pack import DevicePack, cut, on_device
from megatron_solopo.parallel.products import weight_of


@dataclass(frozen=True)
class LogProbHead:
    """Turns final hidden states into log-probs.

    Attributes:
        vocab_size: real rows of the vocabulary.
        chunk_size: response tokens whose logits exist at one time.
        frequencies: the model's RoPE.
        cap: of the logits, `fields.logit_cap`.
    """

    vocab_size: int
    chunk_size: int
    frequencies: RotaryFrequencies
    cap: float | None


def device_pack(pack: Pack, settings: TransformerConfig, device: torch.device) -> DevicePack:
    """Returns this rank's part of a pack, on its device.

    Args:
        pack: a pack on the CPU.
        settings: the model's config.
    """
    group = cast(dist.ProcessGroup, parallel_state.get_context_parallel_group())
    assert isinstance(settings.cp_comm_type, str)  # one for all layers
    method = method_of(group.size(), settings.cp_comm_type)
    kernels = attention_kernels(settings, device)
    part = cut(pack, method, kernels, group.rank(), group.size(), group, window_of(settings), taps_of(settings))
    return on_device(part, device)


def segment_log_probs(
    model: nn.Module, pack: DevicePack, head: LogProbHead, dtype: torch.dtype, squares: bool = False
) -> Tensor:
    """Runs a pack through a GPTModel (or its DDP wrapper).

    Args:
        squares: whether the result has a second row, see `response_log_probs`.

    Returns:
        On the last pipeline stage [N] summed log-probs of each segment's trained tokens, each with its weight of
        `Pack.weights`, nats, float32 or float64 ([2, N] with ``squares``); on the others the hidden states for the next
        stage.
    """
    part, fused = pack.pack, get_model_config(model).gradient_accumulation_fusion

    def sums(states: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        log_probs = response_log_probs(
            states, weight, part.targets, head.vocab_size, head.chunk_size, group, fused, squares, head.cap
        )
        if part.weights is not None:
            log_probs = log_probs * part.weights.to(log_probs.dtype)
        return segment_sums(log_probs, part.segments, len(part.scored))

    return _of_predictors(model, pack, head, dtype, sums)


def greedy_tokens(model: nn.Module, pack: DevicePack, head: LogProbHead, dtype: torch.dtype) -> Tensor:
    """Runs a pack whose ``segments`` number its R predicted tokens through a GPTModel (or its DDP wrapper).

    Returns:
        On the last pipeline stage [R] float64, the most likely token at each place, on every rank that shares the pack;
        on the others the hidden states for the next stage.
    """
    part = pack.pack

    def likeliest(states: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        tokens = most_likely(states, weight, head.vocab_size, head.chunk_size, group, head.cap)
        places = torch.zeros(pack.predicted, dtype=torch.float64, device=tokens.device)
        return places.index_copy(0, part.segments, tokens.double())

    return _of_predictors(model, pack, head, dtype, likeliest)


def _of_predictors(
    model: nn.Module,
    pack: DevicePack,
    head: LogProbHead,
    dtype: torch.dtype,
    compute: Callable[[Tensor, Tensor, dist.ProcessGroup | None], Tensor],
) -> Tensor:
    """Runs a pack; on the last stage returns what ``compute`` makes of the predictors' states, added over the
    context-parallel ranks.

    Args:
        compute: ([R, H] states of this rank's predictors, [V / tp, H] output weight, tensor-parallel group or None).
    """
    part, context = pack.pack, parallel_state.get_context_parallel_group()
    settings = get_model_config(model)
    layout = pack_layout(
        pack.layout, part.positions, head.frequencies, dtype, settings.apply_rope_fusion, pack.windowed, pack.recurrent
    )
    sequence_parallel = settings.sequence_parallel

    def process(
        hidden_states: Tensor, output_layer: nn.Module, output_weight: Tensor | None, **ignored: object
    ) -> Tensor:
        weight = weight_of(output_layer)  # waits for its gather, also where the weight is the embedding's
        if output_weight is not None:
            weight = output_weight
        if sequence_parallel:  # [S / tp, 1, H]; the head sums its gradient over the ranks itself
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        states = hidden_states[:, 0].index_select(0, part.predictors)  # [S, 1, H] -> [R, H]
        parallel = parallel_state.get_tensor_model_parallel_world_size() > 1
        group = cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group()) if parallel else None
        # Every context-parallel rank continues with the total sums, and its gradient is that of its own tokens.
        return reduce_from_tensor_model_parallel_region(compute(states, weight, group), context)

    return model(
        input_ids=part.tokens[None],
        position_ids=None,  # positions enter through the layout's RoPE
        attention_mask=None,
        packed_seq_params=layout,
        padding_mask=padding_mask(model, pack.is_padding),
        output_processor=process,
    )
