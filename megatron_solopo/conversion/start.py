"""Initial weights of a run: a Hugging Face folder, or a Megatron folder converted from one."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import PretrainedConfig

from megatron_solopo.config import ModelConfig, flag
from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.conversion.hf_weights import HfWeights, check_tensors
from megatron_solopo.conversion.manifest import LATEST, MANIFEST, find_checkpoint
from megatron_solopo.conversion.megatron_folder import load_weights_from
from megatron_solopo.conversion.new_tokens import new_rows
from megatron_solopo.conversion.quantized import WeightReader
from megatron_solopo.errors import UserError
from megatron_solopo.model.hf_config import read_hf_config


def is_megatron_folder(folder: str | Path) -> bool:
    """Whether a folder holds weights in megatron-core's format and config.json, which a run folder does not have."""
    return (Path(folder) / LATEST).is_file() and (Path(folder) / "config.json").is_file()


def model_config(options: ModelConfig) -> PretrainedConfig:
    """Returns the Hugging Face config of --hf-path with --rope-scaling and --add-special-tokens.

    Raises:
        UserError: see `read_hf_config` and `new_rows`.
    """
    hf_config = read_hf_config(options.hf_path, options.rope_scaling)
    if options.add_special_tokens is None:
        return hf_config
    if is_megatron_folder(options.hf_path):
        raise UserError(
            "option-conflict",
            f"{flag('add_special_tokens')} with the Megatron folder {options.hf_path}: its matrices have no rows for "
            "them; pass the option to convert-checkpoint hf-to-megatron, which makes such folders",
        )
    extended = copy.deepcopy(hf_config)
    extended.vocab_size = new_rows(options.hf_path, hf_config.vocab_size, options.add_special_tokens).rows
    return extended


def check_weights(folder: str | Path, hf_config: PretrainedConfig, padded_vocab_size: int) -> None:
    """Refuses a folder without complete weights, or with weights of another model.

    Raises:
        UserError: a file is missing or damaged, or see `check_tensors`.
    """
    if is_megatron_folder(folder):
        find_checkpoint(folder, None, "--hf-path")
    else:
        check_tensors(WeightReader(folder), hf_config, padded_vocab_size)


def weights_fingerprint(folder: str | Path) -> str:
    """Returns the sha256 of the weight files, or of the manifest of a Megatron folder."""
    digest = hashlib.sha256()
    if is_megatron_folder(folder):
        digest.update((find_checkpoint(folder, None, "--hf-path") / MANIFEST).read_bytes())
        return digest.hexdigest()
    for path in TensorReader(folder).files():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def open_hf_weights(
    models: Sequence[GPTModel], hf_config: PretrainedConfig, folder: str | Path, add_special_tokens: str | None
) -> HfWeights:
    """Returns a Hugging Face folder's weights, for the chunks of a model.

    Args:
        hf_config: of the model, see `model_config`.

    Raises:
        UserError: see `HfWeights`.
    """
    rows = None
    if add_special_tokens is not None:
        rows = new_rows(folder, read_hf_config(folder).vocab_size, add_special_tokens)
    return HfWeights(folder, models, hf_config, rows)


def load_start(
    models: Sequence[GPTModel], hf_config: PretrainedConfig, folder: str | Path, add_special_tokens: str | None = None
) -> None:
    """Copies a folder's weights into the chunks of a model, split for this process, in the model's dtype.

    Args:
        hf_config: of the model, see `model_config`.
        add_special_tokens: of a Hugging Face folder's model.

    Raises:
        UserError: a tensor is missing, left over, or has the wrong shape.
    """
    if is_megatron_folder(folder):
        load_weights_from(find_checkpoint(folder, None, "--hf-path"), models, frozen=True)
    else:
        open_hf_weights(models, hf_config, folder, add_special_tokens).fill_all()
