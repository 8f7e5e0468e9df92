"""The configuration of a training run from its options; a YAML file has the sections of `config`."""

from __future__ import annotations

import argparse
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_solopo import template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.config import OWNER, SECTIONS, Config, flag, load_loss, names_of
from megatron_solopo.config_checks import check
from megatron_solopo.errors import nearest
from megatron_solopo.lora_options import read_folder_options
from megatron_solopo.losses.base import PreferenceLoss
from megatron_solopo.losses.registry import loss_class
from megatron_solopo.megatron_options import REFUSED
from megatron_solopo.model.rope_scaling import parse as parse_rope_scaling
from megatron_solopo.yaml_options import OptionFile, Options, as_options

GROUPS = ("train_data", "valid_data")
"""Options that `from_options` takes as examples in memory too."""

_hints = functools.cache(typing.get_type_hints)  # evaluating annotations is slow, and every option asks


def _base_type(name: str) -> type:
    annotation = _hints(OWNER[name].kind)[name]
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return annotation


def _converter(name: str) -> Callable[[str], Any]:
    """Returns the function that parses an option's text: its type, choices and minimum."""
    spec, kind = OWNER[name].spec, _base_type(name)

    def convert(text: str) -> Any:
        if text == spec.metadata["word"]:
            return text
        try:
            number = Decimal(text) if kind is int else Decimal()  # exact, and 1e3 is a whole number
            value = int(number) if kind is int else kind(text)
        except (ValueError, ArithmeticError):
            word = spec.metadata["word"]
            wanted = kind.__name__ + (f" or {word}" if word else "")
            raise argparse.ArgumentTypeError(f"must be {wanted}, found {text!r}") from None
        if kind is int and number != value:
            raise argparse.ArgumentTypeError(f"must be a whole number, found {text!r}")
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, found {text!r}")
        choices, minimum = spec.metadata["choices"], spec.metadata["minimum"]
        if choices and value not in choices:
            hint = nearest(str(value), choices)
            raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(choices)}{hint}")
        if minimum is not None and value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, found {value}")
        return value

    convert.__name__ = kind.__name__
    return convert


def build_parser(command: bool = True) -> Parser:
    """One group of options for each section; of the ``command`` there are --help, --dry-run and --mock-data too."""
    parser = Parser(
        prog="pretrain_solopo.py",
        description="Train a language model with SoLoPO on Megatron Core. "
        "Start it under torchrun for several processes.",
        sections={section: names_of(section) for section in SECTIONS},
        refused=REFUSED,
        add_help=command,
    )
    if command:
        parser.add_argument("--dry-run", action="store_true", help="print what would happen; touch nothing")
        parser.add_argument(
            "--mock-data",
            action="store_true",
            help="two steps on one CPU process with generated examples, lengths scaled down, and a model cut to two "
            "narrow layers; leaves nothing behind",
        )
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section, kind.__doc__)
        for name in names_of(section):
            spec = OWNER[name].spec
            text = spec.metadata["help"].replace("%", "%%")
            default: dict[str, Any] = {"default": spec.default}
            if _base_type(name) is bool:
                text += f" (default: {'on' if spec.default else 'off'})"
                group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text, **default)
                continue
            if spec.metadata["choices"]:
                text += f" [{' | '.join(spec.metadata['choices'])}]"
            if spec.default is not None:
                text += f" (default: {spec.default})"
            form = "JSON" if spec.metadata["mapping"] else _base_type(name).__name__.upper()
            group.add_argument(flag(name), metavar=form, type=_converter(name), help=text, **default)
    return parser


def read_yaml(path: str | Path) -> Options:
    """Returns the options of a run's YAML file, not converted; see `read_options`."""
    _load_loss_of(path)
    return build_parser().read_file(path)


def _load_loss_of(path: str | Path) -> None:
    """Registers the user's loss that a run's YAML file names, with its options; see `load_loss`."""
    for name, (value, where) in _read_section(path, "method").items():
        if name == "preference_loss":
            load_loss(str(value), where)


def _read_section(path: str | Path, section: str) -> Options:
    """Returns the options of one section of a YAML file; their names are not checked."""
    with OptionFile(path, "--config") as file:
        sections = file.entries(file.root, f"{path}: must hold the sections {', '.join(SECTIONS)}")
        place, node = next(((where, node) for name, where, node in sections if name == section), ("", None))
        lines = file.entries(node, f"{place}: section '{section}' must hold 'name: value' lines")
        return {name: (file.value(node), f"{where}: {section}.{name}") for name, where, node in lines}


def read_model_options(path: str | Path) -> dict[str, Any]:
    """Reads the model's options in a run's config.yaml, without loading a user's loss, whose file may be gone.

    Raises:
        UserError: unreadable YAML, or a value that is none of its option.
    """
    parser = build_parser()
    values = vars(parser.parse_args(parser.words(_read_section(path, "model"))))
    return {name: values[name] for name in parser.explicit & OWNER.keys()}


def load(argv: list[str] | None = None, command: bool = True) -> tuple[Config, bool]:
    """Returns the resolved configuration of a command line, and whether it is a dry run.

    Args:
        command: see `build_parser`.

    Raises:
        UserError: what is unknown, contradicts something else, or would have no effect.
    """
    config, values = parsed(argv, command)
    resolve(config)
    return config, command and values.dry_run


def parsed(argv: list[str] | None = None, command: bool = True) -> tuple[Config, argparse.Namespace]:
    """What a command line sets, not resolved, and its words as they were parsed; see `load`."""
    first = Parser(config=False, add_help=False)  # a user's loss adds options
    first.add_argument("--config")
    first.add_argument("--preference-loss")
    before, _ = first.parse_known_args(argv)
    parser = _parser_of_run(before.config, before.preference_loss, command)
    values = parser.parse_args(argv)
    return _config_of(parser, values), values


def from_options(options: Mapping[str, Any]) -> Config:
    """See `Config.from_options`."""
    texts, loss = dict(options), options.get("preference_loss")
    parser = _parser_of_run(options.get("config"), loss, command=False)
    if isinstance(loss, type):
        texts["preference_loss"] = load_loss(loss, flag("preference_loss"))
    groups = {name: tuple(texts[name]) for name in GROUPS if _holds_records(texts.get(name))}
    texts |= dict.fromkeys(groups, "in memory")
    config = _config_of(parser, parser.parse_args(parser.words(as_options(texts, "Config.from_options"))))
    for name, records in groups.items():
        config.groups[name] = records
        config.assign(name, str(Path(config.output.save or "") / f"{name}.jsonl"))
    resolve(config)
    return config


def _parser_of_run(file: str | Path | None, loss: str | type[PreferenceLoss] | None, command: bool) -> Parser:
    """Returns the parser, with the options of the loss that the run's file names and of the one that is named beside
    it."""
    if file:
        _load_loss_of(file)
    if loss is not None:
        load_loss(loss, flag("preference_loss"))
    return build_parser(command)


def _config_of(parser: Parser, values: argparse.Namespace) -> Config:
    """Returns the options that are set, without resolved defaults."""
    config = Config(explicit=parser.explicit & OWNER.keys())
    for name in config.explicit:
        config.assign(name, getattr(values, name))
    return config


def _holds_records(value: Any) -> bool:
    """Whether an option's value holds examples, and not the path of their file."""
    return isinstance(value, Iterable) and not isinstance(value, str | os.PathLike)


def resolve(config: Config) -> None:
    """Fills defaults that depend on other options and refuses contradictions and unused options.

    Raises:
        UserError: naming the flag and what to change.
    """
    method, model = config.method, config.model
    if model.rope_scaling is not None:
        model.rope_scaling = str(parse_rope_scaling(model.rope_scaling))  # one text for one scaling
    if model.chat_template_kwargs is not None:
        model.chat_template_kwargs = template_kwargs.canonical(model.chat_template_kwargs)
    if model.chat_template_date is not None:
        template_kwargs.check_date(model.chat_template_date)
    if model.lora_path is not None:
        read_folder_options(model, config.explicit)
    if method.objective == "preference":
        defaults = loss_class(method.preference_loss).defaults
        if method.beta is None:
            method.beta = defaults.get("beta")
        if method.alignment_weight is None and method.context_mode == "solo":
            method.alignment_weight = defaults.get("alignment_weight")
    check(config)
