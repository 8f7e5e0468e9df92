"""What tools/gpu_suite.py runs, in the order of what is worth most: all later choices hang on the first ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A unit of the suite, which runs in a separate process.

    Attributes:
        work: module of this folder and function, called with a `Recorder`.
        expected: seconds on an H200, calculated; it is skipped where less is left, and killed after twice as many.
        transformer_engine: it needs Transformer Engine, which no other cell imports.
        on_cpu: the dry run can run it, with portable layers in the place of Transformer Engine's.
        about: what it yields, for docs/gpu.md.
    """

    name: str
    work: str
    expected: float
    about: str
    transformer_engine: bool = False
    on_cpu: bool = True

    @property
    def cap(self) -> float:
        return 2 * self.expected + 10


CELLS = (
    Cell("environment", "machine:environment", 10, "versions; matrix product, copies, pinning: ceilings of all shares"),
    Cell("start", "machine:start", 10, "NCCL with one process, the allocator, one step of a tiny model"),
    Cell(
        "oracle",
        "checks:oracle",
        25,
        "loss and gradient of DPO, SimPO, ORPO, SFT, Llama and Qwen2 (28 / 4 heads of 128), prompts shared and "
        "separate, float32 and bfloat16, against float64",
    ),
    Cell(
        "attention",
        "kernels:attention",
        40,
        "packed and context-parallel attention against float64; kernels of torch, plans of cuDNN, repeatability",
    ),
    Cell("training", "training:training", 36, "complete runs: the loss falls, checkpoint, resume, export"),
    Cell("candidates", "kernels:candidates", 35, "norm, SwiGLU, logits, gradients of matrices and Adam against others"),
    Cell(
        "model_1_5b", "models:model_1_5b", 20, "a step of 1.5B parameters at 8K with its optimizer: time, MFU, memory"
    ),
    Cell("model_7b", "models:model_7b", 45, "7B at 8K forward and backward; four of its layers at 32K and 128K"),
    Cell(
        "transformer_engine",
        "engine:transformer_engine",
        60,
        "Transformer Engine: layers, the back end its attention takes, agreement with portable, FP8 over 20 steps",
        transformer_engine=True,
        on_cpu=False,
    ),
    Cell(
        "engine_speed",
        "speed:engine_speed",
        55,
        "Transformer Engine in bfloat16 and FP8: forward and backward of 7B and 1.5B at 8K, against portable layers",
        transformer_engine=True,
    ),
    Cell(
        "profile", "traces:portable", 20, "--profile of a 1.5B step at 8K: the ten largest kernels, idle share, trace"
    ),
    Cell("sharing", "speed:sharing", 30, "1.5B at 8K: SoLoPO and long-PO, prompts shared and separate"),
    Cell("model_3b", "speed:model_3b", 30, "a step of 3B at 8K: MFU, and peak memory against the planner's"),
    Cell("trl", "trl_baseline:trl", 70, "long-PO at 8K, 1.5B, against TRL 1.16's DPOTrainer at equal recomputation"),
    Cell(
        "engine_profile",
        "traces:engine",
        20,
        "`profile` with Transformer Engine's layers",
        transformer_engine=True,
    ),
    Cell("engine_3b", "speed:engine_3b", 20, "`model_3b` with Transformer Engine's layers", transformer_engine=True),
    Cell(
        "longest",
        "context:longest",
        90,
        "longest context of a training step, 7B and 3B, all layers recomputed; against the planner's estimate",
    ),
)
"""``expected`` and ``cap`` are seconds."""
