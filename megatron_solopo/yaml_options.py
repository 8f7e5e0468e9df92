"""YAML files of options: YAML 1.2's words and numbers, no key twice, and the line of each value for messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import yaml

from megatron_solopo.errors import UserError, nearest

Options = dict[str, tuple[object, str]]
"""Name of an option -> (value, its place in the file). Numbers are texts, since the option defines the type."""


def as_options(values: Mapping[str, object], caller: str) -> Options:
    """Returns options that Python code has as values, as a file would have them.

    Args:
        caller: the function that takes them, for messages.
    """
    return {name: (_as_written(value), f"{caller}: {name}") for name, value in values.items()}


def _as_written(value: object) -> object:
    if value is None or isinstance(value, bool | str | dict):
        return value
    return [str(part) for part in value] if isinstance(value, list | tuple) else str(value)


class Entry(NamedTuple):
    """A line of a mapping: its key, ``file:line``, and its value."""

    name: str
    where: str
    node: yaml.Node


class _Loader(yaml.SafeLoader):
    """YAML 1.2's words and numbers, and no key twice.

    PyYAML follows YAML 1.1, where 010 is 8, 1:30 is 90, no is false and 1e-6 a text, and drops the first of two keys.
    """

    yaml_implicit_resolvers = {}  # of this class, not PyYAML's

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' occurs twice", key.start_mark)
                seen.add(key.value)
        super().flatten_mapping(node)
        # Merged keys come before those that override them; a node that is merged elsewhere comes here again.
        last = {key.value if isinstance(key, yaml.ScalarNode) else key: (key, value) for key, value in node.value}
        node.value = list(last.values())

    def whole(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))

    def number(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node))

    def option(self, node: yaml.Node) -> object:
        """Returns the value of an option: None, a bool, a text (numbers too), a list of texts, or a nested value."""
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float", ":str")):
            return node.value
        self._refuse_old_switches(node)
        return self.construct_object(node, deep=True)

    def _refuse_old_switches(self, node: yaml.Node) -> None:
        """Refuses YAML 1.1's yes and no in nested values: a chat template would evaluate the text "no" as true."""
        if isinstance(node, yaml.ScalarNode):
            if node.style is None and node.value.lower() in ("yes", "no", "on", "off"):
                problem = f"{node.value} is neither true nor false; write one of these, or '{node.value}' for the text"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return
        for part in node.value:
            self._refuse_old_switches(part[1] if isinstance(part, tuple) else part)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)


class OptionFile:
    """A YAML file whose root is a mapping, read node by node.

    Use it as a context manager: invalid YAML, at the start or in a part that is read later, raises a `UserError` with
    its line.

    Args:
        flag: the option that names the file, for the message about a missing file.
    """

    def __init__(self, path: str | Path, flag: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError("file-missing", f"{flag} {path}: no such file".lstrip())
        with self:
            self._loader = _Loader(self.path.read_text(encoding="utf-8-sig"))
            self.root = self._loader.get_single_node()

    def __enter__(self) -> OptionFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, yaml.YAMLError | ValueError):  # the latter: no UTF-8, a number of thousands of digits
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
            place = f"{self.path}{f':{mark.line + 1}' if mark else ''}"
            raise UserError("not-yaml", f"{place}: not valid YAML ({problem})") from None

    def value(self, node: yaml.Node) -> object:
        """See `Options`."""
        if isinstance(node, yaml.SequenceNode) and all(isinstance(part, yaml.ScalarNode) for part in node.value):
            return [self._loader.option(part) for part in node.value]
        return self._loader.option(node)

    def is_empty(self, node: yaml.Node | None) -> bool:
        return node is None or (isinstance(node, yaml.ScalarNode) and self._loader.option(node) is None)

    def entries(self, node: yaml.Node | None, otherwise: str) -> list[Entry]:
        """Returns the lines of a mapping; [] if it is empty.

        Raises:
            UserError: it is not a mapping; the message is ``otherwise``.
        """
        if self.is_empty(node):
            return []
        if not isinstance(node, yaml.MappingNode):
            raise UserError("yaml-structure", otherwise)
        self._loader.flatten_mapping(node)
        return [
            Entry(str(self._loader.option(key)), f"{self.path}:{key.start_mark.line + 1}", value)
            for key, value in node.value
        ]


def refuse_by_name(where: str, name: str, refused: Mapping[str, str]) -> None:
    """Raises UserError if ``refused`` has a reason against the option ``name``, which stands at ``where``."""
    if name in refused:
        raise UserError("option-unsupported", f"{where}: {refused[name]}")


def read_options(
    path: str | Path,
    sections: Mapping[str, Collection[str]] | None = None,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> Options:
    """Returns options of a YAML file; ``where`` is "file:line: name", or "file:line: section.name".

    Args:
        sections: names of the options in each section of the file; None: the file has no sections, and the names of
            its options are not checked.
        refused: names of options that do not exist, and why, for the message.

    Raises:
        UserError: unreadable YAML, an unknown section or option (with the nearest valid name), or an option in the
            wrong section.
    """
    with OptionFile(path, "--config") as file:
        if sections is None:
            lines = file.entries(file.root, f"{path}: must hold 'name: value' lines")
            return {name: (file.value(node), f"{where}: {name}") for name, where, node in lines}
        options: Options = {}
        for section, where, values in file.entries(file.root, f"{path}: must hold the sections {', '.join(sections)}"):
            if section not in sections:
                owner = next((other for other, names in sections.items() if section in names), None)
                hint = f"; it is an option of section '{owner}'" if owner else nearest(section, sections)
                raise UserError(
                    "option-unknown", f"{where}: unknown section '{section}'{hint}; sections are {', '.join(sections)}"
                )
            for name, place, node in file.entries(
                values, f"{where}: section '{section}' must hold 'name: value' lines"
            ):
                if name not in sections[section]:
                    refuse_by_name(f"{place}: {section}.{name}", name, refused)
                    owner = next((other for other, names in sections.items() if name in names), None)
                    hint = f"; it belongs to section '{owner}'" if owner else nearest(name, sections[section])
                    raise UserError("option-unknown", f"{place}: unknown option '{section}.{name}'{hint}")
                options[name] = (file.value(node), f"{place}: {section}.{name}")
        return options
