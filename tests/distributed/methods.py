"""The methods whose gradients are compared with the oracle, as plain dicts, and what each scores."""

from __future__ import annotations

from itertools import product
from typing import Any

SHORT, LONG = ("short_chosen", "short_rejected"), ("long_chosen", "long_rejected")
PREFERENCE = {"objective": "preference"}
SOLO = PREFERENCE | {"context_mode": "solo"}
METHODS: dict[str, dict[str, Any]] = {
    "dpo": SOLO | {"preference_loss": "dpo", "beta": 0.3, "alignment_weight": 3.0},
    "simpo": SOLO | {"preference_loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "alignment_weight": 1.0},
    "orpo": SOLO | {"preference_loss": "orpo", "orpo_lambda": 0.4, "alignment_weight": 1.5},
    "sft": {"objective": "sft"},
}
"""The methods of every layout."""
SMOOTH = METHODS["dpo"] | {"alignment_distance": "huber"}
"""DPO of runs that are compared between layouts. At the start the policy is the reference and l1 has its kink, where
the last bit of a log-prob, which may depend on the pack, decides the sign of the alignment's gradient."""

CONSTANTS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "ipo": {"beta": 0.2},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0},
    "orpo": {"orpo_lambda": 0.4},
    "longpo": {"beta": 0.1, "longpo_lambda": 0.3},
    "dpo_norm": {"beta": 2.5},
    "ld_dpo": {"beta": 0.3, "ld_alpha": 0.4},
    "wpo": {"beta": 0.3},
}


def _options() -> dict[str, dict[str, Any]]:
    """Every loss x context mode x alignment option, then each further option in every mode."""
    combinations: dict[str, dict[str, Any]] = {}

    def add(loss: str, mode: str, **options: Any) -> None:
        method = PREFERENCE | {"preference_loss": loss, "context_mode": mode} | CONSTANTS[loss]
        if mode == "solo":
            method["alignment_weight"] = 0.7
        words = [name.replace("_", " ") if value is True else str(value) for name, value in options.items() if value]
        combinations[" ".join([loss, mode, *words])] = method | {k: v for k, v in options.items() if v is not False}

    for loss in ("dpo", "ipo", "simpo", "orpo"):
        for mode in ("short", "long"):
            add(loss, mode)
        anchors = ("per_context", "short") if loss in ("dpo", "ipo") else (None,)
        for target, distance, stop, anchor in product(
            ("chosen", "both"), ("l1", "l2", "huber"), (False, True), anchors
        ):
            options = {"alignment_target": target, "alignment_distance": distance}
            if distance == "huber":
                options["alignment_huber_delta"] = 0.5
            if anchor:
                options["alignment_reference"] = anchor
            add(loss, "solo", **options, alignment_stop_short_gradient=stop)
    modes = ("solo", "short", "long")
    for loss, mode in product(("dpo", "dpo_norm", "simpo", "orpo"), ("solo", "long")):
        add(loss, mode, pair_reduction="plackett_luce")
    add("longpo", "long", pair_reduction="plackett_luce")
    for loss, mode in product(("dpo_norm", "ld_dpo", "wpo"), modes):
        add(loss, mode)
    for loss in ("dpo_norm", "ld_dpo", "wpo"):
        add(loss, "solo", alignment_target="both", alignment_reference="short")
    for loss, mode, form in product(("dpo", "simpo"), modes, ("conservative", "robust")):
        add(loss, mode, label_smoothing=0.15, label_smoothing_form=form)
    for loss, mode, how in product(("dpo", "ipo", "simpo"), modes, ("sequence", "token")):
        add(loss, mode, sft_weight=0.8, sft_normalization=how)
    for how in ("sequence", "token"):
        add("longpo", "long", sft_normalization=how)
    add(
        "dpo",
        "solo",
        alignment_target="both",
        alignment_distance="huber",
        alignment_huber_delta=2.0,
        alignment_reference="short",
        alignment_stop_short_gradient=True,
        label_smoothing=0.1,
        label_smoothing_form="robust",
        sft_weight=0.5,
        sft_normalization="token",
    )
    return combinations


OPTIONS = _options()
METHODS |= OPTIONS


def method_roles(method: dict[str, Any]) -> tuple[str, ...]:
    """What the policy scores."""
    if method["objective"] == "sft":
        return ("response",)
    both = method.get("alignment_target") == "both"
    return {"short": SHORT, "long": LONG, "solo": SHORT + (LONG if both else LONG[:1])}[method["context_mode"]]


def has_reference(method: dict[str, Any]) -> bool:
    return method.get("preference_loss") in ("dpo", "ipo", "longpo", "dpo_norm", "ld_dpo", "wpo")


def method_flags(method: dict[str, Any]) -> list[Any]:
    flags: list[Any] = []
    for name, value in method.items():
        flags += ["--" + name.replace("_", "-")] + ([] if value is True else [value])
    return flags
