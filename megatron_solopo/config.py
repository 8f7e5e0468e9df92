"""Every option of a training run, once: its meaning, unit, default and section.

Options come from a YAML file with the sections below (underscores) and from the command line (dashes, the
last word). Names are Megatron's where Megatron has the option. `load` refuses what is unknown, what
contradicts something else, and what would have no effect.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import types
import typing
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from megatron_solopo.errors import UserError


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, minimum: float | None = None) -> Any:
    """A field of a section: default, one line of help, allowed values or the smallest allowed number."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass
class ModelConfig:
    """The model: a Hugging Face folder, its precision, its implementation."""

    hf_path: str | None = option(None, "Hugging Face folder: config.json, tokenizer and (unless --random-init) weights")
    random_init: bool = option(False, "start from random weights of the folder's config instead of its weights")
    chat_template: str | None = option(None, "Jinja file to use instead of the tokenizer's own chat template")
    bf16: bool = option(False, "parameters and activations in bfloat16, optimizer and gradient sums in float32")
    transformer_impl: str = option("portable", "portable: pure PyTorch, every platform", ("portable",))
    make_vocab_size_divisible_by: int = option(
        128, "the vocabulary is padded to a multiple of this; padding rows never count", minimum=1
    )
    logprob_chunk_size: int = option(256, "response tokens whose logits exist at one time", minimum=1)
    recompute_granularity: str | None = option(
        None, "full: keep only layer inputs and recompute the rest in backward", ("full",)
    )
    recompute_method: str = option("uniform", "which layers are recomputed together", ("uniform", "block"))
    recompute_num_layers: int = option(1, "layers a recomputed chunk (uniform) or layers recomputed (block)", minimum=1)


@dataclass
class DataConfig:
    """The examples: preference groups, or conversations for --objective sft."""

    train_data: str | None = option(None, "JSONL of preference groups, or of conversations with --objective sft")
    valid_data: str | None = option(None, "the same for evaluation during training")
    seq_length: int = option(8192, "longest prompt plus response, tokens", minimum=2)
    overlong: str = option(
        "refuse", "examples beyond --seq-length: refuse the run, or drop and list them", ("refuse", "drop")
    )
    share_prompts: bool = option(True, "compute a prompt once for all its continuations")
    shuffle: bool = option(True, "a new order each epoch; off: the file's order")


@dataclass
class MethodConfig:
    """What is learnt. Formulas: losses/solopo.py."""

    objective: str = option(
        "preference",
        "preference pairs, or sft: the negative log-likelihood of assistant messages",
        ("preference", "sft"),
    )
    preference_loss: str = option(
        "dpo",
        "the preference loss and its reward; longpo is a baseline that compares the policy on the long context with "
        "the reference on the short one",
        ("dpo", "ipo", "simpo", "orpo", "longpo"),
    )
    context_mode: str = option(
        "solo",
        "solo: pairs on the short context, chosen aligned to the long; "
        "short, long: plain preference optimization there",
        ("solo", "short", "long"),
    )
    beta: float | None = option(
        None,
        "reward scale; default 0.1 for dpo, ipo and longpo, 2.0 for simpo; ipo's margin aims at 1 / (2 beta) "
        "nats per token",
        minimum=0,
    )
    simpo_gamma: float = option(1.0, "SimPO's target margin, in reward units", minimum=0)
    orpo_lambda: float = option(0.1, "ORPO's weight of the odds-ratio term", minimum=0)
    longpo_lambda: float = option(
        0.01, "LongPO's weight of the preference term, beside the chosen answer's likelihood at length", minimum=0
    )
    label_smoothing: float = option(
        0.0, "probability that a pair's labels are swapped, below 0.5, for dpo and simpo", minimum=0
    )
    label_smoothing_form: str = option(
        "conservative",
        "how: with l(m) = -log sigmoid(m) and e the probability, conservative: (1 - e) l(m) + e l(-m), as TRL's CPO "
        "trainer; robust: ((1 - e) l(m) - e l(-m)) / (1 - 2 e), as TRL's DPO trainer's loss type robust",
        ("conservative", "robust"),
    )
    sft_weight: float = option(
        0.0,
        "weight of the chosen answer's negative log-likelihood, on the context of the preference loss (solo: short), "
        "added to dpo, ipo or simpo; TRL's rpo_alpha, cpo_alpha and loss type sft, RPO's alpha",
        minimum=0,
    )
    sft_normalization: str = option(
        "sequence",
        "of that likelihood and of LongPO's; sequence: the mean over each answer's tokens, every group the same "
        "(RPO); token: the mean over the chosen tokens of the global batch (TRL)",
        ("sequence", "token"),
    )
    alignment_weight: float | None = option(
        None,
        "alpha, the weight of the short-to-long alignment; default 3 for dpo and ipo, 1 for simpo and orpo",
        minimum=0,
    )
    alignment_target: str = option("chosen", "which responses are aligned", ("chosen", "both"))
    alignment_distance: str = option(
        "l1",
        "of two rewards that differ by d; l1: |d|; l2: d^2; huber: d^2 / 2 up to --alignment-huber-delta, "
        "delta (|d| - delta / 2) beyond",
        ("l1", "l2", "huber"),
    )
    alignment_huber_delta: float = option(1.0, "where huber turns linear, in reward units", minimum=0)
    alignment_stop_short_gradient: bool = option(False, "the alignment moves only the long side")
    alignment_reference: str = option(
        "per_context",
        "the reference log-prob in the long reward of dpo and ipo: on its own context, or on the short one",
        ("per_context", "short"),
    )
    reference_cache: str | None = option(
        None, "folder of cached reference log-probs; default: reference/ beside the run folder"
    )


LOSSES_WITH_REFERENCE = ("dpo", "ipo", "longpo")
"""Preference losses that compare the policy with its starting weights."""


@dataclass
class ParallelConfig:
    """Processes and devices."""

    device: str = option("auto", "where to compute", ("auto", "cuda", "cpu"))
    tensor_model_parallel_size: int = option(1, "processes that share each layer", minimum=1)
    pipeline_model_parallel_size: int = option(1, "stages that the layers are spread over", minimum=1)
    sequence_parallel: bool = option(
        False, "processes that share a layer also share its norms and residuals, by tokens"
    )
    context_parallel_size: int = option(1, "processes that share each sequence; 1 in this version", minimum=1)
    distributed_timeout_minutes: float = option(
        30.0, "how long a collective waits for a slow process, minutes", minimum=0.1
    )


@dataclass
class TrainingConfig:
    """Steps, batches, optimizer."""

    train_iters: int | None = option(None, "optimizer steps; either this or --train-epochs", minimum=1)
    train_epochs: float | None = option(None, "passes over the training examples", minimum=0)
    global_batch_size: int = option(32, "examples a step, over all processes", minimum=1)
    micro_batch_size: int = option(8, "most examples packed into one forward pass of a process", minimum=1)
    max_tokens_per_rank: int | None = option(
        None,
        "most tokens packed into one forward pass of a process; default: no limit beyond --micro-batch-size",
        minimum=1,
    )
    lr: float = option(1e-6, "peak learning rate", minimum=0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", minimum=0)
    lr_decay_style: str = option("cosine", "after warm-up", ("cosine", "linear", "constant"))
    lr_warmup_fraction: float = option(0.1, "share of the steps that warm up linearly from 0", minimum=0)
    weight_decay: float = option(0.0, "decoupled weight decay; biases and norms are exempt", minimum=0)
    adam_beta1: float = option(0.9, "Adam's first decay", minimum=0)
    adam_beta2: float = option(0.95, "Adam's second decay", minimum=0)
    adam_eps: float = option(1e-8, "Adam's epsilon", minimum=0)
    clip_grad: float = option(1.0, "largest global gradient norm; 0 switches clipping off", minimum=0)
    on_nonfinite: str = option(
        "stop", "a step whose loss or gradient is not finite: stop, or skip and count it", ("stop", "skip")
    )
    spike_factor: float = option(
        10.0, "warn of a loss or gradient norm above this many times its usual value; 0: never", minimum=0
    )
    seed: int = option(1234, "order of the examples and random weights", minimum=0)
    eval_interval: int = option(0, "steps between evaluations on --valid-data; 0: only after the last step", minimum=0)


@dataclass
class OutputConfig:
    """The run folder and what goes into it."""

    save: str | None = option(None, "run folder: checkpoints, metrics.jsonl, config.yaml")
    load: str | None = option(None, "run folder whose last checkpoint to go on from")
    ckpt_step: int | None = option(None, "iteration of --load to go on from; default: the latest", minimum=1)
    auto_resume: bool = option(
        False, "go on from --save where it holds a checkpoint, else start anew; the same command again and again"
    )
    save_interval: int = option(0, "steps between checkpoints; 0: only after the last step", minimum=0)
    keep_last: int | None = option(
        None, "complete checkpoints that stay; older ones are deleted once a new one is complete", minimum=1
    )
    save_retain_interval: int | None = option(
        None, "checkpoints at multiples of this stay; without --keep-last only the last other one does", minimum=1
    )
    async_save: bool = option(False, "train on while another process writes the checkpoint")
    exit_signal_handler: bool = option(False, "on SIGTERM or SIGUSR1 finish the step, save, and exit with 0")
    exit_duration_in_mins: float | None = option(
        None, "after so many minutes finish the step, save, and exit with 0", minimum=0
    )
    save_hf: str | None = option(None, "folder for the trained model in Hugging Face format")
    save_hf_interval: int = option(
        0, "steps between Hugging Face folders iter_0000100 and so on inside --save-hf; 0: none", minimum=0
    )
    force: bool = option(False, "overwrite an existing --save-hf folder")
    tensorboard_dir: str | None = option(None, "write TensorBoard events there")
    wandb_project: str | None = option(None, "log to this Weights & Biases project (WANDB_MODE=offline: to files)")
    wandb_exp_name: str | None = option(None, "name of the Weights & Biases run; default: the run folder's name")
    wandb_save_dir: str | None = option(None, "folder for Weights & Biases' files; default: the run folder")
    log_interval: int = option(10, "steps between printed lines where no progress bar is shown", minimum=1)


@dataclass
class Config:
    """A resolved run. `explicit` names the options somebody set, in the file or on the command line."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    explicit: set[str] = field(default_factory=set)

    def sections(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "explicit"}

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section, as written to config.yaml."""
        return {name: dataclasses.asdict(section) for name, section in self.sections().items()}


_SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.name != "explicit"}
_OWNER = {f.name: (section, f) for section, kind in _SECTIONS.items() for f in dataclasses.fields(kind)}


def flag(name: str) -> str:
    """``seq_length`` -> ``--seq-length``."""
    return "--" + name.replace("_", "-")


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


@functools.cache  # evaluating annotations is slow, and every option asks
def _base_type(kind: type, name: str) -> type:
    annotation = typing.get_type_hints(kind)[name]
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return annotation


def _convert(name: str, value: Any, where: str) -> Any:
    """The value in the option's type, within its choices and minimum; errors name ``where``."""
    section, spec = _OWNER[name]
    kind = _base_type(_SECTIONS[section], name)
    if value is None:
        if spec.default is None:
            return None
        raise UserError(f"{where}: needs a value ({spec.metadata['help']})")
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{where}: must be true or false, found {value!r}")
        return value
    if isinstance(value, bool) or isinstance(value, list | dict):
        raise UserError(f"{where}: must be {kind.__name__}, found {value!r}")
    try:
        number = Decimal(str(value)) if kind is int else None  # exact, and 1e3 is a whole number
        converted = int(number) if kind is int else kind(value)
    except (TypeError, ValueError, ArithmeticError):
        raise UserError(f"{where}: must be {kind.__name__}, found {value!r}") from None
    if kind is int and number != converted:
        raise UserError(f"{where}: must be a whole number, found {value!r}")
    if kind is float and not math.isfinite(converted):
        raise UserError(f"{where}: must be finite, found {value!r}")
    choices, minimum = spec.metadata["choices"], spec.metadata["minimum"]
    if choices and converted not in choices:
        raise UserError(f"{where}: {converted!r} is not one of {', '.join(choices)}{_nearest(str(converted), choices)}")
    if minimum is not None and converted < minimum:
        raise UserError(f"{where}: must be at least {minimum}, found {converted}")
    return converted


def build_parser() -> argparse.ArgumentParser:
    """The command line: one group a section; a flag that is not given leaves no trace."""
    parser = argparse.ArgumentParser(
        prog="pretrain_solopo.py",
        description="Train a language model with SoLoPO on Megatron Core. "
        "Start it under torchrun for several processes.",
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="YAML with the sections " + ", ".join(_SECTIONS))
    parser.add_argument("--dry-run", action="store_true", default=False, help="print what would happen; touch nothing")
    for section, kind in _SECTIONS.items():
        group = parser.add_argument_group(section, kind.__doc__)
        for spec in dataclasses.fields(kind):
            text = spec.metadata["help"].replace("%", "%%")
            if _base_type(kind, spec.name) is bool:
                text += f" (default: {'on' if spec.default else 'off'})"
                group.add_argument(flag(spec.name), action=argparse.BooleanOptionalAction, help=text)
                continue
            if spec.metadata["choices"]:
                text += f" [{' | '.join(spec.metadata['choices'])}]"
            if spec.default is not None:
                text += f" (default: {spec.default})"
            group.add_argument(flag(spec.name), metavar=_base_type(kind, spec.name).__name__.upper(), help=text)
    return parser


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice; YAML readers would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, tuple[Any, str]]:
    """Options of a YAML file: ``{name: (value, "file: section.name")}``.

    Raises:
        UserError: unreadable YAML, an unknown section or option (with the nearest valid name), or an
            option in the wrong section.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML ({problem})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: must hold the sections {', '.join(_SECTIONS)}")
    found: dict[str, tuple[Any, str]] = {}
    for section, values in document.items():
        if section not in _SECTIONS:
            hint = _nearest(str(section), _SECTIONS)
            raise UserError(f"{path}: unknown section '{section}'{hint}; sections are {', '.join(_SECTIONS)}")
        if values is None:
            continue
        if not isinstance(values, dict):
            raise UserError(f"{path}: section '{section}' must hold 'name: value' lines")
        names = [f.name for f in dataclasses.fields(_SECTIONS[section])]
        for name, value in values.items():
            if name not in names:
                hint = f"; it belongs to section '{_OWNER[name][0]}'" if name in _OWNER else _nearest(str(name), names)
                raise UserError(f"{path}: unknown option '{section}.{name}'{hint}")
            found[name] = (value, f"{path}: {section}.{name}")
    return found


def load(argv: list[str] | None = None) -> tuple[Config, bool]:
    """The resolved configuration of a command line, and whether it is a dry run.

    Raises:
        UserError: see the module's first lines.
    """
    parser = build_parser()
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name.split('/')[0]}: {error.message}") from None
    flags = [text for action in parser._actions for text in action.option_strings]
    for text in unknown:
        if text.startswith("--"):
            raise UserError(f"{text.split('=')[0]}: unknown option{_nearest(text.split('=')[0], flags)}")
        raise UserError(f"'{text}': unexpected argument; options start with --")
    values = vars(given)
    path, dry_run = values.pop("config"), values.pop("dry_run")
    options = read_yaml(path) if path else {}
    options |= {name: (value, flag(name)) for name, value in values.items()}
    config = Config()
    for name, (value, where) in options.items():
        setattr(getattr(config, _OWNER[name][0]), name, _convert(name, value, where))
        config.explicit.add(name)
    resolve(config)
    return config, dry_run


def resolve(config: Config) -> None:
    """Fills defaults that depend on other options and refuses contradictions and unused options.

    Raises:
        UserError: naming the flag and what to change.
    """
    from megatron_solopo.config_checks import check

    method = config.method
    if method.objective == "preference":
        if method.beta is None and method.preference_loss != "orpo":
            method.beta = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "longpo": 0.1}[method.preference_loss]
        if method.alignment_weight is None and method.context_mode == "solo" and method.preference_loss != "longpo":
            method.alignment_weight = {"dpo": 3.0, "ipo": 3.0, "simpo": 1.0, "orpo": 1.0}[method.preference_loss]
    check(config)
