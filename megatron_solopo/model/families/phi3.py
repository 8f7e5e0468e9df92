"""Phi-3, Phi-3.5 and Phi-4: Llama's layout with queries, keys and values in one matrix, and gate and up in one."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import Family
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, FusedGateUp, FusedQKV


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    qkv = FusedQKV(*llama.head_sizes(hf_config))
    return (
        *llama.table_without_qkv(hf_config, padded_vocab_size),
        Entry(MEGATRON_LAYER + "self_attention.linear_qkv.weight", (HF_LAYER + "self_attn.qkv_proj.weight",), qkv),
        gate_up_entry(),
        llama.down_entry(),
    )


def gate_up_entry() -> Entry:
    """Returns the MLP's first matrix where Hugging Face holds gate and up in one tensor."""
    return Entry(MEGATRON_LAYER + "mlp.linear_fc1.weight", (HF_LAYER + "mlp.gate_up_proj.weight",), FusedGateUp())


PARTIAL = frozenset({"partial_rotary_factor"})

# original_max_position_embeddings acts with longrope alone, which is refused
PHI3 = Family("phi3", _table, fields=frozenset({"original_max_position_embeddings"}), rope_fields=PARTIAL)
