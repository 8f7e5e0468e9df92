"""A single-process float64 oracle in plain transformers: nothing of the package is used.

Examples and methods are plain dicts, as the worker gets them:

    {"id", "prompts": [{"ids", "continuations": [{"role", "ids", "learnt" (or null)}]}]}
    {"objective", "preference_loss", "context_mode", "beta", "alignment_weight", ...}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def load(folder: Path) -> nn.Module:
    """The model in float64; transformers' RMSNorm would go through float32 whatever the model's dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def double_norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = double_norm.__get__(module)
    return model


def log_probs(model: nn.Module, example: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Role -> summed log-prob of the learnt tokens, and their number; one sequence at a time."""
    sums, counts = {}, {}
    for prompt in example["prompts"]:
        for continuation in prompt["continuations"]:
            ids = torch.tensor([prompt["ids"] + continuation["ids"]])
            scores = model(ids).logits[0, :-1].log_softmax(-1)
            picked = scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt["ids"]) - 1 :]
            learnt = torch.tensor(continuation["learnt"] or [True] * len(continuation["ids"]))
            sums[continuation["role"]] = picked[learnt].sum()
            counts[continuation["role"]] = int(learnt.sum())
    return sums, counts


def loss_of(
    sums: dict[str, Tensor], counts: dict[str, int], reference: dict[str, float] | None, method: dict[str, Any]
) -> Tensor:
    """The loss of one example, by the paper's formulas written out (arXiv 2505.11166)."""
    if method["objective"] == "sft":
        return -sums["response"] / counts["response"]
    kind, mode = method["preference_loss"], method["context_mode"]

    def reward(role: str) -> Tensor:
        if kind == "dpo":
            anchor = role
            if mode == "solo" and method.get("alignment_reference") == "short":
                anchor = role.replace("long", "short")
            return method["beta"] * (sums[role] - reference[anchor])
        mean = sums[role] / counts[role]
        return method["beta"] * mean if kind == "simpo" else mean - torch.log1p(-torch.exp(mean))

    side = "long" if mode == "long" else "short"
    margin = reward(f"{side}_chosen") - reward(f"{side}_rejected")
    if kind == "simpo":
        margin = margin - method["simpo_gamma"]
    loss = torch.log1p(torch.exp(-margin))
    if kind == "orpo":
        loss = -sums[f"{side}_chosen"] / counts[f"{side}_chosen"] + method["orpo_lambda"] * loss
    if mode == "solo":
        for response in ("chosen", "rejected") if method.get("alignment_target") == "both" else ("chosen",):
            short = reward(f"short_{response}")
            if method.get("alignment_stop_short_gradient"):
                short = short.detach()
            loss = loss + method["alignment_weight"] * (short - reward(f"long_{response}")).abs()
    return loss


def reference_table(folder: Path, examples: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each example's log-prob sums under the folder's model."""
    model = load(folder)
    with torch.no_grad():
        return [{role: value.item() for role, value in log_probs(model, example)[0].items()} for example in examples]


def batch(
    folder: Path, examples: list[dict[str, Any]], reference: list[dict[str, float]] | None, method: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor]]:
    """(loss of each example, gradient of their mean by tensor): the mean of gradients taken one example at a time."""
    model = load(folder)
    losses, total = [], {}
    for number, example in enumerate(examples):
        model.zero_grad()
        sums, counts = log_probs(model, example)
        loss = loss_of(sums, counts, reference[number] if reference else None, method)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad / len(examples)
    return losses, total
