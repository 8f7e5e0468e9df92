"""The options of LoRA: which projections have adapters, and what a PEFT folder of --lora-path says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_solopo.config import ModelConfig, flag
from megatron_solopo.errors import UserError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
RECURRENT = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba", "out_proj")
"""Of layers with a recurrent state: Qwen3.5 has the first four, Qwen3-Next the next two."""
PROJECTIONS = (*ATTENTION, *MLP, *RECURRENT)
MIXTRALS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Mixtral's names of an expert's projections -> ours."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a PEFT folder."""

OF_FOLDER = ("lora_rank", "lora_alpha", "lora_modules", "use_rslora")
"""Options that a folder of --lora-path has values of."""

_READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora"}
_INDIFFERENT = {
    *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode", "peft_version"),
    # how adapters were trained, or began
    *("lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config"),
}
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways of ``init_lora_weights`` that also change the model's own matrices."""


def alpha_of(model: ModelConfig) -> float:
    """Returns LoRA's alpha."""
    assert model.lora_rank is not None
    return float(model.lora_rank) if model.lora_alpha is None else model.lora_alpha


def modules_of(model: ModelConfig) -> tuple[str, ...]:
    """Returns the projections of --lora-modules; by default all of them, of which a model has some.

    Raises:
        UserError: a name is none of a projection.
    """
    if model.lora_modules is None:
        return PROJECTIONS
    names = [name.strip() for name in model.lora_modules.split(",")]
    if wrong := next((name for name in names if name not in PROJECTIONS), None):
        raise UserError(
            "option-value",
            f"--lora-modules {model.lora_modules}: {wrong!r} is no projection; use names of {', '.join(PROJECTIONS)}",
        )
    return tuple(name for name in PROJECTIONS if name in names)


def adapts_experts(model: ModelConfig) -> bool:
    """Whether the experts of a model that has some have adapters: --lora-modules must name their projections."""
    return model.lora_modules is not None and not {*MLP}.isdisjoint(modules_of(model))


def read_folder_options(model: ModelConfig, explicit: set[str]) -> None:
    """Sets the options that a folder of --lora-path defines.

    Args:
        explicit: names of the options that the user set, which must agree with the folder.

    Raises:
        UserError: the folder is none of PEFT's LoRA, or has what is not supported here, or an option differs.
    """
    assert model.lora_path is not None
    where = f"--lora-path {model.lora_path}"
    values = _folder_options(Path(model.lora_path), where)
    for name, value in values.items():
        if name in explicit and (before := getattr(model, name)) != value:
            raise UserError("adapter-other-options", f"{where}: has {flag(name)} {value}, not {before}; leave it out")
        setattr(model, name, value)


def _folder_options(folder: Path, where: str) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError("adapter-missing", f"{where}: no {CONFIG}; set a folder that PEFT's save_pretrained wrote")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha, modules = (document[name] for name in ("peft_type", "r", "lora_alpha", "target_modules"))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError("file-damaged", f"{path}: is no adapter_config.json of PEFT's LoRA; copy it again") from None
    if kind != "LORA":
        raise UserError("adapter-unsupported", f"{path}: peft_type is {kind}; only LORA is read")
    others = [name for name in document if name not in _READ | _INDIFFERENT]
    for name in others:
        if document[name] not in (None, False, [], {}, "none"):
            raise UserError("adapter-unsupported", f"{path}: {name} is {document[name]!r}, which is not supported here")
    if str(document.get("init_lora_weights")).startswith(_CHANGE_THE_BASE):
        raise UserError(
            "adapter-unsupported",
            f"{path}: init_lora_weights is {document['init_lora_weights']!r}, which changed the model's matrices too; "
            "convert the adapters with PEFT (path_initial_model_for_weight_conversion)",
        )
    if isinstance(modules, list):  # of projections, or of their places in a model
        modules = [MIXTRALS.get(name, name) for name in (str(each).rpartition(".")[2] for each in modules)]
    others = sorted({*modules} - {*PROJECTIONS}) if isinstance(modules, list) else [modules]
    if others or not modules:
        raise UserError(
            "adapter-unsupported",
            f"{path}: target_modules has {others[0] if others else 'nothing'}; adapters are read of "
            f"{', '.join(PROJECTIONS)}",
        )
    text = ",".join(name for name in PROJECTIONS if name in modules)
    return {
        "lora_rank": rank,
        "lora_alpha": float(alpha),
        "lora_modules": text,
        "use_rslora": bool(document.get("use_rslora")),
    }
