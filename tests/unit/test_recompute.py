"""What backward recomputes changes no bit of a gradient on the CPU."""

from __future__ import annotations

import itertools
import weakref
from types import SimpleNamespace
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


def offloading(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with all that its layers keep on the host, in blocks smaller than a tensor."""
    from megatron_solopo.model import offload
    from megatron_solopo.model.build import offload_activations

    monkeypatch.setattr(offload, "SMALLEST", 1)
    monkeypatch.setattr(offload, "BLOCK", 1000)
    return offload_activations([model])


def gradients(model: Any, name: str) -> dict[str, Tensor]:
    """Of the weighted log-probs of two packs, computed forward one after the other and backward in reverse order."""
    sums = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # of --lora-dropout
        sums.append(run_pack(CONFIGS[name], model, build_pack([random_group(seed)], [0]), torch.float64))
    for part in reversed(sums):
        (part * torch.arange(1, len(part) + 1)).sum().backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}


KEEP = (*FULL, "--recompute-keep", "core_attn")
CASES = [
    *(("qwen3", flags) for flags in (KEEP, (*KEEP, "--recompute-num-layers", 2))),
    ("qwen3", (*KEEP, "--recompute-method", "block", "--recompute-num-layers", 2)),
    ("mixtral", KEEP),
    *(("qwen3", flags) for flags in (FULL, (*FULL, "--recompute-num-layers", 2))),
    ("qwen3", (*FULL, "--recompute-method", "block", "--recompute-num-layers", 2)),
    *(("qwen3", selective(part)) for part in ("core_attn", "mlp", "core_attn,mlp", "mlp_act")),
    *(("mixtral", flags) for flags in (FULL, *map(selective, ("moe", "core_attn")))),
]
LORA = ("--lora-rank", 2)
WITH_ADAPTERS = [
    *(("qwen3", flags) for flags in (FULL, KEEP, (*KEEP, "--recompute-num-layers", 2))),
    ("qwen3", (*FULL, "--recompute-method", "block", "--recompute-num-layers", 2)),
    *(("qwen3", selective(part)) for part in ("core_attn", "mlp", "core_attn,mlp")),
    *(("mixtral", flags) for flags in (KEEP, selective("moe"))),
]
DROPPED = (*LORA, "--lora-dropout", 0.3)
WITH_DROPOUT = [("qwen3", flags) for flags in (FULL, (*KEEP, "--recompute-num-layers", 2), selective("core_attn,mlp"))]


@pytest.mark.parametrize(
    ("name", "flags", "lora"),
    [
        *((*case, ()) for case in CASES),
        *((*case, LORA) for case in WITH_ADAPTERS),
        *((*case, DROPPED) for case in WITH_DROPOUT),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_gradients_have_the_bits_of_those_without_it(
    engine: None, name: str, flags: tuple[Any, ...], lora: tuple[Any, ...]
) -> None:
    plain = gradients(built(name, *lora), name)
    again = gradients(built(name, *lora, *flags), name)
    assert again.keys() == plain.keys() and all("_lora." in key for key in plain) == bool(lora)
    for key, gradient in again.items():
        assert torch.equal(gradient, plain[key]) and gradient.norm() > 0, key


class Forwards(TorchDispatchMode):
    """Counts the calls of attention's kernels forward, and the bytes that they return."""

    count = size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "attention" in func.__name__ and "backward" not in func.__name__:
            self.count += 1
            self.size += sum(one.nbytes for one in result if isinstance(one, Tensor))
        return result


def attention_of(name: str) -> Forwards:
    """Attention of one pack, without gradients."""
    with Forwards() as forwards, torch.no_grad():
        run_pack(CONFIGS[name], built(name).eval(), build_pack([random_group(1)], [0]), torch.float64)
    return forwards


OFFLOADED = [
    *(("qwen3", FULL, ()), ("qwen3", KEEP, ()), ("qwen3", (*KEEP, "--recompute-num-layers", 2), ())),
    *(("mixtral", KEEP, ()), ("qwen3", KEEP, LORA)),
]


@pytest.mark.parametrize(("name", "flags", "lora"), OFFLOADED)
def test_what_was_on_the_host_has_its_bits_and_its_bytes(
    engine: None, name: str, flags: tuple[Any, ...], lora: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = gradients(built(name, *lora), name), built(name, *lora, *flags)
    offload = offloading(model, monkeypatch)
    seen = []
    for _ in range(2):
        model.zero_grad()
        for key, gradient in gradients(model, name).items():
            assert torch.equal(gradient, plain[key]), key
        seen.append((offload.moved, offload.host_bytes))
    (moved, held), later = seen
    inputs = -(-3 // (2 if 2 in flags else 1)) * build_pack([random_group(1)], [0]).tokens.numel() * 64 * 8
    attention = attention_of(name).size if "core_attn" in flags else 0
    # Both packs wait for their backward pass together, and the second step needs no other blocks.
    assert moved == 2 * (inputs + attention) and later == (2 * moved, held)
    assert moved <= held <= 1.5 * moved


class Streams:
    """Two streams that note who waits for what: an event is the number of records before it on its stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        compute, copies = self.stream("compute"), self.stream("copies")
        monkeypatch.setattr(torch.cuda, "Stream", lambda: copies)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)

    def stream(self, name: str) -> Any:
        count = itertools.count(1)

        def record() -> str:
            self.notes.append(f"{name} {(number := next(count))}")
            return f"{name} {number}"

        return SimpleNamespace(record_event=record, wait_event=lambda event: self.notes.append(f"{name} after {event}"))


def test_copies_and_computation_wait_for_each_other(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order on a GPU: a copy begins when its tensor is computed, and the tensor's memory is used again, or its copy
    read, when the copy is done; backward of one checkpoint starts the copies of the one before."""
    from megatron_solopo.model import offload

    streams = Streams(monkeypatch)
    monkeypatch.setattr(offload, "SMALLEST", 1)
    moving = offload.Offload()

    def notes() -> list[str]:
        taken, streams.notes[:] = [*streams.notes], []
        return taken

    first, second = torch.randn(5, 3), torch.randn(4).double()[None].expand(2, 4).transpose(0, 1)
    expected = [first.clone(), second.clone()]
    gone = weakref.ref(first.untyped_storage())
    a = moving._save(first)
    del first
    assert notes() == ["compute 1", "copies after compute 1", "copies 1"] and gone() is not None
    b = moving._save(second)
    assert notes() == ["compute after copies 1", "compute 2", "copies after compute 2", "copies 2"] and gone() is None
    back = moving.get(b)
    assert notes() == [
        *("compute after copies 2", "compute 3", "copies after compute 3", "copies 3", "compute after copies 3"),
        *("compute 4", "copies after compute 4", "copies 4"),  # of the checkpoint before
    ]
    assert torch.equal(back, expected[1]) and torch.equal(moving.get(a), expected[0])
    assert notes() == ["compute after copies 4"]
    assert moving.put(torch.nn.Parameter(back)) is not None and not isinstance(
        moving.put(torch.arange(9)), offload.Moved
    )


@pytest.mark.parametrize(("flags", "times"), [((), 1), (FULL, 2), (KEEP, 1)], ids=["none", "full", "kept"])
def test_attention_that_is_kept_is_computed_once(engine: None, flags: tuple[str, ...], times: int) -> None:
    once = attention_of("qwen3")
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
