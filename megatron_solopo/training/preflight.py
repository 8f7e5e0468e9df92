"""What is checked before a run computes anything: one list of checks for training, its dry run and the other commands.

`preflight` is all of it, in order: folders, model, machine, data, vocabulary, the run that is resumed, what is left to
do, the reference's weights. Training and ``--dry-run`` call it, so that a dry run refuses what the run would.
verify-parallelism takes `check_run_inputs` (model, machine, data, vocabulary), convert-checkpoint `read_model` and
`check_cut` (model, layout), which are parts of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
import yaml
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.config import Config, ModelConfig
from megatron_solopo.config_checks import check_on_cuda
from megatron_solopo.conversion.companions import generation_config
from megatron_solopo.conversion.start import check_weights, model_config
from megatron_solopo.data.files.inputs import first_field
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.data.tokenized.batches import Schedule, make_schedule
from megatron_solopo.data.tokenized.token_store import is_store, open_tokens, read_manifest
from megatron_solopo.data.tokenized.tokens import TokenDataset, tokenize
from megatron_solopo.errors import UserError
from megatron_solopo.losses.solopo import all_scores, needs_reference, policy_scores, reference_scores
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.hf_config import check_length, padded_vocab_size
from megatron_solopo.model.transformer_engine import check_machine, check_widths
from megatron_solopo.parallel.platform import choose
from megatron_solopo.parallel.topology import check_layout, world_size
from megatron_solopo.training import resume
from megatron_solopo.training.objective import check_loss
from megatron_solopo.training.reference import shared, starting_weights


@dataclass(frozen=True)
class RunData:
    """Tokenised examples of a run, and how its chats were written.

    Attributes:
        reference: split -> the same examples with what the reference model scores; nothing without a reference.
        chat_template: the text of --chat-template, if given; at the end of a run the file may be gone.
        end_of_turn: the id that ends a turn.
    """

    train: TokenDataset
    valid: TokenDataset | None
    reference: dict[str, TokenDataset]
    chat_template: str | None
    end_of_turn: int


@dataclass(frozen=True)
class RunInputs:
    """What a step is computed from.

    Attributes:
        schedule: which examples each step trains on.
        unfit: why this machine cannot compute the run, where that does not end the check.
    """

    hf_config: PretrainedConfig
    data: RunData
    schedule: Schedule
    unfit: str | None


@dataclass(frozen=True)
class Preflight:
    """A run that nothing is known against.

    Attributes:
        progress: what says which run this is; kept in every checkpoint.
        source: the checkpoint that is resumed, or None.
        before: its `progress` and ``iteration``; empty without one.
        nothing_left: an earlier start of this command did all its work.
        weights: `starting_weights`, where the loss has a reference and they were read.
    """

    inputs: RunInputs
    progress: resume.Progress
    source: Path | None
    before: resume.Progress = field(default_factory=dict)
    nothing_left: bool = False
    weights: str | None = None

    @property
    def resumed(self) -> int:
        """Steps that are done."""
        return self.before["iteration"] if self.before else 0


def preflight(config: Config, dry_run: bool = False) -> Preflight:
    """Checks everything that can be known before the first step. Collective, where there are processes.

    Args:
        dry_run: there are no processes; a machine that cannot compute the run, which may be a cluster's login node,
            is noted in `RunInputs.unfit` instead of refused, and a new run's weights are not read.

    Raises:
        UserError: what is wrong, and what to change.
    """
    resume.check_folders(config)
    inputs = check_run_inputs(config, refuse_machine=not dry_run)
    progress = resume.progress_of(inputs.schedule, inputs.data.train, config, inputs.hf_config)
    source = resume.find_start(config)
    before: resume.Progress = {}
    if source is not None:
        before = resume.read_progress(source)
        resume.check_same_run(before, progress, config)
    if resume.nothing_left(config, before.get("iteration", 0), inputs.schedule.steps):
        return Preflight(inputs, progress, source, before, nothing_left=True)
    weights = None
    if needs_reference(config.method) and (before or not dry_run):  # reads all weights
        weights = _on_first(lambda: starting_weights(config))
        progress[resume.REFERENCE_WEIGHTS] = weights
        if before:
            resume.check_reference(before, weights, config)
    return Preflight(inputs, progress, source, before, weights=weights)


def _on_first(make: Callable[[], str]) -> str:
    return shared(make) if dist.is_initialized() else make()


def check_run_inputs(config: Config, refuse_machine: bool = True) -> RunInputs:
    """Model, machine, data, vocabulary and order of the examples.

    Raises:
        UserError: see `check_model`, `check_loss`, `check_machine`, `load_data` and `check_vocabulary`.
    """
    device = choose(config.parallel.device)
    hf_config = check_model(config, device)
    check_loss(config.method)
    unfit = None
    try:
        check_machine(config, device)
    except UserError as error:
        if refuse_machine:
            raise
        unfit = str(error)
    data = load_data(config)
    check_vocabulary(data, hf_config.vocab_size)
    return RunInputs(hf_config, data, run_schedule(config, data), unfit)


def check_model(config: Config, device: str) -> PretrainedConfig:
    """The Hugging Face config, after what can be refused without reading weights or data.

    Args:
        device: ``cuda`` or ``cpu``.

    Raises:
        UserError: no such folder, an unknown architecture, --seq-length beyond its positions, a layout that it cannot
            be cut into, no complete weights, or a broken generation_config.json.
    """
    if device == "cuda":
        check_on_cuda(config)
    hf_config = read_model(config)
    check_length(hf_config, config.data.seq_length)
    check_cut(hf_config, config, world_size())
    if not config.model.random_init:
        padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
        check_weights(config.model.hf_path, hf_config, padded)
    if config.output.save_hf is not None:
        generation_config(Path(config.model.hf_path))  # which an export changes
    return hf_config


def read_model(config: Config) -> PretrainedConfig:
    """The Hugging Face config of a run.

    Raises:
        UserError: see `model_config` and `family_of`.
    """
    hf_config = model_config(config.model)
    family_of(hf_config)
    return hf_config


def check_cut(hf_config: PretrainedConfig, config: Config, processes: int) -> None:
    """Refuses a layout that this model cannot be cut into.

    Raises:
        UserError: see `check_layout` and `check_widths`.
    """
    padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
    check_layout(hf_config, config, padded, processes)
    check_widths(hf_config, config)


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


def load_data(config: Config) -> RunData:
    """Training and validation data: files are tokenised, folders of token ids opened.

    Raises:
        UserError: see `tokenize` and `open_tokens`.
    """
    tokenizer = dated_tokenizer(config)
    wanted, data = all_scores(config.method), config.data
    read: dict[str, TokenDataset] = {}
    for split, path in (("train", data.train_data), ("valid", data.valid_data)):
        if path and is_store(path):
            facts = text_facts(config.model.hf_path, tokenizer)
            read[split] = open_tokens(path, facts, wanted, data.seq_length, data.overlong)
        elif path:
            read[split] = tokenize(path, tokenizer, wanted, data.seq_length, data.overlong)
    policy = {split: dataset.only(policy_scores(config.method)) for split, dataset in read.items()}
    compared = reference_scores(config.method)
    reference = {split: dataset.only(compared) for split, dataset in read.items()} if compared else {}
    template = chosen_template(config.model, tokenizer)
    return RunData(policy["train"], policy.get("valid"), reference, template, end_of_turn(tokenizer))


def run_schedule(config: Config, data: RunData) -> Schedule:
    """Which examples each step of the run trains on."""
    training = config.training
    return make_schedule(
        len(data.train.groups),
        training.global_batch_size,
        training.train_iters,
        training.train_epochs,
        training.seed,
        config.data.shuffle,
    )


def load_run_tokenizer(
    options: ModelConfig, begun_with: str | None = None, of_data: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a run.

    Args:
        begun_with, of_data: dates, see `template_kwargs.give`.

    Raises:
        UserError: see `load_tokenizer`.
    """
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


def dated_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, whose date is put into the config where its template prints one. Collective, where there
    are processes: midnight may come between two of them.

    Raises:
        UserError: see `load_tokenizer`.
    """
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
    try:
        document = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
        return template_kwargs.recorded_date(document["model"].get(template_kwargs.DATE))
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return None


def chosen_template(options: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text of a run's --chat-template, if given."""
    if options.chat_template is None:
        return None
    assert isinstance(tokenizer.chat_template, str)  # of a file there is one
    return tokenizer.chat_template


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a turn."""
    assert isinstance(tokenizer.eos_token_id, int)  # `load_tokenizer` refuses others
    return tokenizer.eos_token_id
