"""What a run is made of before anything starts: its examples, their order, its model, and what can be refused of them.

Training, its dry run and the comparison of layouts share it.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_solopo.config import Config, ModelConfig
from megatron_solopo.config_checks import check_on_cuda
from megatron_solopo.errors import UserError


def quiet() -> None:
    """megatron-core warns of its own deprecations and of absent CUDA extensions at every import, as torch does."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
    # The CPU platform sees every torch call, so torch's warnings of what megatron-core does name it as their place.
    warnings.filterwarnings("ignore", module=r"megatron_solopo\.parallel\.cpu_shim")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


@dataclass
class RunData:
    """Tokenised examples of a run, and how its chats were written.

    Attributes:
        reference: split -> the same examples with what the reference model scores; nothing without a reference.
        chat_template: the text of --chat-template, if given; at the end of a run the file may be gone.
        end_of_turn: the id that ends a turn.
    """

    train: Any
    valid: Any | None
    reference: dict[str, Any]
    chat_template: str | None
    end_of_turn: int


def load_run_tokenizer(options: ModelConfig, begun_with: str | None = None, of_data: str | None = None) -> Any:
    """The tokenizer of a run.

    Args:
        begun_with, of_data: dates, see `template_kwargs.give`.

    Raises:
        UserError: see `load_tokenizer`.
    """
    from megatron_solopo.data.text.chat import load_tokenizer

    return load_tokenizer(
        options.hf_path,
        options.chat_template,
        options.eos_token,
        chat_template_kwargs=options.chat_template_kwargs,
        added_tokens=options.add_special_tokens,
        chat_template_date=options.chat_template_date,
        begun_with=begun_with,
        of_data=of_data,
    )


def dated_tokenizer(config: Config) -> Any:
    """The tokenizer of a run, whose date is put into the config where its template prints one. Collective, where there
    are processes: midnight may come between two of them.

    Raises:
        UserError: see `load_tokenizer`.
    """
    import torch.distributed as dist

    from megatron_solopo import template_kwargs
    from megatron_solopo.data.files.inputs import first_field
    from megatron_solopo.data.tokenized.token_store import is_store, read_manifest

    days = [template_kwargs.today()]
    if dist.is_initialized():
        dist.broadcast_object_list(days, src=0)
    data, output = config.data.train_data, config.output
    begun_with = _date_of_run(output.load or output.save)
    if is_store(data):
        begun_with = begun_with or read_manifest(Path(data))["text"].get(template_kwargs.DATE)
    of_data = days[0] if is_store(data) else first_field(data, template_kwargs.DATE) or days[0]
    tokenizer = load_run_tokenizer(config.model, begun_with, of_data)
    config.model.chat_template_date = template_kwargs.date_of(tokenizer)
    return tokenizer


def _date_of_run(folder: str) -> str | None:
    """What the config.yaml of a run folder has; one that cannot be read has none, for a killed start may leave it."""
    from megatron_solopo import template_kwargs

    try:
        document = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
        return template_kwargs.recorded_date(document["model"].get(template_kwargs.DATE))
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return None


def chosen_template(options: ModelConfig, tokenizer: Any) -> str | None:
    """The text of a run's --chat-template, if given."""
    return tokenizer.chat_template if options.chat_template is not None else None


def load_data(config: Config) -> RunData:
    """Training and validation data: files are tokenised, folders of token ids opened.

    Raises:
        UserError: see `tokenize` and `open_tokens`.
    """
    from megatron_solopo.data.text.text_facts import text_facts
    from megatron_solopo.data.tokenized.token_store import is_store, open_tokens
    from megatron_solopo.data.tokenized.tokens import tokenize
    from megatron_solopo.losses.solopo import reference_roles, roles, scored_roles

    tokenizer = dated_tokenizer(config)
    wanted, data = scored_roles(config.method), config.data
    read = {}
    for split, path in (("train", data.train_data), ("valid", data.valid_data)):
        if path and is_store(path):
            facts = text_facts(config.model.hf_path, tokenizer)
            read[split] = open_tokens(path, facts, wanted, data.seq_length, data.overlong)
        elif path:
            read[split] = tokenize(path, tokenizer, wanted, data.seq_length, data.overlong)
    policy = {split: dataset.with_roles(roles(config.method)) for split, dataset in read.items()}
    compared = reference_roles(config.method)
    reference = {split: dataset.with_roles(compared) for split, dataset in read.items()} if compared else {}
    template = chosen_template(config.model, tokenizer)
    return RunData(policy["train"], policy.get("valid"), reference, template, tokenizer.eos_token_id)


def run_schedule(config: Config, data: RunData) -> Any:
    """Which examples each step of the run trains on."""
    from megatron_solopo.data.tokenized.batches import make_schedule

    training, examples = config.training, len(data.train.groups)
    return make_schedule(
        examples,
        training.global_batch_size,
        training.train_iters,
        training.train_epochs,
        training.seed,
        config.data.shuffle,
    )


def check_model(config: Config) -> Any:
    """The Hugging Face config, after what can be refused without reading weights or data.

    Raises:
        UserError: no such folder, an unknown architecture, --seq-length beyond its positions, no complete weights, or
            a broken generation_config.json.
    """
    from megatron_solopo.conversion.companions import generation_config
    from megatron_solopo.conversion.start import check_weights, model_config
    from megatron_solopo.model.build import check_length, padded_vocab_size
    from megatron_solopo.model.families import family_of
    from megatron_solopo.model.transformer_engine import check_widths
    from megatron_solopo.parallel.platform import choose
    from megatron_solopo.parallel.topology import check_layout, world_size

    if choose(config.parallel.device) == "cuda":
        check_on_cuda(config)
    hf_config = model_config(config.model)
    family_of(hf_config)
    check_length(hf_config, config.data.seq_length)
    padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
    check_layout(hf_config, config, padded, world_size())
    check_widths(hf_config, config)
    if not config.model.random_init:
        check_weights(config.model.hf_path)
    if config.output.save_hf is not None:
        generation_config(Path(config.model.hf_path))  # which an export changes
    return hf_config


def check_vocabulary(data: RunData, vocab_size: int) -> None:
    """Refuses token ids that the model has no row for."""
    for dataset in (data.train, data.valid, *data.reference.values()):
        if dataset is None:
            continue
        largest, example = dataset.largest_token()
        if largest >= vocab_size:
            raise UserError(
                f"example {example!r}: token id {largest} is beyond the model's vocabulary of {vocab_size}; "
                "tokenizer and config.json do not belong together"
            )
