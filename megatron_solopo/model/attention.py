"""The core attention of a layer over a pack: RoPE by explicit positions, then the attention of the pack's layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel

from megatron_solopo.errors import UserError
from megatron_solopo.model import transformer_engine
from megatron_solopo.model.kept_attention import Results, recording, replaying
from megatron_solopo.model.norm import WidthNorm
from megatron_solopo.model.offload import Offload
from megatron_solopo.model.rope import RotaryFrequencies, rotate
from megatron_solopo.parallel.context import method_of
from megatron_solopo.parallel.kernels import Kernels, is_wide, kernels_for
from megatron_solopo.parallel.layout import RankLayout, backends_of
from megatron_solopo.parallel.recurrence import RecurrentLayout


@dataclass
class PackLayout(PackedSeqParams):
    """The layout of a pack as every layer reads it; passed through megatron-core as its packed sequence parameters.

    Attributes:
        attention: layout of the rows that this rank computes.
        cos, sin: [S / cp, 1, R] of each token's position, for the first R channels of a head.
        angles: [S / cp, 1, 1, R] float32, radians, for Transformer Engine's kernel; None: cos and sin rotate.
        scaling: factor on the rotated values, which ``angles`` do not contain.
        query_scale: [S / cp, 1, 1] factor on the queries of each position; None: 1.
        kept: number of a layer -> what its attention kernels returned, until the layer is recomputed.
        windowed: the layout of layers with a window; None: it is this one.
        recurrent: the layout of layers with a recurrent state.
    """

    attention: RankLayout = field(kw_only=True)
    cos: Tensor = field(kw_only=True)
    sin: Tensor = field(kw_only=True)
    angles: Tensor | None = None
    scaling: float = 1.0
    query_scale: Tensor | None = None
    kept: dict[int, Results] = field(default_factory=dict)
    windowed: PackLayout | None = None
    recurrent: RecurrentLayout | None = None

    def rotate_query(self, x: Tensor) -> Tensor:
        """`rotate` for queries, which some models scale by position."""
        rotated = self.rotate(x)
        return rotated if self.query_scale is None else rotated * self.query_scale

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
    windowed: RankLayout | None = None,
    recurrent: RecurrentLayout | None = None,
) -> PackLayout:
    """Makes the layout of a pack's rows, [S / cp] ``positions``, on their device.

    Args:
        rope_fusion: Transformer Engine's kernel rotates queries and keys.
        windowed: the layout of layers with a window; None where it hides nothing.
        recurrent: the layout of layers with a recurrent state.
    """
    cos, sin = frequencies(positions, dtype)
    angles = frequencies.angles(positions)[:, None, None] if rope_fusion else None
    layout = PackLayout(
        qkv_format="thd",
        attention=attention,
        cos=cos,
        sin=sin,
        angles=angles,
        scaling=frequencies.attention_scaling,
        query_scale=frequencies.query_scale(positions, dtype),
        recurrent=recurrent,
    )
    if frequencies.windowed is not None:
        layout.windowed = pack_layout(windowed or attention, positions, frequencies.windowed, dtype, rope_fusion)
    elif windowed is not None:
        layout.windowed = replace(layout, attention=windowed)
    return layout


def window_of(settings: TransformerConfig) -> int | None:
    """Returns the window of the layers that have one, in tokens, of which the first is the query's own."""
    return None if settings.window_size is None else settings.window_size[0] + 1


def is_windowed(settings: TransformerConfig, layer_number: int) -> bool:
    """Whether a layer, counted from 1, has a window."""
    return is_layer_window_attention(settings.window_size, cast(Any, settings.window_attn_skip_freq), layer_number)


def attention_kernels(settings: TransformerConfig, device: torch.device) -> Kernels:
    """Returns the kernels of a model's attention without context parallelism, of layers without a window."""
    engine, sixteen_bits = settings.transformer_impl == transformer_engine.NAME, settings.params_dtype.itemsize == 2
    backend, deterministic = settings.attention_backend.name, settings.deterministic_mode
    if has_sinks(settings) and not engine:
        backend = "flash"  # torch's attention for prompts returns no log-sum-exps
    kernels = kernels_for(engine, device.type == "cuda", sixteen_bits, backend, deterministic)
    flash = kernels in (Kernels.PROMPTS, Kernels.FLASH)
    return Kernels.BLOCKS if flash and backend == "auto" and is_wide(cast(int, settings.kv_channels)) else kernels


def describe_kernels(settings: TransformerConfig, device: torch.device) -> str:
    """Describes in words, for the log, which kernels compute attention on a CUDA device.

    Raises:
        UserError: torch has no kernel for the model's prompts that holds no scores of all with all.
    """
    assert isinstance(settings.cp_comm_type, str)  # one for all layers
    flash = f"torch's flash kernel ({current_flash_attention_impl() or 'FA2'})"
    kernels = attention_kernels(settings, device)
    of_layers = method_of(settings.context_parallel_size, settings.cp_comm_type).kernels_of_layers
    if kernels is Kernels.FLASH or not of_layers or has_sinks(settings):
        return f"attention: {flash}, one call for all sequences of a pack"
    if kernels is Kernels.ENGINE:
        return f"attention: Transformer Engine, {settings.attention_backend.name} kernels"
    windows = "" if settings.window_size is None else f"; layers with a window in one call of {flash}"
    if kernels is Kernels.BLOCKS:
        return f"attention: torch's memory-efficient kernel, keys and values repeated for each query head{windows}"
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
    return f"attention: prompts on {prompts}, all responses of a pack in one call of {flash}{windows}"


def has_sinks(settings: TransformerConfig) -> bool:
    """Whether each head has a learnable score in the softmax of its queries (``softmax_type`` learnable)."""
    return settings.softmax_type == "learnable"


class PackedAttention(nn.Module):
    """The portable core attention of a layer; the arguments are megatron-core's.

    Attributes:
        windowed: whether the layer has a window.
        rotates: whether the layer has RoPE.
        softmax_offset: [heads] of this rank, the sinks under megatron-core's name; None: the model has none.
        q_norm, k_norm: over all heads of queries and of keys; None: the model has none.
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
        width_norms: bool = False,
        **ignored: object,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.layer_number = layer_number
        self.windowed = is_windowed(config, layer_number)
        without_rope = cast(list[int] | None, config.no_rope_freq)
        self.rotates = not (without_rope and without_rope[layer_number - 1])
        self.softmax_offset: nn.Parameter | None = None
        if has_sinks(config):
            of_rank = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = nn.Parameter(torch.zeros(of_rank, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        heads, groups = config.num_attention_heads, cast(int, config.num_query_groups)
        self.q_norm, self.k_norm = (WidthNorm(config, n) if width_norms else None for n in (heads, groups))
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
        kept, layout = packed_seq_params.kept, layout_of(packed_seq_params, self.windowed)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        # of a view backward would keep queries, keys and values before RoPE
        rotated = (layout.rotate_query(query), layout.rotate(key)) if self.rotates else (query, key)
        inputs = tuple(x.contiguous() for x in (*rotated, value))
        sinks: dict[str, Any] = {} if self.softmax_offset is None else {"sinks": self.softmax_offset}
        attend = partial(layout.attention.attend, scale=self.softmax_scale, **sinks)
        if self.keeps and self.training and not torch.is_grad_enabled():
            output, results = recording(attend, *inputs)
            kept[self.layer_number] = self.offload.put_all(results) if self.offload else results
        elif (results := kept.pop(self.layer_number, None)) is not None:
            output = replaying(attend, self.offload.get_all(results) if self.offload else results, *inputs)
        else:
            output = attend(*inputs)
        return output.flatten(1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns megatron-core's description of the parameters for checkpoints."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            dict.fromkeys(("softmax_offset", "q_norm.weight", "k_norm.weight"), 0),
            sharded_offsets,
            tp_group=cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group()),
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class GatedSelfAttention(SelfAttention):
    """megatron-core's attention with an output gate, in the dtype of the layer; its own gate is compiled, and rounds
    float64 to float32."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate.reshape(x.shape).sigmoid()


def layout_of(packed: PackLayout, windowed: bool) -> PackLayout:
    """Returns the layout of a layer, with a window or without."""
    return packed.windowed if windowed and packed.windowed is not None else packed
