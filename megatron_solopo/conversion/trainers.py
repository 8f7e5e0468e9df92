"""Checkpoints of Megatron-LM and Megatron-Bridge: what they hold beside megatron-core's tensors.

Both save weights by megatron-core (``--ckpt-format torch_dist``) in ``iter_0000100`` or ``release``. The facts are from
their sources as of November 2026: megatron/training/checkpointing.py of Megatron-LM, and training/checkpointing.py,
training/model_load_save.py and training/mlm_compat of Megatron-Bridge. Nothing of them is needed here.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core.transformer import TransformerConfig
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PretrainedConfig

from megatron_solopo.conversion.manifest import LATEST, existing_folder, latest_iteration
from megatron_solopo.conversion.stored import StoredWeights
from megatron_solopo.conversion.stored_index import StoredIndex
from megatron_solopo.errors import UserError
from megatron_solopo.model.families.fields import attention_window
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.rope import rope_of
from megatron_solopo.model.transformer_engine import portable_part

RUN_CONFIG = "run_config.yaml"
"""Megatron-Bridge's file with the model's settings; Megatron-LM has its arguments in the checkpoint (``args``)."""

EMBEDDING = "embedding.word_embeddings.weight"

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The only scaling of Llama 3's kind that megatron-core has, beside its factor (rotary_pos_embedding.py)."""

BRIDGE_NAMES = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "swiglu": "gated_linear_unit",
    "num_experts": "num_moe_experts",
    "use_rope_scaling": "rope_scaling",
}
"""Megatron-LM's name of a setting -> Megatron-Bridge's, where they differ."""


def is_trainer_folder(folder: Path) -> bool:
    """Whether a folder holds checkpoints that neither a run nor convert-checkpoint wrote."""
    return (folder / LATEST).is_file() and not any((folder / name).is_file() for name in ("config.yaml", "config.json"))


def unsupported(hf_config: PretrainedConfig) -> str | None:
    """Returns what of a model Megatron-LM's layers do not have, or its arguments do not express; None if nothing."""
    family = family_of(hf_config)
    if (part := portable_part(family, hf_config)) is not None:
        return part
    if attention_window(hf_config) is not None:
        return "attention windows"
    if family.transformer_options(hf_config).get("no_rope_freq"):
        return "layers without RoPE"
    rope = rope_of(hf_config)
    kind = rope.get("rope_type", "default")
    if kind != "default" and not (kind == "llama3" and all(rope.get(name) == value for name, value in LLAMA3.items())):
        return f"RoPE of the type {kind}" + (" with other numbers than Llama 3.1's" if kind == "llama3" else "")
    return None


def settings_of(hf_config: PretrainedConfig, config: TransformerConfig) -> dict[str, Any]:
    """Returns the settings that define what the weights compute, by Megatron-LM's names of its arguments."""
    rope, experts = rope_of(hf_config), config.num_moe_experts
    settings: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "normalization": config.normalization,
        "norm_epsilon": config.layernorm_epsilon,
        "apply_layernorm_1p": config.layernorm_zero_centered_gamma,
        "swiglu": config.gated_linear_unit,
        "add_bias_linear": config.add_bias_linear,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "untie_embeddings_and_output_weights": not hf_config.tie_word_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope.get("partial_rotary_factor") or 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": rope.get("rope_type") == "llama3",
        "num_experts": experts,
    }
    if settings["use_rope_scaling"]:
        settings["rope_scaling_factor"] = rope["factor"]
    if not experts:
        return settings | {"ffn_hidden_size": config.ffn_hidden_size}
    names = ("moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_router_score_function")
    return settings | {name: getattr(config, name) for name in names}


def state_of_trainers(
    hf_config: PretrainedConfig, config: TransformerConfig, vocabulary: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns what a checkpoint holds beside tensors so that Megatron-LM and Megatron-Bridge start from it.

    Args:
        vocabulary: padded.
    """
    settings = settings_of(hf_config, config)
    arguments = settings | {
        "ffn_hidden_size": config.ffn_hidden_size,
        "group_query_attention": True,
        "max_position_embeddings": hf_config.max_position_embeddings,
        "seq_length": hf_config.max_position_embeddings,
        "vocab_size": hf_config.vocab_size,
        "padded_vocab_size": vocabulary,
        "moe_grouped_gemm": bool(config.num_moe_experts),
        "moe_layer_freq": config.moe_layer_freq,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        # The rest is what Megatron-Bridge asks of any arguments of Megatron-LM (mlm_compat).
        "transformer_impl": "transformer_engine",
        "add_position_embedding": True,
        "no_persist_layer_norm": False,
        "overlap_p2p_comm": False,
        "fp8_param_gather": False,
        "bias_swiglu_fusion": True,
        "squared_relu": False,
        "qk_l2_norm": False,
        "multi_latent_attention": False,
        "is_hybrid_model": False,
        "init_method_xavier_uniform": False,
        "fp16_lm_cross_entropy": False,
        "heterogeneous_layers_config_path": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "mtp_num_layers": None,
        "config_logger_dir": "",
        "cp_comm_type": ["p2p"],
    }
    return {
        "args": argparse.Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def find_trainer_checkpoint(folder: Path, ckpt_step: int | None) -> Path:
    """Returns the latest checkpoint of a folder, or that of an iteration, after its files were compared with its index.

    Raises:
        UserError: it is missing, incomplete or in another format.
    """
    iteration = latest_iteration(folder) if ckpt_step is None else ckpt_step
    assert iteration is not None  # `is_trainer_folder`
    source = existing_folder(folder, iteration)
    if not (source / "metadata.json").is_file():
        problem = "the folder is missing; set --ckpt-step to a step whose folder exists"
        if any(source.glob("mp_rank_*")):
            problem = "it is in Megatron-LM's format torch; save it with --ckpt-format torch_dist"
        elif (source / ".metadata").is_file():
            problem = (
                "it has no metadata.json: save it with --ckpt-format torch_dist, or use an earlier --ckpt-step if its "
                "writing was not finished"
            )
        raise UserError("checkpoint-incomplete", f"--load {folder}: the checkpoint {source} cannot be used: {problem}")
    try:
        fields = json.loads((source / "metadata.json").read_text(encoding="utf-8"))
    except ValueError:
        raise UserError("not-json", f"{source / 'metadata.json'}: not valid JSON; copy the checkpoint again") from None
    backend = fields.get("sharded_backend") if isinstance(fields, dict) else None
    if backend != "torch_dist":
        raise UserError(
            "checkpoint-format",
            f"--load {folder}: the checkpoint {source} is in megatron-core's format {backend!r}, and torch_dist alone "
            "is read; save it with --ckpt-format torch_dist",
        )
    ends: defaultdict[str, int] = defaultdict(int)
    for place in StoredIndex(source).metadata.storage_data.values():
        ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
    for name, end in sorted(ends.items()):
        size = (source / name).stat().st_size if (source / name).is_file() else 0
        if size < end:
            problem = f"{name} has {size:,} bytes, the index needs {end:,}"
            raise UserError(
                "checkpoint-incomplete",
                f"--load {folder}: the checkpoint {source} cannot be used: {problem}; copy it again",
            )
    return source


def check_settings(source: Path, hf_path: str, hf_config: PretrainedConfig, config: TransformerConfig) -> None:
    """Refuses a trainer's checkpoint whose recorded settings are not those of config.json; shapes do not show most.

    Raises:
        UserError: naming a setting; or the model's layers are not megatron-core's own, see `unsupported`.
    """
    if (part := unsupported(hf_config)) is not None:
        raise UserError(
            "trainer-model",
            f"--load {source}: {hf_config.model_type} has {part}, and of other trainers' checkpoints only models of "
            "megatron-core's own layers are read",
        )
    index = StoredIndex(source)
    theirs, where = _recorded(source, index)
    for name, value in settings_of(hf_config, config).items():
        if (other := theirs.get(name)) is not None and other != value:
            raise UserError(
                "checkpoint-settings",
                f"--load {source}: its {where} has {name} = {other!r}, and {hf_path}/config.json makes it {value!r}; "
                "use the --hf-path of its model",
            )
    stored = index.metadata.state_dict_metadata.get(EMBEDDING)
    if isinstance(stored, TensorStorageMetadata) and stored.size[0] < hf_config.vocab_size:
        raise UserError(
            "checkpoint-other-model",
            f"--load {source}: its vocabulary has {stored.size[0]:,} rows, and config.json's "
            f"{hf_config.vocab_size:,}; use the --hf-path of its model",
        )


def check_all_read(source: Path, weights: StoredWeights) -> None:
    """Refuses a trainer's checkpoint with tensors that the model lacks; collective.

    Raises:
        UserError: naming one.
    """
    read: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(read, weights.keys())
    tensors = StoredIndex(source).metadata.state_dict_metadata
    left_over = {key for key, value in tensors.items() if isinstance(value, TensorStorageMetadata)} - set().union(*read)
    left_over = {key for key in left_over if "optimizer." not in key}
    if left_over:
        raise UserError(
            "tensor-left-over",
            f"--load {source}: the tensor {min(left_over)!r} is not part of the model of config.json ({len(left_over)} "
            "such) and would be lost; use the --hf-path of its model",
        )


def _recorded(source: Path, index: StoredIndex) -> tuple[dict[str, Any], str]:
    """Returns the settings that a checkpoint records, by Megatron-LM's names, and the name of their place."""
    path = source / RUN_CONFIG
    if path.is_file():
        document = yaml.load(path.read_text(encoding="utf-8"), _Plain)
        section = document.get("model") if isinstance(document, dict) else None
        theirs = dict(section) if isinstance(section, dict) else {}
        theirs |= nested if isinstance(nested := theirs.get("transformer"), dict) else {}
        theirs |= {ours: theirs[name] for ours, name in BRIDGE_NAMES.items() if name in theirs}
        if (tied := theirs.get("share_embeddings_and_output_weights")) is not None:
            theirs["untie_embeddings_and_output_weights"] = not tied
        return theirs, RUN_CONFIG
    theirs = dict(vars(index.common().get("args", argparse.Namespace())))
    if theirs.get("group_query_attention") is False:
        theirs["num_query_groups"] = theirs.get("num_attention_heads")
    return theirs, "args"


class _Plain(yaml.SafeLoader):
    """Reads values of unknown tags, such as Python's objects, as None."""


_Plain.add_multi_constructor("", lambda loader, suffix, node: None)
