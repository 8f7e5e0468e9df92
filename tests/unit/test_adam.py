"""Optimizers with a smaller state, or one on the host: the plain one's steps, whatever form the state has."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import SHAPE, preference_groups, write_lines, write_model
from training_home import TIMES
from transformers import LlamaConfig

from megatron_solopo.config import Config

STEPS = 20
FP32 = ("--use-precision-aware-optimizer", "--no-store-param-remainders")
BF16 = ("--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16")
HOST = ("--optimizer-cpu-offload",)
LORA = ("--lora-rank", 4, "--lora-alpha", 16)
PIECES = 500
"""Smaller than most parameters of the model, and no divisor of their sizes."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adam")
    write_model(folder / "model", LlamaConfig(**SHAPE, tie_word_embeddings=False))
    write_lines(folder / "groups.jsonl", preference_groups(12))
    return folder


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_solopo.training import adam

    monkeypatch.setattr(adam, "PIECE", PIECES)


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(engine: Any, home: Path, tmp_path: Path, pieces: None) -> Iterator[Run]:
    """Trains, and returns the lines of all steps without their times."""
    from megatron_solopo import config_load
    from megatron_solopo.parallel.platform import end_model_parallel
    from megatron_solopo.training import engine as engines
    from megatron_solopo.training.trainer import train

    def trained(name: str, *flags: Any) -> list[dict[str, Any]]:
        argv = [
            "--hf-path", home / "model", "--train-data", home / "groups.jsonl", "--preference-loss", "orpo", "--bf16",
            "--device", "cpu", "--seq-length", 128, "--global-batch-size", 4, "--micro-batch-size", 2, "--lr", 1e-2,
            "--weight-decay", 0.1, "--save", tmp_path / name, "--train-iters", STEPS, "--save-interval", STEPS // 2,
            *flags,
        ]  # fmt: skip
        end_model_parallel()
        train(engine, config_load.load(list(map(str, argv)))[0])
        times = {*TIMES, "warnings"}  # warnings are of all lines of a run
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in times} for line in lines if line["split"] == "train"]

    yield trained
    end_model_parallel()
    engines.initialize_parallel(Config())


def away_from_zero(main: torch.Tensor) -> torch.Tensor:
    """To the nearest bfloat16, and away from 0 where two are as near: torch rounds to the even one."""
    bits = main.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("lora", [(), LORA], ids=["all", "adapters"])
def test_a_smaller_state_trains_and_resumes_exactly(run: Run, tmp_path: Path, lora: tuple[Any, ...]) -> None:
    flags = (*BF16, *HOST, "--optimizer-offload-fraction", 0.5, "--main-grads-dtype", "bf16", *lora)
    lines = run("small", *flags)
    losses = [line["loss"] for line in lines]
    assert losses[-1] < 0.9 * losses[0]
    assert run("small", *flags, "--load", tmp_path / "small", "--ckpt-step", STEPS // 2) == lines


def test_forms_of_the_same_state_are_the_plain_optimizer(run: Run, tmp_path: Path) -> None:
    """And a run may resume with another form."""
    plain = run("plain")
    assert len({line["loss"] for line in plain}) == STEPS and any(line["clipped"] for line in plain)
    forms = {"device": FP32, "host": (*HOST, *FP32, "--optimizer-offload-fraction", 0.4), "plain": ()}
    for before, after in itertools.pairwise(["plain", "device", "host", "plain"]):
        if before != "plain":
            assert run(before, *forms[before]) == plain, before
        load = "--load", tmp_path / before, "--ckpt-step", STEPS // 2
        assert run(f"{before}-{after}", *forms[after], *load) == plain[STEPS // 2 :], (before, after)


def test_adapters_take_the_plain_optimizers_steps(run: Run) -> None:
    plain = run("plain", *LORA)
    assert len({line["loss"] for line in plain}) == STEPS
    assert run("device", *LORA, *FP32) == plain
    assert run("host", *LORA, *HOST, *FP32, "--optimizer-offload-fraction", 0.4) == plain


def test_every_main_parameter_is_a_weight_and_a_remainder() -> None:
    from megatron_solopo.training.adam import joined, split

    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000
    main = torch.cat([bits, ties, torch.tensor([0, -(2**31), 1, 0x7FFF, 0x8000, 0xFFFF])]).to(torch.int32)
    main = main.view(torch.float32)
    main = main[main.abs() < 3e38]  # beyond, the nearest bfloat16 is infinite
    weight, remainder = torch.empty(main.shape, dtype=torch.bfloat16), torch.empty(main.shape, dtype=torch.int16)
    split(main, weight, remainder)
    assert torch.equal(joined(weight, remainder).view(torch.int32), main.view(torch.int32))
    assert torch.equal(weight.view(torch.int16), away_from_zero(main).view(torch.int16))
    even = main.bfloat16() == weight
    assert even[(main.view(torch.int32) & 0xFFFF) != 0x8000].all() and not even.all()


SHAPES = (37, 23), (23, 11)


class Regression:
    """Two matrices, and the gradients of their squared error in the dtype of the weights."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=draw) * scale).bfloat16().double()

        self.start = [drawn(*shape, scale=shape[0] ** -0.5) for shape in SHAPES]
        self.inputs, self.targets = drawn(STEPS, 64, 37), drawn(STEPS, 64, 11)

    def gradients(self, step: int, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        dtype = weights[0].dtype
        leaves = [weight.detach().view(shape).requires_grad_() for weight, shape in zip(weights, SHAPES, strict=True)]
        hidden = torch.tanh(self.inputs[step].to(dtype) @ leaves[0])
        error = hidden @ leaves[1] - self.targets[step].to(dtype)
        return [gradient.flatten() for gradient in torch.autograd.grad(error.pow(2).mean(), leaves)]


ADAM: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def exact(case: Regression) -> list[torch.Tensor]:
    weights = [torch.nn.Parameter(matrix.flatten().clone()) for matrix in case.start]
    adam = torch.optim.AdamW(weights, **ADAM, foreach=False)
    for step in range(STEPS):
        for weight, gradient in zip(weights, case.gradients(step, [*weights]), strict=True):
            weight.grad = gradient
        adam.step()
    return [weight.detach() for weight in weights]


def by_pieces(case: Regression, sums: torch.dtype = torch.float32, **settings: Any) -> list[torch.Tensor]:
    """Weights after training in bfloat16, and their main parameters."""
    from megatron_solopo.training.adam import PieceAdam

    dtypes = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.float32)
    weights: list[Any] = [matrix.flatten().bfloat16() for matrix in case.start]
    adam = PieceAdam(weights, **ADAM, **{"store_param_remainders": False} | dtypes | settings)
    for step in range(STEPS):
        for weight, gradient in zip(weights, case.gradients(step, weights), strict=True):
            weight.decoupled_grad = gradient.to(sums)
        adam.step()
    assert {state["exp_avg_sq"].dtype for state in adam.state.values()} == {adam.dtypes["exp_avg_sq"]}
    return [*weights, *(adam.stored_state(weight)["param"] for weight in weights)]


def test_remainders_are_main_parameters_but_for_ties(pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_solopo.training import adam

    case = Regression(5)
    remainders = by_pieces(case, store_param_remainders=True)
    step = adam.PieceAdam.step

    def step_and_round(self: Any) -> None:
        step(self)
        for weight, state in self.state.items():
            weight.copy_(away_from_zero(state["master_param"]))

    monkeypatch.setattr(adam.PieceAdam, "step", step_and_round)
    for one, other in zip(by_pieces(case), remainders, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", (1, 2, 3))
@pytest.mark.parametrize("sums", [torch.float32, torch.bfloat16])
def test_moments_in_bfloat16_are_within_the_bound(pieces: None, seed: int, sums: torch.dtype) -> None:
    """Weights are at most 1.1 times as far from float64 as those of plain training in bfloat16. Main parameters, whose
    distance is a five-hundredth of it, are at most 2.2 times as far as the plain ones."""
    case = Regression(seed)
    truth, plain = exact(case), by_pieces(case)
    moments = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
    small = by_pieces(case, sums, store_param_remainders=True, **moments)
    for number, (true, one, other) in enumerate(zip(truth * 2, plain, small, strict=True)):
        assert 0 < (other.double() - true).norm() <= (1.1, 2.2)[number >= 2] * (one.double() - true).norm()


class Lazy(torch.overrides.TorchFunctionMode):
    """A device whose copies take as long as they may: each is made when something waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: LazyStream | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and (kwargs or {}).get("non_blocking") and self.stream is not None:
            target, source = args
            self.stream.queue.append(lambda: target.copy_(source))
            return target
        return func(*args, **(kwargs or {}))


class LazyStream:
    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = 0

    def run(self, until: int | None = None) -> None:
        while self.done < (len(self.queue) if until is None else until):
            self.done += 1
            self.queue[self.done - 1]()

    def wait_stream(self, other: LazyStream) -> None:
        other.run()

    def record_event(self) -> Any:
        until = len(self.queue)
        return SimpleNamespace(synchronize=lambda: self.run(until))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_copies_of_any_speed_are_the_same_steps(
    pieces: None, monkeypatch: pytest.MonkeyPatch, engine: Any, lazy: bool, overlap: bool, fraction: float
) -> None:
    from megatron_solopo.training.adam import Staging

    case, device = Regression(4), Lazy()
    plain = by_pieces(case)
    if lazy:

        @contextlib.contextmanager
        def entered(stream: LazyStream) -> Iterator[None]:
            device.stream = stream
            yield
            device.stream = None

        current = LazyStream()
        monkeypatch.setattr(torch.cuda, "Stream", LazyStream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
        monkeypatch.setattr(torch.cuda, "stream", entered)
    staging = Staging(torch.device("cpu"), overlap)
    with device:
        there = by_pieces(case, offload_fraction=fraction, staging=staging)
    for one, other in zip(plain, there, strict=True):
        assert torch.equal(one, other)
    assert len(staging._buffers) == 2 and {buffer.numel() for pair in staging._buffers for buffer in pair} == {PIECES}
