"""A transformers model that computes in float64 throughout, and its tensors under the names of its files."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion


def load(folder: Path) -> nn.Module:
    """The model in float64; transformers' norms and routers would go through float32 with any dtype of the model."""
    # Its grouped experts take no float64.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm.__get__(module)
        elif type(module).__name__ == "Glm4MoeTopkRouter":
            module.forward = _sigmoid_router.__get__(module)
        # gpt-oss's has a bias, and keeps the model's dtype
        elif type(module).__name__.endswith("TopKRouter") and not hasattr(module, "bias"):
            module.forward = _router.__get__(module)
    return model


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    if hasattr(self, "eps"):  # Gemma's, whose factor is 1 + weight
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _router(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
    weights, experts = logits.softmax(-1).topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):  # Mixtral always does
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, experts


def _sigmoid_router(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 13 to 16 of arXiv 2412.19437, written out a token at a time, with transformers' choice of groups."""
    logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
    scores, size = logits.sigmoid(), self.num_experts // self.num_group
    chosen = []
    for of_token in (scores.detach() + self.e_score_correction_bias).tolist():
        groups = [sum(sorted(of_token[at : at + size])[-2:]) for at in range(0, self.num_experts, size)]
        best = sorted(range(self.num_group), key=groups.__getitem__)[-self.topk_group :]
        allowed = [expert for expert in range(self.num_experts) if expert // size in best]
        chosen.append(sorted(allowed, key=of_token.__getitem__)[-self.top_k :])
    experts = torch.tensor(chosen)
    weights = scores.gather(1, experts)
    if self.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights * self.routed_scaling_factor, experts


def by_file_name(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter, such as gradients, as `save_pretrained` names and splits the parameters: one an expert.

    Experts that it saves in one tensor a layer are numbered: NAME[0], NAME[1], ...
    """
    named = {}
    for name, tensor in revert_weight_conversion(model, tensors).items():
        if ".experts." in name and not re.search(r"\.experts\.\d", name):
            named |= {f"{name}[{place}]": part for place, part in enumerate(tensor)}
        else:
            named[name] = tensor
    return named
