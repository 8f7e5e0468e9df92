"""OLMo 2 and OLMo 3: Llama's matrices, with norms of what attention and MLP add alone, and norms over all heads of
queries and of keys; OLMo 3 has windows on three of four layers, and scales RoPE on the others."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import Family, Norms, refuse
from megatron_solopo.model.families.llama import HF_LAYER, MEGATRON_LAYER
from megatron_solopo.model.families.operators import Entry, Rename

NORMS = {"post_attention_layernorm": "post_attention_layernorm", "post_mlp_layernorm": "post_feedforward_layernorm"}


def _table(hf_config: PretrainedConfig, padded_vocab_size: int) -> tuple[Entry, ...]:
    attention, hf = MEGATRON_LAYER + "self_attention.core_attention", HF_LAYER + "self_attn"
    return (
        *llama.table(hf_config, padded_vocab_size, NORMS),
        *(Entry(f"{attention}.{x}_norm.weight", (f"{hf}.{x}_norm.weight",), Rename()) for x in "qk"),
    )


def _check(hf_config: PretrainedConfig) -> None:
    refuse(hf_config, attention_bias=False)


OLMO2, OLMO3 = (Family(name, _table, _check, norms=Norms.AFTER, width_norms=True) for name in ("olmo2", "olmo3"))
