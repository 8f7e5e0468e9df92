"""A Hugging Face model for generation: loading, the positions that it covers, the tokens that end its responses."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import transformers
from safetensors import SafetensorError

from megatron_solopo.data.text.control import end_of_turn_id
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import check_json
from megatron_solopo.model.hf_config import auto_class
from megatron_solopo.model.rope import reach as reach_of
from megatron_solopo.model_folder import check_is_folder, seen_in
from megatron_solopo.progress import reporting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(device: str) -> None:
    """Raises `UserError` for ``cuda`` if torch finds no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("cuda-missing", "--device cuda: torch finds no GPU here; use --device cpu")


def load_model(folder: str | Path, device: str, dtype: str, flag: str = "--model") -> PreTrainedModel:
    """Loads a causal language model for generation; ``flag`` is the option of its folder.

    Raises:
        UserError: ``cuda`` without a GPU, or the folder holds no complete model.
    """
    check_device(device)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_is_folder(f"{flag} {folder}", folder, "set a Hugging Face folder")
    check_json(Path(folder) / "config.json")
    if not (Path(folder) / "config.json").is_file():  # else transformers would look for an adapter's base model
        seen = seen_in(folder)
        raise UserError(
            "model-unreadable",
            f"{flag} {folder}: has no config.json" + (f"; {seen}" if seen else "; set a model's folder"),
        )
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    torch_dtype = DTYPES.get(dtype) or ("auto" if device == "cuda" else torch.float32)
    try:
        with reporting(f"loading {folder}"):
            loaded = auto_class(folder).from_pretrained(
                folder, dtype=torch_dtype, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason, seen = str(error).splitlines()[0], seen_in(folder)
        raise UserError(
            "model-unreadable", f"{flag} {folder}: cannot be loaded ({reason})" + (f"; {seen}" if seen else "")
        ) from None
    model, info = cast("tuple[PreTrainedModel, Mapping[str, Collection[str]]]", loaded)  # with `output_loading_info`
    if missing := sorted(info["missing_keys"]):  # transformers initialises them at random
        raise UserError(
            "tensor-missing",
            f"{flag} {folder}: {missing[0]} is not in its weights ({len(missing)} such), and would be random numbers; "
            "copy or convert the model again",
        )
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]  # transformers wraps `to` without types


def weight_facts(folder: str | Path) -> dict[str, str | dict[str, int]]:
    """Identifies the weights in a Hugging Face folder, so that a resumed run notices a change.

    The config is compared by content, weights by size and modification time: reading a large model would take minutes
    at every start.
    """
    facts: dict[str, str | dict[str, int]] = {}
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        if path.name in ("config.json", "adapter_config.json"):
            facts[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix in (".safetensors", ".bin"):
            facts[path.name] = {"bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns}
    return facts


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: the tokenizer's end of turn and those of the model's generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [] if configured is None else list(configured) if isinstance(configured, (list, tuple)) else [configured]
    return sorted({end_of_turn_id(tokenizer), *ids})


def reach(folder: str | Path) -> int | None:
    """Returns the number of positions that the model of a folder covers: ``max_position_embeddings``, more with YaRN.

    Returns:
        None if the config has no limit.

    Raises:
        UserError: there is no config.json.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            "model-config-missing",
            f"--model {folder}: no config.json there; "
            + (seen_in(folder) or "set a Hugging Face folder with a model (--save-hf of a training run writes one)"),
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    positions = config.get("max_position_embeddings")
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    return positions and reach_of(positions, scaling)


def check_reach(folder: str | Path, prompt_tokens: int, max_new_tokens: int, where: str) -> None:
    """Refuses a prompt whose response could end beyond the positions the model covers.

    Args:
        where: source of this length, first in the message (a flag and its value).

    Raises:
        UserError: naming ``where``, the lengths and ``max_position_embeddings``.
    """
    positions = reach(folder)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise UserError(
            "prompt-beyond-positions",
            f"{where}: a prompt of {prompt_tokens:,} tokens and --max-new-tokens {max_new_tokens} go beyond the "
            f"max_position_embeddings {positions:,} of {Path(folder) / 'config.json'}; use a shorter context or a "
            "shorter response",
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """Returns the number of token ids that have an embedding."""
    rows = model.get_input_embeddings().num_embeddings
    assert isinstance(rows, int)
    return rows


def check_rows(model: PreTrainedModel, ids: Sequence[int], where: str) -> None:
    """Refuses token ids that the model has no embedding for.

    Args:
        where: source of the ids, first in the message.

    Raises:
        UserError: naming ``where`` and the largest id.
    """
    rows = embedding_rows(model)
    if ids and max(ids) >= rows:
        raise UserError(
            "token-beyond-vocabulary",
            f"{where}: token id {max(ids)} is beyond the {rows:,} embeddings of {model.name_or_path}; "
            "the tokenizer is not this model's",
        )
