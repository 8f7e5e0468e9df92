"""A single-process float64 oracle in plain transformers and closed-form losses: nothing of the package is used.

Examples and methods are plain dicts, as the worker gets them:

    {"id", "prompts": [{"ids", "jumps", "completions": [{"role", "response", "ids", "loss_mask" (or null)}]}]}
    {"objective", "preference_loss", "context_mode", "beta", "alignment_weight", ...}

A loss depends on the model only through the log-prob sum of each completion. So the gradient of every sum is taken
once, one sequence at a time, and a method's gradient is their combination by the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers_in_double import by_file_name, load


def named(role: str, response: int) -> str:
    """The name of a response: further ones of a role are numbered from 1."""
    return f"{role}_{response}" if response else role


def called(model: nn.Module, prompt: dict[str, Any], completion: list[int]) -> tuple[Tensor, Tensor]:
    """[1, S] ids of a prompt and what follows it, and their logits; a jump (token, gap) moves all positions from a
    token on."""
    ids = torch.tensor([prompt["ids"] + completion])
    positions = torch.arange(ids.shape[1])[None]
    for token, gap in prompt["jumps"]:
        positions[:, token:] += gap
    # Without a mask transformers takes a jump for the start of another sequence (`find_packed_sequence_indices`).
    return ids, model(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits


def log_probs(model: nn.Module, example: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Role -> summed log-prob of the trained tokens, and their number; one sequence at a time.

    "ROLE tail" is the sum beyond the length of the shortest response, "ROLE squares" the sum of the logarithms of the
    summed squared probabilities, without gradient.
    """
    sums, counts = {}, {}
    trained = [sum(c["loss_mask"] or [1] * len(c["ids"])) for p in example["prompts"] for c in p["completions"]]
    for prompt in example["prompts"]:
        for completion in prompt["completions"]:
            ids, logits = called(model, prompt, completion["ids"])
            scores = logits[0, :-1].log_softmax(-1)
            picked = scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt["ids"]) - 1 :]
            loss_mask = torch.tensor(completion["loss_mask"] or [True] * len(completion["ids"]))
            role = named(completion["role"], completion.get("response", 0))
            sums[role] = picked[loss_mask].sum()
            sums[f"{role} tail"] = picked[loss_mask][min(trained) :].sum()
            squares = scores.detach().exp().square().sum(-1).log()[len(prompt["ids"]) - 1 :]
            sums[f"{role} squares"] = squares[loss_mask].sum()
            counts[role] = int(loss_mask.sum())
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
            role: by_file_name(
                model, dict(zip(names, torch.autograd.grad(value, parameters, retain_graph=True), strict=True))
            )
            for role, value in sums.items()
            if value.requires_grad
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
    routers = _routers(model)
    outputs: dict[nn.Module, list[tuple[Tensor, ...]]] = {router: [] for router in routers}
    first = 0
    hooks = [
        router.register_forward_hook(lambda module, _, output: outputs[module].append(tuple(x[first:] for x in output)))
        for router in routers
    ]
    for prompt in (prompt for example in examples for prompt in example["prompts"]):
        for place, completion in enumerate(prompt["completions"]):
            first = len(prompt["ids"]) if place else 0
            called(model, prompt, completion["ids"][:-1])
    for hook in hooks:
        hook.remove()
    total = torch.zeros((), dtype=torch.float64)
    for router, parts in outputs.items():
        logits, _, chosen = map(torch.cat, zip(*parts, strict=True))
        probs = logits.softmax(-1)
        if hasattr(router, "e_score_correction_bias"):  # a sigmoid router, whose scores are normalised
            probs = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        choices = torch.zeros_like(probs).scatter(1, chosen, 1.0)
        total = total + probs.shape[1] * (choices.sum(0) / choices.sum() * probs.mean(0)).sum()
    return total


def _routers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def layers_with_experts(model: nn.Module) -> int:
    """The number of layers that have a router."""
    return len(_routers(model))


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
    rivals: Sequence[tuple[dict, dict, dict]] = (),
) -> Tensor:
    """The loss of one example, by the papers' formulas written out (arXiv 2505.11166; LongPO: 2502.13922).

    ``mean_chosen_length``: over the batch, of the chosen answers on the preference loss's context.
    ``rivals``: (sums, reference, counts) with each of the group's rejected answers, for Plackett-Luce.
    """
    if method["objective"] == "sft":
        return -sums["response"] / counts["response"]
    kind, mode = method["preference_loss"], method["context_mode"]
    side = "long" if mode == "long" else "short"
    chosen, rejected = f"{side}_chosen", f"{side}_rejected"

    def log_ratio(role: str, sums: dict = sums, reference: dict = reference) -> Tensor:
        anchor = role
        if kind == "longpo" or (mode == "solo" and method.get("alignment_reference") == "short"):
            anchor = role.replace("long", "short")
        if kind == "ld_dpo":
            less = 1 - method["ld_alpha"]
            tails = sums[f"{role} tail"] - reference[f"{anchor} tail"]
            return sums[role] - reference[anchor] - less * tails
        return sums[role] - reference[anchor]

    def reward(role: str, sums: dict = sums, reference: dict = reference, counts: dict = counts) -> Tensor:
        if kind in ("dpo", "ipo", "longpo", "ld_dpo", "wpo"):
            return method["beta"] * log_ratio(role, sums, reference)
        if kind == "dpo_norm":
            return method["beta"] * log_ratio(role, sums, reference) / counts[role]
        mean = sums[role] / counts[role]
        return method["beta"] * mean if kind == "simpo" else mean - torch.log1p(-torch.exp(mean))

    per_token = method.get("sft_normalization") == "token"
    likelihood = -sums[chosen] / (mean_chosen_length if per_token else counts[chosen])
    margin = reward(chosen) - reward(rejected)
    if method.get("pair_reduction") == "plackett_luce":
        margin = reward(chosen) - sum(torch.exp(reward(rejected, *rival)) for rival in rivals).log()
    if kind == "ipo":
        gap = log_ratio(chosen) / counts[chosen] - log_ratio(rejected) / counts[rejected]
        loss = (gap - 1 / (2 * method["beta"])) ** 2
    elif kind == "orpo":
        loss = likelihood + method["orpo_lambda"] * logistic(margin)
    elif kind == "longpo":
        loss = likelihood + method["longpo_lambda"] * logistic(margin)
    else:
        loss = smoothed(margin - method["simpo_gamma"] if kind == "simpo" else margin, method)
    if kind == "wpo":
        for role in (chosen, rejected):
            loss = loss * torch.exp((sums[role].detach() - sums[f"{role} squares"].detach()) / counts[role])
    loss = loss + method.get("sft_weight", 0.0) * likelihood
    if mode == "solo":
        for response in ("chosen", "rejected") if method.get("alignment_target") == "both" else ("chosen",):
            short = reward(f"short_{response}")
            if method.get("alignment_stop_short_gradient"):
                short = short.detach()
            loss = loss + method["alignment_weight"] * distance(short - reward(f"long_{response}"), method)
    return loss


def group_loss(
    sums: dict[str, Tensor],
    counts: dict[str, int],
    reference: dict[str, float],
    method: dict[str, Any],
    mean_chosen_length: float,
) -> Tensor:
    """The loss of a group: the mean over its pairs of a chosen and a rejected response."""
    if method["objective"] == "sft":
        return loss_of(sums, counts, reference, method, mean_chosen_length)

    def pair(chosen: int, rejected: int) -> tuple[dict, dict, dict]:
        return tuple(
            {
                role + more: values[name]
                for context, side in product(("short", "long"), ("chosen", "rejected"))
                for role, more in product([f"{context}_{side}"], ("", " tail", " squares"))
                if (name := named(role, chosen if side == "chosen" else rejected) + more) in values
            }
            for values in (sums, reference, counts)
        )

    sides = [[name for name in counts if name.startswith((f"short_{y}", f"long_{y}"))] for y in ("chosen", "rejected")]
    k, m = (len({name.partition("_")[2] for name in names}) for names in sides)
    losses = []
    for i, j in product(range(k), range(m)):
        of_pair, row, lengths = pair(i, j)
        rivals = [pair(i, other) for other in range(m)]
        losses.append(loss_of(of_pair, lengths, row, method, mean_chosen_length, rivals))
    return torch.stack(losses).mean()


def batch(
    examples: list[Scores], reference: list[dict[str, float]], method: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor]]:
    """(loss of each example, gradient of their mean by tensor): every example weighs the same."""
    side = "long_chosen" if method.get("context_mode") == "long" else "short_chosen"
    chosen = [[n for name, n in example.counts.items() if name.startswith(side)] for example in examples]
    mean_length = sum(sum(each) / max(len(each), 1) for each in chosen) / len(examples)
    losses: list[float] = []
    total: dict[str, Tensor] = {}
    for example, row in zip(examples, reference, strict=True):
        sums = {role: value.clone().requires_grad_() for role, value in example.sums.items()}
        loss = group_loss(sums, example.counts, row, method, mean_length)
        loss.backward()
        losses.append(loss.item())
        for role, value in sums.items():
            if value.grad is not None:
                for name, gradient in example.gradients[role].items():
                    total[name] = total.get(name, 0) + value.grad * gradient / len(examples)
    return losses, total
