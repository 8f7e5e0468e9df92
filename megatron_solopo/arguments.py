"""The argument parser of every command: options by their full names, each given once, a mistake in one line."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from megatron_solopo.errors import UserError


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean --seq-length?"``, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """Refuses, as a `UserError`, abbreviations, unknown options (naming the nearest) and options that are given twice.

    argparse itself takes the beginning of a name for the whole, keeps the last of several values without a word, and
    prints its usage before each error.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**({"allow_abbrev": False} | settings))

    def error(self, message: str) -> NoReturn:
        # "argument --bf16/--no-bf16: ..." names the option as a person wrote it.
        raise UserError(re.sub(r"^argument ([^\s:/]+)[^\s:]*: ", r"\1: ", message))

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args = sys.argv[1:] if args is None else list(args)
        self._refuse_twice(args)
        try:
            return super().parse_known_args(args, namespace)
        except UserError as error:
            self._refuse_misspelt(args, str(error).partition("arguments are required: ")[2].split(", "))
            raise

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        given, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown, given)
        return given

    def refuse_unknown(self, unknown: Sequence[str], given: argparse.Namespace) -> None:
        """Refuses what is left of a command line.

        Raises:
            UserError: naming the first and the nearest option there is.
        """
        known = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                known += action.choices[getattr(given, action.dest)]._option_string_actions
        for text in unknown:
            name = text.split("=")[0]
            if name.startswith("--"):
                raise UserError(f"{name}: unknown option{nearest(name, known)}")
            raise UserError(f"'{text}': unexpected argument; options start with --")

    def _refuse_misspelt(self, args: Sequence[str], missing: Sequence[str]) -> None:
        """Refuses an unknown name that is near a required one: that the required one is missing would mislead."""
        for name in (text.split("=")[0] for text in args):
            if name.startswith("--") and name not in self._option_string_actions and (hint := nearest(name, missing)):
                raise UserError(f"{name}: unknown option{hint}")

    def _refuse_twice(self, args: Sequence[str]) -> None:
        before: dict[argparse.Action, str] = {}
        for text in args:
            if text == "--":
                return
            name = text.split("=")[0]
            action = self._option_string_actions.get(name)
            if action is None:
                continue
            # The same switch again says nothing new: launch scripts add some behind a user's own.
            if action in before and not (action.nargs == 0 and before[action] == name):
                several = f"all its values behind one {name}" if action.nargs in ("+", "*") else None
                raise UserError(f"{name}: given twice; give {several or 'it once, with the value that counts'}")
            before[action] = name
