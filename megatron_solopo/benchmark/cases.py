"""What is measured: cases, the tables that compare them, and the tables of the suites ``quick`` and ``full``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

SOLOPO, TRL = "solopo", "trl"
SIDES = (SOLOPO, TRL)
SOLO, SHORT, LONG, SFT = "solo", "short", "long", "sft"
MODES = (SOLO, LONG, SHORT, SFT)
"""``--context-mode`` of preference training, and supervised training on the long context."""
SPEED, LONGEST = "speed", "longest context"

MODELS: dict[str, dict[str, Any]] = {
    "d64-l2": dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, heads=2),
    "d256-l4": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, heads=2),
    "d384-l6": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, heads=3),
    "d512-l8": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, heads=4),
}
"""Shapes of Llama models for ``--model``; ``heads`` of keys and values."""


def config_of_model(name: str, vocab_size: int) -> dict[str, Any]:
    """Returns the config.json of one of `MODELS`. A vocabulary above 100,000 shares its weight with the output, as in
    Qwen2.5's models of this size; smaller ones do not, as in Llama 2."""
    shape = dict(MODELS[name])
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=vocab_size,
        num_key_value_heads=shape.pop("heads"),
        max_position_embeddings=2**20,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        tie_word_embeddings=vocab_size > 100_000,
        **shape,
    )


@dataclass(frozen=True)
class Setting:
    """What all cases of a table share.

    Attributes:
        model: one of `MODELS`, or a Hugging Face folder or config.json, of which the config is read.
        vocab_size: of one of `MODELS`.
        long, short, response: tokens of the long prompt, the short one and each response.
        pairs: preference groups, or conversations, a step.
        bf16: parameters in bfloat16; otherwise float32.
        threads: of each process.
    """

    model: str
    vocab_size: int = 32000
    long: int = 4096
    short: int = 512
    response: int = 64
    pairs: int = 1
    bf16: bool = False
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        side: `SOLOPO`, or TRL's DPOTrainer, which trains on the long context with a chosen and a rejected response.
        mode: one of `MODES`.
        share: whether the prompt is computed once for its responses; TRL has no such option.
        recompute: all activations of the layers are recomputed in the backward pass.
        as_shipped: the trainer's defaults instead of its best settings: TRL recomputes, and computes reference
            log-probs in every step; the package packs up to 8 pairs.
        on_short: supervised training on the short context.
        chosen, rejected: responses of a group.
        options: further options of ``solopo train``.
    """

    side: str = SOLOPO
    mode: str = SOLO
    loss: str = "dpo"
    share: bool = True
    recompute: bool = False
    as_shipped: bool = False
    on_short: bool = False
    chosen: int = 1
    rejected: int = 1
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its row, such as ``solo dpo, shared``."""
        words = ["TRL DPO" if self.side == TRL else self.mode if self.mode == SFT else f"{self.mode} {self.loss}"]
        if self.mode == SFT:
            words.append("short" if self.on_short else "long")
        elif self.side == SOLOPO:
            words.append("shared" if self.share else "separate")
        words += ["full recompute"] if self.recompute else []
        words += ["as shipped"] if self.as_shipped else []
        words += [f"{self.chosen} x {self.rejected}"] if (self.chosen, self.rejected) != (1, 1) else []
        return ", ".join([*words, *([" ".join(self.options)] if self.options else [])])


@dataclass(frozen=True)
class Table:
    """Cases that are measured in turn: A B A B.

    Attributes:
        kind: `SPEED` or `LONGEST`.
        rounds: how often each case is started; steps: timed steps of each start, behind one that is not timed.
        limit: of `LONGEST`: bytes of a process above its resident memory before the model is built; 0: four times
            weights, gradients and Adam's moments in float32.
        judged: its ratios have aims, which belong to its sizes.
    """

    name: str
    title: str
    setting: Setting
    cases: tuple[Case, ...]
    kind: str = SPEED
    rounds: int = 3
    steps: int = 2
    limit: int = 0
    judged: bool = False


PLAIN = (Case(mode=SFT), Case(mode=SFT, on_short=True))
"""Plain causal training on one sequence, long and short: what a step costs without pairs and sharing."""


def modes(loss: str) -> tuple[Case, ...]:
    """Returns SoLoPO, long-PO and short-PO, with shared and with separate prompts."""
    return tuple(Case(mode=mode, loss=loss, share=share) for mode in (SOLO, LONG, SHORT) for share in (True, False))


def against_trl(recompute: bool = False) -> tuple[Case, ...]:
    """Returns long-DPO with shared and separate prompts and TRL's, with the same recomputation."""
    ours = Case(mode=LONG, recompute=recompute)
    return ours, replace(ours, share=False), Case(TRL, LONG, recompute=recompute)


AS_SHIPPED = (
    Case(mode=LONG, as_shipped=True),
    Case(mode=LONG, share=False, as_shipped=True),
    Case(TRL, LONG, recompute=True, as_shipped=True),
)


def on_machine(tables: Sequence[Table], threads: int, device: str) -> list[Table]:
    """Returns the tables with the threads and the device of a machine."""
    return [replace(t, setting=replace(t.setting, threads=threads, device=device)) for t in tables]


_SMALL = Setting("d256-l4", vocab_size=8000, long=1024, short=128, response=32)
_LARGE = Setting("d512-l8")
_BOTH = against_trl() + against_trl(recompute=True)

SUITES: dict[str, tuple[Table, ...]] = {
    "quick": (
        Table("floor", "Steps against their FLOP floor", _SMALL, PLAIN + modes("simpo")[:4], rounds=2, steps=3),
        Table("trl", "Long-PO against TRL", _SMALL, against_trl(), rounds=2, steps=3),
    ),
    "full": (
        Table(
            "floor",
            "Steps against their FLOP floor, d512 / L8, 4K",
            _LARGE,
            PLAIN + modes("simpo"),
            rounds=5,
            judged=True,
        ),
        Table(
            "outside",
            "Time outside forward and backward, d512 / L8, 4K, 8 pairs a step",
            replace(_LARGE, pairs=8),
            (Case(),),
            rounds=2,
            steps=1,
            judged=True,
        ),
        Table(
            "trl-4k", "Long-PO against TRL, d512 / L8, vocabulary of 32,000, 4K", _LARGE, _BOTH, rounds=2, judged=True
        ),
        Table(
            "trl-2k-vocabulary",
            "Long-PO against TRL, d512 / L8, vocabulary of 151,936, 2K",
            replace(_LARGE, vocab_size=151_936, long=2048, short=256),
            _BOTH,
            rounds=2,
            judged=True,
        ),
        Table(
            "trl-shipped",
            "Long-PO against TRL, both as shipped, d384 / L6, 2K",
            Setting("d384-l6", long=2048, short=256, pairs=4),
            AS_SHIPPED,
            rounds=2,
        ),
        Table(
            "longest",
            "Longest context in four times the states, d384 / L6",
            Setting("d384-l6", long=1024, short=128),
            against_trl(),
            LONGEST,
            rounds=1,
            steps=1,
            judged=True,
        ),
    ),
}
"""Suite -> its tables."""
