"""--deterministic-mode, as far as a machine without a GPU shows it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_solopo.config import Config
from megatron_solopo.parallel import platform
from megatron_solopo.parallel.deterministic import VARIABLES, fixed_order
from megatron_solopo.training import run


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_libraries_and_torch_keep_an_order_inside_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    with fixed_order():
        assert {name: os.environ[name] for name in VARIABLES} == VARIABLES | {"NCCL_ALGO": "Tree"}
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["NCCL_ALGO"] == "Tree" and not VARIABLES.keys() - {"NCCL_ALGO"} & os.environ.keys()
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("mode", [True, False])
def test_the_order_is_fixed_before_the_device_starts(monkeypatch: pytest.MonkeyPatch, mode: bool) -> None:
    seen: list[bool] = []

    def start(*arguments: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return SimpleNamespace(undo=lambda: None)

    monkeypatch.setattr(platform, "start", start)
    monkeypatch.setattr(platform, "stop", lambda running: seen.append(torch.are_deterministic_algorithms_enabled()))
    config = Config()
    config.training.deterministic_mode = mode
    with run.started(config):
        pass
    assert seen == [mode, mode] and not torch.are_deterministic_algorithms_enabled()
