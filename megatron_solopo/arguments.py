"""The options of every command, from the command line and from a YAML file: one parser, a mistake in one line.

``--config FILE`` sets any option under its name with underscores; the command line overrides the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from megatron_solopo.errors import UserError, nearest
from megatron_solopo.terminal import write_line
from megatron_solopo.yaml_options import Options, read_options, refuse_by_name

RENAMED: dict[str, dict[str, str]] = {
    "prepare-data": {
        "--input": "--data",
        "--left-out": "--skipped-output",
        "--validation-share": "--validation-fraction",
        "--drop-gold-share": "--drop-gold-fraction",
    },
    "sample-responses": {"--num-samples-context": "--sample-on"},
    "build-pairs": {"--right-above": "--correct-threshold", "--wrong-below": "--incorrect-threshold"},
    "tokenize-data": {"--train-data": "--data"},
    "inspect-data": {"--html": "--output"},
    "hf-to-megatron": {"--force": "--overwrite"},
    "megatron-to-hf": {"--force": "--overwrite"},
    "pretrain_solopo.py": {"--force": "--overwrite", "--no-force": "--no-overwrite"},
}
"""Last word of a parser's ``prog`` -> {name in version 0.1: name now}; the next version drops the old ones."""


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` for abbreviations, unknown options (naming the nearest) and repeated options.

    argparse itself accepts the beginning of a name, silently keeps the last of several values, and prints its usage
    before each error.

    Args:
        config: add ``--config``. It leaves nothing in the namespace but the options of its file.
        refused: options that are not there, by name with underscores, and why; they are refused with that reason.
        sections: names of the options in each section of that file; None: the file has none.

    Attributes:
        explicit: `dest` of every option that the last command line or its file set.
    """

    def __init__(
        self,
        *,
        config: bool = True,
        sections: Mapping[str, Collection[str]] | None = None,
        refused: Mapping[str, str] = MappingProxyType({}),
        **settings: Any,
    ) -> None:
        settings.setdefault("allow_abbrev", False)
        super().__init__(**settings)
        self.explicit: set[str] = set()
        self._sections = sections
        self._refused = refused
        self._places: dict[str, str] = {}
        self._config: argparse.Action | None = None
        if config:
            kind = f"with the sections {', '.join(sections)}" if sections else "of options, name_of_option: value"
            self._config = self.add_argument(
                "--config", metavar="FILE", help=f"YAML {kind}; the command line overrides it"
            )

    def error(self, message: str) -> NoReturn:
        # "argument --bf16/--no-bf16: ..." names the option as the user wrote it.
        option = re.match(r"argument ([^\s:/]+)[^\s:]*: ", message)
        if option:
            message = f"{self._places.get(option[1], option[1])}: {message[option.end() :]}"
        if re.search(r"arguments .*(are|is) required", message):
            raise UserError("option-missing", message)
        if "not allowed with" in message:
            raise UserError("option-conflict", message)
        raise UserError("option-value", message)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # one of its overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args = self._renamed(sys.argv[1:] if args is None else list(args))
        explicit = self._options_in(args)
        self._places = {}
        self.explicit = {action.dest for action in explicit}
        try:
            words = [*self._from_file(args, explicit), *args]
            values, unknown = super().parse_known_args(words, namespace or argparse.Namespace())
        except UserError as error:
            self._refuse_misspelt(args, str(error).partition("arguments are required: ")[2].split(", "))
            raise
        if self._config is not None:
            delattr(values, self._config.dest)
            self.explicit.discard("config")
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                self.explicit |= {action.dest, *action.choices[getattr(values, action.dest)].explicit}
        return values, unknown

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # one of its overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        values, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown, values)
        return values

    def refuse_unknown(self, unknown: Sequence[str], values: argparse.Namespace) -> None:
        """Refuses the words of a command line that no option took.

        Raises:
            UserError: the first of them, with the nearest option.
        """
        options = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                options += action.choices[getattr(values, action.dest)]._option_string_actions
        for text in unknown:
            name = text.split("=")[0]
            if name.startswith("--"):
                refuse_by_name(name, name.removeprefix("--no-").removeprefix("--").replace("-", "_"), self._refused)
                raise UserError("option-unknown", f"{name}: unknown option{nearest(name, options)}")
            raise UserError("argument-unexpected", f"'{text}': unexpected argument; options start with --")

    def _refuse_misspelt(self, args: Sequence[str], missing: Sequence[str]) -> None:
        """Refuses an unknown name near a required one, instead of reporting the required one as missing."""
        for name in (text.split("=")[0] for text in args):
            if name.startswith("--") and name not in self._option_string_actions and (hint := nearest(name, missing)):
                raise UserError("option-unknown", f"{name}: unknown option{hint}")

    def _options_in(self, args: Sequence[str]) -> set[argparse.Action]:
        """Returns the options on a command line; refuses a repeated one."""
        before: dict[argparse.Action, str] = {}
        for text in args:
            if text == "--":
                break
            name = text.split("=")[0]
            action = self._option_string_actions.get(name)
            if action is None:
                continue
            # The same switch twice is harmless: launch scripts append switches to a user's words.
            if action in before and not (action.nargs == 0 and before[action] == name):
                remedy = f"put all its values behind one {name}" if action.nargs in ("+", "*") else "set it once"
                raise UserError("option-twice", f"{name}: is set twice; {remedy}")
            before[action] = name
        return set(before)

    def _from_file(self, args: Sequence[str], explicit: Collection[argparse.Action]) -> list[str]:
        """Returns the options of --config's file that the command line does not set."""
        if self._config not in explicit:
            return []
        place = next(index for index, text in enumerate(args) if text.split("=")[0] == "--config")
        path = args[place].partition("=")[2] or next(iter(args[place + 1 :]), None)
        if path is None:
            return []  # argparse reports it
        options = self.read_file(path)
        if "config" in options:
            raise UserError("option-unknown", f"{options['config'][1]}: unknown option; one file does not name another")
        return self.words(options, besides=explicit)

    def read_file(self, path: str | Path) -> Options:
        """Returns the options of a file that --config takes; see `read_options`."""
        sections = None
        if self._sections is not None:
            old = self._old_keys()
            sections = {
                section: [*names, *(key for key, now in old.items() if now in names)]
                for section, names in self._sections.items()
            }
        return read_options(path, sections, self._refused)

    def words(self, options: Options, besides: Collection[argparse.Action] = ()) -> list[str]:
        """Returns the command line that sets the options of a file; later messages about them name their lines.

        Args:
            besides: options to leave out.

        Raises:
            UserError: an option is unknown (the nearest is named), set under two names, or its value has a type that
                a command line cannot express.
        """
        commands = next((a for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        if commands is not None:
            name, where = options.get(commands.dest, (None, ""))
            choices = ", ".join(commands.choices)
            if not where:
                raise UserError("option-missing", f"{commands.dest}: missing; set one of {choices}")
            if not isinstance(name, str) or name not in commands.choices:
                raise UserError("option-value", f"{where}: {name!r} is not one of {choices}")
            rest = {key: value for key, value in options.items() if key != commands.dest}
            return [name, *commands.choices[name].words(rest)]
        actions = {
            strings[0].removeprefix("--").replace("-", "_"): action
            for action in self._actions
            if (strings := action.option_strings) and strings[0].startswith("--") and action.dest != "help"
        }
        old = self._old_keys()
        words: list[str] = []
        places: dict[argparse.Action, str] = {}
        for key, (value, where) in options.items():
            name = key
            if key not in actions and old.get(key) in actions:
                name = old[key]
                _warn(f"{where}: is now {name}")
            if name not in actions:
                refuse_by_name(where, name, self._refused)
                place = where.removesuffix(key).rstrip()
                raise UserError("option-unknown", f"{place} unknown option '{key}'{nearest(key, actions)}")
            action = actions[name]
            if action in places:
                raise UserError("option-twice", f"{where}: is {name}, which {places[action]} sets too; set it once")
            places[action] = where
            if action not in besides:
                words += _words_of(action, value, where)
                if value is not None:
                    self.explicit.add(action.dest)
                self._places |= dict.fromkeys(action.option_strings, where)
        return words

    def _old_names(self) -> dict[str, str]:
        """Old name -> new name of this command's options."""
        options = self._option_string_actions
        renamed = RENAMED.get(self.prog.split()[-1], {})
        return {old: new for old, new in renamed.items() if new in options and old not in options}

    def _old_keys(self) -> dict[str, str]:
        """Old name -> new name of this command's options in a file."""
        return {before[2:].replace("-", "_"): now[2:].replace("-", "_") for before, now in self._old_names().items()}

    def _renamed(self, args: list[str]) -> list[str]:
        """Returns the command line with old names of options replaced by new ones."""
        old, new = self._old_names(), []
        for text in args:
            name, equals, value = text.partition("=")
            if name in old:
                _warn(f"{name} is now {old[name]}")
                text = old[name] + equals + value
            new.append(text)
        return new


@functools.cache  # a process may read its options several times
def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        write_line(f"warning: {message}; the next version drops the old name")


def _words_of(action: argparse.Action, value: object, where: str) -> list[str]:
    """Returns an option of a file as it is written on a command line."""
    name = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError("option-value", f"{where}: must be true or false, found {_shown(value)}")
        return [name] if value else [text for text in action.option_strings if text.startswith("--no-")]
    if value is None:
        if action.default is None and not action.required:
            return []
        raise UserError("option-value", f"{where}: needs a value ({action.help})")
    if isinstance(value, dict) and action.metavar == "JSON":
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and action.nargs in ("+", "*") and all(isinstance(one, str) for one in value):
        return [name, *value]
    if not isinstance(value, str):
        kind = getattr(action.type, "__name__", "str")
        raise UserError("option-value", f"{where}: must be {kind}, found {_shown(value)}")
    return [name, value] if action.nargs in ("+", "*") or not value.startswith("-") else [f"{name}={value}"]


def _shown(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else repr(value)
