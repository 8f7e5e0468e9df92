"""Which figures docs/gpu.md shows, and how."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

from gpu.cells import CELLS

NOT_MEASURED = "not measured"

KERNELS = ("default", "cudnn", "flash", "varlen", "efficient", "math")


@dataclass(frozen=True)
class Row:
    """A line of a table: the figure of a cell, or the largest of those whose keys match a pattern."""

    text: str
    cell: str
    key: str


def _models() -> tuple[Row, ...]:
    rows = []
    for cell, title, cases in (
        ("model_1_5b", "1.5B, 1K / 8K, with its optimizer", ("recompute_none", "recompute_full")),
        ("model_7b", "7B, 1K / 8K, forward and backward", ("8k/recompute_none", "8k/recompute_full")),
        ("model_7b", "four layers of 7B", ("four_layers/32k/recompute_full", "four_layers/128k/recompute_full")),
    ):
        for case in cases:
            name = f"{title}, {case.replace('/', ' ').replace('four_layers ', '').replace('_', ' ')}"
            rows += [
                Row(f"{name}: step", cell, f"{case}/step"),
                Row(f"{name}: tokens a second", cell, f"{case}/tokens_per_second"),
                Row(f"{name}: model operations", cell, f"{case}/rate"),
                Row(f"{name}: MFU", cell, f"{case}/mfu"),
                Row(f"{name}: memory allocated", cell, f"{case}/allocated"),
                Row(f"{name}: memory reserved", cell, f"{case}/reserved"),
            ]
    return tuple(rows)


def _speed() -> tuple[Row, ...]:
    rows = []
    for cell, layers in (("model_3b", "portable"), ("engine_3b", "Transformer Engine")):
        rows += [
            Row(f"3B, 1K / 8K, {layers}, recompute none: step", cell, "recompute_none/step"),
            Row(f"3B, 1K / 8K, {layers}, recompute none: MFU", cell, "recompute_none/mfu"),
            Row(f"3B, 1K / 8K, {layers}, recompute none: MFU at least 45 %", cell, "recompute_none/mfu/verdict"),
        ]
    for case in ("recompute_none", "recompute_full"):
        name = f"3B, 1K / 8K, portable, {case.replace('_', ' ')}"
        rows += [
            Row(f"{name}: peak memory", "model_3b", f"{case}/peak"),
            Row(f"{name}: peak memory of the planner", "model_3b", f"{case}/peak_planned"),
            Row(f"{name}: within 5 %", "model_3b", f"{case}/peak_off/verdict"),
        ]
    for size, name in (("7b", "7B"), ("1_5b", "1.5B")):
        for kind in ("portable", "bf16", "tensorwise", "delayed", "blockwise"):
            rows.append(Row(f"{name}, forward and backward, {kind}: step", "engine_speed", f"{size}/{kind}/step"))
        rows += [
            Row(f"{name}, forward and backward, best FP8 over bfloat16", "engine_speed", f"{size}/fp8_over_bf16"),
            Row(f"{name}, at least 1.25 times as fast", "engine_speed", f"{size}/fp8_over_bf16/verdict"),
        ]
    return tuple(rows)


def _trl() -> tuple[Row, ...]:
    rows = []
    for case in ("recompute_none", "recompute_full"):
        name = case.replace("_", " ")
        for kind, words in (
            ("shared", "prompts shared"),
            ("separate", "prompts separate"),
            ("trl", "TRL"),
            ("trl_liger", "TRL with Liger"),
        ):
            rows += [
                Row(f"{name}, {words}: pairs a second", "trl", f"{case}/{kind}/pairs_per_second"),
                Row(f"{name}, {words}: memory allocated", "trl", f"{case}/{kind}/allocated"),
            ]
        for layout, bound in (("shared", "1.7"), ("separate", "1.0")):
            rows += [
                Row(f"{name}, {layout} over TRL", "trl", f"{case}/trl/{layout}_over_trl"),
                Row(f"{name}, {layout} at least {bound} x TRL", "trl", f"{case}/trl/{layout}_over_trl/verdict"),
            ]
    return tuple(rows)


def _longest() -> tuple[Row, ...]:
    rows = []
    for size, name in (("7b", "7B"), ("3b", "3B")):
        rows += [
            Row(f"{name}: longest prompt whose step fits", "longest", f"{size}/longest"),
            Row(f"{name}: longest by the planner's estimate", "longest", f"{size}/guess"),
            Row(f"{name}: peak memory", "longest", f"{size}/peak"),
            Row(f"{name}: peak memory of the planner", "longest", f"{size}/peak_planned"),
            Row(f"{name}: within 5 %", "longest", f"{size}/peak_off/verdict"),
        ]
    return tuple(rows)


def _largest_kernels() -> tuple[Row, ...]:
    return tuple(
        row
        for cell, name in (("profile", "portable"), ("engine_profile", "Transformer Engine"))
        for row in (
            Row(f"{name}: in kernels", cell, "in_kernels"),
            Row(f"{name}: idle", cell, "idle"),
            Row(f"{name}: launches", cell, "launches"),
            *(Row(f"{name}: {number}.", cell, f"kernels/{number:02}") for number in range(1, 11)),
        )
    )


TABLES: dict[str, tuple[Row, ...]] = {
    "Machine": (
        Row("date", "environment", "date"),
        Row("driver", "environment", "driver"),
        Row("torch", "environment", "torch"),
        Row("cuDNN", "environment", "cudnn"),
        Row("NCCL", "environment", "nccl"),
        Row("bfloat16 product, 8,192 cubed", "environment", "product"),
        Row("copy on the device", "environment", "copy"),
        Row("to the device, pinned", "environment", "to_device_pinned"),
        Row("to the host, pinned", "environment", "to_host_pinned"),
        Row("to the device, pageable", "environment", "to_device_pageable"),
        Row("to the host, pageable", "environment", "to_host_pageable"),
        Row("pinning", "environment", "pin"),
        Row("one process and its groups start", "start", "start"),
    ),
    "Correctness": (
        Row("gradient of a step, float64, largest error (bound 1e-10)", "oracle", "* float64/gradient"),
        Row("gradient of a step, float32, largest error (bound 1e-5)", "oracle", "* float32/gradient"),
        Row("loss of a step, float32, largest error (bound 1e-5)", "oracle", "* float32/loss"),
        Row("gradient of a step, bfloat16, largest error (bound 5e-2)", "oracle", "* bfloat16/gradient"),
        Row("packed attention, shared prompts, error", "attention", "packed/shared/error"),
        Row("packed attention, separate prompts, error", "attention", "packed/separate/error"),
        Row("packed attention, all in one flash call, error", "attention", "packed/shared_flash/error"),
        Row("context-parallel attention, largest error", "attention", "context_parallel/*_error"),
        Row("attention again: the same bits", "attention", "repeats/attention_output"),
        Row("gradient of the values again: the same bits", "attention", "repeats/attention_value"),
        Row("sums of segments again: the same bits", "attention", "repeats/sums_of_segments"),
        Row("--deterministic-mode again: a sum that differs", "attention", "deterministic/*_differs"),
        Row("SoLo-DPO's first preference loss, off ln 2", "training", "dpo/first_loss_off_ln_2"),
        Row("SoLo-DPO resumed: exact", "training", "dpo/resume_is_exact"),
        Row("SoLo-DPO resumed, --deterministic-mode: exact", "training", "dpo_deterministic/resume_is_exact"),
        Row("SoLo-DPO resumed: largest error of a loss", "training", "dpo/resume_loss_off"),
        Row("supervised training learns", "training", "sft/learns"),
        Row("SoLo-ORPO learns", "training", "orpo/learns"),
    ),
    "Attention, 28 / 4 heads of 128, causal": (
        *(
            row
            for length in (1024, 8192)
            for row in (
                Row(f"{length:,}: kernel taken", "attention", f"{length}/default/is"),
                *(
                    Row(
                        f"{length:,}: {name}, forward and backward",
                        "attention",
                        f"{length}/{name}/forward_and_backward",
                    )
                    for name in KERNELS
                ),
                *(Row(f"{length:,}: {name}, error", "attention", f"{length}/{name}/error") for name in KERNELS),
            )
        ),
        Row("a length for the first time", "attention", "plans/first_time"),
        Row("for the second time", "attention", "plans/second_time"),
        Row("rounded up to a planned one", "attention", "plans/rounded"),
        Row("packed, shared over separate prompts, time", "attention", "packed/shared_over_separate_time"),
    ),
    "Candidates": (
        Row("norm, today", "candidates", "norm/today/forward_and_backward"),
        Row("norm, step by step", "candidates", "norm/steps/forward_and_backward"),
        Row("SwiGLU, today", "candidates", "swiglu/today/forward_and_backward"),
        Row("SwiGLU, megatron-core's", "candidates", "swiglu/steps/forward_and_backward"),
        Row("SwiGLU, compiled", "candidates", "swiglu/compiled/forward_and_backward"),
        Row("SwiGLU, compiling", "candidates", "swiglu/compiled/compile"),
        Row("logits, error", "candidates", "logits/error"),
        Row("logits, rounded to bfloat16, error", "candidates", "logits/rounded_error"),
        Row("128 experts, one after another", "candidates", "experts/any/today"),
        Row("128 experts, in one call", "candidates", "experts/any/grouped"),
        Row("128 experts, in one call, tokens multiples of 8", "candidates", "experts/multiples_of_8/grouped"),
        Row("gradient of a matrix, product and sum", "candidates", "weight_gradient/steps"),
        Row("gradient of a matrix, added by the product", "candidates", "weight_gradient/today"),
        Row("AdamW, 1e9 parameters, foreach", "candidates", "adam/foreach/step"),
        Row("AdamW, 1e9 parameters, fused (taken)", "candidates", "adam/fused/step"),
        Row("AdamW, foreach, temporaries", "candidates", "adam/foreach/temporaries"),
        Row("AdamW, fused, temporaries", "candidates", "adam/fused/temporaries"),
        Row("AdamW on the CPU, 1e9 parameters", "candidates", "adam_on_cpu/step"),
    ),
    "Models": _models(),
    "Transformer Engine": (
        Row("version", "transformer_engine", "version"),
        Row("attention's back end", "transformer_engine", "back_end/selected"),
        Row("attention, largest error", "transformer_engine", "back_end/error_*"),
        Row("attention, 1K / 8K, forward and backward", "transformer_engine", "back_end/forward_and_backward"),
        Row("RMSNorm, error", "transformer_engine", "layers/rmsnorm_error"),
        Row("Linear, bfloat16, error", "transformer_engine", "layers/bf16_error"),
        Row("Linear, FP8, error", "transformer_engine", "layers/fp8_error"),
        Row("Linear, FP8 over bfloat16, time", "transformer_engine", "layers/fp8_over_bf16_time"),
        Row("gradient against float32, portable, largest", "transformer_engine", "*/gradient_portable"),
        Row("gradient against float32, bfloat16, largest (shared)", "transformer_engine", "*/shared/gradient"),
        Row("gradient against float32, FP8 tensorwise, largest", "transformer_engine", "*/tensorwise/gradient"),
        Row("gradient against float32, FP8 blockwise, largest", "transformer_engine", "*/blockwise/gradient"),
        Row("20 steps, portable, learns", "transformer_engine", "steps/portable/learns"),
        Row("20 steps, bfloat16, learns", "transformer_engine", "steps/bfloat16/learns"),
        Row("20 steps, FP8 tensorwise, learns", "transformer_engine", "steps/tensorwise/learns"),
        Row("20 steps, FP8 delayed, learns", "transformer_engine", "steps/delayed/learns"),
        Row("20 steps, FP8 blockwise, learns", "transformer_engine", "steps/blockwise/learns"),
    ),
    "Speed": _speed(),
    "Prompts shared and separate, 1.5B, 1K / 8K": (
        *(
            Row(f"{name}, {layout}: pairs a second", "sharing", f"{method}/{layout}/pairs_per_second")
            for method, name in (("solo", "SoLoPO"), ("long", "long-PO"))
            for layout in ("shared", "separate")
        ),
        Row("SoLoPO, separate over shared", "sharing", "solo_separate_over_solo_shared"),
        Row("long-PO, separate over shared", "sharing", "long_separate_over_long_shared"),
        Row("long-PO over SoLoPO, shared", "sharing", "long_shared_over_solo_shared"),
        Row("long-PO over SoLoPO, separate", "sharing", "long_separate_over_solo_separate"),
    ),
    "TRL 1.16, long-PO at 8K, 1.5B": _trl(),
    "Ten largest kernels of a 1.5B step, 1K / 8K": _largest_kernels(),
    "Longest context of one GPU, all layers recomputed, AdamW on the device": _longest(),
}


def figures_of(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Cell -> key -> {"value", "unit"}; the latest of each."""
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        if "key" in record:
            figures.setdefault(record["cell"], {})[record["key"]] = {k: record[k] for k in ("value", "unit")}
    return figures


def shown(row: Row, figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Returns the cell of a row: the figure, the reason why there is none, or `NOT_MEASURED`."""
    of_cell = figures.get(row.cell, {})
    matching = [of_cell[key] for key in of_cell if fnmatch.fnmatchcase(key, row.key)]
    numbers = [f for f in matching if isinstance(f["value"], float | int) and not isinstance(f["value"], bool)]
    if numbers and len(numbers) == len(matching):
        largest = max(numbers, key=lambda figure: figure["value"])
        return f"{_number(largest['value'])} {largest['unit']}".strip()
    if matching:
        value = next(figure["value"] for figure in matching if figure not in numbers)
        return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    part = row.key
    while part:
        part = part.rpartition("/")[0]
        for key in (part, f"{part}/refused"):
            if key in of_cell:
                return "refused" if key.endswith("/refused") else str(of_cell[key]["value"])
    return NOT_MEASURED


def _number(value: float) -> str:
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e9):
        return f"{int(value):,}" if abs(value) >= 10000 else str(int(value))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(machines: dict[str, list[dict[str, Any]]]) -> str:
    """Returns all tables, a column a machine."""
    columns = {name: figures_of(records) for name, records in machines.items()} or {"GPU": {}}
    statuses = {
        name: {r["cell"]: f"{r['status']}, {r['seconds']:g} s" for r in records if "status" in r}
        for name, records in machines.items()
    } or {"GPU": {}}
    head = " | ".join(columns)
    rule = "---|" * len(columns)
    lines = ["### Cells", "", f"| cell | what it yields | {head} |", f"|---|---|{rule}"]
    for cell in CELLS:
        states = " | ".join(of.get(cell.name, "not run") for of in statuses.values())
        lines.append(f"| `{cell.name}` | {cell.about} | {states} |")
    for title, rows in TABLES.items():
        lines += ["", f"### {title}", "", f"| | {head} |", f"|---|{rule}"]
        lines += [f"| {row.text} | {' | '.join(shown(row, figures) for figures in columns.values())} |" for row in rows]
    return "\n".join(lines) + "\n"
