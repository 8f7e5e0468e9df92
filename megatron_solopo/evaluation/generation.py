"""Generation from a Hugging Face folder, in batches sorted by length under a token budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from megatron_solopo.errors import UserError

DEFAULT_BATCH_TOKENS = 32768  # about 2 GB of keys and values for a 7B model with grouped-query attention in bf16


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: the tokenizer's end of turn and those of the model's generation config."""
    own = model.generation_config.eos_token_id
    ids = [] if own is None else list(own) if isinstance(own, (list, tuple)) else [own]
    return sorted({tokenizer.eos_token_id, *ids})


def reach(folder: str | Path) -> int | None:
    """Positions the model of a folder covers: its ``max_position_embeddings``, more with YaRN.

    Returns:
        None where the config names no limit.

    Raises:
        UserError: there is no config.json.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"--model {folder}: no config.json there; give a Hugging Face folder with a model "
            "(--save-hf of a training run writes one)"
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    positions = config.get("max_position_embeddings")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if positions and (scaling.get("rope_type") or scaling.get("type")) == "yarn":
        # Published YaRN configs keep max_position_embeddings at the length before the extension.
        original = scaling.get("original_max_position_embeddings") or positions
        positions = max(positions, int(original * scaling.get("factor", 1.0)))
    return positions


def check_reach(folder: str | Path, prompt_tokens: int, max_new_tokens: int, where: str) -> None:
    """Refuses a prompt whose response could end beyond the positions the model covers.

    Args:
        where: what asked for this length, first in the message (a flag and its value).

    Raises:
        UserError: naming ``where``, the lengths and ``max_position_embeddings``.
    """
    positions = reach(folder)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise UserError(
            f"{where}: a prompt of {prompt_tokens:,} tokens and --max-new-tokens {max_new_tokens} go beyond the "
            f"max_position_embeddings {positions:,} of {Path(folder) / 'config.json'}; use a shorter context"
        )


def batches_by_length(lengths: Sequence[int], new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Indices of prompts in batches, longest first, each at most ``batch_tokens`` with its padding and responses.

    Longest first, so that a batch too large for the memory fails at the start and the ETA shrinks.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        row = (lengths[batches[-1][0]] if batches else 0) + new_tokens
        if batches and (len(batches[-1]) + 1) * row <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: str | None = None,
) -> list[str]:
    """The greedy response to each prompt as text, in the order of the prompts.

    A response ends at an end-of-turn token (which is not part of the text) or after ``max_new_tokens``.
    Generation settings stored with the checkpoint (sampling, repetition penalty, ...) are not used: what
    is measured depends on the arguments alone.

    Args:
        prompts: token ids, one non-empty list a prompt.
        batch_tokens: rows x (longest prompt + ``max_new_tokens``) of a batch stays within this number; a
            single prompt that is longer than that runs alone.
        progress: the name on the progress bar; None shows no bar, and a bar appears only on a terminal.

    Raises:
        UserError: the tokenizer has more ids than the model.
    """
    rows = model.get_input_embeddings().num_embeddings
    highest = max((max(prompt) for prompt in prompts), default=0)
    if highest >= rows:
        raise UserError(
            f"token id {highest} is beyond the {rows:,} embeddings of {model.name_or_path}; "
            "the tokenizer is not this model's"
        )
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=pad)
    lengths = [len(prompt) for prompt in prompts]
    responses = [""] * len(prompts)
    # transformers fills what a config leaves open from the model's own, so that one is put away meanwhile.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    bar = tqdm(
        total=sum(lengths),
        desc=progress,
        unit=" tokens",
        unit_scale=True,
        leave=False,
        disable=True if progress is None else None,
    )
    try:
        for batch in batches_by_length(lengths, max_new_tokens, batch_tokens):
            longest = lengths[batch[0]]
            ids = torch.full((len(batch), longest), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(batch):
                ids[row, longest - lengths[index] :] = torch.tensor(prompts[index], dtype=torch.long)
                mask[row, longest - lengths[index] :] = 1
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
            for index, row in zip(batch, out[:, longest:].tolist(), strict=True):
                end = next((position for position, token in enumerate(row) if token in stops), len(row))
                responses[index] = tokenizer.decode(row[:end], skip_special_tokens=True)
            bar.update(sum(lengths[index] for index in batch))
    finally:
        bar.close()
        model.generation_config = kept
    return responses
