"""Complete runs through the training command, as on a new machine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tiny_models import conversations, preference_groups, write_lines, write_model

from gpu.record import Recorder

TIMES = ("seconds", "tokens_per_second", "memory_gib", "memory_allocated_gib", "data_seconds", "data_rank")


def train_lines(save: Path) -> list[dict[str, Any]]:
    """Returns the metrics of each training step of a run."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def run(out: Recorder, save: Path, *flags: Any) -> list[dict[str, Any]]:
    """Returns the metrics of each training step of a run of ``pretrain_solopo.py``."""
    from megatron_solopo.cli import run as run_command
    from megatron_solopo.training.run import main

    argv = [
        "--hf-path", out.work / "start", "--bf16", "--seq-length", 128, "--global-batch-size", 16,
        "--micro-batch-size", 8, "--device", out.device, "--save", save, *flags,
    ]  # fmt: skip
    status = run_command(main, list(map(str, argv)))
    if status:
        raise RuntimeError(f"the run into {save.name} ended with status {status}")
    return train_lines(save)


def learns(out: Recorder, key: str, lines: list[dict[str, Any]]) -> None:
    """The loss of the last steps is at least 5 % below that of the first."""
    first, last = (sum(line["loss"] for line in part) / len(part) for part in (lines[:3], lines[-3:]))
    out.value(f"{key}/loss_first", first)
    out.value(f"{key}/step", sorted(line["seconds"] for line in lines)[len(lines) // 2], "s")
    out.value(f"{key}/memory", lines[-1]["memory_gib"], "GiB")
    out.value(f"{key}/loss_last", last)
    out.require(f"{key}/learns", last < 0.95 * first)


def export_is_finite(out: Recorder, key: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    out.require(f"{key}/export_is_finite", bool(torch.isfinite(model(torch.tensor([[1, 5, 2]])).logits).all()))


def unbroken_and_resumed(out: Recorder, groups: Path, name: str, *more: Any) -> list[list[dict[str, Any]]]:
    """The metrics, but for times, of ten steps of SoLo-DPO, and of the same steps resumed from the middle."""
    save = out.work / name
    flags = ["--train-data", groups, "--preference-loss", "dpo", "--lr", 1e-3, "--train-iters", 10]
    flags += ["--save-hf", out.work / f"{name}-hf", *more]
    unbroken = run(out, save, *flags, "--save-interval", 5)
    resumed = run(out, save, *flags, "--load", save, "--ckpt-step", 5, "--overwrite")
    return [[{k: v for k, v in line.items() if k not in TIMES} for line in lines] for lines in (unbroken, resumed)]


def training(out: Recorder) -> None:
    """Ten steps of SoLo-DPO, resumed from the middle; twenty each of SoLo-ORPO and of supervised training."""
    write_model(out.work / "start")
    groups = write_lines(out.work / "groups.jsonl", preference_groups(64))
    chats = write_lines(out.work / "chats.jsonl", conversations(64))
    with out.part("dpo"):
        plain = unbroken_and_resumed(out, groups, "dpo")
        out.check("dpo/first_loss_off_ln_2", abs(plain[0][0]["po_loss"] - math.log(2)), 2e-2)
        # On CUDA the order of sums over tokens varies: a resumed run may still be exact.
        out.value("dpo/resume_is_exact", plain[0] == plain[1])
        off = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(*plain, strict=True)]
        out.check("dpo/resume_loss_off", max(off), 0.05 if out.device == "cuda" else 0.0)
        export_is_finite(out, "dpo", out.work / "dpo-hf")
    with out.part("dpo_deterministic"):
        out.need_cuda()
        ordered = unbroken_and_resumed(out, groups, "dpo_deterministic", "--deterministic-mode")
        out.require("dpo_deterministic/resume_is_exact", ordered[0] == ordered[1])
    for key, rate, data, *flags in (
        ("sft", 1e-2, chats, "--objective", "sft"),
        ("orpo", 2e-3, groups, "--preference-loss", "orpo"),
    ):
        with out.part(key):
            save, hf = out.work / key, out.work / f"{key}-hf"
            learns(
                out,
                key,
                run(out, save, "--train-data", data, "--lr", rate, "--train-iters", 20, "--save-hf", hf, *flags),
            )
            export_is_finite(out, key, hf)
