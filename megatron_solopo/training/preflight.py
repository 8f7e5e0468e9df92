"""The checks before a run computes anything: one list for training, its dry run and the other commands.

`preflight` runs all checks in order: folders, model, machine, data, vocabulary, the run that is resumed, the work that
is left, the reference's weights. Training and ``--dry-run`` call it, so that a dry run refuses what the run would.
verify-parallelism calls a part of it, `check_run_inputs` (model, machine, data, vocabulary), and convert-checkpoint
`read_model` and `check_cut` (model, layout).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_solopo import template_kwargs
from megatron_solopo.config import AUTO, Config, ModelConfig, OutputConfig
from megatron_solopo.config_checks import check_on_cuda, profiled_ranks
from megatron_solopo.conversion.adapters import check_adapters
from megatron_solopo.conversion.hf import beside_of
from megatron_solopo.conversion.sidecar_files import generation_config
from megatron_solopo.conversion.start import check_weights, model_config
from megatron_solopo.data.files.inputs import first_field
from megatron_solopo.data.options import TokenizerOptions
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.data.tokenized.batches import Schedule, make_schedule
from megatron_solopo.data.tokenized.make_store import Job, cache_folder, cached_store, is_complete
from megatron_solopo.data.tokenized.stretch import Stretch
from megatron_solopo.data.tokenized.token_store import StoredTokens, is_store, open_tokens, read_manifest
from megatron_solopo.errors import UserError
from megatron_solopo.losses.solopo import all_scores, needs_reference, policy_scores, reference_scores
from megatron_solopo.model.families.registry import family_of
from megatron_solopo.model.hf_config import (
    check_attention_on_cuda,
    check_biased_experts,
    check_lengths,
    padded_vocab_size,
)
from megatron_solopo.model.recompute import check_modules
from megatron_solopo.model.tiles import check_tiles
from megatron_solopo.model.transformer_engine import check_machine, check_widths
from megatron_solopo.parallel.platform import agreed, check_same, choose, first_of_node, resolve
from megatron_solopo.parallel.topology import check_layout, world_size
from megatron_solopo.training import resume, run_identity
from megatron_solopo.training.answers import ANSWER_METRICS, HeldOut, read_held_out
from megatron_solopo.training.best import check_metric
from megatron_solopo.training.objective import check_loss, metric_names
from megatron_solopo.training.reference import shared, starting_weights
from megatron_solopo.training.run_folder import recorded_budget


@dataclass(frozen=True)
class RunData:
    """Tokenized examples of a run, and how its chats were written.

    Attributes:
        reference: split -> the same examples with what the reference model scores; nothing without a reference.
        chat_template: the text of --chat-template, if set; at the end of a run the file may be gone.
        end_of_turn: the id that ends a turn.
        held_out: the questions of --eval-generate, if set.
    """

    train: StoredTokens
    valid: StoredTokens | None
    reference: dict[str, StoredTokens]
    chat_template: str | None
    end_of_turn: int
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run's steps.

    Attributes:
        schedule: the examples of each step.
        unfit: why this machine cannot compute the run, where that is not an error.
    """

    hf_config: PretrainedConfig
    data: RunData
    schedule: Schedule
    unfit: str | None


@dataclass(frozen=True)
class Preflight:
    """A run that passed all checks.

    Attributes:
        progress: the run's identity, which is saved in every checkpoint.
        source: the checkpoint that is resumed, or None.
        before: its `progress` and ``iteration``; empty without one.
        nothing_left: an earlier start of this command did all its work.
        weights: `starting_weights`, where the loss has a reference or they are frozen, and they were read.
        budget: why --max-tokens-per-rank auto is what it is, for the log; None without it.
    """

    inputs: RunInputs
    progress: run_identity.Progress
    source: Path | None
    before: run_identity.Progress = field(default_factory=dict)
    nothing_left: bool = False
    weights: str | None = None
    budget: str | None = None

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
    resume.check_shared_folder(Path(config.output.save))
    agreed(lambda: resume.check_folders(config), "folders")
    inputs = check_run_inputs(config, refuse_machine=not dry_run)
    progress = run_identity.progress_of(inputs.schedule, inputs.data.train, config, inputs.hf_config)
    source, before = agreed(lambda: _start(config), "checkpoint")
    check_same((source, before), "another checkpoint there than on rank 0 to resume; let all nodes see one folder")
    if source is not None:
        run_identity.check_same_run(before, progress, config)
    budget = _choose_budget(config, inputs, resumed=source is not None)
    if resume.nothing_left(config, before.get("iteration", 0), inputs.schedule.steps):
        return Preflight(inputs, progress, source, before, nothing_left=True)
    check_profile(config.output, inputs.schedule.steps)
    weights = None
    # A checkpoint of adapters is one of the weights beside them, as a loss with a reference is one of the reference.
    identified = needs_reference(config.method) or config.model.lora_rank is not None
    if identified and (before or not dry_run):  # reads all weights
        weights = shared(lambda: starting_weights(config))
        progress[run_identity.REFERENCE_WEIGHTS] = weights
        if before:
            run_identity.check_reference(before, weights, config)
    return Preflight(inputs, progress, source, before, weights=weights, budget=budget)


def _choose_budget(config: Config, inputs: RunInputs, resumed: bool) -> str | None:
    """Replaces --max-tokens-per-rank auto in the config by a number, and returns why it is that, or None; collective.

    A run that is resumed by as many processes, with the same options of model and layout, keeps its number: what is
    available differs from start to start, and so would the order of its sums.

    Raises:
        UserError: see `token_budget`.
    """
    if config.training.max_tokens_per_rank != AUTO:
        return None
    folder = Path(config.output.load or config.output.save)
    recorded = shared(lambda: recorded_budget(folder, config), "folders") if resumed else None
    if recorded is not None:
        config.training.max_tokens_per_rank = recorded
        return f"--max-tokens-per-rank auto: {recorded:,}, as before in {folder}"
    from megatron_solopo.planning.budget import token_budget  # which rehearses what this room does

    device = config.parallel.device
    config.training.max_tokens_per_rank, why = token_budget(config, inputs, resolve(device))
    return why


def _start(config: Config) -> tuple[Path | None, run_identity.Progress]:
    """Returns the checkpoint that is resumed, and its `progress`."""
    source = resume.find_start(config)
    return source, {} if source is None else run_identity.read_progress(source)


def check_profile(output: OutputConfig, steps: int) -> None:
    """Refuses a profile of ranks or steps that the run does not have.

    Raises:
        UserError: names the option.
    """
    if not output.profile:
        return
    first, last_rank = output.profile_step_start, world_size() - 1
    if first >= steps:
        raise UserError("option-value", f"--profile-step-start {first}: the run has {steps} steps; lower it")
    if (largest := max(profiled_ranks(output))) > last_rank:
        raise UserError(
            "option-value",
            f"--profile-ranks {output.profile_ranks}: the run has the ranks 0 to {last_rank}, not {largest}",
        )


def check_run_inputs(config: Config, refuse_machine: bool = True) -> RunInputs:
    """Model, machine, data, vocabulary and order of the examples.

    Raises:
        UserError: see `check_model`, `check_loss`, `check_machine`, `load_data` and `check_vocabulary`.
    """
    device = resolve(config.parallel.device)
    hf_config = agreed(lambda: check_model(config, device), "model")
    check_loss(config.method)
    unfit = None
    try:
        check_machine(config, choose(config.parallel.device))
    except UserError as error:
        if refuse_machine:
            raise
        unfit = str(error)
    data = load_data(config)
    if config.output.save_best is not None:
        measured = metric_names(config.method) if config.data.valid_data is not None else ()
        check_metric(config.output.save_best, (*measured, *(ANSWER_METRICS if data.held_out is not None else ())))
    check_vocabulary(data, hf_config.vocab_size)
    return RunInputs(hf_config, data, run_schedule(config, data), unfit)


def check_model(config: Config, device: str) -> PretrainedConfig:
    """Returns the Hugging Face config, after what can be refused without reading weights or data.

    Args:
        device: ``cuda`` or ``cpu``.

    Raises:
        UserError: no such folder, an unknown architecture, lengths beyond its positions, a layout that it cannot
            be cut into, no complete weights, or a broken generation_config.json.
    """
    if device == "cuda":
        check_on_cuda(config)
    hf_config = read_model(config)
    if device == "cuda":
        check_attention_on_cuda(hf_config, config)
    check_lengths(hf_config, config.data)
    check_cut(hf_config, config, world_size())
    if not config.model.random_init:
        padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
        check_weights(config.model.hf_path, hf_config, padded)
    check_adapters(config.model, hf_config)
    if config.output.save_hf is not None:
        generation_config(Path(config.model.hf_path))  # which an export changes
        beside_of(config.model.hf_path, hf_config)
    return hf_config


def read_model(config: Config) -> PretrainedConfig:
    """Returns the Hugging Face config of a run.

    Raises:
        UserError: see `model_config` and `family_of`.
    """
    hf_config = model_config(config.model)
    family_of(hf_config)
    return hf_config


def check_cut(hf_config: PretrainedConfig, config: Config, processes: int) -> None:
    """Refuses a layout that this model cannot be cut into.

    Raises:
        UserError: see `check_layout`, `check_biased_experts`, `check_widths` and `check_tiles`.
    """
    padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
    check_layout(hf_config, config, padded, processes)
    check_biased_experts(hf_config, config)
    check_widths(hf_config, config)
    check_modules(hf_config, config.model)
    check_tiles(hf_config, config)


def check_vocabulary(data: RunData, vocab_size: int) -> None:
    """Refuses token ids that the model has no row for."""
    for dataset in (data.train, data.valid, *data.reference.values()):
        if dataset is None:
            continue
        largest, example = dataset.largest_token
        if largest >= vocab_size:
            raise UserError(
                "token-beyond-vocabulary",
                f"example {example!r}: token id {largest} is beyond the model's vocabulary of {vocab_size}; "
                "tokenizer and config.json do not belong together",
            )


def load_data(config: Config) -> RunData:
    """Training and validation data, opened by mmap. Collective, where there are processes.

    Raises:
        UserError: see `_store_of` and `open_tokens`; a process has other examples than rank 0.
    """
    tokenizer = dated_tokenizer(config)
    data = config.data
    facts = text_facts(config.model.hf_path, tokenizer)
    read: dict[str, StoredTokens] = {}
    for split, path in (("train", data.train_data), ("valid", data.valid_data)):
        if not path:
            continue
        folder = _store_of(path, config, tokenizer)
        stretch = Stretch.of(config) if split == "train" else None
        tokens = agreed(partial(_open, path, folder, facts, config, stretch), "data")
        check_same(tokens.fingerprint, f"{path} is other data there than on rank 0; copy rank 0's")
        read[split] = tokens
    policy = {split: dataset.only(policy_scores(config.method)) for split, dataset in read.items()}
    compared = reference_scores(config.method)
    reference = {split: dataset.only(compared) for split, dataset in read.items()} if compared else {}
    template = chosen_template(config.model, tokenizer)
    held_out = None
    if data.eval_generate is not None:
        held_out = agreed(lambda: read_held_out(config, tokenizer), "data")
        differ = f"--eval-generate {data.eval_generate} is other data there than on rank 0; copy rank 0's"
        check_same(held_out.fingerprint, differ)
    return RunData(policy["train"], policy.get("valid"), reference, template, end_of_turn(tokenizer), held_out)


def _open(path: str, folder: Path, facts: dict[str, Any], config: Config, stretch: Stretch | None) -> StoredTokens:
    """Opens the token store of a data option, see `_store_of`."""
    data, source = config.data, None if folder == Path(path) else path
    tokens = open_tokens(folder, facts, all_scores(config.method), data.seq_length, data.overlong, source)
    return tokens if stretch is None else tokens.stretched(stretch, path)


def _store_of(path: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Returns the token store of a data option: the path itself if it is one, else that of the file in the cache.

    Where the cache has none, rank 0 writes it while the others wait. The first process of each other machine writes
    the same from the file on its disk, if its cache does not have it either.

    Raises:
        UserError: see `cached_store`.
    """
    if shared(lambda: is_store(path), "data"):
        return Path(path)
    data, cache = config.data, cache_folder(config.data.data_cache)
    job = Job(path, tokenizer_options(config.model), config.method.objective)
    if data.overlong == "cut":  # which depends on what is scored; else one store serves every method and length
        job = replace(job, seq_length=data.seq_length, overlong="cut", scored=all_scores(config.method))
    workers = len(os.sched_getaffinity(0))
    store, settings = shared(lambda: cached_store(job, tokenizer, cache, workers), f"tokenizing {path}")
    folder = cache / store.name

    def write_on_this_node() -> None:
        if first_of_node() and not is_complete(folder, settings):
            cached_store(job, tokenizer, cache, workers, settings)

    agreed(write_on_this_node, f"tokenizing {path}")
    return folder


def run_schedule(config: Config, data: RunData) -> Schedule:
    """Returns which examples each step of the run trains on."""
    training = config.training
    return make_schedule(
        len(data.train.groups),
        training.global_batch_size,
        training.train_iters,
        training.train_epochs,
        training.seed,
        config.data.shuffle,
    )


def tokenizer_options(options: ModelConfig) -> TokenizerOptions:
    """Returns what a run's tokenizer is loaded from."""
    return TokenizerOptions(
        options.hf_path,
        options.chat_template,
        options.eos_token,
        options.chat_template_kwargs,
        options.add_special_tokens,
        options.chat_template_date,
    )


def load_run_tokenizer(
    options: ModelConfig, of_resumed: str | None = None, of_data: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a run.

    Args:
        of_resumed, of_data: dates, see `template_kwargs.apply`.

    Raises:
        UserError: see `load_tokenizer`.
    """
    return tokenizer_options(options).load(of_resumed, of_data)


def dated_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a run, and writes its date into the config where its template prints one.

    Collective, where there are several processes: midnight may come between two of them.

    Raises:
        UserError: see `load_tokenizer`.
    """
    of_resumed, of_data = shared(lambda: _dates(config), "data")
    tokenizer = agreed(lambda: load_run_tokenizer(config.model, of_resumed, of_data), "tokenizer")
    config.model.chat_template_date = template_kwargs.date_of(tokenizer)
    return tokenizer


def _dates(config: Config) -> tuple[str | None, str]:
    """Returns the date of the run that is resumed, and that of its data, else today's."""
    data, output, today = config.data.train_data, config.output, template_kwargs.today()
    of_resumed = _date_of_run(output.load or output.save)
    if is_store(data):
        return of_resumed or read_manifest(Path(data))["text"].get(template_kwargs.DATE), today
    return of_resumed, first_field(data, template_kwargs.DATE) or today


def _date_of_run(folder: str) -> str | None:
    """Returns what the config.yaml of a run folder has; one that cannot be read has none, for a killed start may leave
    it."""
    try:
        document = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
        return template_kwargs.recorded_date(document["model"].get(template_kwargs.DATE))
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return None


def chosen_template(options: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the text of a run's --chat-template, if set."""
    if options.chat_template is None:
        return None
    assert isinstance(tokenizer.chat_template, str)  # of a file there is one
    return tokenizer.chat_template


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that ends a turn."""
    assert isinstance(tokenizer.eos_token_id, int)  # `load_tokenizer` refuses others
    return tokenizer.eos_token_id
