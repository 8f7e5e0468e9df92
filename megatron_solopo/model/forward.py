"""A pack through the model: summed log-probs of each segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_solopo.model.attention import layout_of
from megatron_solopo.model.log_probs import response_log_probs, segment_sums
from megatron_solopo.model.rope import RotaryFrequencies
from megatron_solopo.model.router import padding_mask
from megatron_solopo.pack import Pack


@dataclass(frozen=True)
class LogProbHead:
    """What turns final hidden states into log-probs.

    Attributes:
        vocab_size: real rows of the vocabulary.
        chunk_size: response tokens whose logits exist at one time.
        frequencies: the model's RoPE.
    """

    vocab_size: int
    chunk_size: int
    frequencies: RotaryFrequencies


def segment_log_probs(model: nn.Module, pack: Pack, head: LogProbHead, dtype: Any) -> Tensor:
    """Runs a pack through a GPTModel (or its DDP wrapper).

    Returns:
        On the last pipeline stage [N] summed log-probs of each segment's learnt tokens, nats, float32 or float64;
        on the others the hidden states that go on to the next stage.
    """

    sequence_parallel = get_model_config(model).sequence_parallel

    def process(hidden_states: Tensor, output_layer: nn.Module, output_weight: Tensor | None, **ignored: Any) -> Tensor:
        weight = output_layer.weight if output_weight is None else output_weight
        if sequence_parallel:  # [S / tp, 1, H]; the head sums its gradient over the processes itself
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        states = hidden_states[:, 0].index_select(0, pack.predictors)  # [S, 1, H] -> [R, H]
        shared = parallel_state.get_tensor_model_parallel_world_size() > 1
        group = parallel_state.get_tensor_model_parallel_group() if shared else None
        log_probs = response_log_probs(states, weight, pack.targets, head.vocab_size, head.chunk_size, group)
        return segment_sums(log_probs, pack.segments, len(pack.segment_roles))

    return model(
        input_ids=pack.tokens[None],
        position_ids=None,  # positions act through the layout's RoPE
        attention_mask=None,
        packed_seq_params=layout_of(pack, head.frequencies, dtype),
        padding_mask=padding_mask(model, pack),
        output_processor=process,
    )
