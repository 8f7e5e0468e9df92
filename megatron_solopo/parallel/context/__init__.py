"""How context-parallel ranks share a pack: one file for each --cp-comm-type, and ``none`` for one rank.

A file holds a `ContextMethod` as ``METHOD``; its name is the option's value. Nothing else refers to it.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from megatron_solopo.parallel.method import ContextMethod

WHOLE = "none"
"""The method of a context-parallel size of 1; not a value of --cp-comm-type."""

DEFAULT = "all_gather"


@cache
def methods() -> dict[str, ContextMethod]:
    """Returns the methods of all files of this folder by name, the default first."""
    names = sorted((module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: (name != DEFAULT, name))
    return {name: import_module(f"{__name__}.{name}").METHOD for name in names}


def choices() -> tuple[str, ...]:
    """Returns the values of --cp-comm-type."""
    return tuple(name for name in methods() if name != WHOLE)


def about() -> str:
    """Returns the help text of the values, in the order of `choices`."""
    return "; ".join(f"{name}: {methods()[name].about}" for name in choices())


def method_of(size: int, cp_comm_type: str) -> ContextMethod:
    """Returns the method of ``size`` context-parallel ranks."""
    return methods()[WHOLE if size == 1 else cp_comm_type]
