"""megatron-core's Transformer Engine layers with attention over packs; importable only with Transformer Engine."""

from __future__ import annotations

from typing import Any

import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports] (optional)
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_submodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_solopo.model.attention import PackedAttention, PackLayout, has_sinks, is_windowed, layout_of
from megatron_solopo.model.router import Router
from megatron_solopo.model.swiglu import SwiGLU
from megatron_solopo.parallel.context import method_of
from megatron_solopo.parallel.layout import select
from megatron_solopo.parallel.sequences import SequenceLayout

FINAL_NORM = TENorm


class TEPackedAttention(TEDotProductAttention):
    """Transformer Engine's attention over a pack: one call of its kernels for packed sequences (THD).

    A completion's keys are its prompt's and its own, aligned at the end (bottom right). With context parallelism
    (p2p, a2a) every piece is a sequence of its own, and Transformer Engine's zig-zag is that of `parallel.zigzag`.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (it is called with a `PackLayout` only)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        *,
        packed_seq_params: PackLayout,
        **ignored: object,
    ) -> Tensor:
        """query [S, heads, head_dim], key and value [S, kv_heads, head_dim] before RoPE -> [S, heads x head_dim]."""
        # The window itself is Transformer Engine's: megatron-core gives it the layer's.
        layout = layout_of(packed_seq_params, is_windowed(self.config, self.layer_number))
        without_rope: Any = self.config.no_rope_freq
        if not (without_rope and without_rope[self.layer_number - 1]):
            query, key = layout.rotate_query(query), layout.rotate(key)
        sequences = layout.attention
        assert isinstance(sequences, SequenceLayout)
        # megatron-core's forward has no bottom-right mask for packed sequences.
        return te.DotProductAttention.forward(
            self,
            query,
            select(key, sequences.keys),
            select(value, sequences.keys).contiguous(),  # a view would keep queries and keys before RoPE too
            None,
            qkv_format="thd",
            cu_seqlens_q=sequences.cu_seqlens_q,
            cu_seqlens_kv=sequences.cu_seqlens_kv,
            max_seqlen_q=sequences.max_seqlen_q,
            max_seqlen_kv=sequences.max_seqlen_kv,
            attn_mask_type="padding_causal" if sequences.keys is None else "padding_causal_bottom_right",
            pad_between_seqs=False,  # a piece's padding follows it and is computed like the rest
        )


def layer_spec(settings: TransformerConfig, te_activation: bool, experts: int | None) -> ModuleSpec:
    """Returns megatron-core's Transformer Engine layer with attention over packs and this package's router.

    Args:
        te_activation: SwiGLU is Transformer Engine's kernel, otherwise this package's function.
        experts: of the layer; None: it has an MLP.
    """
    submodules = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=experts,
        moe_grouped_gemm=settings.moe_grouped_gemm,
        qk_layernorm=settings.qk_layernorm,
        use_te_activation_func=te_activation,
    )
    assert isinstance(settings.cp_comm_type, str)  # one for all layers
    method = method_of(settings.context_parallel_size, settings.cp_comm_type)
    # Sinks are computed behind the flash kernel, which returns log-sum-exps.
    attention = TEPackedAttention if method.kernels_of_layers and not has_sinks(settings) else PackedAttention
    # megatron-core declares these parts of a layer as any builder.
    submodules.self_attention.submodules.core_attention = attention  # pyright: ignore[reportAttributeAccessIssue]
    mlp: Any = submodules.mlp  # a functools.partial
    parts = mlp.keywords["submodules"]
    if experts:
        parts.router = Router
        parts = parts.experts.keywords["submodules"]
    if not te_activation:
        parts.activation_func = SwiGLU
    return ModuleSpec(module=TransformerLayer, submodules=submodules)
