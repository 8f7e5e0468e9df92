"""What a step reads from the device, its gradient norm, and the packs that are prepared ahead."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from host_reads import host_reads
from refusals import refused
from segment_names import only
from test_step import GROUPS, METHODS, draw, reference_of
from tiny_models import EXPERTS, SHAPE, write_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, MixtralConfig

from megatron_solopo.config import Config, ModelConfig, TrainingConfig
from megatron_solopo.data.tokenized.batches import make_schedule
from megatron_solopo.errors import UserError
from megatron_solopo.losses.solopo import policy_scores

MODELS = {
    "dense": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "experts": MixtralConfig(**SHAPE, **EXPERTS, tie_word_embeddings=False),
}
SOLO = METHODS["solo"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name), model) for name, model in MODELS.items()}


def trainer(engine: Any, folder: Path, **training: Any) -> tuple[Any, Any, Any, Config]:
    """(engine, optimizer, scheduler, configuration), the same at every call."""
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.engine import build_engine, build_optimizer

    training = {"lr": 1e-3, "lr_warmup_fraction": 0.0, "micro_batch_size": 2} | training
    config = Config(model=ModelConfig(hf_path=str(folder)), method=SOLO, training=TrainingConfig(**training))
    built = build_engine(engine, read_hf_config(folder), config)
    built.train()
    return (built, *build_optimizer(built, config.training, 4), config)


def examples() -> tuple[Any, Any]:
    """Groups, and numbers for what the reference would score."""
    everything = draw(SOLO)
    return only(everything, policy_scores(SOLO)), reference_of(everything, SOLO)


def parts(built: Any, config: Config) -> Any:
    from megatron_solopo.training.objective import step_inputs
    from megatron_solopo.training.step import run_parts
    from megatron_solopo.training.step_work import make_packs

    dataset, reference = examples()
    packs = make_packs(built, dataset, range(GROUPS), config)
    inputs = step_inputs([pack.pack for pack in packs], reference, SOLO, built.platform.device)
    return lambda: run_parts(built, packs, inputs, GROUPS, SOLO)


def test_nothing_is_read_between_a_pack_and_the_optimizer(engine: Any, folders: dict[str, Path]) -> None:
    """Neither by value nor by a shape that depends on values: that would make the host wait for every pack."""
    from megatron_solopo.training.engine import squared_gradient_norm

    built, optimizer, _, config = trainer(engine, folders["dense"])
    run = parts(built, config)
    built.zero_gradients()
    with host_reads() as reads:
        run()
        squared_gradient_norm(optimizer)
    assert not reads


def test_a_step_reads_the_device_once(engine: Any, folders: dict[str, Path]) -> None:
    from megatron_solopo.training import step as steps
    from megatron_solopo.training.memory import PeakMemory
    from megatron_solopo.training.objective import NOT_OF_LOSSES, metric_names
    from megatron_solopo.training.step_work import training_work

    built, optimizer, scheduler, config = trainer(engine, folders["dense"])
    (data, reference), schedule = examples(), make_schedule(GROUPS, GROUPS, 2, None, 0, True)
    collectives = []

    def counted(kind: str, collective: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            collectives.append(kind)
            return collective(*arguments, **more)

        return call

    kinds = ("all_reduce", "all_gather_into_tensor", "broadcast", "all_gather_object")
    patches = {kind: counted(kind, getattr(torch.distributed, kind)) for kind in kinds}
    with (
        training_work(built, data, schedule, config, reference) as work,
        mock.patch.multiple(torch.distributed, **patches),
    ):
        # torch's Adam counts its steps on the CPU.
        with host_reads() as reads, mock.patch.object(steps, "update"):
            line, agreed = steps.train_step(
                built, optimizer, scheduler, data, schedule, work, 0, config, PeakMemory(engine), lambda: 15
            )
    assert len(reads) == 1 and "readings.py" in reads[0], reads
    assert agreed == 15
    assert line.keys() - NOT_OF_LOSSES == {*metric_names(SOLO)} - {"loss"}
    ours = [kind for kind in collectives if kind != "all_reduce"]  # megatron-core sums gradients
    assert ours == ["all_gather_into_tensor"], collectives


class Collectives(TorchDispatchMode):
    """Names of the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", MODELS)
def test_a_process_alone_copies_neither_gradients_nor_weights(
    engine: Any, folders: dict[str, Path], model: str
) -> None:
    """gloo would, both of the complete model; and the step is what it is in the buffers."""
    from megatron_solopo.training.engine import squared_gradient_norm, update

    built, optimizer, _, config = trainer(engine, folders[model])
    run = parts(built, config)
    before = [parameter.detach().clone() for parameter in built.models[0].parameters()]
    with Collectives() as seen:
        run()
        squared_gradient_norm(optimizer)
        update(optimizer, 1.0)
    assert not [name for name in seen.names if "gather" in name or "scatter" in name], seen.names
    assert not all(map(torch.equal, before, built.models[0].parameters()))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_the_norm_and_the_update_are_megatrons(engine: Any, folders: dict[str, Path], model: str, clip: float) -> None:
    """Bit for bit what the optimizer's step does, clipped or not."""
    from megatron_solopo.training.engine import squared_gradient_norm, update

    after = []
    for ours in (True, False):
        built, optimizer, scheduler, config = trainer(engine, folders[model], clip_grad=clip)
        for _ in range(2):
            built.zero_gradients()
            optimizer.zero_grad()
            parts(built, config)()
            scheduler.step(1)
            if ours:
                norm = squared_gradient_norm(optimizer).item() ** 0.5
                update(optimizer, norm)
            else:
                _, norm, _ = optimizer.step()
        after.append((norm, [parameter.detach().clone() for parameter in built.models[0].parameters()]))
    (norm, weights), (their_norm, theirs) = after
    assert norm == their_norm > 0.01
    assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))


def test_inputs_are_prepared_in_order_and_one_step_ahead() -> None:
    from megatron_solopo.training.ahead import Ahead

    calls: list[tuple[int, str]] = []

    def make(number: int) -> int:
        calls.append((number, threading.current_thread().name))
        return number * number

    with Ahead(make, 4, torch.device("cpu")) as ahead:
        for number in range(1, 4):  # as a resumed run starts
            assert ahead.take(number) == number * number
            ahead.settle()
            assert [n for n, _ in calls] == list(range(1, min(number + 2, 4)))
        assert ahead.take(0) == 0 and ahead.take(3) == 9  # not what was prepared ahead
    assert len({thread for _, thread in calls}) == 1 and calls[0][1] != threading.current_thread().name
    assert calls[0][1] not in {thread.name for thread in threading.enumerate()}


def test_ended_work_is_not_waited_for() -> None:
    """A save settles the work behind the last step too, where the thread may have ended before it started a job."""
    from megatron_solopo.training.ahead import Ahead

    go_on = threading.Event()

    def make(number: int) -> int:
        ahead._thread.submit(go_on.wait)  # keeps the thread from the job behind this one
        return number

    ahead = Ahead(make, 2, torch.device("cpu"))
    assert ahead.take(0) == 0
    threading.Timer(0.1, go_on.set).start()
    ahead.close()
    settled = threading.Thread(target=ahead.settle, daemon=True)
    settled.start()
    settled.join(10)
    assert not settled.is_alive()


def test_an_error_is_raised_at_its_step() -> None:
    from megatron_solopo.training.ahead import Ahead

    def make(number: int) -> int:
        if number == 1:
            raise UserError("file-damaged", "tokens.bin: damaged")
        return number

    with Ahead(make, 3, torch.device("cpu")) as ahead:
        assert ahead.take(0) == 0
        ahead.settle()
        with refused("file-damaged", "tokens.bin"):
            ahead.take(1)
        assert ahead.take(2) == 2


def test_a_cut_pack_keeps_what_its_rank_predicts() -> None:
    """Every prediction is on one rank, its place there holds the same token and position, and segments stay whole."""
    from drawn_packs import draw_pack

    from megatron_solopo.parallel.context import method_of
    from megatron_solopo.parallel.device_pack import cut
    from megatron_solopo.parallel.kernels import Kernels

    for seed, size in ((3, 2), (4, 4), (5, 1)):
        pack, predicted = draw_pack(seed, size), []
        for rank in range(size):
            device_pack = cut(pack, method_of(size, "all_gather"), Kernels.CPU, rank, size)
            part, rows = device_pack.pack, torch.from_numpy(method_of(size, "all_gather").rows(pack.pieces, rank, size))
            assert device_pack.tokens == pack.tokens.numel() and part.tokens.numel() == device_pack.tokens // size
            assert torch.equal(part.positions, pack.positions[rows]) and part.pieces == pack.pieces
            assert part.scored is pack.scored
            assert torch.equal(device_pack.is_padding, pack.is_padding()[rows])
            columns = (rows[part.predictors], part.targets, part.segments)
            predicted += list(zip(*(column.tolist() for column in columns), strict=True))
        columns = (pack.predictors, pack.targets, pack.segments)
        assert sorted(predicted) == sorted(zip(*(column.tolist() for column in columns), strict=True))
