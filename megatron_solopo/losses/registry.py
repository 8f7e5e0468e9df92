"""The preference losses by name: those of this folder, and a user's by module:CLASS."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import sys
import typing
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from megatron_solopo.losses.base import PreferenceLoss
from megatron_solopo.metrics import Metric, register
from megatron_solopo.user_function import import_module

if TYPE_CHECKING:  # which reads this registry
    from megatron_solopo.config import MethodConfig

COMMON = tuple(field.name for field in dataclasses.fields(PreferenceLoss))
"""The options that every loss has."""

READABLE = frozenset({"label_smoothing", "sft_weight", "sft_normalization"})
"""The common options that a loss reads only if it declares them, see `PreferenceLoss.reads`."""

LOSSES: dict[str, type[PreferenceLoss]] = {}
"""Value of --preference-loss -> its class, sorted by name; a user's loss is added once it is loaded."""


def _classes(module: ModuleType) -> list[type[PreferenceLoss]]:
    """Returns the losses that a module defines."""
    values = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, PreferenceLoss)]
    return [value for value in values if value.__module__ == module.__name__ and value is not PreferenceLoss]


def _read_folder() -> None:
    folder = __name__.rpartition(".")[0]
    path = sys.modules[folder].__path__
    for name in sorted(module.name for module in pkgutil.iter_modules(path)):
        if name not in ("registry", "solopo"):  # these import this module
            for kind in _classes(importlib.import_module(f"{folder}.{name}")):
                LOSSES[kind.name] = kind
                register(*kind.metrics)


_read_folder()


def declared_options(kind: type[PreferenceLoss]) -> tuple[dataclasses.Field, ...]:
    """Returns the options of one loss alone."""
    return tuple(field for field in dataclasses.fields(kind) if field.name not in COMMON)


def loss_class(name: str) -> type[PreferenceLoss]:
    """Returns the class of a --preference-loss; see `load` for a user's.

    Raises:
        ValueError: there is no such loss.
    """
    return LOSSES[name] if name in LOSSES else load(name)


def preference_loss(method: MethodConfig) -> PreferenceLoss:
    """Returns the loss with its options.

    Raises:
        ValueError: the loss refuses them.
    """
    values = {name: getattr(method, name) for name in COMMON}
    if values["beta"] is None:
        values["beta"] = math.nan
    return loss_class(method.preference_loss)(**values, **method.loss_options)


def load(name: str) -> type[PreferenceLoss]:
    """Imports the class that ``module:CLASS`` names, from the working directory or an installed package.

    Raises:
        ValueError: there is no such module or class, or it is not a loss.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ValueError(f"{name!r} is neither one of {', '.join(LOSSES)} nor module:CLASS of a loss of yours")
    module = import_module(module_name)
    kind = getattr(module, class_name, None)
    if kind is None:
        names = ", ".join(value.__name__ for value in _classes(module)) or "no loss"
        raise ValueError(f"{getattr(module, '__file__', module_name)} has no {class_name}; it has {names}")
    return add(kind, name)


def add(kind: type[PreferenceLoss], name: str | None = None) -> type[PreferenceLoss]:
    """Registers a class as a loss, in place of an earlier one of its name.

    Args:
        name: default: ``module:CLASS``; a registered class keeps its name.

    Raises:
        ValueError: it is not a complete loss, in one line.
    """
    if name is None:
        if kind in LOSSES.values():
            return kind
        name = f"{kind.__module__}:{kind.__qualname__}" if isinstance(kind, type) else repr(kind)
    _check(kind, name)
    register(*kind.metrics)
    kind.name = name
    LOSSES[name] = kind
    return kind


def _check(kind: object, name: str) -> None:
    """Refuses a class that is no complete loss."""
    if not (isinstance(kind, type) and issubclass(kind, PreferenceLoss)):
        raise ValueError(f"{name} is no subclass of megatron_solopo.losses.PreferenceLoss")
    declared = {key for key, value in vars(kind).items() if isinstance(value, dataclasses.Field)}
    if declared or "__dataclass_fields__" not in vars(kind):
        raise ValueError(f"{name} is no dataclass; write @dataclass(frozen=True) above the class")
    for field in declared_options(kind):
        if "help" not in field.metadata:
            raise ValueError(f"{name}: its field {field.name} is no option; declare it as option(default, help)")
    try:
        kinds = typing.get_type_hints(kind)
    except NameError as error:
        raise ValueError(f"{name}: the type of an option is unknown ({error})") from None
    for field in declared_options(kind):
        if kinds[field.name] not in (bool, int, float, str):
            raise ValueError(f"{name}: its option {field.name} must be of type bool, int, float or str")
    if unknown := [*(kind.reads - READABLE), *(kind.defaults.keys() - {"beta", "alignment_weight"})]:
        raise ValueError(f"{name} reads {unknown[0]}, which is no common option of losses")
    if "solo" in kind.context_modes and "alignment_weight" not in kind.defaults:
        raise ValueError(f"{name}: its defaults lack alignment_weight, which --context-mode solo needs")
    if not all(isinstance(metric, Metric) for metric in kind.metrics):
        raise ValueError(f"{name}: its metrics are no megatron_solopo.metrics.Metric")
    for method in ("reward", "loss"):
        if getattr(kind, method) is getattr(PreferenceLoss, method):
            raise ValueError(f"{name} defines no method {method}")
    if "reward_text" not in dir(kind):
        raise ValueError(f"{name} has no reward_text, the reward in a line")


def those_that(have: Callable[[type[PreferenceLoss]], bool], word: str = "or") -> str:
    """Returns the names of the losses for which ``have`` is true: ``dpo, ipo or simpo``."""
    return _listed([name for name, kind in LOSSES.items() if have(kind)], word)


def reads(option: str) -> Callable[[type[PreferenceLoss]], bool]:
    """Returns the condition that a loss reads a common option."""
    return lambda kind: option in kind.reads or option in kind.defaults


def has(option: str) -> Callable[[type[PreferenceLoss]], bool]:
    """Returns the condition that an option is one of the loss alone."""
    return lambda kind: any(spec.name == option for spec in declared_options(kind))


def aligns_with_reference(kind: type[PreferenceLoss]) -> bool:
    """Whether --alignment-reference has an effect for a loss."""
    return kind.needs_reference and not kind.reference_on_short and "solo" in kind.context_modes


def defaults_in_words(option: str) -> str:
    """Returns the defaults of an option in words: ``0.1 for dpo, ipo and longpo, 2 for simpo``."""
    by_value: dict[float, list[str]] = {}
    for name, kind in LOSSES.items():
        if option in kind.defaults:
            by_value.setdefault(kind.defaults[option], []).append(name)
    return ", ".join(f"{value:g} for {_listed(names, 'and')}" for value, names in by_value.items())


def _listed(names: list[str], word: str) -> str:
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "no loss"
