"""Paths of CUDA alone, as far as a machine without a GPU shows them; the rest is tests/gpu and tools/gpu_suite.py."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import check, refused
from segment_names import prompt_of
from tiny_models import SHAPE, preference_groups, write_lines, write_model
from training_home import TIMES
from transformers import LlamaConfig

from megatron_solopo.config import Config, ModelConfig, TrainingConfig
from megatron_solopo.data.tokenized.batches import above_the_token_limit, plan_step
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.errors import LostProcess
from megatron_solopo.pack import Context, Side
from megatron_solopo.parallel.context.none import CUDNN_LENGTHS
from megatron_solopo.parallel.deterministic import fixed_order
from megatron_solopo.parallel.platform import (
    CONNECTIONS,
    expand_segments,
    limit_connections,
    too_many_connections,
)

ROOT = Path(__file__).resolve().parents[2]

START = """
import os, sys
import torch, torch.distributed as dist
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.set_device = lambda device: print("allocator", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
init_process_group = dist.init_process_group
dist.init_process_group = lambda backend, **more: init_process_group("gloo", **more)
from megatron_solopo.parallel import platform
here = platform.start("cuda")
from megatron_solopo.training import engine
print("adam", engine.HAVE_APEX_OR_TE)
from megatron_solopo.config import Config, ModelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.model.transformer_engine import check_machine
check_machine(Config(), "cuda")
try:
    check_machine(Config(model=ModelConfig(transformer_impl="transformer_engine")), "cuda")
except UserError as error:
    print(error.code, error)
"""
"""A process that starts as on CUDA, with the device and NCCL left out."""


def start_as_on_cuda(*paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | variables
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, ROOT)))
    return subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("raised", "where"),
    [
        ("OSError('libcudnn.so.9: cannot open shared object file')", "__init__.py"),
        ("RuntimeError('built for another torch')", "pytorch.py"),
    ],
)
def test_a_transformer_engine_that_does_not_import_stops_no_portable_run(
    tmp_path: Path, raised: str, where: str
) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    for name in ("__init__.py", "common.py"):
        (package / name).write_text("")
    (package / where).write_text(f"import transformer_engine.common\nraise {raised}\n")
    done = start_as_on_cuda(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    message = raised.partition("'")[2].removesuffix("')")
    reason = f"installed, but its import fails: {raised.partition('(')[0]}: {message}"
    assert f"warning: Transformer Engine is not used: {reason}\n" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["allocator expandable_segments:True", "adam False"]
    check(
        *lines[2].split(" ", 1), "transformer-engine-unusable", "--transformer-impl transformer_engine: ", f"({reason}"
    )


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_allocator_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    expand_segments()
    assert [value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")] == ["max_split_size_mb:512"]


@pytest.mark.parametrize(
    ("chosen", "capability", "used", "warned"),
    [(None, 9, "1", False), ("1", 9, "1", False), ("8", 9, "8", True), ("8", 10, "8", False)],
)
def test_one_queue_of_kernels_where_processes_share_layers(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, capability: int, used: str, warned: bool
) -> None:
    monkeypatch.delenv(CONNECTIONS, raising=False)
    if chosen:
        monkeypatch.setenv(CONNECTIONS, chosen)
    limit_connections()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    assert os.environ[CONNECTIONS] == used
    warning = too_many_connections()
    assert (warning is not None) == warned
    if warning:
        assert f"{CONNECTIONS}={chosen}" in warning and "--tensor-model-parallel-size" in warning


@pytest.mark.parametrize(
    ("flags", "split"),
    [([], False), (["--tensor-model-parallel-size", 2], True), (["--context-parallel-size", 2], True)],
)
def test_a_run_knows_whether_processes_share_layers(
    flags: list[Any], split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_solopo import config_load
    from megatron_solopo.training import run

    calls: list[bool] = []
    monkeypatch.setattr(run.platform, "start", lambda device, minutes, split_layers: calls.append(split_layers))
    monkeypatch.setattr(run.platform, "stop", lambda running: None)
    argv = ["--hf-path", "m", "--train-data", "t", "--save", "s", "--train-iters", 1, *flags]
    with run.started(config_load.load(list(map(str, argv)))[0]):
        pass
    assert calls == [split]


def test_a_full_gpu_is_one_line_with_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_solopo import config_load
    from megatron_solopo.training import run

    monkeypatch.setattr(run.platform, "start", lambda *arguments: None)
    monkeypatch.setattr(run.platform, "stop", lambda running: None)
    monkeypatch.setenv("RANK", "3")
    argv = ["--hf-path", "m", "--train-data", "t", "--save", "s", "--train-iters", "1"]
    words = ("rank 3", "(CUDA out of memory)", "--micro-batch-size 8", "--recompute-granularity full", "--dry-run")
    with refused("gpu-out-of-memory", *words), run.started(config_load.load(argv)[0]):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


def test_no_gloo_group_is_created_beside_the_others(engine: Any) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_solopo.parallel.platform import end_model_parallel
    from megatron_solopo.training.engine import initialize_parallel

    end_model_parallel()
    initialize_parallel(Config())
    names = [group.group_desc for group in dist.distributed_c10d._world.pg_map]
    assert "DATA_PARALLEL_GROUP" in names and not [name for name in names if "GLOO" in name]
    with pytest.raises(AssertionError):
        parallel_state.get_data_parallel_group_gloo()


def draw_groups(seed: int, longest: int = 900) -> list[TokenGroup]:
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(SHAPE["vocab_size"]) for _ in range(draw.randint(1, most))]

    return [
        TokenGroup(
            f"g{number}",
            tuple(
                Prompt(context, ids(longest), tuple(Completion(side, ids(40)) for side in sides))
                for context, sides in ((Context.SHORT, (Side.CHOSEN, Side.REJECTED)), (Context.LONG, (Side.CHOSEN,)))
            ),
        )
        for number in range(5)
    ]


@pytest.mark.parametrize("share", [True, False])
def test_prompts_are_padded_to_few_lengths_on_cuda(share: bool) -> None:
    groups, config = draw_groups(1), Config(model=ModelConfig(bf16=True))
    config.data.share_prompts, config.training.micro_batch_size = share, 2
    plan = plan_step(groups, 32, 2, config, "cuda")
    assert plan.of_prompts == CUDNN_LENGTHS and plan_step(groups, 32, 2, config).of_prompts == 1
    for places in (places for packs in plan.shares for places in packs):
        chosen = [groups[i] for i in places]
        pack = build_pack(chosen, places, share, plan.of_packs, plan.of_pieces, plan.of_prompts)
        tokens = sum(g.tokens(share, plan.of_pieces, plan.of_prompts) for g in chosen)
        assert pack.tokens.numel() == tokens or not chosen
        for piece in pack.pieces if chosen else ():
            assert piece.slot % CUDNN_LENGTHS == 0 if piece.prompt is None else piece.padding == 0


@pytest.mark.parametrize(
    ("change", "multiple"),
    [
        ({}, 128),
        ({"bf16": False}, 1),
        ({"transformer_impl": "transformer_engine"}, 1),
        ({"context_parallel_size": 2}, 4),
    ],
)
def test_prompts_that_cudnn_does_not_compute_keep_their_lengths(change: dict[str, Any], multiple: int) -> None:
    config = Config(model=ModelConfig(bf16=True))
    for section in (config.model, config.parallel):
        for name in change.keys() & vars(section).keys():
            setattr(section, name, change[name])
    assert plan_step(draw_groups(2), 32, 1, config, "cuda").of_prompts == multiple


def test_the_limit_of_a_pack_counts_the_padding_of_prompts() -> None:
    group = TokenGroup("g", (prompt_of([1] * 129, {"short_chosen": [1] * 2, "short_rejected": [1] * 2}),))
    groups, config = [group], Config(model=ModelConfig(bf16=True))
    config.training.max_tokens_per_rank = 131
    assert above_the_token_limit(groups, config) is None
    assert "up to 258 tokens a process" in above_the_token_limit(groups, config, "cuda")
    config.training.max_tokens_per_rank = 300
    shares = {device: plan_step(groups * 2, 32, 1, config, device).shares for device in ("cpu", "cuda")}
    assert shares == {"cpu": [[[0, 1]]], "cuda": [[[0], [1]]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), LlamaConfig(**SHAPE, tie_word_embeddings=False))


def test_the_fused_adam_is_adam_and_resumes(
    engine: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps as torch's Adam of single operators but for rounding, and exact ones after a resume. A checkpoint
    does not restrict the kernels that continue from it."""
    from megatron_solopo import config_load
    from megatron_solopo.parallel.platform import end_model_parallel
    from megatron_solopo.training import engine as engines
    from megatron_solopo.training.trainer import train

    data = write_lines(tmp_path / "groups.jsonl", preference_groups(12))
    build, built = engines.build_optimizer, []

    def run(fused: bool, save: str, *flags: Any) -> list[dict[str, Any]]:
        def build_with_kernels(*arguments: Any) -> Any:
            optimizer, scheduler = build(*arguments)
            for group in [] if fused else optimizer.param_groups:
                group |= {"fused": False}
            built.append(optimizer)
            return optimizer, scheduler

        monkeypatch.setattr(engines, "build_optimizer", build_with_kernels)
        argv = [
            "--hf-path", folder, "--train-data", data, "--preference-loss", "orpo", "--device", "cpu",
            "--seq-length", 128, "--global-batch-size", 4, "--micro-batch-size", 2, "--lr", 1e-3,
            "--save", tmp_path / save, "--train-iters", 6, "--save-interval", 3, *flags,
        ]  # fmt: skip
        end_model_parallel()
        train(engine, config_load.load(list(map(str, argv)))[0])
        assert {(g.get("fused"), g.get("foreach")) for g in built[-1].param_groups} == {(fused, False)}
        lines = [json.loads(line) for line in (tmp_path / save / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["split"] == "train"]
        return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]

    single, fused = run(False, "single"), run(True, "fused")
    assert [line["loss"] for line in fused] == pytest.approx([line["loss"] for line in single], rel=1e-5)
    assert run(True, "fused", "--load", tmp_path / "fused", "--ckpt-step", 3) == fused
    assert run(False, "single", "--load", tmp_path / "single", "--ckpt-step", 3) == single
    crossed = run(True, "crossed", "--load", tmp_path / "single", "--ckpt-step", 3)
    assert [line["loss"] for line in crossed] == pytest.approx([line["loss"] for line in single[3:]], rel=1e-5)
    with fixed_order():  # no operator of a step lacks an ordered algorithm on the CPU
        assert run(True, "ordered", "--deterministic-mode") == fused
    run(False, "back", "--load", tmp_path / "fused", "--ckpt-step", 3)
    end_model_parallel()
    engines.initialize_parallel(Config())


def test_only_torchs_adam_is_fused(engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training import engine as engines

    built = engines.build_engine(engine, read_hf_config(folder), Config(model=ModelConfig(hf_path=str(folder))))
    for theirs in (False, True):
        monkeypatch.setattr(engines, "HAVE_APEX_OR_TE", theirs)
        optimizer, _ = engines.build_optimizer(built, TrainingConfig(), 1)
        assert {bool(group.get("fused")) for group in optimizer.param_groups} == {not theirs}


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        ({}, "auto"),
        ({"attention_backend": "flash"}, "flash"),
        ({"transformer_impl": "transformer_engine"}, "fused"),
        ({"transformer_impl": "transformer_engine", "attention_backend": "flash"}, "flash"),
    ],
)
def test_transformer_engine_never_chooses_by_itself(
    engine: Any, monkeypatch: pytest.MonkeyPatch, model: dict[str, str], backend: str
) -> None:
    """megatron-core's auto allows the kernel that holds all scores."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_solopo.model.build import transformer_config

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", print)  # megatron-core looks whether it is there

    config = Config(model=ModelConfig(bf16=True, **model))
    assert transformer_config(LlamaConfig(**SHAPE), config, torch.bfloat16).attention_backend.name == backend


def test_models_of_two_backends_in_one_process(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core refuses the variables that an earlier model set."""
    from megatron_solopo.model.build import build_model

    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    for backend, flag in (("auto", "1"), ("fused", "0"), ("flash", "1")):
        build_model(LlamaConfig(**SHAPE), Config(model=ModelConfig(attention_backend=backend)))
        assert os.environ["NVTE_FLASH_ATTN"] == flag


@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_are_those_that_ddp_would_add(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """As on CUDA but for the kernel: matrices and head add their gradient to the sum in the product, over two packs.
    They differ by the rounding of each product, of which DDP adds bfloat16, and tied weights by that of the sum too."""
    from contextlib import ExitStack

    from megatron_solopo.model.forward import device_pack, segment_log_probs
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.parallel import cpu_shim
    from megatron_solopo.training.engine import build_engine

    model = write_model(tmp_path, LlamaConfig(**SHAPE, tie_word_embeddings=tied), noise=0.02)
    config, groups = Config(model=ModelConfig(hf_path=str(model), bf16=True)), draw_groups(4, longest=30)

    def gradients(fused: bool) -> dict[str, torch.Tensor]:
        with ExitStack() as stack:
            cpu_shim._add_weight_gradients(stack, on_cuda=fused)
            built = build_engine(engine, read_hf_config(model), config)
            settings = built.models[0].config
            assert settings.gradient_accumulation_fusion == fused
            built.zero_gradients()
            for number in range(2):
                pack = device_pack(build_pack(groups[number : number + 1], [number], True), settings, engine.device)
                segment_log_probs(built.chunks[0], pack, built.head, built.dtype).sum().backward()
        return {name: parameter.main_grad for name, parameter in built.models[0].named_parameters()}

    plain, fused = gradients(False), gradients(True)
    assert plain.keys() == fused.keys() and all(gradient.norm() > 0 for gradient in plain.values())
    for name, expected in plain.items():
        bound = 0.01 if "embedding" in name and tied else 2**-8
        assert (fused[name] - expected).norm() < bound * expected.norm(), name


def test_no_object_that_the_gpu_exchanges_holds_gradients(
    engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL copies the objects of all processes to one GPU."""
    import pickle

    import torch.distributed as dist

    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training import engine as engines
    from megatron_solopo.training.gradients import full_gradients

    built = engines.build_engine(engine, read_hf_config(folder), Config(model=ModelConfig(hf_path=str(folder))))
    for chunk in built.chunks:
        for buffer in engines.gradient_buffers(chunk):
            buffer.grad_data.normal_()
    sizes = []
    exchange = dist.all_gather_object

    def all_gather_object(values: list[Any], value: Any) -> None:
        sizes.append(len(pickle.dumps(value)))
        exchange(values, value)

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    monkeypatch.delattr(dist, "gather_object")
    gradients = full_gradients(built)
    names = {name for name, _ in built.models[0].named_parameters()}
    assert len(gradients) >= len(names) and sum(each.norm() ** 2 for each in gradients.values()) > 0
    assert sum(sizes) < sum(each.nbytes for each in gradients.values()) / 4


def test_a_device_draws_normal_numbers_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid of every GPU that computes in bfloat16 holds a piece, 256 blocks of 256 threads."""
    from megatron_solopo.conversion import random_start

    cpu, piece = torch.device("cpu"), random_start.PIECE
    assert piece <= 2**16
    whole = random_start._drawn_in_pieces(torch.Size((3, piece)), 0.07, 5, cpu)
    assert whole.shape == (3, piece) and whole.dtype == torch.float32
    assert torch.equal(whole, random_start._drawn_in_pieces(torch.Size((3, piece)), 0.07, 5, cpu))
    assert abs(whole.std().item() - 0.07) < 6 * 0.07 / (2 * whole.numel()) ** 0.5
    assert abs(whole.mean().item()) < 6 * 0.07 / whole.numel() ** 0.5
    assert not torch.equal(whole, random_start._drawn_in_pieces(torch.Size((3, piece)), 0.07, -5, cpu))
    monkeypatch.setattr(random_start, "PIECE", 1001)  # the CPU's generator draws such lengths otherwise than their sum
    generator = torch.Generator().manual_seed(5)
    one_by_one = torch.cat([torch.empty(1001).normal_(0.0, 0.07, generator=generator) for _ in range(3)])
    assert torch.equal(random_start._drawn_in_pieces(torch.Size((3003,)), 0.07, 5, cpu), one_by_one)
    at_once = torch.empty(3003).normal_(0.0, 0.07, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(one_by_one, at_once)


def test_the_log_holds_allocated_memory_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_solopo.parallel.platform import Platform

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    assert Platform("cuda", torch.device("cuda", 0), "nccl", lambda: None).peak_allocated_gib() == 1.5
    assert Platform("cpu", torch.device("cpu"), "gloo", lambda: None).peak_allocated_gib() is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("NCCL communicator was aborted on rank 1. Original reason for failure was: ...", "process-lost"),
        ("... a network error or a remote process exiting prematurely.", "process-lost"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, ...", "process-timeout"),
        ("NCCL error: invalid usage", None),
    ],
)
def test_a_lost_process_is_recognized_by_nccls_message(text: str, code: str | None) -> None:
    from megatron_solopo.parallel.platform import explain_lost_process, lost_process

    error = torch.distributed.DistBackendError(text)
    assert getattr(lost_process(error), "code", None) == code
    if code is None:
        with pytest.raises(type(error)), explain_lost_process():
            raise error
        return
    with (
        refused(code, "another process", "its message says why", "; resume") as caught,
        explain_lost_process(lambda: "; resume"),
    ):
        raise error
    assert type(caught.value) is LostProcess


def test_the_note_about_a_sudden_death_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_solopo.training.exits import note_sudden_death

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    with pytest.raises(KeyError), note_sudden_death("runs/solo", 30.0):
        assert "within --distributed-timeout-minutes 30 " in json.loads(path.read_text())["message"]
        raise KeyError
    assert not path.exists()
