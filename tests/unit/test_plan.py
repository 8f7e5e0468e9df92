"""`solopo plan`: what it searches and refuses, how near its estimates are to rehearsals, and the file it writes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from refusals import refused
from tiny_models import SHAPE
from transformers import DeepseekV2Config, Gemma4TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from megatron_solopo.config import Config
from megatron_solopo.data.tokenized.batches import plan_step
from megatron_solopo.parallel.layouts import parse_layout
from megatron_solopo.parallel.topology import data_parallel_size
from megatron_solopo.planning.candidate import Candidate, Request, layout_name
from megatron_solopo.planning.choices import MARGIN, WORTH, Choices, ladders, optimizers, with_options
from megatron_solopo.planning.cost import operators, seconds_of_step
from megatron_solopo.planning.estimate import activations_on_host
from megatron_solopo.planning.machines import load_machine
from megatron_solopo.planning.memory import Moment
from megatron_solopo.planning.plan import main, nothing_fits, read_options, request_of
from megatron_solopo.planning.plan_file import write_plan
from megatron_solopo.planning.process import Process
from megatron_solopo.planning.search import Plan, SearchResult, packs_of_step, plan, rehearsed, search
from megatron_solopo.planning.workers import Rehearsals

WIDE = SHAPE | dict(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, vocab_size=8000
)
WIDE |= dict(num_key_value_heads=4, max_position_embeddings=65536)
DENSE = Qwen2Config(**WIDE, tie_word_embeddings=False)
EXPERTS: dict[str, Any] = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512, norm_topk_prob=True)
MOE = Qwen3MoeConfig(**WIDE | dict(num_hidden_layers=2), head_dim=64, **EXPERTS, tie_word_embeddings=False)
LATENT: dict[str, Any] = dict(q_lora_rank=None, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32)
LATENT |= dict(v_head_dim=64, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=512, n_shared_experts=1)
LATENTS = DeepseekV2Config(**WIDE | dict(num_hidden_layers=2, num_key_value_heads=16), **LATENT)
# One of three layers has heads of 512, on the memory-efficient kernel.
WIDE_HEADS = Gemma4TextConfig(
    **WIDE | dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2),
    sliding_window=1024,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    hidden_size_per_layer_input=0,
    attention_k_eq_v=True,
    num_global_key_value_heads=2,
    final_logit_softcapping=30.0,
)
SMALL = LlamaConfig(**SHAPE | dict(num_hidden_layers=4, max_position_embeddings=4096))


def folder(path: Path, model: PretrainedConfig) -> Path:
    model.save_pretrained(path)
    return path


def request(path: Path, model: PretrainedConfig, gpus: int, memory: float, *flags: str, long: int = 16000) -> Request:
    words = ["--model", str(folder(path, model)), "--gpus", str(gpus), "--gpu-memory", str(memory), "--reserve", "0"]
    arguments, config = read_options([*words, "--long-tokens", str(long), *flags])
    return request_of(arguments, config, load_machine(arguments.machine))


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[Rehearsals]:
    with Rehearsals(1) as rehearsals:
        yield rehearsals


FULL, BLOCK, TILES = "--recompute-granularity=full", "--recompute-method=block", "--mlp-tiles=auto"
KEEP, OFFLOAD, SELECTIVE = "--recompute-keep=core_attn", "--activation-offload", "--recompute-granularity=selective"
ROUNDED = ("--use-precision-aware-optimizer", "--exp-avg-dtype=bf16", "--exp-avg-sq-dtype=bf16")
ESTIMATED = [
    (DENSE, "tp2 sp cp2 dp2", ()),
    (DENSE, "tp4", (FULL,)),
    (DENSE, "pp2 vpp2 dp2", (FULL,)),
    (DENSE, "tp2 sp pp4", (FULL, BLOCK)),
    (DENSE, "cp8", (FULL, "--no-share-prompts")),
    (DENSE, "tp2 sp cp2 dp2", (FULL, KEEP)),
    (DENSE, "tp2 sp dp2", (FULL, KEEP, OFFLOAD)),
    (DENSE, "pp2 vpp2 dp2", (FULL, OFFLOAD)),
    (DENSE, "tp4", (SELECTIVE, "--recompute-modules=mlp")),
    (DENSE, "tp2 sp cp2 dp2", (SELECTIVE, "--recompute-modules=mlp_act")),
    (MOE, "tp2 sp dp4 ep4", (SELECTIVE, "--recompute-modules=moe,core_attn")),
    (DENSE, "tp2 sp cp2 dp2", (TILES,)),
    (DENSE, "tp4", (FULL, TILES)),
    (MOE, "dp8 ep8", ()),
    (MOE, "tp2 sp dp4 ep4", (FULL,)),
    (WIDE_HEADS, "tp2 sp dp2", ()),
    (WIDE_HEADS, "tp2 sp dp2", (FULL, KEEP)),
    (LATENTS, "dp8 ep8", ()),
    (LATENTS, "cp4 dp2 ep8", ()),  # what attention gathers is wider than experts
    (MOE, "tp2 sp cp2 dp2 ep4 etp1", (FULL,)),
    (DENSE, "tp2 sp cp2 dp2", ("--reference=resident",)),
    (DENSE, "tp4", (FULL, TILES, *ROUNDED)),
    (DENSE, "dp2", (FULL, TILES, "--optimizer-cpu-offload")),
]


def candidate(tmp_path: Path, model: PretrainedConfig, layout: str, flags: tuple[str, ...], **more: Any) -> Any:
    """The request and the only candidate of a layout."""
    options = parse_layout(layout)
    parts = dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, context_parallel_size=1)
    parts |= dict(num_virtual_stages_per_pipeline_rank=1, expert_model_parallel_size=1) | options.options
    parts.setdefault("expert_tensor_parallel_size", parts["tensor_model_parallel_size"])
    if parts["pipeline_model_parallel_size"] == 1:
        del parts["num_virtual_stages_per_pipeline_rank"]
    if not getattr(model, "num_experts", None):
        parts = {name: size for name, size in parts.items() if "expert" not in name}
    parts.pop("sequence_parallel", None)
    words = [f"--{name.replace('_', '-')}={size}" for name, size in parts.items()]
    asked = request(tmp_path, model, options.processes, 1000, *words, *flags, "--micro-batch-size=1", **more)
    if options.options.get("tensor_model_parallel_size", 1) > 1 and "sp" not in layout.split():
        asked.config.explicit.add("sequence_parallel")
    [one] = search(asked).fitting
    return asked, one


@pytest.mark.parametrize(("model", "layout", "flags"), ESTIMATED, ids=lambda value: str(value)[:30])
def test_the_estimate_is_near_the_rehearsal(
    rehearsals: Rehearsals, tmp_path: Path, model: PretrainedConfig, layout: str, flags: tuple[str, ...]
) -> None:
    asked, one = candidate(tmp_path, model, layout, flags)
    assert (
        layout_name(one.config.parallel, data_parallel_size(one.config.parallel, asked.gpus)).split() == layout.split()
    )
    rehearsed(asked, [one], rehearsals)
    assert abs(one.error) < 0.08, (one.estimated, one.peak)
    for stage, outcome in zip(one.process.key_stages, one.outcomes, strict=True):
        on_host = activations_on_host(one.process, stage)
        assert (on_host > 0) == (OFFLOAD in flags)
        if on_host:  # in blocks of 16 MiB, which these tensors fill by half or more
            assert on_host <= outcome.host <= 2 * on_host + 2**24
    work = one.outcomes[-1].work
    started = work.score.operators + work.forward.operators + work.backward.operators
    assert operators(one.process, one.process.stages - 1) == pytest.approx(started, rel=0.2)


def test_a_step_takes_as_long_as_the_host_needs_to_start_it(tmp_path: Path) -> None:
    """Short packs of many small experts, whose operators take the host longer than the GPU."""
    model = Qwen3MoeConfig(**WIDE, head_dim=64, **EXPERTS | dict(num_experts=64), tie_word_embeddings=False)
    best = cheapest(request(tmp_path, model, 8, 80, "--micro-batch-size=1", long=1000))
    started = operators(best.process, best.process.stages - 1)
    assert best.seconds > best.packs * started * load_machine("h100").launch_us[0] / 1e6


def test_training_refuses_what_the_search_leaves_out(tmp_path: Path) -> None:
    searched = search(request(tmp_path, SMALL, 8, 80, "--global-batch-size=16", long=1000))
    tensor = {one.config.parallel.tensor_model_parallel_size for one in searched.fitting}
    assert tensor == {1, 2}  # two key heads
    refused_for = "\n".join(searched.refused)
    assert "--tensor-model-parallel-size 4: does not divide the model's num_key_value_heads 2" in refused_for
    assert "--cp-comm-type p2p" in refused_for and "--cp-comm-type a2a" in refused_for
    assert {one.config.parallel.pipeline_model_parallel_size for one in searched.fitting} == {1, 2, 4}
    assert any(one.config.parallel.num_virtual_stages_per_pipeline_rank == 2 for one in searched.fitting)
    assert all(one.config.parallel.sequence_parallel == (one.process.tensor > 1) for one in searched.fitting)
    assert searched.layouts == sum(searched.refused.values()) + len(
        {id(one.config.parallel) for one in searched.fitting}
    )
    wide = search(request(tmp_path, WIDE_HEADS, 2, 80, long=1000))
    assert {one.config.parallel.context_parallel_size for one in wide.fitting} == {1}
    assert any("head_dim 512: " in message for message in wide.refused)


def test_an_option_that_is_set_is_not_varied(tmp_path: Path) -> None:
    flags = ("--pipeline-model-parallel-size=2", "--micro-batch-size=4", "--recompute-granularity=full")
    searched = search(request(tmp_path, SMALL, 8, 80, *flags, long=1000))
    assert searched.fitting
    for one in searched.fitting:
        parallel, model = one.config.parallel, one.config.model
        assert (parallel.pipeline_model_parallel_size, one.groups, model.recompute_granularity) == (2, 4, "full")


def test_stages_that_cannot_be_alike_have_fewer_layers_at_both_ends(tmp_path: Path) -> None:
    model = LlamaConfig(**SHAPE | dict(num_hidden_layers=14, max_position_embeddings=4096))
    searched = search(request(tmp_path, model, 4, 80, "--pipeline-model-parallel-size=4", long=1000))
    assert {tuple(one.process.sizes) for one in searched.fitting} == {(3, 4, 4, 3)}
    assert {tuple(one.process.key_stages) for one in searched.fitting} == {(0, 1, 3)}  # the second is the slowest


def every_choice(asked: Request, one: Candidate) -> list[Candidate]:
    """Each combination of options that the planner may try with a layout."""
    choices, candidates = Choices(asked), list[Candidate]()
    layout = replace(asked.config, parallel=one.config.parallel)
    ways = [way for ladder in ladders(asked, layout, choices.shape) for way in ladder if choices.accepts(layout, way)]
    for way, states in itertools.product(ways, optimizers(asked)):
        config = with_options(layout, way | states)
        process = Process(choices.shape, config, one.process.work, asked.gpus)
        candidates.append(Candidate(config, one.groups, process, seconds_of_step(process, asked.machine)))
    return candidates


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_no_more_is_done_than_memory_asks_for(tmp_path: Path, model: PretrainedConfig) -> None:
    """As memory falls, a step takes longer; no combination of options that fits is more than a little cheaper."""
    one_pack = "--micro-batch-size=1"
    [plain] = search(request(tmp_path, model, 1, 1000, one_pack)).fitting
    assert plain.name == "1, micro-batch 1, recompute none"
    every = every_choice(request(tmp_path, model, 1, 1000, one_pack), plain)
    most, least = plain.estimated.total, min(one.estimated.total for one in every)
    assert least < 0.6 * most
    names, before = set[str](), plain.seconds
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.02):
        asked = request(tmp_path, model, 1, 1.03 * (least + share * (most - least)) / 2**30, one_pack)
        [one] = search(asked).fitting
        fitting = [choice.seconds for choice in every if choice.estimated.total * MARGIN <= asked.limit]
        assert WORTH * before <= one.seconds <= min(fitting) / WORTH, one.name
        names.add(one.name)
        before = one.seconds
    assert len(names) > 3, names
    with pytest.raises(ValueError, match="unpack"):
        [one] = search(request(tmp_path, model, 1, 0.99 * least / 2**30, one_pack)).fitting


def test_what_the_device_has_no_room_for_goes_to_the_host_as_far_as_that_has(tmp_path: Path) -> None:
    """On one GPU the states alone do not fit; moments in bfloat16 take less of the host, and a save its part."""
    device = ("--micro-batch-size=1", "--gpus-per-node=1")

    def searched_with(*flags: str) -> tuple[Request, SearchResult]:
        asked = request(tmp_path, DENSE, 1, 0.6, *device, *flags, long=1000)
        return asked, search(asked)

    _, searched = searched_with()
    [one] = searched.fitting
    assert one.config.training.optimizer_cpu_offload and one.config.training.exp_avg_dtype == "fp32"
    assert one.name.endswith("Adam on host")
    gib = one.host / 2**30
    assert gib == pytest.approx(3 + (12 + 2) * 61.2e6 / 2**30, rel=0.02)
    write_plan(tmp_path / "plan.yaml", one.config, [], [])
    assert Config.load(tmp_path / "plan.yaml").training.optimizer_cpu_offload
    _, searched = searched_with(f"--host-memory={gib - 0.1}")
    [one] = searched.fitting
    assert one.name.endswith("Adam on host moments in bf16")
    asked, searched = searched_with(f"--host-memory={gib - 0.3}")
    [one] = searched.others
    assert not searched.fitting and one.estimated.total < asked.limit
    refusal = nothing_fits(asked, Plan(searched, [one], []))
    assert "main memory" in str(refusal) and "--host-memory" in str(refusal)
    _, searched = searched_with("--no-optimizer-cpu-offload")
    assert not searched.fitting


def test_a_machine_without_a_host_keeps_nothing_there(tmp_path: Path) -> None:
    asked = request(tmp_path, DENSE, 1, 0.6, "--micro-batch-size=1", long=1000)
    searched = search(replace(asked, machine=replace(asked.machine, host=None)))
    assert not searched.fitting and "host" not in searched.others[0].name
    machine = replace(load_machine("h100"), host=None)
    for flags in (("--reference=resident",), ("--optimizer-cpu-offload",), (FULL, OFFLOAD)):
        words = ["--model", str(tmp_path), "--gpus", "1", "--long-tokens", "1000", *flags]
        with refused("field-missing", "'host'"):
            request_of(*read_options(words), machine)


def test_a_choice_whose_rehearsal_exceeds_memory_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the error of its estimate."""
    asked = request(tmp_path, DENSE, 1, 1.2, "--micro-batch-size=1", long=4000)
    rounds: list[int] = []

    def rehearse(request: Request, candidates: list[Any], rehearsals: Any) -> None:
        rounds.append(len(candidates))
        for one in candidates:
            peak = Moment({"weights": int(1.06 * one.estimated.total)})
            one.outcomes, one.forecast = [SimpleNamespace(peak=peak, host=0)], SimpleNamespace(seconds=one.seconds)

    monkeypatch.setattr("megatron_solopo.planning.search.rehearsed", rehearse)
    [first] = search(asked).fitting
    assert 1.06 * first.estimated.total > asked.limit
    result = plan(asked, 1, cast(Any, None))
    [one] = result.fitting
    assert rounds == [1, 1] and one.peak.total <= asked.limit and one.seconds > first.seconds


@pytest.mark.parametrize("layout", ["dp2", "pp2 vpp2 dp4", "tp2 sp dp3"])
def test_packs_are_those_of_a_step(tmp_path: Path, layout: str) -> None:
    asked = request(tmp_path, SMALL, 1, 80, "--global-batch-size=25", "--micro-batch-size=4", long=1000)
    asked.config.parallel = parse_layout(layout).applied(asked.config.parallel)
    gpus = parse_layout(layout).processes
    step = plan_step([asked.group] * 25, 32, data_parallel_size(asked.config.parallel, gpus), asked.config, "cuda")
    assert {len(share) for share in step.shares} == {packs_of_step(asked.config, 4, gpus)}


def cheapest(asked: Request) -> Candidate:
    return search(asked).fitting[0]


def test_the_file_is_a_run_of_that_layout_with_a_comment_on_each_line(tmp_path: Path) -> None:
    flags = ("--preference-loss=orpo", "--no-share-prompts", "--lr=1e-5", "--train-iters=7", "--save=runs/x")
    asked = request(tmp_path / "m", SMALL, 8, 80, *flags, "--tensor-model-parallel-size=2", long=1000)
    one = cheapest(asked)
    write_plan(tmp_path / "plan.yaml", one.config, ["solopo", "plan", "--x", "a b"], ["two facts"])
    text = (tmp_path / "plan.yaml").read_text()
    assert text.startswith("# Made by: solopo plan --x 'a b'\n# two facts\n")
    assert all("  # " in line for line in text.splitlines() if line.startswith(" "))
    read = Config.load(tmp_path / "plan.yaml")
    expected = one.config.as_dict()
    expected["parallel"]["device"] = "auto"
    assert read.as_dict() == expected
    assert read.explicit == {name for section in yaml.safe_load(text).values() for name in section}


MODEL = ["--model", "m", "--gpus", "8", "--long-tokens", "1000"]
WRONG = [
    (["--model", "m", "--gpus", "0", "--long-tokens", "9"], "option-value", "--gpus", "at least 1"),
    (["--gpus", "8"], "option-missing", "--model"),
    ([*MODEL, "--machine", "h10"], "file-missing", "--machine h10", "did you mean h100"),
    ([*MODEL, "--gpu-memry", "8"], "option-unknown", "--gpu-memry", "--gpu-memory?"),
    ([*MODEL, "--gpu-memory", "3"], "option-value", "--gpu-memory 3", "--reserve 4"),
    ([*MODEL, "--gpu-memory", "nan"], "option-value", "--gpu-memory nan"),
    ([*MODEL, "--host-memory", "0"], "option-value", "--host-memory 0", "above 0"),
    ([*MODEL, "--response-tokens", "1000"], "option-conflict", "--response-tokens 1000"),
    ([*MODEL, "--seq-length", "999"], "option-conflict", "--seq-length 999", "--long-tokens 1000"),
    (["--model", "m", "--gpus", "8", "--long-tokens", "5000"], "seq-length-beyond-positions", "--long-tokens 5000"),
    ([*MODEL, "--long-tokens=5000"], "option-twice", "--long-tokens"),
    ([*MODEL, "--beta", "0"], "option-value", "--beta 0"),
    ([*MODEL, "--transformer-impl=transformer_engine"], "plan-implementation", "--transformer-impl"),
    ([*MODEL, "--tensor-model-parallel-size=3"], "plan-nothing-fits", "--tensor-model-parallel-size 3"),
]


@pytest.mark.parametrize(("words", "code", "named"), [(words, code, named) for words, code, *named in WRONG])
def test_wrong_inputs(
    words: list[str], code: str, named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "m", SMALL)
    with refused(code, *named):
        main(words)


def test_a_model_without_config(tmp_path: Path) -> None:
    with refused("model-config-missing", f"--model {tmp_path}"):
        main(["--model", str(tmp_path), "--gpus", "1", "--long-tokens", "1000"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with refused("model-type-unsupported", "gpt2"):
        main(["--model", str(tmp_path / "config.json"), "--gpus", "1", "--long-tokens", "1000"])
