"""SoLoPO (short-to-long preference optimization) on Megatron Core.

    from megatron_solopo import Config, PreferenceGroup, PreferenceLoss, evaluate, train

Importing the package imports nothing heavy: each name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_solopo.api import Evaluation, TrainResult, evaluate, train
    from megatron_solopo.config import Config
    from megatron_solopo.data.schema import PreferenceGroup
    from megatron_solopo.errors import UserError
    from megatron_solopo.losses import PreferenceLoss

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Evaluation",
    "PreferenceGroup",
    "PreferenceLoss",
    "TrainResult",
    "UserError",
    "__version__",
    "evaluate",
    "train",
]

_HOMES = {
    "megatron_solopo.api": ("Evaluation", "TrainResult", "evaluate", "train"),
    "megatron_solopo.config": ("Config",),
    "megatron_solopo.data.schema": ("PreferenceGroup",),
    "megatron_solopo.errors": ("UserError",),
    "megatron_solopo.losses": ("PreferenceLoss",),
}
"""Module -> the public names that it defines."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
