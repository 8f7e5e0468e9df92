"""What backward recomputes changes no bit of a gradient on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import refused
from test_model_parity import CONFIGS, random_group, run_pack
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.model.recompute import check_modules

FULL = ("--recompute-granularity", "full")


def selective(modules: str) -> tuple[str, ...]:
    return "--recompute-granularity", "selective", "--recompute-modules", modules


def options(*flags: Any) -> Config:
    argv = ["--hf-path", "model", "--train-data", "x", "--save", "y", "--train-iters", "1", *map(str, flags)]
    return config_load.load(argv)[0]


def built(name: str, *flags: Any) -> Any:
    """A model of random weights in training mode, the same for all options."""
    from megatron_solopo.model.build import build_model

    model = build_model(CONFIGS[name], options(*flags), torch.float64).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64) + 0.01)
    return model


def gradients(model: Any, name: str) -> dict[str, Tensor]:
    """Of the weighted log-probs of two packs, computed forward one after the other and backward in reverse order."""
    packs = [build_pack([random_group(seed)], [0]) for seed in (1, 2)]
    sums = [run_pack(CONFIGS[name], model, pack, torch.float64) for pack in packs]
    for part in reversed(sums):
        (part * torch.arange(1, len(part) + 1)).sum().backward()
    return {key: parameter.grad for key, parameter in model.named_parameters()}


KEEP = (*FULL, "--recompute-keep", "core_attn")
CASES = [
    *(("qwen3", flags) for flags in (KEEP, (*KEEP, "--recompute-num-layers", 2))),
    ("qwen3", (*KEEP, "--recompute-method", "block", "--recompute-num-layers", 2)),
    ("mixtral", KEEP),
    *(("qwen3", flags) for flags in (FULL, (*FULL, "--recompute-num-layers", 2))),
    ("qwen3", (*FULL, "--recompute-method", "block", "--recompute-num-layers", 2)),
    *(("qwen3", selective(part)) for part in ("core_attn", "mlp", "core_attn,mlp")),
    *(("mixtral", flags) for flags in (FULL, *map(selective, ("moe", "core_attn")))),
]


@pytest.mark.parametrize(
    ("name", "flags"), CASES, ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value))
)
def test_gradients_have_the_bits_of_those_without_it(engine: None, name: str, flags: tuple[Any, ...]) -> None:
    plain = gradients(built(name), name)
    for key, gradient in gradients(built(name, *flags), name).items():
        assert torch.equal(gradient, plain[key]) and gradient.norm() > 0, key


class Forwards(TorchDispatchMode):
    """Counts the calls of attention's kernels forward."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "attention" in func.__name__ and "backward" not in func.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("flags", "times"), [((), 1), (FULL, 2), (KEEP, 1)], ids=["none", "full", "kept"])
def test_attention_that_is_kept_is_computed_once(engine: None, flags: tuple[str, ...], times: int) -> None:
    with Forwards() as once, torch.no_grad():
        run_pack(CONFIGS["qwen3"], built("qwen3").eval(), build_pack([random_group(1)], [0]), torch.float64)
    with Forwards() as forwards:
        gradients(built("qwen3", *flags), "qwen3")
    assert once.count > 0 and forwards.count == 2 * times * once.count  # two packs


@pytest.mark.parametrize(
    ("name", "engine", "part", "named"),
    [
        ("qwen3", False, "moe", "use mlp"),
        ("mixtral", False, "core_attn,mlp", "use moe"),
        ("qwen3", True, "moe_act", "use mlp_act"),
        ("qwen3", True, "layernorm", "norms"),
    ],
)
def test_a_part_that_the_layers_lack_is_refused(name: str, engine: bool, part: str, named: str) -> None:
    flags = ("--bf16", "--transformer-impl", "transformer_engine") if engine else ()
    with refused("option-unused", f"--recompute-modules {part.rpartition(',')[2]}:", named):
        check_modules(CONFIGS[name], options(*flags, *selective(part)).model)
    check_modules(
        CONFIGS["mixtral"],
        options("--bf16", "--transformer-impl", "transformer_engine", *selective("layernorm,moe_act")).model,
    )
