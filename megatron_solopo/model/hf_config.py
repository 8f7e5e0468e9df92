"""Reads config.json of a Hugging Face folder and checks what follows from it alone; imports no megatron-core."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_solopo.config import Config, DataConfig
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import check_json
from megatron_solopo.model.families.fields import attention_window, head_dim, of_layers, windowed_layers
from megatron_solopo.model.families.registry import MULTIMODAL, family_of
from megatron_solopo.model.rope import reach, rope_of
from megatron_solopo.model.rope_scaling import extended
from megatron_solopo.model_folder import check_is_folder, seen_in
from megatron_solopo.parallel.context import DEFAULT
from megatron_solopo.parallel.kernels import HEAD_DIMS, is_wide

OUTER = "_outer_model_type"
"""Private, as transformers' own additions to a config are."""


def read_hf_config(folder: str | Path, rope_scaling: str | None = None, option: str = "--hf-path") -> PretrainedConfig:
    """Reads config.json of a Hugging Face folder and extends it by --rope-scaling; every model's config is made here.

    Args:
        option: the one that names the folder, for errors.

    Raises:
        UserError: there is no folder or no config.json, transformers cannot read it, or the scaling does not fit it.
    """
    folder = Path(folder)
    check_is_folder(f"{option} {folder}", folder, "set a Hugging Face folder")
    if not (folder / "config.json").is_file():
        remedy = seen_in(folder) or "set a Hugging Face folder"
        raise UserError("model-config-missing", f"{option} {folder}: the folder holds no config.json; {remedy}")
    return read_config_file(folder / "config.json", rope_scaling)


def read_config_file(path: Path, rope_scaling: str | None = None) -> PretrainedConfig:
    """Reads a config.json and extends it by --rope-scaling.

    Raises:
        UserError: transformers cannot read it, or the scaling does not fit it.
    """
    check_json(path)
    try:
        hf_config: Any = language_model(AutoConfig.from_pretrained(str(path), local_files_only=True), path)
    except Exception as error:  # transformers raises many kinds; the first line says what is wrong, or its kind:
        first, *others = str(error).splitlines() or [type(error).__name__]
        reason = " ".join((first, others[0].strip())) if first.endswith(":") and others else first
        raise UserError("model-config-unreadable", f"{path}: not readable ({reason})") from None
    if _is_dequantized(hf_config):
        delattr(hf_config, "quantization_config")
    return hf_config if rope_scaling is None else extended(hf_config, rope_scaling)


FP8_BLOCK = 128
"""Rows and columns of a block of FP8 weights, the only size that `conversion.quantized` reads."""


def _is_dequantized(hf_config: PretrainedConfig) -> bool:
    """Whether a folder's weights are quantised in one of the ways that `conversion.quantized` reads; `family_of`
    refuses others."""
    quantization = getattr(hf_config, "quantization_config", None)
    if not isinstance(quantization, dict):
        return False
    kind = quantization.get("quant_method")
    if kind == "mxfp4":
        return hf_config.model_type == "gpt_oss"
    return kind == "fp8" and quantization.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]


def language_model(whole: PretrainedConfig, path: Path) -> PretrainedConfig:
    """Returns the config of the language model in that of a model of `MULTIMODAL`; others as they are.

    Whether embeddings are tied is a field of both, of which transformers reads the outer one, and takes its default for
    no decision: it ties equal tensors alone.
    """
    if whole.model_type not in MULTIMODAL:
        return whole
    hf_config, document = whole.get_text_config(decoder=True), json.loads(path.read_text(encoding="utf-8-sig"))
    hf_config.tie_word_embeddings = document.get("tie_word_embeddings", hf_config.tie_word_embeddings)
    setattr(hf_config, OUTER, whole.model_type)
    if "quantization_config" in document:
        hf_config.quantization_config = document["quantization_config"]
    return hf_config


def outer_model_type(hf_config: PretrainedConfig) -> str | None:
    """Returns the model_type of the model that a language model is part of; None for a model of its own."""
    return getattr(hf_config, OUTER, None)


def whole_config(folder: str | Path, hf_config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """Returns transformers' class for the model of a folder, and its config with ``hf_config`` as its language model's,
    or as itself; quantised weights are to be dequantised, as here."""
    whole = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    quantization = getattr(whole, "quantization_config", None)
    if whole.model_type in MULTIMODAL:
        whole.text_config, whole.tie_word_embeddings = hf_config, hf_config.tie_word_embeddings
    else:
        whole = copy.deepcopy(hf_config)
    if quantization is not None:
        setattr(whole, "quantization_config", quantization | {"dequantize": True})
    return auto_class(folder), whole


def auto_class(folder: str | Path) -> Any:
    """Returns transformers' class for the model of a folder with config.json."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # which import torch._dynamo

    kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8-sig")).get("model_type")
    return AutoModelForImageTextToText if kind in MULTIMODAL else AutoModelForCausalLM


def padded_vocab_size(hf_config: PretrainedConfig, divisible_by: int) -> int:
    """Returns the rows of the vocabulary matrices; they depend on the config only, not on the number of processes."""
    return -(-hf_config.vocab_size // divisible_by) * divisible_by


def check_attention_on_cuda(hf_config: PretrainedConfig, config: Config) -> None:
    """Refuses a model whose attention no kernel of CUDA computes with these options; Transformer Engine checks the
    sizes of heads itself.

    Raises:
        UserError: head_dim is no multiple of 8, or above 256 where the flash kernel alone would do; or layers have
            windows or sinks, and the kernels that the options name have none.
    """
    _check_windows_on_cuda(hf_config, config)
    if not config.model.bf16 or config.model.transformer_impl != "portable":
        return
    model, context = config.model, config.parallel.context_parallel_size
    for windowed in {*windowed_layers(hf_config)}:
        size = head_dim(of_layers(hf_config, windowed))
        remedy = "" if size in HEAD_DIMS else "leave --bf16 out"
        if is_wide(size) and not windowed and not _has_sinks(hf_config):  # the memory-efficient kernel's
            remedy = "" if model.attention_backend == "auto" else "use --attention-backend auto"
            remedy = remedy if context == 1 else "use --context-parallel-size 1"
        if remedy:
            raise UserError(
                "attention-unsupported",
                f"config.json: head_dim {size}: with --bf16 on CUDA it must be a multiple of {HEAD_DIMS.step} up to "
                f"{HEAD_DIMS[-1]}, for torch's flash attention; {remedy}",
            )


def _has_sinks(hf_config: PretrainedConfig) -> bool:
    return family_of(hf_config).transformer_options(hf_config).get("softmax_type") == "learnable"


def _check_windows_on_cuda(hf_config: PretrainedConfig, config: Config) -> None:
    """Refuses windows that hide something, and sinks, with kernels that have none.

    Windows are the flash kernel's, or without context parallelism Transformer Engine's; sinks are computed behind the
    flash kernel.
    """
    window, model = attention_window(hf_config), config.model
    sinks = _has_sinks(hf_config)
    if not sinks and (window is None or window >= config.data.seq_length):
        return
    what = "attention sinks" if sinks else f"sliding_window {window} (config.json)"
    if not model.bf16:
        remedy = "with --device cuda it needs --bf16: the flash kernel takes 16 bits"
    elif model.attention_backend == "fused" and (sinks or model.transformer_impl == "portable"):
        remedy = "--attention-backend fused has no kernel for it; use flash or auto"
    elif config.parallel.context_parallel_size > 1 and config.parallel.cp_comm_type != DEFAULT:
        remedy = f"--cp-comm-type {config.parallel.cp_comm_type} does not compute it; use {DEFAULT}"
    else:
        return
    raise UserError("attention-unsupported", f"{what}: {remedy}")


def check_biased_experts(hf_config: PretrainedConfig, config: Config) -> None:
    """Refuses expert tensor parallelism of experts with biases, which each of its ranks would add.

    Raises:
        UserError: the layout has it.
    """
    parallel, options = config.parallel, family_of(hf_config).transformer_options(hf_config)
    size = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    if size > 1 and options.get("num_moe_experts") and options.get("add_bias_linear"):
        raise UserError(
            "layout-biased-experts",
            f"--expert-tensor-parallel-size {size}: the experts of {hf_config.model_type} have biases, which every "
            "rank would add; use 1, and --expert-model-parallel-size to distribute the experts",
        )


def check_lengths(hf_config: PretrainedConfig, data: DataConfig) -> None:
    """Refuses --seq-length and --stretch-positions beyond the model's positions; see `check_length`."""
    check_length(hf_config, data.seq_length)
    if data.stretch_positions is not None:
        check_length(hf_config, data.stretch_positions, "--stretch-positions")


def check_length(hf_config: PretrainedConfig, length: int, option: str = "--seq-length") -> None:
    """Refuses sequences beyond the model's positions.

    Raises:
        UserError: the option's length is too large.
    """
    covered = reach(hf_config.max_position_embeddings, rope_of(hf_config))
    if length > covered:
        scaled = rope_of(hf_config)["rope_type"] != "default"
        raise UserError(
            "seq-length-beyond-positions",
            f"{option} {length} is beyond the model's max_position_embeddings {covered} (config.json); "
            f"lower it, {'' if scaled else 'extend the model with --rope-scaling, '}or use a longer model",
        )
