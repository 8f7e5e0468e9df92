"""Transformer Engine: that it works, which kernels it selects, whether it agrees with the portable implementation."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

from gpu.checks import exact_attention
from gpu.record import Recorder, milliseconds

LAYER_BOUNDS = {"bf16": 5e-3, "fp8": 6e-2}
"""bfloat16 keeps 8 bits and FP8 (E4M3) 4, of which rounding loses half a unit."""


def transformer_engine(out: Recorder) -> None:
    out.need_cuda()
    with out.part("layers"):
        layers(out)
    with out.part("back_end"):
        back_end(out)
    from gpu.machine import start_platform

    platform = start_platform(out)
    with out.part("agreement"):
        agreement(out, platform)
    with out.part("fp8_training"):
        fp8_training(out, platform)


def layers(out: Recorder) -> None:
    """Linear in bfloat16 and FP8, and RMSNorm, against float64; their times."""
    import transformer_engine
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Format

    size, rows = 4096, 8192
    torch.manual_seed(0)
    x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
    linear = te.Linear(size, size, bias=False, params_dtype=torch.bfloat16, device="cuda")
    norm = te.RMSNorm(size, params_dtype=torch.bfloat16, device="cuda")
    out.value("version", transformer_engine.__version__)
    with torch.no_grad():
        exact = x.double() @ linear.weight.double().t()

        def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
            return ((actual.double() - expected).norm() / expected.norm()).item()

        normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.eps)
        out.check("layers/rmsnorm_error", error(norm(x), normed), LAYER_BOUNDS["bf16"])
        out.check("layers/bf16_error", error(linear(x), exact), LAYER_BOUNDS["bf16"])
        plain = milliseconds(lambda: linear(x), "cuda", 20)
        out.value("layers/bf16_time", plain, "ms")
        recipe = DelayedScaling(fp8_format=Format.HYBRID)

        def fp8() -> torch.Tensor:
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                return linear(x)

        fp8()  # the first call measures the scales
        out.check("layers/fp8_error", error(fp8(), exact), LAYER_BOUNDS["fp8"])
        took = milliseconds(fp8, "cuda", 20)
        out.value("layers/fp8_time", took, "ms")
        out.value("layers/fp8_over_bf16_time", took / plain)


def back_end(out: Recorder) -> None:
    """The attention back end for packs with shared prompts, from Transformer Engine's debug log."""
    utils = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    from transformer_engine.pytorch import DotProductAttention

    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    before, utils.AttentionLogging._log_level = utils.AttentionLogging._log_level, logging.DEBUG
    logger = logging.getLogger("DotProductAttention")
    logger.addHandler(Keep())
    logger.setLevel(logging.DEBUG)
    heads, kv_heads, size = 28, 4, 128
    queries, seen = [1024, 256, 8192, 255], [1024, 1280, 8192, 8447]
    attention = DotProductAttention(
        heads, size, num_gqa_groups=kv_heads, attention_dropout=0.0, qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
    )  # fmt: skip
    ends = [torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32, device="cuda") for x in (queries, seen)]
    q = torch.randn(sum(queries), heads, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(sum(seen), kv_heads, size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv"
    )

    def both() -> torch.Tensor:
        result = attention(
            q, k, v, cu_seqlens_q=ends[0], cu_seqlens_kv=ends[1], max_seqlen_q=max(queries), max_seqlen_kv=max(seen)
        )
        result.float().square().mean().backward()
        return result.detach()

    result = both().view(-1, heads, size)
    selected = [line for line in lines if "Selected backend" in line]
    out.value("back_end/selected", selected[-1] if selected else "not logged")
    utils.AttentionLogging._log_level = before
    logger.setLevel(logging.WARNING)
    with torch.no_grad():
        for number, (length, of) in enumerate(zip(queries, seen, strict=True)):
            rows = slice(int(ends[0][number + 1]) - min(64, length), int(ends[0][number + 1]))
            keys = slice(int(ends[1][number]), int(ends[1][number]) + of)
            expected = exact_attention(q[rows].double(), k[keys].double(), v[keys].double())
            error = ((result[rows].double() - expected).norm() / expected.norm()).item()
            out.check(f"back_end/error_{number}", error, 1e-2)
    out.value("back_end/forward_and_backward", milliseconds(both, "cuda"), "ms")


def agreement(out: Recorder, platform: Any) -> None:
    """As far from float32 as the portable bfloat16, with each layout; FP8 by recipe. The measures are tests/gpu's."""
    import test_te_cuda as theirs
    from tiny_models import write_model
    from transformers import AutoModelForCausalLM

    from megatron_solopo import environment
    from megatron_solopo.config import FP8_MULTIPLES
    from megatron_solopo.training.engine import initialize_parallel

    initialize_parallel(theirs.Config())
    refusals = environment.fp8_refusals()
    for name, hf_config in theirs.MODELS.items():
        folder = write_model(out.work / name, hf_config, noise=0.02)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
        for share in (True, False):
            key = f"{name}/{'shared' if share else 'separate'}"
            with out.part(key):
                exact = theirs.measure(platform, theirs.config_of(folder, "float32", share))
                portable, engine = (
                    theirs.distances(theirs.measure(platform, theirs.config_of(folder, kind, share)), exact)
                    for kind in ("portable", "bfloat16")
                )
                for measure, value in engine.items():
                    out.value(f"{key}/{measure}_portable", portable[measure])
                    out.check(f"{key}/{measure}", value, 2 * portable[measure] + 1e-3)
        for recipe in FP8_MULTIPLES:
            with out.part(f"{name}/{recipe}"):
                if refusals[recipe]:
                    out.value(f"{name}/{recipe}", f"not on this GPU: {refusals[recipe]}")
                    continue
                exact = theirs.measure(platform, theirs.config_of(folder, "float32"))
                for measure, value in theirs.distances(
                    theirs.measure(platform, theirs.config_of(folder, recipe)), exact
                ).items():
                    out.value(f"{name}/{recipe}/{measure}", value)


def fp8_training(out: Recorder, platform: Any) -> None:
    """Twenty steps of the whole trainer in bfloat16 and with each FP8 recipe: the loss falls as it does portably."""
    import test_te_cuda as theirs
    from tiny_models import preference_groups, write_lines, write_model
    from transformers import LlamaConfig

    from gpu.training import learns, train_lines
    from megatron_solopo import config_load, environment
    from megatron_solopo.config import FP8_MULTIPLES
    from megatron_solopo.parallel.platform import end_model_parallel
    from megatron_solopo.training.trainer import train

    folder = write_model(out.work / "fp8", LlamaConfig(**theirs.SHAPE), noise=0.02)
    data = write_lines(out.work / "groups.jsonl", preference_groups(64))
    refusals = environment.fp8_refusals()
    for kind in ("portable", "bfloat16", *(recipe for recipe in FP8_MULTIPLES if not refusals[recipe])):
        with out.part(f"steps/{kind}"):
            flags = [] if kind == "portable" else ["--transformer-impl", "transformer_engine"]
            flags += ["--fp8-format", "hybrid", "--fp8-recipe", kind] if kind in FP8_MULTIPLES else []
            save = out.work / f"steps-{kind}"
            argv = [
                "--hf-path", folder, "--train-data", data, "--preference-loss", "orpo", "--bf16", "--seq-length", 128,
                "--global-batch-size", 16, "--micro-batch-size", 8, "--lr", 1e-3, "--device", "cuda",
                "--save", save, "--train-iters", 20, *flags,
            ]  # fmt: skip
            end_model_parallel()
            train(platform, config_load.load(list(map(str, argv)))[0])
            learns(out, f"steps/{kind}", train_lines(save))
