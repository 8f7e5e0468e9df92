"""Long-PO against TRL's DPOTrainer at equal recomputation: pairs a second of whole training steps.

Both sides train DPO on a long prompt with a chosen and a rejected response, with precomputed reference log-probs
(whose time is not counted), bfloat16 weights, torch's fused AdamW, one pair a forward pass and the same pairs a step.
TRL keeps no float32 copy of the weights and sums gradients in bfloat16.
"""

from __future__ import annotations

import gc
import json
import time
from typing import Any

import torch

from gpu import steps
from gpu.machine import start_platform
from gpu.models import QWEN_1_5B, TINY, hf_config_of
from gpu.record import Recorder, memory, reset_memory, synchronize
from gpu.speed import lengths_of
from gpu.steps import flags_of_recompute
from megatron_solopo.benchmark.trl import ATTENTION, VERSION, arguments, clock_of, trainer_of

SHARED_BOUND, SEPARATE_BOUND = 1.7, 1.0
"""Pairs a second over TRL's, prompts shared and separate."""

WARM = 2


def trl(out: Recorder) -> None:
    """Pairs a second of both sides, without recomputation and with it."""
    out.need_package("trl", f"trl=={VERSION}")
    import trl as package

    shape, lengths, pairs, repeats = (TINY, lengths_of(out), 2, 1) if out.dry else (QWEN_1_5B, lengths_of(out), 4, 3)
    out.value("version", package.__version__)
    platform = start_platform(out)
    for recompute in (False, True):
        name = f"recompute_{'full' if recompute else 'none'}"
        ours: dict[str, float] = {}
        for layout, flags in (("shared", ()), ("separate", ("--no-share-prompts",))):
            key = f"{name}/{layout}"
            with out.part(key):
                flags = (*steps.LONG_DPO, *flags_of_recompute(recompute), *flags)
                config = steps.options(out, key, shape, lengths, pairs, *flags)
                with steps.training(out, platform, config, steps.generated(config, shape, lengths, pairs)) as run:
                    ours[layout] = pairs / run.measure(key, WARM, repeats)
                    first = run.lines[0]["po_loss"]
                out.value(f"{key}/pairs_per_second", ours[layout])
                out.value(f"{key}/first_loss", first)
        for liger in (False, True):
            key = f"{name}/trl{'_liger' if liger else ''}"
            with out.part(key):
                if liger:
                    out.need_cuda()
                    out.need_package("liger_kernel", "liger-kernel==0.8.5")
                theirs, loss = measured(out, key, shape, lengths, recompute, liger, pairs, repeats)
                out.value(f"{key}/pairs_per_second", theirs)
                out.value(f"{key}/first_loss", loss)
                for layout, bound in (("shared", SHARED_BOUND), ("separate", SEPARATE_BOUND)):
                    if layout in ours:
                        out.target(f"{key}/{layout}_over_trl", ours[layout] / theirs, bound)


def measured(
    out: Recorder,
    key: str,
    shape: dict[str, Any],
    lengths: tuple[int, int, int],
    recompute: bool,
    liger: bool,
    pairs: int,
    repeats: int,
) -> tuple[float, float]:
    """Pairs a second of TRL's trainer, and the loss of its first step."""
    begun, times = [0.0], list[float]()

    def begin(done: int) -> None:
        synchronize(out.device)
        if done == WARM:
            reset_memory(out)
        begun[0] = time.perf_counter()

    def end() -> None:
        synchronize(out.device)
        times.append(time.perf_counter() - begun[0])

    gc.collect()
    reset_memory(out)
    flags = arguments(
        out.work / "trl", pairs, WARM + repeats, recompute, bf16=True, use_liger_kernel=liger, use_cpu=out.dry
    )
    out.value(f"{key}/options", json.dumps(flags | {"dtype": "bfloat16", "attn_implementation": ATTENTION}))
    dataset, tokenizer = text_pairs(out, lengths, pairs)
    clock = clock_of(begin, end)
    trainer = trainer_of(hf_config_of(shape), dataset, tokenizer, flags, torch.bfloat16, out.device, [clock])
    (batch,) = {len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in trainer.train_dataset}
    out.value(f"{key}/tokens_of_a_sequence", batch)
    trainer.train()
    memory(out, key)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    trainer.model = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    times = sorted(times[WARM:])
    return pairs / times[len(times) // 2], losses[0]


def text_pairs(out: Recorder, lengths: tuple[int, int, int], pairs: int) -> tuple[list[dict[str, str]], Any]:
    """Rows whose long prompt and responses have these tokens, the one that TRL ends a response with included; and
    their tokenizer, of words."""
    import random

    from tiny_models import WORDS, write_model
    from transformers import AutoTokenizer

    draw = random.Random(0)
    _, long, response = lengths

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    rows = [
        {"prompt": words(long), **{side: " " + words(response - 1) for side in ("chosen", "rejected")}}
        for _ in range(pairs)
    ]
    tokenizer = AutoTokenizer.from_pretrained(write_model(out.work / "tokenizer"))
    return rows, tokenizer
