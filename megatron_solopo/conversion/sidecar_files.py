"""Sidecar files of an exported folder, beside its weights: config.json, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from megatron_solopo import template_kwargs
from megatron_solopo.conversion.tokenizer_files import complete_tokenizer, write_chat_template
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import check_json
from megatron_solopo.model import rope_scaling
from megatron_solopo.model.families.registry import MULTIMODAL
from megatron_solopo.model.hf_config import read_hf_config

CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model*",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files that are copied from the folder that training started from. Mistral names SentencePiece models
``tokenizer.model.v3``."""

DTYPES = ("torch_dtype", "dtype")
"""Names of the weights' dtype in config.json: transformers before 4.56 reads only the first, 4.57 writes the second."""

OLDER_NAMES = {"qwen3_moe": {"num_local_experts": "num_experts"}}
"""model_type -> {name that transformers 5 writes: name that transformers 4 reads}; transformers 5 reads both."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json that transformers reads if there is no generation_config.json."""


@dataclass(frozen=True)
class SidecarFiles:
    """The files beside the weights of a folder to write.

    Attributes:
        source: the Hugging Face folder that config and tokenizer files come from.
        config_json: the text of config.json.
        chat_template: replaces the source's template.
        chat_template_kwargs: a JSON object that replaces the values in the source's tokenizer_config.json.
        added_tokens: --add-special-tokens, for the tokenizer.
        end_of_turn: the id with which the model was trained to end a turn, at which generation stops.
        chat_template_date: the date that the template prints, for tokenizer_config.json.
    """

    source: Path
    config_json: str
    chat_template: str | None = None
    chat_template_kwargs: str | None = None
    added_tokens: str | None = None
    end_of_turn: int | None = None
    chat_template_date: str | None = None

    def write(self, folder: Path) -> None:
        """Writes the files into a folder, adapted so that transformers 4 and 5 read them as training did.

        Raises:
            OSError: a file cannot be written.
        """
        for path in (path for pattern in CARRIED for path in sorted(self.source.glob(pattern))):
            target = folder / path.relative_to(self.source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        complete_tokenizer(folder, self.source, self.added_tokens)
        if self.chat_template is not None:
            write_chat_template(folder, self.chat_template)
        if self.chat_template_kwargs is not None or self.chat_template_date is not None:
            template_kwargs.write(folder, self.chat_template_kwargs, self.chat_template_date)
        if self.end_of_turn is not None:
            self._stop_at(self.end_of_turn, folder / "generation_config.json")
        (folder / "config.json").write_text(
            self.config_json, encoding="utf-8"
        )  # last: without it the folder does not load

    def _stop_at(self, token: int, path: Path) -> None:
        """Adds a token to eos_token_id in generation_config.json, whose defaults are those of config.json."""
        model = json.loads(self.config_json)
        document = generation_config(path.parent) or {key: model[key] for key in SPECIAL_IDS if key in model}
        stored = document.get("eos_token_id")
        stops = stored if isinstance(stored, list) else [] if stored is None else [stored]
        if token not in stops:
            document["eos_token_id"] = [*stops, token]
            path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def generation_config(folder: Path) -> dict[str, Any] | None:
    """Returns the content of a folder's generation_config.json; None if there is none.

    Raises:
        UserError: it is not a JSON object.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    check_json(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UserError("not-json", f"{path}: not a JSON object; copy or download it again, or remove it")
    return document


def config_json(source: str | Path, hf_config: PretrainedConfig, dtype: torch.dtype) -> str:
    """Returns the text of config.json, with the changes of training options.

    Args:
        source: the folder that training started from.
        hf_config: of the model, see `start.model_config`.
        dtype: of the weights.
    """
    text = (Path(source) / "config.json").read_text(encoding="utf-8")
    whole = json.loads(text)
    document = whole.setdefault("text_config", {}) if whole.get("model_type") in MULTIMODAL else whole
    names = [name for name in DTYPES if name in whole]
    if not rope_scaling.is_read_alike(document, hf_config):
        names = DTYPES
        rope_scaling.write(document, hf_config)
    if read_hf_config(source).vocab_size != hf_config.vocab_size:
        document["vocab_size"] = hf_config.vocab_size
    for name, older in OLDER_NAMES.get(hf_config.model_type, {}).items():
        if name in document:
            document[older] = document[name]
    whole |= dict.fromkeys(names or DTYPES, dtype_name(dtype))
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if document is whole else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    whole.setdefault("architectures", [classes[whole["model_type"]]])
    return text if whole == json.loads(text) else json.dumps(whole, indent=2) + "\n"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``, as config.json writes it."""
    return str(dtype).removeprefix("torch.")
