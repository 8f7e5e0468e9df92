"""Options from a YAML file with the sections of `config` (underscores) and from the command line (the last word)."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import types
import typing
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from megatron_solopo import template_kwargs
from megatron_solopo.arguments import Parser, nearest
from megatron_solopo.config import OWNER, SECTIONS, Config, flag
from megatron_solopo.config_checks import check
from megatron_solopo.errors import UserError
from megatron_solopo.model.rope_scaling import parse as parse_rope_scaling


@functools.cache  # evaluating annotations is slow, and every option asks
def _base_type(kind: type, name: str) -> type:
    annotation = typing.get_type_hints(kind)[name]
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return annotation


def _convert(name: str, value: Any, where: str) -> Any:
    """The value in the option's type, within its choices and minimum; errors name ``where``."""
    section, spec = OWNER[name]
    kind = _base_type(SECTIONS[section], name)
    if value is None:
        if spec.default is None:
            return None
        raise UserError(f"{where}: needs a value ({spec.metadata['help']})")
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{where}: must be true or false, found {value!r}")
        return value
    if isinstance(value, dict) and spec.metadata["mapping"]:
        value = json.dumps(value, ensure_ascii=False)
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
        raise UserError(f"{where}: {converted!r} is not one of {', '.join(choices)}{nearest(str(converted), choices)}")
    if minimum is not None and converted < minimum:
        raise UserError(f"{where}: must be at least {minimum}, found {converted}")
    return converted


def build_parser() -> Parser:
    """The command line: one group a section; a flag that is not given leaves no trace."""
    parser = Parser(
        prog="pretrain_solopo.py",
        description="Train a language model with SoLoPO on Megatron Core. "
        "Start it under torchrun for several processes.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="YAML with the sections " + ", ".join(SECTIONS))
    parser.add_argument("--dry-run", action="store_true", default=False, help="print what would happen; touch nothing")
    for section, kind in SECTIONS.items():
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
    """YAML 1.2's words and numbers, and no key twice.

    PyYAML follows YAML 1.1, where 010 is 8, 1:30 is 90, no is false and 1e-6 a text, and drops the first of two keys.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
                seen.add(key.value)
        super().flatten_mapping(node)

    def option(self, node: yaml.Node) -> Any:
        """The value of an option: None, a switch, a text (numbers too: their option says which), or what is nested."""
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float", ":str")):
            return node.value
        self._refuse_old_switches(node)
        return self.construct_object(node, deep=True)

    def _refuse_old_switches(self, node: yaml.Node) -> None:
        """No option says what type a nested value has, and a chat template takes the text "no" for true."""
        if isinstance(node, yaml.ScalarNode):
            if node.style is None and node.value.lower() in ("yes", "no", "on", "off"):
                problem = f"{node.value} is neither true nor false; write one of these, or '{node.value}' for the text"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return
        for part in node.value:
            self._refuse_old_switches(part[1] if isinstance(part, tuple) else part)


for _tag, _pattern, _begins in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _begins)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))


def read_yaml(path: str | Path) -> dict[str, tuple[Any, str]]:
    """Options of a YAML file: ``{name: (value, "file:line: section.name")}``.

    Raises:
        UserError: unreadable YAML, an unknown section or option (with the nearest valid name), or an
            option in the wrong section.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        return _options_of(_Loader(path.read_text(encoding="utf-8-sig")), path)
    except (yaml.YAMLError, ValueError) as error:  # the latter: no UTF-8, a number of thousands of digits
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML ({problem})") from None


def _options_of(loader: _Loader, path: Path) -> dict[str, tuple[Any, str]]:
    def entries(node: yaml.MappingNode) -> list[tuple[str, str, yaml.Node]]:
        loader.flatten_mapping(node)
        return [(str(loader.option(key)), f"{path}:{key.start_mark.line + 1}", value) for key, value in node.value]

    root = loader.get_single_node()
    if root is None or (isinstance(root, yaml.ScalarNode) and loader.option(root) is None):
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: must hold the sections {', '.join(SECTIONS)}")
    found: dict[str, tuple[Any, str]] = {}
    for section, where, values in entries(root):
        if section not in SECTIONS:
            hint = nearest(section, SECTIONS)
            raise UserError(f"{where}: unknown section '{section}'{hint}; sections are {', '.join(SECTIONS)}")
        if isinstance(values, yaml.ScalarNode) and loader.option(values) is None:
            continue
        if not isinstance(values, yaml.MappingNode):
            raise UserError(f"{where}: section '{section}' must hold 'name: value' lines")
        names = [f.name for f in dataclasses.fields(SECTIONS[section])]
        for name, where, value in entries(values):
            if name not in names:
                hint = f"; it belongs to section '{OWNER[name][0]}'" if name in OWNER else nearest(name, names)
                raise UserError(f"{where}: unknown option '{section}.{name}'{hint}")
            found[name] = (loader.option(value), f"{where}: {section}.{name}")
    return found


def read_model_options(path: str | Path) -> dict[str, Any]:
    """The model's options in a run's config.yaml.

    Raises:
        UserError: see `read_yaml`, or a value that is none of its option.
    """
    return {
        name: _convert(name, value, where)
        for name, (value, where) in read_yaml(path).items()
        if OWNER[name][0] == "model"
    }


def load(argv: list[str] | None = None) -> tuple[Config, bool]:
    """The resolved configuration of a command line, and whether it is a dry run.

    Raises:
        UserError: what is unknown, contradicts something else, or would have no effect.
    """
    values = vars(build_parser().parse_args(argv))
    path, dry_run = values.pop("config"), values.pop("dry_run")
    options = read_yaml(path) if path else {}
    options |= {name: (value, flag(name)) for name, value in values.items()}
    config = Config()
    for name, (value, where) in options.items():
        setattr(getattr(config, OWNER[name][0]), name, _convert(name, value, where))
        config.explicit.add(name)
    resolve(config)
    return config, dry_run


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
