"""A rehearsed step: bytes that arithmetic knows, every method and layout, and what it must notice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_models import SHAPE
from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_solopo import config_load
from megatron_solopo.config import Config, flag
from megatron_solopo.losses.registry import LOSSES
from megatron_solopo.parallel.context import choices, methods
from megatron_solopo.parallel.engine_method import EngineMethod
from megatron_solopo.parallel.layouts import parse_layout
from megatron_solopo.planning import fake, fewer_layers
from megatron_solopo.planning.estimate import on_host
from megatron_solopo.planning.memory import (
    ACTIVATIONS,
    COMMUNICATION,
    GRADIENTS,
    LOG_PROBS,
    OPTIMIZER,
    WEIGHTS,
    WORKING,
)
from megatron_solopo.planning.process import Process, Shape, Work
from megatron_solopo.planning.rehearse import Outcome, example
from megatron_solopo.planning.states import standing as closed_form
from megatron_solopo.planning.table import (
    calculated,
    largest_pack,
    not_rehearsed,
    outcomes_of,
    packs_that_matter,
    table,
)
from megatron_solopo.planning.workers import Rehearsals, Task, outcome_of
from megatron_solopo.training.adam import PIECE

HIDDEN, LAYERS, VOCABULARY = 64, 2, 1000
LLAMA = LlamaConfig(
    **SHAPE
    | dict(hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=8)
    | dict(num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=4096),
    tie_word_embeddings=False,
)
MOE = Qwen3MoeConfig(
    **SHAPE
    | dict(hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, head_dim=8)
    | dict(num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=4096)
    | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
    tie_word_embeddings=False,
)
DEEP = LlamaConfig(**LLAMA.to_dict() | dict(num_hidden_layers=2 * LAYERS))
DEEP_MOE = Qwen3MoeConfig(**MOE.to_dict() | dict(num_hidden_layers=2 * LAYERS))
FULL = ("--recompute-granularity", "full")


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[Rehearsals]:
    with Rehearsals(1) as rehearsals:
        yield rehearsals


def options(*flags: Any, layout: str = "1") -> Config:
    argv = ["--hf-path", "model", "--random-init", "--train-data", "x", "--save", "y", "--train-iters", 2, *flags]
    for name, value in parse_layout(layout).options.items():
        argv += [flag(name)] if value is True else [flag(name), value]
    config, _ = config_load.load([*map(str, argv)])
    return config


def task(
    *flags: Any, layout: str = "1", model: PretrainedConfig = LLAMA, rank: int = 0, packs: int = 1, **more: Any
) -> Task:
    config = options(*flags, layout=layout)
    groups = [example(config.method, 30, 200, 12)]
    world = parse_layout(layout).processes
    return Task(config, model, groups, packs, rank % world, world, **more)


def parameters(tensor: int = 1, stages: int = 1, last: bool = True) -> int:
    """Of the llama above on one process: matrices are cut, norms are not; the vocabulary is padded to 1,024."""
    matrices = 64 * 64 + 64 * 64 + 64 * 64 + 3 * 64 * 96  # query, keys and values, output, gate up and down
    ends = 2 if stages == 1 else 1
    return (
        LAYERS // stages * (matrices // tensor + 2 * HIDDEN) + ends * 1024 * HIDDEN // tensor + (HIDDEN if last else 0)
    )


@pytest.mark.parametrize(
    ("device", "layout", "rank", "count", "copies"),
    [
        ("cuda", "1", 0, parameters(), 1),
        ("cpu", "tp2 sp", 1, parameters(2), 1),
        ("cuda", "pp2", 0, parameters(stages=2, last=False), 1),
        ("cpu", "pp2", 1, parameters(stages=2), 1),
        ("cuda", "cp2", 0, parameters(), 2),
        ("cpu", "dp8", 5, parameters(), 8),
    ],
)
def test_what_stands_between_steps_is_what_arithmetic_says(
    rehearsals: Rehearsals, device: str, layout: str, rank: int, count: int, copies: int
) -> None:
    """Two bytes a weight, four a gradient, twelve a parameter of the optimizer's share; buffers are padded so that
    copies of the model share them evenly, and CUDA's blocks to 512 bytes."""
    [outcome] = rehearsals.each([task("--bf16", layout=layout, rank=rank, packs=2, device=device)])
    standing = outcome.standing
    room = 2 * 64 * copies * 128 if copies > 1 else 1024  # param_and_grad_buffer.py pads by lcm(copies, 128)
    rounded = 60 * 512 * 3 if device == "cuda" else 60 * 4  # each tensor of a moment, and Adam's count of steps
    assert 0 <= standing[WEIGHTS] - 2 * count <= 2 * room + 512
    assert 0 <= standing[GRADIENTS] - 4 * count <= 4 * room
    assert 0 <= standing[OPTIMIZER] - 12 * count // copies <= rounded + 12 * 128


@pytest.mark.parametrize(("layout", "cut"), [("1", 1), ("tp2 sp", 2)])
def test_frozen_weights_have_neither_gradients_nor_optimizer(rehearsals: Rehearsals, layout: str, cut: int) -> None:
    """With LoRA both are the adapters', and the estimate has the same."""
    rank = 4
    flags = ("--bf16", "--lora-rank", rank)
    [outcome] = rehearsals.each([task(*flags, layout=layout, packs=2)])
    rows = 64 + 32 + 32 + 2 * 96 + 64 + 96  # those of B of q, k, v, gate and up; columns of A of o and down
    adapters = LAYERS * rank * (7 * HIDDEN + rows // cut)
    standing, room = outcome.standing, 60 * 512 * 3
    assert 0 <= standing[WEIGHTS] - 2 * (parameters(cut) + adapters) <= 60 * 512
    assert 0 <= standing[GRADIENTS] - 4 * adapters <= room
    assert 0 <= standing[OPTIMIZER] - 12 * adapters <= 14 * LAYERS * 3 * 512 + 60 * 512
    config = options(*flags, layout=layout)
    work = Work.of(example(config.method, 30, 200, 12), 1, 2, True, 1, 1)
    estimated = closed_form(Process(Shape.of(LLAMA, 128), config, work, cut), 0)
    assert estimated[GRADIENTS] == 4 * adapters and estimated[OPTIMIZER] == 12 * adapters
    assert estimated[WEIGHTS] == 2 * (parameters(cut) + adapters)


@pytest.mark.parametrize(("layout", "parts", "cut"), [("1", 1, 1), ("dp2 ep2", 2, 1), ("tp2 sp", 1, 2)])
def test_adapters_of_experts_are_what_arithmetic_says(
    rehearsals: Rehearsals, layout: str, parts: int, cut: int
) -> None:
    rank = 8
    flags = ("--bf16", "--lora-rank", rank, "--lora-modules", "q_proj,gate_proj,up_proj,down_proj")
    [outcome] = rehearsals.each([task(*flags, layout=layout, model=MOE, packs=2)])
    of_experts = LAYERS * rank * 8 // parts * 3 * (HIDDEN + 32 // cut)
    adapters = of_experts + LAYERS * rank * (HIDDEN + 64 // cut)
    assert 0 <= outcome.standing[GRADIENTS] - 4 * adapters <= 4 * 64 * 128
    config = options(*flags, layout=layout)
    work = Work.of(example(config.method, 30, 200, 12), 1, 2, True, 1, 1)
    estimated = closed_form(Process(Shape.of(MOE, 128), config, work, parse_layout(layout).processes), 0)
    assert estimated[GRADIENTS] == 4 * adapters


FIRST_DENSE = SHAPE | dict(hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8)
FIRST_DENSE |= dict(vocab_size=VOCABULARY, max_position_embeddings=4096, pad_token_id=0, first_k_dense_replace=1)
FIRST_DENSE |= dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=2)
MIXED = Glm4MoeConfig(**FIRST_DENSE | dict(head_dim=8, num_key_value_heads=4))
"""A first layer without experts; shared ones, and a router's bias, in the others."""
LATENT = dict(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
LATENTS = DeepseekV3Config(**FIRST_DENSE | LATENT | dict(n_group=1, topk_group=1, num_key_value_heads=8))
"""The same with latents, of which each tensor-parallel rank has the matrices and norms whole."""


@pytest.mark.parametrize(
    ("model", "layout", "rank"),
    [
        *[(MIXED, "1", 0), (MIXED, "pp2", 0), (MIXED, "pp2", 1), (MIXED, "tp2 sp ep2 etp1", 1)],
        *[(LATENTS, "pp2", 1), (LATENTS, "tp2 sp ep2 etp1", 1)],
    ],
)
def test_layers_with_and_without_experts_are_counted(
    rehearsals: Rehearsals, model: PretrainedConfig, layout: str, rank: int
) -> None:
    [outcome] = rehearsals.each([task("--bf16", layout=layout, model=model, rank=rank, packs=2)])
    parallel = options(layout=layout).parallel
    cut, stages, ranks = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    )
    attention = 3 * 64 * 64 // cut + 2 * HIDDEN  # query, keys and values, output; norms
    if model is LATENTS:
        of_heads = 8 * (24 * 16 + 16 * (8 + 8) + 8 * HIDDEN)
        attention = HIDDEN * (24 + 16 + 8) + 24 + 16 + of_heads // cut + 2 * HIDDEN
    mlp, experts = 3 * 64 * 96 // cut, 8 * HIDDEN + 3 * 64 * 2 * 32 // cut + 8 // ranks * 3 * 64 * 32
    with_experts = 3 if stages == 1 else 2 - (rank == 0)
    layers = 4 // stages
    count = layers * attention + (layers - with_experts) * mlp + with_experts * experts
    count += (2 if stages == 1 else 1) * 1024 * HIDDEN // cut + (HIDDEN if rank or stages == 1 else 0)
    biases = with_experts * 8 * 4
    room = 60 * 512
    assert 0 <= outcome.standing[WEIGHTS] - 2 * count - biases <= room
    assert 0 <= outcome.standing[GRADIENTS] - 4 * count <= 2 * room
    config = options("--bf16", layout=layout)
    work = Work.of(example(config.method, 30, 200, 12), 1, 2, True, 1, 1)
    process = Process(Shape.of(model, 128), config, work, parse_layout(layout).processes)
    assert closed_form(process, rank if stages > 1 else 0)[GRADIENTS] == 4 * count


def with_fewer_layers(task: Task) -> Outcome:
    with mock.patch.object(fewer_layers, "MANY", 1):
        return outcome_of(task)


def with_every_chunk(task: Task) -> Outcome:
    with mock.patch.object(fake, "Counter", lambda keys: SimpleNamespace(pop=lambda key, default: 1)):
        return outcome_of(task)


LINEAR = Qwen3_5TextConfig(
    **SHAPE
    | dict(hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    | dict(num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=4096)
    | dict(layer_types=["linear_attention", "full_attention"])
    | dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=20),
)
DEEPER = Glm4MoeConfig(**MIXED.to_dict() | dict(num_hidden_layers=8, n_routed_experts=4))


@pytest.mark.parametrize(
    ("model", "layout", "short_cut"),
    [(DEEPER, "dp4 ep2", with_fewer_layers), (LINEAR, "1", with_every_chunk)],
    ids=["layers", "chunks"],
)
def test_what_repeats_is_rehearsed_once_and_counted(
    rehearsals: Rehearsals, model: PretrainedConfig, layout: str, short_cut: Any
) -> None:
    """Layers of a model of many experts, chunks of a recurrence: bytes, operations and messages are those of all."""
    of_all = task("--bf16", *FULL, layout=layout, model=model, packs=2)
    futures = [rehearsals.run(work, of_all) for work in (outcome_of, short_cut)]
    whole, other = (future.result() for future in futures)
    assert whole.peaks.keys() == other.peaks.keys() and whole.tokens == other.tokens
    assert {kind: pytest.approx(size, rel=5e-3) for kind, size in whole.standing.items()} == other.standing
    for phase, moment in whole.peaks.items():
        # a copy's share of the optimizer begins and ends within a layer
        bound = 2e-2 if phase == "update" else 2e-3
        assert other.peaks[phase].total == pytest.approx(moment.total, rel=bound), phase
    for name, part in vars(whole.work).items():
        theirs = getattr(other.work, name)
        assert theirs.flops() == pytest.approx(part.flops(), rel=1e-9)
        assert theirs.moved == pytest.approx(part.moved, rel=2e-3)
        if name != "update":
            assert theirs.operators == pytest.approx(part.operators, rel=1e-9)
        for kind in ("ep", "dp"):
            assert theirs.traffic(kind).bytes == pytest.approx(part.traffic(kind).bytes, rel=2e-3)


SMALL = ("--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16")


@pytest.mark.parametrize(
    ("flags", "gradient", "device", "host"),
    [
        (SMALL, 4, 6, 0),
        ((*SMALL, "--main-grads-dtype", "bf16"), 2, 6, 0),
        (("--optimizer-cpu-offload",), 4, 0, 12),
        ((*SMALL, "--optimizer-cpu-offload"), 4, 0, 8),
        (("--reference", "resident"), 4, 12, 2),
    ],
)
def test_states_of_optimizers_are_what_arithmetic_says(
    rehearsals: Rehearsals, flags: tuple[str, ...], gradient: int, device: int, host: int
) -> None:
    """Bytes a parameter; on the host besides two pairs of buffers, of a gradient in its dtype and a weight."""
    [outcome] = rehearsals.each([task("--bf16", *flags)])
    count, standing = parameters(), outcome.standing
    assert 0 <= standing[GRADIENTS] - gradient * count <= 4096
    assert 0 <= standing[OPTIMIZER] - device * count <= 60 * 512 * 3
    staging = 2 * PIECE * (gradient + 2) if "--optimizer-cpu-offload" in flags else 0
    wide = 8 * 1024 * HIDDEN if host == 8 else 0  # moments of the largest parameter in float32
    padding = 0 if staging else 4096  # of the weights' buffer
    assert 0 <= outcome.host - staging - host * count <= wide + padding + 128  # and Adam's count of steps
    config = options("--bf16", *flags)
    process = Process(Shape.of(LLAMA, 128), config, Work(0, 0, 0, 0.0, 1), 1)
    assert closed_form(process, 0)[OPTIMIZER] == device * count and on_host(process, 0) == host * count
    assert closed_form(process, 0)[GRADIENTS] == gradient * count
    [header, row] = table([outcome], 1)
    assert ("host" in header.split()) == (host > 0) and (f" {outcome.host / 2**20:.2f} " in row) == (host > 0)


def test_building_holds_the_weights_once(rehearsals: Rehearsals) -> None:
    """Their memory is free before the flat buffers exist: no more is held than between steps."""
    [outcome] = rehearsals.each([task("--bf16", layout="dp64")])
    built, standing = outcome.peaks["build"], outcome.standing
    assert built.held[WEIGHTS] + built.held[GRADIENTS] == standing[WEIGHTS] + standing[GRADIENTS]


def test_recomputation_keeps_the_inputs_of_layers(rehearsals: Rehearsals) -> None:
    kept, checkpoints = rehearsals.each([task(device="cpu"), task(*FULL, device="cpu")])
    # forward ends with the inputs of all layers and the output of the last, in float32
    assert checkpoints.peaks["forward"].held[ACTIVATIONS] >= LAYERS * checkpoints.tokens * HIDDEN * 4
    assert checkpoints.peaks["forward"].held[ACTIVATIONS] < 3 * LAYERS * checkpoints.tokens * HIDDEN * 4
    assert kept.peaks["forward"].held[ACTIVATIONS] > 10 * LAYERS * kept.tokens * HIDDEN * 4


@pytest.mark.parametrize(
    ("layout", "models"), [("tp2 sp", (LLAMA, DEEP)), ("cp2", (LLAMA, DEEP)), ("dp2 ep2", (MOE, DEEP_MOE))]
)
def test_what_layers_keep_is_no_communication(
    rehearsals: Rehearsals, layout: str, models: tuple[PretrainedConfig, PretrainedConfig]
) -> None:
    """More layers keep more of what was sent or received, and need no larger buffers."""
    few, many = (
        outcome.peaks["forward"].held
        for outcome in rehearsals.each([task("--bf16", layout=layout, model=model) for model in models])
    )
    assert many[COMMUNICATION] <= few[COMMUNICATION] and many[WORKING] <= few[WORKING]
    assert many[ACTIVATIONS] > 1.8 * few[ACTIVATIONS]


@pytest.mark.parametrize("layout", ["pp2", "pp2 vpp2"])
def test_packs_beyond_those_in_flight_add_no_memory(rehearsals: Rehearsals, layout: str) -> None:
    first = task(*FULL, layout=layout, model=DEEP)
    packs = packs_that_matter(99, first.config.parallel)
    fewer, enough, more = (
        outcome.peaks["backward"].held
        for outcome in rehearsals.each([replace(first, packs=count) for count in (packs // 2, packs, packs + 2)])
    )
    for kind in (ACTIVATIONS, WORKING, COMMUNICATION):
        assert more[kind] == enough[kind]
    assert fewer[ACTIVATIONS] < enough[ACTIVATIONS]


def test_tiles_of_the_mlp_keep_and_hold_less(rehearsals: Rehearsals) -> None:
    """Without recomputation a layer keeps nothing of its MLP; with it the working set of backward holds a tile's."""
    wide = LlamaConfig(**LLAMA.to_dict() | dict(intermediate_size=8 * HIDDEN))
    modes = itertools.product(((), FULL), ((), ("--mlp-tiles", 1), ("--mlp-tiles", "auto")))
    whole, one, tiles, whole_again, one_again, tiles_again = rehearsals.each(
        task("--bf16", *full, *flags, model=wide) for full, flags in modes
    )
    mlp = 3 * whole.tokens * 8 * HIDDEN * 2  # gate, up and their product
    kept = [outcome.peaks["forward"].held[ACTIVATIONS] for outcome in (whole, one, tiles)]
    assert kept[0] - kept[2] >= LAYERS * mlp and kept[1] <= kept[2]  # with one tile the peak is in the last layer
    working = [outcome.peaks["backward"].held[WORKING] for outcome in (whole_again, one_again, tiles_again)]
    count = -(-whole.tokens // HIDDEN)
    assert count > 4 and working[2] < working[0] / 3
    assert working[1] - working[2] >= 2 * mlp * (1 - 1 / count)  # their gradients too


def widest(job: Task) -> list[tuple[str, tuple[int, ...]]]:
    """Tensors in float32 that a step makes of all tokens, at least as wide as the model."""
    from megatron_solopo.planning.memory import Ledger

    made: list[tuple[str, tuple[int, ...]]] = []
    see = Ledger._see

    def seeing(ledger: Ledger, tensor: torch.Tensor, func: Any) -> None:
        if tensor.dtype == torch.float32:
            made.append((str(func), tuple(tensor.shape)))
        see(ledger, tensor, func)

    with mock.patch.object(Ledger, "_see", seeing):
        tokens = outcome_of(job).tokens
    assert made
    return [one for one in made if tokens in one[1] and math.prod(one[1]) >= tokens * HIDDEN]


@pytest.mark.parametrize("flags", [(), FULL, ("--mlp-tiles", "auto")])
@pytest.mark.parametrize("model", [LLAMA, Qwen3Config(**LLAMA.to_dict() | dict(head_dim=8))])
def test_no_layer_in_bfloat16_makes_a_copy_of_its_states_in_float32(
    rehearsals: Rehearsals, flags: tuple[str, ...], model: PretrainedConfig
) -> None:
    assert rehearsals.run(widest, task("--bf16", *flags, model=model)).result() == []


SHARED = ((), ("--no-share-prompts",))
METHODS = [
    *(
        ("--preference-loss", name, "--context-mode", mode)
        for name, kind in LOSSES.items()
        for mode in kind.context_modes
    ),
    *(("--no-share-prompts", "--context-mode", mode) for mode in ("solo", "short", "long")),
    *(("--alignment-distance", name) for name in ("l2", "huber")),
    ("--alignment-target", "both", "--alignment-stop-short-gradient"),
    ("--alignment-reference", "short"),
    ("--sft-weight", 0.5, "--sft-normalization", "token"),
    ("--label-smoothing", 0.1, "--label-smoothing-form", "robust"),
    ("--objective", "sft"),
    ("--objective", "sft", "--no-share-prompts"),
]
COMMON_LAYOUTS = ("1", "dp2", "tp2 sp", "pp2", "cp2", "tp2 sp cp2 pp2 dp2")
LAYOUTS = [
    *((model, layout) for model in (LLAMA, MOE) for layout in COMMON_LAYOUTS),
    (LLAMA, "tp2"),
    (LLAMA, "tp2 pp2"),
    (DEEP, "pp2 vpp2"),
    (DEEP, "tp2 sp cp2 pp2 vpp2"),
    *((MOE, layout) for layout in ("dp2 ep2", "tp2 sp dp2 ep4 etp1", "cp2 ep2", "pp2 dp2 ep2")),
]
CONTEXT_METHODS = [name for name in choices() if not isinstance(methods()[name], EngineMethod)]
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
STEPS = [
    *(((*flags, "--bf16"), LLAMA, "1") for flags in METHODS),
    *((("--bf16", *flags), *layout) for layout in LAYOUTS for flags in ((), FULL)),
    *(((), model, layout) for model in (LLAMA, MOE) for layout in ("1", "tp2 sp", "pp2")),
    *((("--bf16", "--cp-comm-type", name, *flags), LLAMA, "cp2") for name in CONTEXT_METHODS for flags in SHARED),
    *((("--bf16", *flags), LLAMA, "dp2") for flags in (OVERLAP[:1], OVERLAP)),
    (("--bf16", *OVERLAP), DEEP, "pp2 vpp2 dp2"),
    *((("--bf16", "--mlp-tiles", 3, *flags), LLAMA, layout) for layout in COMMON_LAYOUTS for flags in ((), FULL)),
    (("--mlp-tiles", "auto"), LLAMA, "tp2 sp"),
    *(
        (("--bf16", "--moe-token-dispatcher-type", "allgather", *flags), MOE, layout)
        for layout in ("1", "tp2 sp", "tp2 sp ep2 etp1", "cp2 ep2")
        for flags in ((), FULL)
    ),
    *((("--bf16", "--moe-aux-loss-coeff", 0.1, *flags), MOE, "tp2 sp dp2 ep2") for flags in ((), FULL)),
]
"""Options, model and layout of each rehearsal on CUDA."""


def test_no_step_on_cuda_mixes_devices_or_reads_a_value(rehearsals: Rehearsals) -> None:
    """The last process of each; a fake tensor has no value that could be read."""
    tasks = [
        task(*flags, layout=layout, model=model, rank=-1, packs=2 if "pp" in layout else 1)
        for flags, model, layout in STEPS
    ]
    for outcome in rehearsals.each(tasks):
        assert outcome.peak.total > sum(outcome.standing.values())


@pytest.mark.parametrize(
    ("layout", "model", "flags"), [("tp2 sp cp2 pp2 dp2", LLAMA, FULL), ("tp2 sp dp2 ep2", MOE, ())]
)
def test_the_first_stage_and_the_code_of_the_cpu(
    rehearsals: Rehearsals, layout: str, model: PretrainedConfig, flags: tuple[Any, ...]
) -> None:
    for outcome in rehearsals.each([task("--bf16", *flags, layout=layout, model=model, packs=2, device="cpu")]):
        assert outcome.peak.total > sum(outcome.standing.values())


def mixing(job: Task) -> Outcome:
    """A rehearsal of a product whose loss multiplies by a tensor of the host."""
    from megatron_solopo.training import step

    losses = step.group_losses

    def mixed(*args: Any) -> Any:
        result = losses(*args)
        return replace(result, loss=result.loss * torch.ones(len(result.loss)))

    with mock.patch.object(step, "group_losses", mixed):
        return outcome_of(job)


def test_a_tensor_of_the_host_in_the_loss_is_found(rehearsals: Rehearsals) -> None:
    with pytest.raises(RuntimeError, match="two different devices cuda:0, cpu"):
        rehearsals.run(mixing, task("--bf16")).result()
    assert rehearsals.run(mixing, task("--bf16", device="cpu")).result().peak.total  # where they are the same device


def test_the_largest_pack_of_a_run_is_the_one_rehearsed() -> None:
    config = options("--micro-batch-size", 2, "--global-batch-size", 4, layout="dp2 pp2")
    lengths = [9, 50, 7, 8, 60, 61, 5, 6]
    groups = [example(config.method, 3, length, 2) for length in lengths]
    schedule = SimpleNamespace(steps=2, step=lambda number: range(4 * number, 4 * number + 4))
    inputs: Any = SimpleNamespace(data=SimpleNamespace(train=SimpleNamespace(groups=groups)), schedule=schedule)
    inputs.hf_config = LLAMA
    pack, packs = largest_pack(config, inputs, 4, "cpu")
    longest = sorted(len(prompt.ids) for group in pack for prompt in group.prompts)
    assert 61 in longest and longest[0] == 3 and packs == 1
    assert packs_that_matter(9, config.parallel) == 2  # each stage holds as many packs as there are stages


def leaking(job: Task) -> Outcome:
    """A rehearsal of a product that computes the logits of all tokens at once, and keeps them."""
    from megatron_solopo.model import forward

    kept: list[Any] = []
    head = forward.response_log_probs

    def leak(states: Any, weight: Any, *rest: Any) -> Any:
        kept.append(states.detach() @ weight.detach().t())
        return head(states, weight, *rest)

    forward.response_log_probs = leak
    try:
        return outcome_of(job)
    finally:
        forward.response_log_probs = head


def test_a_tensor_of_all_logits_is_noticed(rehearsals: Rehearsals) -> None:
    """The head holds logits of a chunk alone; where all of them are kept, each byte is in the peaks behind that."""
    config = options("--bf16", "--logprob-chunk-size", 4)
    job = Task(config, LLAMA, [example(config.method, 30, 200, 120)])
    [clean] = rehearsals.each([job])
    leaked = rehearsals.run(leaking, job).result()
    logits = 3 * 120 * 1024 * 2
    assert clean.peaks["forward"].held[LOG_PROBS] < logits / 4
    for phase in ("backward", "update"):
        assert leaked.peaks[phase].total - clean.peaks[phase].total == logits, phase


def test_what_cannot_be_rehearsed_is_calculated() -> None:
    """A 7B model with FP8: every matrix of a layer, a byte as it is and a byte transposed."""
    matrices = 3584 * (3584 + 2 * 512 + 3584) + 3 * 3584 * 18944
    shape = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)
    heads = dict(num_attention_heads=28, num_key_value_heads=4, vocab_size=152064)
    engine = ("--bf16", "--transformer-impl", "transformer_engine", "--fp8-format", "hybrid")
    anew = ("--disable-parameter-transpose-cache",)
    for flags, layout, layers in (
        ((), "1", 28),
        ((), "tp2 sp", 14),
        (anew, "1", 28),
        ((*anew, *FULL), "1", 1),
        ((*anew, *FULL, "--recompute-method", "block", "--recompute-num-layers", 8), "1", 21),
    ):
        config = options(*engine, *flags, layout=layout)
        assert "--transformer-impl transformer_engine" in str(not_rehearsed(config))
        [line] = calculated(config, LlamaConfig(**shape, **heads), parse_layout(layout).processes)
        assert line.endswith(f"FP8 copies of weights {2 * layers * matrices / 2**30:.2f}"), (flags, layout)
    flex = options("--bf16", "--moe-token-dispatcher-type", "flex", layout="dp2 ep2")
    assert "--moe-token-dispatcher-type flex" in str(not_rehearsed(flex)) and not_rehearsed(options()) is None


def test_a_failed_rehearsal_is_a_line_of_the_dry_run() -> None:
    without_groups = Task(Config(), LLAMA, [])
    assert "not known: the rehearsal failed (" in outcomes_of([without_groups])
