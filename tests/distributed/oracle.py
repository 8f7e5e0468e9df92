"""A single-process float64 oracle in plain transformers and closed-form losses: nothing of the package is used.

Examples and methods are plain dicts, as the worker gets them:

    {"id", "prompts": [{"ids", "completions": [{"role", "ids", "loss_mask" (or null)}]}]}
    {"objective", "preference_loss", "context_mode", "beta", "alignment_weight", ...}

A loss depends on the model only through the log-prob sum of each completion. So the gradient of every sum is taken
once, one sequence at a time, and a method's gradient is their combination by the chain rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers_in_double import by_file_name, load


def log_probs(model: nn.Module, example: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Role -> summed log-prob of the trained tokens, and their number; one sequence at a time."""
    sums, counts = {}, {}
    for prompt in example["prompts"]:
        for completion in prompt["completions"]:
            ids = torch.tensor([prompt["ids"] + completion["ids"]])
            scores = model(ids).logits[0, :-1].log_softmax(-1)
            picked = scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt["ids"]) - 1 :]
            loss_mask = torch.tensor(completion["loss_mask"] or [True] * len(completion["ids"]))
            sums[completion["role"]] = picked[loss_mask].sum()
            counts[completion["role"]] = int(loss_mask.sum())
    return sums, counts


@dataclass(frozen=True)
class Scores:
    """An example under a model: role -> log-prob sum, its tokens, and its gradient by tensor."""

    sums: dict[str, Tensor]
    counts: dict[str, int]
    gradients: dict[str, dict[str, Tensor]]


def scores(folder: Path, examples: list[dict[str, Any]]) -> list[Scores]:
    """Each example under the folder's model."""
    model, scores = load(folder), []
    names, parameters = zip(*model.named_parameters(), strict=True)
    for example in examples:
        sums, counts = log_probs(model, example)
        gradients = {
            role: by_file_name(model, dict(zip(names, torch.autograd.grad(value, parameters), strict=True)))
            for role, value in sums.items()
        }
        scores.append(Scores({role: value.detach() for role, value in sums.items()}, counts, gradients))
    return scores


def reference_table(folder: Path, examples: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each example's log-prob sums under the folder's model."""
    model = load(folder)
    with torch.no_grad():
        return [{role: value.item() for role, value in log_probs(model, example)[0].items()} for example in examples]


def load_balancing(model: nn.Module, examples: list[dict[str, Any]]) -> Tensor:
    """The auxiliary loss of a pack, added over its layers (Switch Transformers, arXiv 2101.03961, equations 4 to 6).

    A layer's: experts x sum over experts of (share of all choices x mean probability), over the tokens that are
    computed: each prompt once, and each completion without its last token.
    """
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    outputs: dict[nn.Module, list[Tensor]] = {router: [] for router in routers}
    first = 0
    hooks = [
        router.register_forward_hook(lambda module, _, output: outputs[module].append(output[0][first:]))
        for router in routers
    ]
    for prompt in (prompt for example in examples for prompt in example["prompts"]):
        for place, completion in enumerate(prompt["completions"]):
            first = len(prompt["ids"]) if place else 0
            model(torch.tensor([prompt["ids"] + completion["ids"][:-1]]))
    for hook in hooks:
        hook.remove()
    total = torch.zeros((), dtype=torch.float64)
    for router, parts in outputs.items():
        probs = torch.cat(parts).softmax(-1)
        choices = torch.zeros_like(probs).scatter(1, probs.topk(router.top_k).indices, 1.0)
        total = total + probs.shape[1] * (choices.sum(0) / choices.sum() * probs.mean(0)).sum()
    return total


def logistic(margin: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-margin))


def smoothed(margin: Tensor, method: dict[str, Any]) -> Tensor:
    """The logistic loss of labels that are swapped with a probability."""
    e = method.get("label_smoothing", 0.0)
    right, wrong = logistic(margin), logistic(-margin)
    if method.get("label_smoothing_form") == "robust":
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    return (1 - e) * right + e * wrong


def distance(difference: Tensor, method: dict[str, Any]) -> Tensor:
    size = difference.abs()
    if method.get("alignment_distance") == "l2":
        return size**2
    if method.get("alignment_distance") == "huber":
        delta = method["alignment_huber_delta"]
        return size**2 / 2 if size <= delta else delta * size - delta**2 / 2
    return size


def loss_of(
    sums: dict[str, Tensor],
    counts: dict[str, int],
    reference: dict[str, float],
    method: dict[str, Any],
    mean_chosen_length: float,
) -> Tensor:
    """The loss of one example, by the papers' formulas written out (arXiv 2505.11166; LongPO: 2502.13922).

    ``mean_chosen_length``: over the batch, of the chosen answers on the preference loss's context.
    """
    if method["objective"] == "sft":
        return -sums["response"] / counts["response"]
    kind, mode = method["preference_loss"], method["context_mode"]
    side = "long" if mode == "long" else "short"
    chosen, rejected = f"{side}_chosen", f"{side}_rejected"

    def log_ratio(role: str) -> Tensor:
        anchor = role
        if kind == "longpo" or (mode == "solo" and method.get("alignment_reference") == "short"):
            anchor = role.replace("long", "short")
        return sums[role] - reference[anchor]

    def reward(role: str) -> Tensor:
        if kind in ("dpo", "ipo", "longpo"):
            return method["beta"] * log_ratio(role)
        mean = sums[role] / counts[role]
        return method["beta"] * mean if kind == "simpo" else mean - torch.log1p(-torch.exp(mean))

    per_token = method.get("sft_normalization") == "token"
    likelihood = -sums[chosen] / (mean_chosen_length if per_token else counts[chosen])
    margin = reward(chosen) - reward(rejected)
    if kind == "ipo":
        gap = log_ratio(chosen) / counts[chosen] - log_ratio(rejected) / counts[rejected]
        loss = (gap - 1 / (2 * method["beta"])) ** 2
    elif kind == "orpo":
        loss = likelihood + method["orpo_lambda"] * logistic(margin)
    elif kind == "longpo":
        loss = likelihood + method["longpo_lambda"] * logistic(margin)
    else:
        loss = smoothed(margin - method["simpo_gamma"] if kind == "simpo" else margin, method)
    loss = loss + method.get("sft_weight", 0.0) * likelihood
    if mode == "solo":
        for response in ("chosen", "rejected") if method.get("alignment_target") == "both" else ("chosen",):
            short = reward(f"short_{response}")
            if method.get("alignment_stop_short_gradient"):
                short = short.detach()
            loss = loss + method["alignment_weight"] * distance(short - reward(f"long_{response}"), method)
    return loss


def batch(
    examples: list[Scores], reference: list[dict[str, float]], method: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor]]:
    """(loss of each example, gradient of their mean by tensor): every example weighs the same."""
    side = "long_chosen" if method.get("context_mode") == "long" else "short_chosen"
    mean_length = sum(example.counts.get(side, 0) for example in examples) / len(examples)
    losses: list[float] = []
    total: dict[str, Tensor] = {}
    for example, row in zip(examples, reference, strict=True):
        sums = {role: value.clone().requires_grad_() for role, value in example.sums.items()}
        loss = loss_of(sums, example.counts, row, method, mean_length)
        loss.backward()
        losses.append(loss.item())
        for role, value in sums.items():
            if value.grad is not None:
                for name, gradient in example.gradients[role].items():
                    total[name] = total.get(name, 0) + value.grad * gradient / len(examples)
    return losses, total
