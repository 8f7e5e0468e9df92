"""The core attention of a layer over a pack: RoPE by explicit positions, then the attention of the pack's layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel

from megatron_solopo.errors import UserError
from megatron_solopo.model import transformer_engine
from megatron_solopo.model.kept_attention import Results, recording, replaying
from megatron_solopo.model.offload import Offload
from megatron_solopo.model.rope import RotaryFrequencies, rotate
from megatron_solopo.parallel.context import method_of
from megatron_solopo.parallel.kernels import Kernels, kernels_for
from megatron_solopo.parallel.layout import RankLayout, backends_of


@dataclass
class PackLayout(PackedSeqParams):
    """The layout of a pack as every layer reads it; passed through megatron-core as its packed sequence parameters.

    Attributes:
        attention: layout of the rows that this rank computes.
        cos, sin: [S / cp, 1, head_dim] of each token's position.
        angles: [S / cp, 1, 1, head_dim] float32, radians, for Transformer Engine's kernel; None: cos and sin rotate.
        scaling: factor on the rotated values, which ``angles`` do not contain.
        kept: number of a layer -> what its attention kernels returned, until the layer is recomputed.
    """

    attention: RankLayout = field(kw_only=True)
    cos: Tensor = field(kw_only=True)
    sin: Tensor = field(kw_only=True)
    angles: Tensor | None = None
    scaling: float = 1.0
    kept: dict[int, Results] = field(default_factory=dict)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates [S / cp, heads, head_dim] by its rows' positions."""
        if self.angles is None:
            return rotate(x, self.cos, self.sin)
        # As a batch of one sequence (sbhd), whose kernel takes an angle for each row; that of packed sequences (thd)
        # counts positions from 0 in every sequence, and a response continues its prompt.
        rotated = rope_utils.fused_apply_rotary_pos_emb(x[:, None], self.angles)[:, 0]
        return rotated if self.scaling == 1 else rotated * self.scaling


def pack_layout(
    attention: RankLayout,
    positions: Tensor,
    frequencies: RotaryFrequencies,
    dtype: torch.dtype,
    rope_fusion: bool = False,
) -> PackLayout:
    """Makes the layout of a pack's rows, [S / cp] ``positions``, on their device.

    Args:
        rope_fusion: Transformer Engine's kernel rotates queries and keys.
    """
    cos, sin = frequencies(positions, dtype)
    angles = frequencies.angles(positions)[:, None, None] if rope_fusion else None
    scaling = frequencies.attention_scaling
    return PackLayout(qkv_format="thd", attention=attention, cos=cos, sin=sin, angles=angles, scaling=scaling)


def attention_kernels(settings: TransformerConfig, device: torch.device) -> Kernels:
    """Returns the kernels of a model's attention without context parallelism."""
    engine, sixteen_bits = settings.transformer_impl == transformer_engine.NAME, settings.params_dtype.itemsize == 2
    backend, deterministic = settings.attention_backend.name, settings.deterministic_mode
    return kernels_for(engine, device.type == "cuda", sixteen_bits, backend, deterministic)


def describe_kernels(settings: TransformerConfig, device: torch.device) -> str:
    """Describes in words, for the log, which kernels compute attention on a CUDA device.

    Raises:
        UserError: torch has no kernel for the model's prompts that holds no scores of all with all.
    """
    assert isinstance(settings.cp_comm_type, str)  # one for all layers
    flash = f"torch's flash kernel ({current_flash_attention_impl() or 'FA2'})"
    kernels = attention_kernels(settings, device)
    of_layers = method_of(settings.context_parallel_size, settings.cp_comm_type).kernels_of_layers
    if kernels is Kernels.FLASH or not of_layers:
        return f"attention: {flash}, one call for all sequences of a pack"
    if kernels is Kernels.ENGINE:
        return f"attention: Transformer Engine, {settings.attention_backend.name} kernels"
    if kernels is Kernels.BLOCKS:
        return "attention: torch's memory-efficient kernel, keys and values repeated for each query head"
    heads, kv_heads, size = settings.num_attention_heads, settings.num_query_groups, settings.kv_channels
    assert kv_heads and size
    query, key = (torch.zeros(1, n, 128, size, dtype=settings.params_dtype, device=device) for n in (heads, kv_heads))
    with sdpa_kernel(backends_of(settings.params_dtype, kernels is Kernels.CUDNN)):
        choose = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
        chosen = SDPBackend(choose(query, key, key, is_causal=True, enable_gqa=True))
    if chosen == SDPBackend.ERROR:
        raise UserError(
            "attention-unsupported",
            f"--attention-backend {settings.attention_backend.name}: torch has no such kernel on this GPU for "
            f"{heads} heads of {size}; use flash",
        )
    prompts = f"cuDNN {torch.backends.cudnn.version()}" if chosen == SDPBackend.CUDNN_ATTENTION else flash
    return f"attention: prompts on {prompts}, all responses of a pack in one call of {flash}"


class PackedAttention(nn.Module):
    """The portable core attention of a layer; the arguments are megatron-core's.

    Attributes:
        keeps: whether the kernels' results are kept where the layer is recomputed (model/kept_attention.py).
        offload: what moves them to the host meanwhile.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **ignored: object,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.layer_number = layer_number
        self.keeps = False
        self.offload: Offload | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        *,
        packed_seq_params: PackLayout,
    ) -> Tensor:
        """query [S, heads, head_dim], key and value [S, kv_heads, head_dim] before RoPE -> [S, heads x head_dim]."""
        layout = packed_seq_params
        # of a view backward would keep queries, keys and values before RoPE
        inputs = layout.rotate(query), layout.rotate(key), value.contiguous()
        attend = partial(layout.attention.attend, scale=self.softmax_scale)
        if self.keeps and self.training and not torch.is_grad_enabled():
            output, results = recording(attend, *inputs)
            layout.kept[self.layer_number] = self.offload.put_all(results) if self.offload else results
        elif (results := layout.kept.pop(self.layer_number, None)) is not None:
            output = replaying(attend, self.offload.get_all(results) if self.offload else results, *inputs)
        else:
            output = attend(*inputs)
        return output.flatten(1)
