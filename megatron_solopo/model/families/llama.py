"""Llama 2 / 3 / 3.1 / 3.2: RMSNorm, RoPE, grouped queries, SwiGLU, no biases."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from megatron_solopo.model.families.family import Family, refuse
from megatron_solopo.model.families.fields import head_dim
from megatron_solopo.model.families.operators import Entry, InterleaveQKV, PadRows, Rename, StackGateUp

MEGATRON_LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
"""The norms of a layer: megatron-core's name -> Hugging Face's. `norm.SandwichLayer` has two more."""


def table(hf_config: PretrainedConfig, padded_vocab_size: int, norms: Mapping[str, str] = NORMS) -> tuple[Entry, ...]:
    """Returns every parameter of the Llama layout; families with the same layout add to it."""
    return (*table_without_mlp(hf_config, padded_vocab_size, norms), *mlp_entries())


def mlp_entries(name: str = "mlp", layers: range | None = None) -> tuple[Entry, ...]:
    """Returns an MLP of the layers that have it, by its name in a layer, which is both sides'."""
    gate_up = (f"{HF_LAYER}{name}.gate_proj.weight", f"{HF_LAYER}{name}.up_proj.weight")
    return (
        Entry(f"{MEGATRON_LAYER}{name}.linear_fc1.weight", gate_up, StackGateUp(), layers),
        Entry(f"{MEGATRON_LAYER}{name}.linear_fc2.weight", (f"{HF_LAYER}{name}.down_proj.weight",), Rename(), layers),
    )


def table_without_mlp(
    hf_config: PretrainedConfig, padded_vocab_size: int, norms: Mapping[str, str] = NORMS
) -> tuple[Entry, ...]:
    """Returns vocabulary, norms and attention, which families with another MLP share."""
    qkv = InterleaveQKV(*head_sizes(hf_config))
    entry = Entry(MEGATRON_LAYER + "self_attention.linear_qkv.weight", qkv_names(HF_LAYER, "weight"), qkv)
    return (*table_without_qkv(hf_config, padded_vocab_size, norms), entry)


def head_sizes(hf_config: PretrainedConfig) -> tuple[int, int, int]:
    """Returns query heads, key-value heads and head_dim."""
    return hf_config.num_attention_heads, hf_config.num_key_value_heads, head_dim(hf_config)


def down_entry() -> Entry:
    """Returns the MLP's last matrix."""
    return Entry(MEGATRON_LAYER + "mlp.linear_fc2.weight", (HF_LAYER + "mlp.down_proj.weight",), Rename())


def table_without_qkv(
    hf_config: PretrainedConfig, padded_vocab_size: int, norms: Mapping[str, str] = NORMS
) -> tuple[Entry, ...]:
    """Returns vocabulary, norms and the matrix behind attention, which families with fused projections share."""
    proj = (HF_LAYER + "self_attn.o_proj.weight",)
    entry = Entry(MEGATRON_LAYER + "self_attention.linear_proj.weight", proj, Rename())
    return (*table_without_attention(hf_config, padded_vocab_size, norms), entry)


def table_without_attention(
    hf_config: PretrainedConfig, padded_vocab_size: int, norms: Mapping[str, str] = NORMS
) -> tuple[Entry, ...]:
    """Returns vocabulary and norms, which families with another attention share."""
    vocabulary = PadRows(hf_config.vocab_size, padded_vocab_size)
    megatron, hf = MEGATRON_LAYER, HF_LAYER
    entries = (
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),
        *(Entry(f"{megatron}{ours}.weight", (f"{hf}{theirs}.weight",), Rename()) for ours, theirs in norms.items()),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Rename()),
    )
    if not hf_config.tie_word_embeddings:
        entries += (Entry("output_layer.weight", ("lm_head.weight",), vocabulary),)
    return entries


def qkv_names(hf_layer: str, kind: str) -> tuple[str, str, str]:
    """Returns the names of a layer's query, key and value tensors."""
    query, key, value = (f"{hf_layer}self_attn.{part}_proj.{kind}" for part in "qkv")
    return query, key, value


def head_norms() -> tuple[Entry, ...]:
    """Returns the norms over each head of queries and keys that some families add."""
    return tuple(
        Entry(
            f"{MEGATRON_LAYER}self_attention.{x}_layernorm.weight", (f"{HF_LAYER}self_attn.{x}_norm.weight",), Rename()
        )
        for x in "qk"
    )


def _check(hf_config: PretrainedConfig) -> None:
    refuse(hf_config, attention_bias=False, mlp_bias=False)


LLAMA = Family("llama", table, _check)
