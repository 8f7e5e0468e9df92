"""A user's function, named ``module:function`` in place of one of the package."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from megatron_solopo.errors import UserError


def load_function(flag: str, name: str, choices: Iterable[str]) -> Callable[..., object]:
    """Imports ``module:function``, from the current folder first, then from Python's path.

    Args:
        flag: the option and its value, with which error messages start.
        choices: the names of the package's functions.

    Raises:
        UserError: there is no such module or function.
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError("option-value", f"{flag}: set {', '.join(choices)}, or a function of yours as module:function")
    try:
        module = import_module(module_name)
    except ValueError as error:
        raise UserError(
            "module-import", f"{flag}: the {error}; put {module_name}.py into the current folder or on PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        problem = "is not a function" if hasattr(module, function_name) else "is not there"
        place = getattr(module, "__file__", None) or module_name
        raise UserError("function-missing", f"{flag}: {function_name} {problem} in {place}")
    return function


def import_module(name: str) -> ModuleType:
    """Imports a user's module, from the current folder first, then from Python's path.

    Raises:
        ValueError: it cannot be imported; the message is one line.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"module {name} cannot be imported ({error_text(error)})") from error


def error_text(error: Exception) -> str:
    """Returns an exception of a user's code in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def short(value: object) -> str:
    """Returns a value for an error message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def source_digest(function: Callable[..., object]) -> str:
    """Returns the sha256 of the file that holds the function, "" where it has none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""
