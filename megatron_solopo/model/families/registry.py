"""The model families by the ``model_type`` of config.json."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_solopo.errors import UserError
from megatron_solopo.model.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE
from megatron_solopo.model.families.family import Family, refuse
from megatron_solopo.model.families.fields import check_shape, refuse_unknown, windowed_layers
from megatron_solopo.model.families.gemma3 import GEMMA3
from megatron_solopo.model.families.gemma4 import GEMMA4, GEMMA4_UNIFIED
from megatron_solopo.model.families.glm4 import GLM, GLM4
from megatron_solopo.model.families.glm4_moe import GLM4_MOE
from megatron_solopo.model.families.gpt_oss import GPT_OSS
from megatron_solopo.model.families.llama import LLAMA
from megatron_solopo.model.families.mistral import MINISTRAL, MINISTRAL3, MISTRAL
from megatron_solopo.model.families.mixtral import MIXTRAL
from megatron_solopo.model.families.olmo import OLMO2, OLMO3
from megatron_solopo.model.families.phi3 import PHI3
from megatron_solopo.model.families.qwen2 import QWEN2
from megatron_solopo.model.families.qwen3 import QWEN3
from megatron_solopo.model.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from megatron_solopo.model.families.qwen3_moe import QWEN3_MOE
from megatron_solopo.model.families.smollm3 import SMOLLM3
from megatron_solopo.model.rope import check_rope

FAMILIES = {
    family.model_type: family
    for family in (
        *(DEEPSEEK_V2, DEEPSEEK_V3, GEMMA3, GEMMA4, GEMMA4_UNIFIED, GLM, GLM4, GLM4_MOE, GLM4_MOE_LITE, GPT_OSS),
        *(LLAMA, MINISTRAL, MINISTRAL3, MISTRAL),
        *(MIXTRAL, OLMO2, OLMO3, PHI3, QWEN2, QWEN3, QWEN3_5, QWEN3_5_MOE, QWEN3_MOE, QWEN3_NEXT, SMOLLM3),
    )
}

MULTIMODAL = frozenset({"gemma3", "gemma4", "gemma4_unified", "mistral3", "qwen3_5", "qwen3_5_moe"})
"""Models that also read images, whose ``text_config`` is of a family; their language model alone is trained."""

UNSUPPORTED = {
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), "its attention selects keys (DSA)"),
    "gemma2": "its attention caps scores (attn_logit_softcapping), which torch's attention kernels do not compute",
}
"""Reasons why no family has a model_type that others would be taken for."""


def family_of(hf_config: PretrainedConfig) -> Family:
    """Checks a config and returns its family.

    Raises:
        UserError: the model_type is unknown, or the family does not support a config field.
    """
    if hf_config.model_type not in FAMILIES:
        raise UserError(
            "model-type-unsupported",
            f"config.json: model_type {hf_config.model_type!r} is not supported"
            + (f", because {reason}" if (reason := UNSUPPORTED.get(hf_config.model_type)) else "")
            + f"; supported are {', '.join(sorted(FAMILIES))}",
        )
    family = FAMILIES[hf_config.model_type]
    refuse(hf_config, hidden_act=family.activation, hidden_activation=family.activation, attention_dropout=0.0)
    check_shape(hf_config, "per_layer_config" in family.fields)
    family.check(hf_config)
    check_rope(hf_config, family.rope_fields)
    windowed_layers(hf_config)
    refuse_unknown(hf_config, family.fields)
    return family
