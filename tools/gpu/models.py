"""Steps of models of real size with random weights: time, share of the peak, memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import Qwen2Config

from gpu.record import Recorder, memory, milliseconds, reset_memory
from megatron_solopo.benchmark.flops import FLOPS_COUNTED, flops_of_packs
from megatron_solopo.config import Config

TINY = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, tie_word_embeddings=True,
)  # fmt: skip
QWEN_1_5B = dict(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
QWEN_3B = dict(
    hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
QWEN_7B = dict(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip
"""Shapes of Qwen2.5-1.5B, 3B and 7B."""

RESPONSE = 256
DENSE_PEAK = {"h100": 989e12, "h200": 989e12}
"""bfloat16 operations a second by NVIDIA's data sheets, without sparsity."""

MFU = f"operations a second over the peak, {DENSE_PEAK['h200'] / 1e12:.0f} TFLOP/s of dense bfloat16; {FLOPS_COUNTED}"
"""The formula of MFU."""


def hf_config_of(shape: dict[str, Any]) -> Qwen2Config:
    return Qwen2Config(**shape, max_position_embeddings=2**20)


def build(
    out: Recorder, platform: Any, shape: dict[str, Any], dtype: torch.dtype, recompute: bool, **model: Any
) -> tuple[Any, Config]:
    """Returns (an engine of random weights, its configuration); creates the process groups if there are none."""
    from megatron.core import parallel_state

    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.engine import build_engine, initialize_parallel

    folder = out.work / "model"
    folder.mkdir(exist_ok=True)
    hf_config_of(shape).save_pretrained(folder)
    config = Config()
    config.model.hf_path, config.model.random_init, config.model.bf16 = str(folder), True, dtype == torch.bfloat16
    for name, value in model.items():
        setattr(config.model, name, value)
    if recompute:
        config.model.recompute_granularity = "full"
    config.method = replace(config.method, preference_loss="simpo", beta=2.0, alignment_weight=1.0)
    config.parallel.device = out.device
    if not parallel_state.model_parallel_is_initialized():
        initialize_parallel(config)
    return build_engine(platform, read_hf_config(folder), config, dtype), config


def packs_of(
    engine: Any, config: Config, short: int, long: int, response: int = RESPONSE, groups: int = 1
) -> list[Any]:
    """Returns packs of `groups_of`, as a training step makes them."""
    from megatron_solopo.data.tokenized.tokens import TokenDataset
    from megatron_solopo.training.step_work import make_packs

    token_groups = groups_of(config.method, engine.hf_config.vocab_size, short, long, response, groups)
    return make_packs(engine, TokenDataset(token_groups, [], ""), range(groups), config)


def groups_of(method: Any, vocabulary: int, short: int, long: int, response: int, groups: int) -> list[Any]:
    """Returns groups of random token ids with what a method scores: for SoLoPO a short prompt with two responses and a
    long one with the chosen one; the lengths are tokens of the prompts and of each response."""
    from megatron_solopo.planning.rehearse import example

    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, vocabulary, (count,), generator=draw).tolist()

    model = example(method, short, long, response)
    responses = [
        {side: ids(response) for side in sorted({done.side for _, done in model.segments()})} for _ in range(groups)
    ]
    return [
        replace(
            model,
            id=str(number),
            prompts=tuple(
                replace(
                    prompt,
                    ids=ids(len(prompt.ids)),
                    completions=tuple(replace(done, ids=of_side[done.side]) for done in prompt.completions),
                )
                for prompt in model.prompts
            ),
        )
        for number, of_side in enumerate(responses)
    ]


def step_of(engine: Any, config: Config, packs: list[Any], optimizer: Any = None) -> Callable[[], float]:
    """Returns a call of one training step: the loss."""
    from megatron_solopo.training.step import run_step

    def step() -> float:
        engine.zero_gradients()
        sums = run_step(engine, packs, sum(len(pack.groups) for pack in packs), config.method, None)
        if optimizer is not None:
            optimizer.step()
        return sums.means()["loss"]

    return step


def measure(
    out: Recorder, key: str, engine: Any, config: Config, packs: list[Any], optimizer: Any, repeats: int
) -> float:
    """Time, share of the peak and memory of a step; returns its seconds."""
    reset_memory(out)
    engine.train()
    step = step_of(engine, config, packs, optimizer)
    took = milliseconds(step, out.device, repeats, 2 if repeats > 2 else 1) / 1000
    report(out, key, engine, packs, took)
    memory(out, key)
    return took


def report(out: Recorder, key: str, engine: Any, packs: list[Any], seconds: float) -> None:
    """A step's time and what follows from it."""
    tokens = sum(pack.tokens for pack in packs)
    operations = flops_of_packs(engine.hf_config, [pack.pack for pack in packs]).total
    out.value(f"{key}/step", seconds, "s")
    out.value(f"{key}/tokens", tokens)
    out.value(f"{key}/tokens_per_second", tokens / seconds)
    out.value(f"{key}/rate", operations / seconds / 1e12, "TFLOP/s")
    peak = dense_peak(out)
    if peak:
        out.value(f"{key}/mfu", mfu(engine, packs, seconds, peak))


def mfu(engine: Any, packs: list[Any], seconds: float, peak: float) -> float:
    """Returns the share of the peak that a step's operations reach; see `MFU`."""
    return flops_of_packs(engine.hf_config, [pack.pack for pack in packs]).total / seconds / peak


def dense_peak(out: Recorder) -> float | None:
    """Returns the operations a second of this GPU, if known; in the dry run those of an H200."""
    return DENSE_PEAK["h200"] if out.dry else next((p for name, p in DENSE_PEAK.items() if name in _gpu()), None)


def _gpu() -> str:
    return torch.cuda.get_device_name(0).lower()


def case(
    out: Recorder,
    platform: Any,
    key: str,
    shape: dict[str, Any],
    recompute: bool,
    lengths: tuple[int, int, int],
    repeats: int,
    optimize: bool,
    **model: Any,
) -> tuple[weakref.ref, float]:
    """Builds a model, measures its step and lets it go; ``lengths`` are those of `packs_of`. Returns what is gone with
    the model, and the seconds."""
    from megatron_solopo.training.engine import build_optimizer

    reset_memory(out)
    engine, config = build(out, platform, shape, torch.bfloat16, recompute, **model)
    optimizer = None
    if optimize:
        optimizer, scheduler = build_optimizer(engine, config.training, 100)
        scheduler.step(1)
        inner = optimizer.chained_optimizers[0].optimizer
        fused = " fused" if inner.param_groups[0].get("fused") else ""
        out.value(f"{key}/adam", f"{type(inner).__module__}.{type(inner).__name__}{fused}")
    took = measure(out, key, engine, config, packs_of(engine, config, *lengths), optimizer, repeats)
    engine.close()
    return weakref.ref(engine.models[0]), took


def alone(out: Recorder, key: str, *arguments: Any, **more: Any) -> float | None:
    """A case whose failure leaves the others theirs; its memory is free afterwards. Returns the seconds of a step."""
    took = None
    with out.part(key):
        model, took = case(out, arguments[0], key, *arguments[1:], **more)
        gc.collect()  # models and optimizers refer to themselves
        out.require(f"{key}/is_freed", model() is None)
    gc.collect()
    return took


def model_1_5b(out: Recorder) -> None:
    """A 1.5B model at 1K / 8K with its optimizer, with full recompute and without."""
    from gpu.machine import start_platform

    out.value("mfu_is", MFU)
    platform = start_platform(out)
    shape, lengths = (TINY, (64, 512, 16)) if out.dry else (QWEN_1_5B, (1024, 8192, RESPONSE))
    for recompute in (True, False):
        alone(out, f"recompute_{'full' if recompute else 'none'}", platform, shape, recompute, lengths, 5, True)


def model_7b(out: Recorder) -> None:
    """Memory of forward and backward without an optimizer, against which a memory plan is checked."""
    from gpu.machine import start_platform

    out.value("mfu_is", MFU)
    platform = start_platform(out)
    full, four = (TINY, TINY) if out.dry else (QWEN_7B, QWEN_7B | {"num_hidden_layers": 4})
    for key, shape, recompute, long, repeats in (
        ("8k/recompute_full", full, True, 8192, 3),
        ("8k/recompute_none", full, False, 8192, 3),
        ("four_layers/32k/recompute_full", four, True, 32768, 2),
        ("four_layers/128k/recompute_full", four, True, 131072 - RESPONSE, 2),
    ):
        lengths = (64, long // 64, 16) if out.dry else (1024, long, RESPONSE)
        alone(out, key, platform, shape, recompute, lengths, repeats, False)
