"""Speed of whole training steps: 3B parameters, FP8, prompts shared and separate, SoLoPO against long-PO."""

from __future__ import annotations

from typing import Any

from gpu import models, steps
from gpu.machine import start_platform
from gpu.models import MFU, QWEN_1_5B, QWEN_3B, QWEN_7B, RESPONSE, TINY
from gpu.record import Recorder
from gpu.steps import flags_of_recompute

PORTABLE, ENGINE = "portable", "transformer_engine"

INSTALL_ENGINE = '--no-build-isolation "transformer_engine[pytorch]==2.20.2"'

MFU_BOUND, MFU_AIM = 0.45, 0.5
"""Share of 989 TFLOP/s at 8K without recomputation, 3B parameters."""

FP8_BOUND, FP8_AIM = 1.25, 1.4
"""Time of forward and backward in bfloat16 over that in FP8."""


def lengths_of(out: Recorder) -> tuple[int, int, int]:
    """Tokens of the short prompt, the long one and each response."""
    return (32, 256, 16) if out.dry else (1024, 8192, RESPONSE)


def implementation_flags(out: Recorder, implementation: str) -> tuple[str, ...]:
    """Options of an implementation; in the dry run the portable one stands in for Transformer Engine."""
    if implementation == PORTABLE or out.dry:
        return ()
    out.need_package("transformer_engine", INSTALL_ENGINE)
    return ("--transformer-impl", implementation)


def model_3b(out: Recorder) -> None:
    """MFU and memory of 3B parameters, the memory against the planner's."""
    mfu_of(out, PORTABLE, (False, True))


def engine_3b(out: Recorder) -> None:
    """MFU of 3B parameters with Transformer Engine."""
    mfu_of(out, ENGINE, (False,))


def mfu_of(out: Recorder, implementation: str, recomputes: tuple[bool, ...]) -> None:
    out.value("mfu_is", MFU)
    # In the dry run a larger vocabulary, beside which what the profiler's events leave out is small.
    flags, lengths = implementation_flags(out, implementation), lengths_of(out)
    shape = TINY | {"vocab_size": 16384} if out.dry else QWEN_3B
    platform = start_platform(out)
    with steps.Planner(out.device) as planner:
        for recompute in recomputes:
            key = f"recompute_{'full' if recompute else 'none'}"
            with out.part(key):
                config = steps.options(out, key, shape, lengths, 1, *steps.SOLO, *flags_of_recompute(recompute), *flags)
                groups = steps.generated(config, shape, lengths, 1)
                planned = planner.rehearse(config, shape, groups) if implementation == PORTABLE else None
                peak = _timed(out, platform, key, config, groups, recompute)
                if planned is None:
                    out.value(f"{key}/peak_off", "layers of Transformer Engine cannot be rehearsed")
                    continue
                if out.dry:
                    peak = steps.peak_on_cpu(platform, config, shape, groups)
                steps.compare_peak(out, key, peak, planned.result())


def _timed(out: Recorder, platform: Any, key: str, config: Any, groups: list[Any], recompute: bool) -> float:
    """Figures of a step; returns the bytes at its peak, 0 on the CPU."""
    with steps.training(out, platform, config, groups) as run:
        took = run.measure(key, 2, 1 if out.dry else 5)
        peak = 0.0 if out.dry else steps.peak_on_cuda()
        rate = models.dense_peak(out)
        if rate and not recompute:
            out.target(f"{key}/mfu", models.mfu(run.engine, run.packs(), took, rate), MFU_BOUND, MFU_AIM)
    return peak


def engine_speed(out: Recorder) -> None:
    """Forward and backward of Transformer Engine in bfloat16 and with each FP8 recipe, and of portable layers.

    Without the optimizer, whose state would not fit beside the activations of 7B parameters.
    """
    from megatron_solopo import environment
    from megatron_solopo.config import FP8_MULTIPLES

    out.value("mfu_is", MFU)
    engine = {"transformer_impl": ENGINE} if implementation_flags(out, ENGINE) else {}
    refusals = {"delayed": ""} if out.dry else environment.fp8_refusals()
    platform, lengths, repeats = start_platform(out), lengths_of(out), 1 if out.dry else 5
    for size, shape in {"tiny": TINY}.items() if out.dry else (("7b", QWEN_7B), ("1_5b", QWEN_1_5B)):
        kinds = {PORTABLE: {}, "bf16": engine}
        for recipe in FP8_MULTIPLES:
            if refusals.get(recipe):
                out.value(f"{size}/{recipe}", f"not on this GPU: {refusals[recipe]}")
            elif recipe in refusals:
                kinds[recipe] = engine and {**engine, "fp8_format": "hybrid", "fp8_recipe": recipe}
        times: dict[str, float] = {}
        for kind, of_kind in kinds.items():
            key = f"{size}/{kind}"
            out.value(f"{key}/options", ", ".join(f"{name} {value}" for name, value in of_kind.items()) or "defaults")
            took = models.alone(out, key, platform, shape, False, lengths, repeats, False, **of_kind)
            if took is not None:
                times[kind] = took
        fp8_over_bf16(out, size, times)


def fp8_over_bf16(out: Recorder, size: str, times: dict[str, float]) -> None:
    """The ratio of each FP8 recipe that ran, and the verdict on the best."""
    from megatron_solopo.config import FP8_MULTIPLES

    ratios = {kind: times["bf16"] / times[kind] for kind in times if kind in FP8_MULTIPLES and "bf16" in times}
    for recipe, ratio in ratios.items():
        out.value(f"{size}/{recipe}/over_bf16", ratio, "times as fast")
    if ratios:
        out.value(f"{size}/fp8_best", max(ratios, key=ratios.__getitem__))
        out.target(f"{size}/fp8_over_bf16", max(ratios.values()), FP8_BOUND, FP8_AIM)


def sharing(out: Recorder) -> None:
    """Pairs a second of SoLoPO and long-PO, prompts shared by their responses and laid out for each."""
    shape, lengths, groups = (TINY if out.dry else QWEN_1_5B), lengths_of(out), 2
    platform = start_platform(out)
    times: dict[str, float] = {}
    for method, flags in (("solo", steps.SOLO), ("long", steps.LONG)):
        for layout, of_layout in (("shared", ()), ("separate", ("--no-share-prompts",))):
            key = f"{method}/{layout}"
            with out.part(key):
                config = steps.options(out, key, shape, lengths, groups, *flags, *of_layout)
                with steps.training(out, platform, config, steps.generated(config, shape, lengths, groups)) as run:
                    times[key] = run.measure(key, 2, 1 if out.dry else 5)
                out.value(f"{key}/pairs_per_second", groups / times[key])
    for above, below in (
        ("solo/separate", "solo/shared"),
        ("long/separate", "long/shared"),
        ("long/shared", "solo/shared"),
        ("long/separate", "solo/separate"),
    ):
        if above in times and below in times:
            out.value(f"{above}_over_{below}".replace("/", "_"), times[above] / times[below], "times as long")
