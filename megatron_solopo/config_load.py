"""The configuration of a training run from its options; a YAML file has the sections of `config`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_solopo import template_kwargs
from megatron_solopo.arguments import Parser
from megatron_solopo.config import OWNER, SECTIONS, Config, flag
from megatron_solopo.config_checks import check
from megatron_solopo.errors import nearest
from megatron_solopo.model.rope_scaling import parse as parse_rope_scaling
from megatron_solopo.yaml_options import Options


@functools.cache  # evaluating annotations is slow, and every option asks
def _base_type(kind: type, name: str) -> type:
    annotation = typing.get_type_hints(kind)[name]
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return annotation


def _converter(name: str) -> Callable[[str], Any]:
    """What makes an option's value of its text: of its type, within its choices and minimum."""
    section, spec = OWNER[name]
    kind = _base_type(SECTIONS[section], name)

    def convert(text: str) -> Any:
        try:
            number = Decimal(text) if kind is int else None  # exact, and 1e3 is a whole number
            value = int(number) if kind is int else kind(text)
        except (ValueError, ArithmeticError):
            raise argparse.ArgumentTypeError(f"must be {kind.__name__}, found {text!r}") from None
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


def build_parser() -> Parser:
    """One group of options for each section."""
    parser = Parser(
        prog="pretrain_solopo.py",
        description="Train a language model with SoLoPO on Megatron Core. "
        "Start it under torchrun for several processes.",
        sections={section: [spec.name for spec in dataclasses.fields(kind)] for section, kind in SECTIONS.items()},
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would happen; touch nothing")
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section, kind.__doc__)
        for spec in dataclasses.fields(kind):
            text = spec.metadata["help"].replace("%", "%%")
            default: dict[str, Any] = {"default": spec.default}
            if _base_type(kind, spec.name) is bool:
                text += f" (default: {'on' if spec.default else 'off'})"
                group.add_argument(flag(spec.name), action=argparse.BooleanOptionalAction, help=text, **default)
                continue
            if spec.metadata["choices"]:
                text += f" [{' | '.join(spec.metadata['choices'])}]"
            if spec.default is not None:
                text += f" (default: {spec.default})"
            form = "JSON" if spec.metadata["mapping"] else _base_type(kind, spec.name).__name__.upper()
            group.add_argument(flag(spec.name), metavar=form, type=_converter(spec.name), help=text, **default)
    return parser


def read_yaml(path: str | Path) -> Options:
    """What a run's YAML file says, not converted; see `read_options`."""
    return build_parser().read_file(path)


def read_model_options(path: str | Path) -> dict[str, Any]:
    """The model's options in a run's config.yaml.

    Raises:
        UserError: see `read_options`, or a value that is none of its option.
    """
    parser = build_parser()
    values = vars(parser.parse_args(["--config", str(path)]))
    return {name: values[name] for name in parser.given if name in OWNER and OWNER[name][0] == "model"}


def load(argv: list[str] | None = None) -> tuple[Config, bool]:
    """The resolved configuration of a command line, and whether it is a dry run.

    Raises:
        UserError: what is unknown, contradicts something else, or would have no effect.
    """
    parser = build_parser()
    values = parser.parse_args(argv)
    config = Config(explicit=parser.given & OWNER.keys())
    for name in config.explicit:
        setattr(getattr(config, OWNER[name][0]), name, getattr(values, name))
    resolve(config)
    return config, values.dry_run


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
    if method.objective == "preference":
        if method.beta is None and method.preference_loss != "orpo":
            method.beta = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "longpo": 0.1}[method.preference_loss]
        if method.alignment_weight is None and method.context_mode == "solo" and method.preference_loss != "longpo":
            method.alignment_weight = {"dpo": 3.0, "ipo": 3.0, "simpo": 1.0, "orpo": 1.0}[method.preference_loss]
    check(config)
