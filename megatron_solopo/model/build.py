"""Builds megatron-core's GPTModel from a Hugging Face config. The only module that touches GPTModel."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear, layers
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from transformers import PretrainedConfig

from megatron_solopo.config import Config
from megatron_solopo.config_checks import recomputed_modules
from megatron_solopo.model import recompute, transformer_engine
from megatron_solopo.model.attention import GatedSelfAttention, PackedAttention
from megatron_solopo.model.delta_net import DeltaNetSubmodules, GatedDeltaNet
from megatron_solopo.model.experts import Experts
from megatron_solopo.model.families.family import Norms
from megatron_solopo.model.families.fields import (
    has_latents,
    head_dim,
    linear_layers,
    mlp_width,
    of_layers,
    window_options,
    windowed_layers,
)
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.hf_config import padded_vocab_size
from megatron_solopo.model.latent_attention import LatentAttention
from megatron_solopo.model.lora import attach_adapters
from megatron_solopo.model.norm import RMSNorm, SandwichLayer
from megatron_solopo.model.offload import Offload
from megatron_solopo.model.repeated import ColumnParallel, RowParallel
from megatron_solopo.model.rope import RotaryFrequencies
from megatron_solopo.model.router import Router
from megatron_solopo.model.swiglu import ACTIVATIONS, SwiGLU
from megatron_solopo.model.tiled_mlp import TiledMLP
from megatron_solopo.model.value_norm import value_norm_spec


def transformer_config(hf_config: PretrainedConfig, config: Config, dtype: torch.dtype) -> TransformerConfig:
    """Returns megatron-core's configuration of the model, without dropout."""
    model, parallel = config.model, config.parallel
    engine = model.transformer_impl == transformer_engine.NAME
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first is not None and parallel.pipeline_model_parallel_size == 2:
        last = None  # follows from the first; transformer_layer.py:157 divides by the number of stages between them
    windows, sizes = window_options(hf_config), of_layers(hf_config, False)  # others: `value_norm.ScaledLayer`
    if engine and windows and windows["window_size"][0] + 1 >= config.data.seq_length:
        windows = {}  # they hide nothing, and Transformer Engine's ring refuses them
    choices: dict[str, Any] = {  # texts that mcore annotates as literals
        "transformer_impl": "local" if model.transformer_impl == "portable" else model.transformer_impl,
        "attention_backend": AttnBackend[_backend(config)],
        "fp8": model.fp8_format,
        "fp8_recipe": model.fp8_recipe,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "add_bias_linear": False,
    }
    return (MLATransformerConfig if has_latents(hf_config) else TransformerConfig)(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank if interleaved else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        # Two stages that exchange several tensors in one batch confuse them: with mcore's defaults the interleaved
        # schedule would be silently wrong.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        # Transformer Engine's own defaults of delayed scaling; mcore's look back one batch only.
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=sizes.num_key_value_heads,
        kv_channels=head_dim(sizes),
        ffn_hidden_size=mlp_width(hf_config),
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[family_of(hf_config).activation],
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        # mcore's defaults are 0.1; a dropped-out policy is not comparable with its reference.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        deterministic_mode=config.training.deterministic_mode,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Every weight is loaded, or drawn by conversion/random_start.py. Portable layers are then built on the CPU;
        # Transformer Engine's would build unsharded matrices there.
        perform_initialization=False,
        use_cpu_initialization=model.transformer_impl == "portable",
        # Gradients of matrices are added in float32 by the product itself; only on CUDA (parallel/cpu_shim.py). Both
        # implementations have a product for it, and the output head (model/log_probs.py) too.
        gradient_accumulation_fusion=model.gradient_accumulation_fusion
        and dtype == torch.bfloat16
        and config.training.main_grads_dtype == "fp32"
        and layers._grad_accum_fusion_available,
        disable_parameter_transpose_cache=model.disable_parameter_transpose_cache,
        # Other fused kernels need CUDA extensions (Apex); Transformer Engine's layers have their own.
        bias_activation_fusion=False,
        use_te_activation_func=True,  # which means the layer's spec decides: see `layer_spec`
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=engine and model.rope_fusion,
        # Packs differ in length, which pipeline stages must know of; mcore refuses it with allgather, which
        # `topology.check_layout` allows in one stage alone.
        variable_seq_lengths=parallel.moe_token_dispatcher_type != "allgather",
        moe_permute_fusion=engine and model.moe_permute_fusion,
        # Transformer Engine's experts in one call; portable layers have model/experts.py.
        moe_grouped_gemm=engine,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        moe_aux_loss_coeff=config.training.moe_aux_loss_coeff,
        moe_router_load_balancing_type="aux_loss" if config.training.moe_aux_loss_coeff else "none",
        # Routing is a choice: bfloat16 logits would often choose by their rounding.
        moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
        **recompute.megatron_settings(model),
        **(choices | windows | family_of(hf_config).transformer_options(hf_config)),
    )


def _backend(config: Config) -> str:
    """Returns the name of megatron-core's attention backend.

    Its auto lets Transformer Engine fall silently to a kernel that holds the scores of all tokens with all, so auto is
    fused there, and what cuDNN does not support is an error.
    """
    engine, backend = config.model.transformer_impl == transformer_engine.NAME, config.model.attention_backend
    return "fused" if engine and backend == "auto" else backend


def layer_spec(
    settings: TransformerConfig,
    te_activation: bool,
    mlp_tiles: str | None = None,
    repeat_activation: bool = False,
    norms: Norms = Norms.BEFORE,
    width_norms: bool = False,
    experts: bool = True,
) -> tuple[ModuleSpec, type]:
    """Returns the spec of a layer, and the type of the final norm.

    These are Transformer Engine's, or megatron-core's local transformer layer with this package's RMSNorm, packed
    attention and router.

    Args:
        te_activation: of Transformer Engine's layers SwiGLU too is its kernel; otherwise it is this package's.
        mlp_tiles: --mlp-tiles, without experts.
        repeat_activation: the product of SwiGLU, in portable layers without experts, is not kept for backward but
            computed again.
        norms: where the norms of a layer are.
        width_norms: whether queries and keys have a norm over all heads together.
        experts: whether the layer has the model's experts, if it has some.
    """
    number = settings.num_moe_experts if experts else None
    if settings.transformer_impl == transformer_engine.NAME:
        from megatron_solopo.model import te_layers  # imports Transformer Engine, which is optional

        spec, final_norm = te_layers.layer_spec(settings, te_activation, number), te_layers.FINAL_NORM
    else:
        spec, final_norm = _portable_layer_spec(settings, number), RMSNorm
    submodules = cast(TransformerLayerSubmodules, spec.submodules)
    if norms is not Norms.BEFORE:
        spec.module = SandwichLayer
    if norms is Norms.AFTER:
        submodules.input_layernorm = submodules.pre_mlp_layernorm = IdentityOp
    if width_norms:
        attention: Any = submodules.self_attention  # a ModuleSpec
        attention.submodules.core_attention = partial(PackedAttention, width_norms=True)
    mlp: Any = submodules.mlp  # a functools.partial
    if repeat_activation and not number:
        mlp.keywords["submodules"].linear_fc2 = RowParallel
    if mlp_tiles is not None and not number:
        submodules.mlp = partial(TiledMLP.as_mlp_submodule, tiles=mlp_tiles, **mlp.keywords)
    return spec, final_norm


def _portable_layer_spec(settings: TransformerConfig, experts: int | None) -> ModuleSpec:
    submodules = get_gpt_layer_local_submodules(
        num_experts=experts, normalization="RMSNorm", multi_latent_attention=settings.multi_latent_attention
    )
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    attention: Any = submodules.self_attention.submodules  # mcore annotates it as an object
    attention.core_attention = PackedAttention
    if settings.multi_latent_attention:
        submodules.self_attention.module = LatentAttention
    else:
        attention.linear_qkv = ColumnParallel
    if settings.attention_output_gate:
        submodules.self_attention.module = GatedSelfAttention
    if settings.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp: Any = submodules.mlp  # a functools.partial
    parts = mlp.keywords["submodules"]
    if experts:
        parts.router = Router
        shared = parts.shared_experts.keywords["submodules"]
        shared.activation_func, shared.linear_fc1 = SwiGLU, ColumnParallel
        parts.experts = partial(Experts, **parts.experts.keywords)
        parts.experts.keywords["submodules"].activation_func = SwiGLU
        # mcore's checkpoints would name it as in dense layers; Transformer Engine's layers with experts do not.
        submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    else:
        parts.activation_func = SwiGLU
        parts.linear_fc1 = ColumnParallel
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def recurrent_layer_spec(layer: ModuleSpec) -> ModuleSpec:
    """Returns the spec of a portable layer with Gated DeltaNet in the place of its attention."""
    matrices = DeltaNetSubmodules(in_proj=ColumnParallel, out_proj=RowParallelLinear)
    attention = ModuleSpec(module=GatedDeltaNet, submodules=matrices)
    submodules = replace(cast(TransformerLayerSubmodules, layer.submodules), self_attention=attention)
    return ModuleSpec(module=layer.module, submodules=submodules)


def build_model(
    hf_config: PretrainedConfig, config: Config, dtype: torch.dtype | None = None, vp_stage: int | None = None
) -> GPTModel:
    """Builds the GPTModel of a Hugging Face config on the current device, without loading weights.

    mcore's position embeddings are switched off: model/rope.py's are applied inside the attention.

    Args:
        dtype: parameter dtype; default by --bf16.
        vp_stage: index of this rank's model chunk, where it has several.
    """
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # mcore warns at every build that GPTModel is old
    dtype = dtype or (torch.bfloat16 if config.model.bf16 else torch.float32)
    settings = transformer_config(hf_config, config, dtype)
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)  # GPTModel sets them by the option, and refuses those of an earlier model
    repeat_activation, family = "mlp_act" in recomputed_modules(config.model), family_of(hf_config)
    (layer, final_norm), (dense, _) = (
        layer_spec(
            settings,
            config.model.use_te_activation_func,
            config.model.mlp_tiles,
            repeat_activation,
            family.norms,
            family.width_norms,
            experts,
        )
        for experts in (True, False)
    )
    first, count = get_transformer_layer_offset(settings, vp_stage), get_num_layers_to_build(settings, vp_stage)
    kinds = settings.moe_layer_freq if isinstance(settings.moe_layer_freq, list) else [1] * settings.num_layers
    specs = [layer if has_experts else dense for has_experts in kinds[first : first + count]]
    linear = linear_layers(hf_config)[first : first + count]
    specs = [recurrent_layer_spec(spec) if is_linear else spec for spec, is_linear in zip(specs, linear, strict=True)]
    if family.value_norms:
        windowed = windowed_layers(hf_config)[first : first + count]
        specs = [value_norm_spec(spec, hf_config, kind) for spec, kind in zip(specs, windowed, strict=True)]
    block = TransformerBlockSubmodules(layer_specs=specs, layer_norm=final_norm)
    model = GPTModel(
        settings,
        block,  # pyright: ignore[reportArgumentType]  # mcore takes both kinds and annotates one
        vocab_size=padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by),
        max_sequence_length=hf_config.max_position_embeddings,
        position_embedding_type="none",
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        vp_stage=vp_stage,
    )
    if model.pre_process and (scale := family.embedding_scale(hf_config)) != 1:
        model.embedding.register_forward_hook(_scaling(torch.tensor(scale, dtype=dtype, device="cpu").item()))
    for module in model.modules():
        if isinstance(module, PackedAttention):
            module.keeps = config.model.recompute_keep is not None
    if config.model.lora_rank is not None:
        attach_adapters(model, hf_config, config.model)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # mcore sets it only where experts are sharded unlike the other layers, and a checkpoint would then hold one
            # optimizer under some layouts and two under others.
            setattr(parameter, "allreduce", False)
            # mcore sets it for biases of experts too (layers.py:1413), and would add those of several ranks' experts.
            setattr(parameter, "sequence_parallel", False)
    return model.cuda(torch.cuda.current_device())


def _scaling(scale: float) -> Callable[..., torch.Tensor]:
    """Returns a hook that multiplies embeddings by a number, which transformers rounds to their dtype."""
    return lambda module, inputs, output: output * scale


def offload_activations(models: Sequence[GPTModel]) -> Offload:
    """Moves what recomputed layers of a process's model chunks keep to the host (--activation-offload)."""
    offload = Offload()
    for model in models:
        offload.attach(model.decoder)
        for module in model.modules():
            if isinstance(module, PackedAttention):
                module.offload = offload
    return offload


def rotary_frequencies(hf_config: PretrainedConfig) -> RotaryFrequencies:
    """Returns the model's RoPE; `hf_config.check_length` checks how many positions it covers."""
    return RotaryFrequencies(hf_config)
