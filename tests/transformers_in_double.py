"""A transformers model that computes in float64 throughout, and its tensors under the names of its files."""

from __future__ import annotations

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
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = _router.__get__(module)
        elif type(module).__name__.endswith("GatedDeltaNet"):
            module.forward = _delta_net.__get__(module)
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


def _delta_net(self: nn.Module, hidden_states: Tensor, **ignored: object) -> Tensor:
    """The gated delta rule token by token (arXiv 2412.06464, equation 10)."""
    keys, values, width = self.num_k_heads, self.num_v_heads, self.head_v_dim
    (x,) = hidden_states
    if hasattr(self, "in_proj_ba"):  # Qwen3-Next: by key head
        parts = self.fix_query_key_value_ordering(self.in_proj_qkvz(x)[None], self.in_proj_ba(x)[None])
        query, key, value, gate, b, a = (part[0] for part in parts)
        mixed = torch.cat([part.flatten(1) for part in (query, key, value)], -1)
    else:
        mixed, gate, b, a = self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)
    padded = F.pad(mixed.T, (self.conv_kernel_size - 1, 0))
    mixed = F.silu(F.conv1d(padded[None], self.conv1d.weight, groups=len(padded))[0].T)
    query, key, value = mixed.split([self.key_dim, self.key_dim, self.value_dim], -1)
    query, key = (part.unflatten(-1, (keys, -1)) for part in (query, key))
    query, key = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (query, key))
    query, key = (part.repeat_interleave(values // keys, 1) for part in (query / query.shape[-1] ** 0.5, key))
    value, beta = value.unflatten(-1, (values, -1)), b.sigmoid()
    decay = torch.exp(-self.A_log.exp() * F.softplus(a + self.dt_bias))
    state, outputs = x.new_zeros(values, key.shape[-1], width), []
    for q, k, v, rate, kept in zip(query, key, value, beta, decay, strict=True):
        state = state * kept[:, None, None]
        correction = rate[:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
        state = state + torch.einsum("hk,hv->hkv", k, correction)
        outputs.append(torch.einsum("hkv,hk->hv", state, q))
    output = torch.stack(outputs)
    output = output / (output.square().mean(-1, keepdim=True) + self.layer_norm_epsilon).sqrt() * self.norm.weight
    return self.out_proj((output * F.silu(gate.reshape(output.shape))).flatten(1))[None]


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
    """Tensors by parameter, such as gradients, as `save_pretrained` names and splits the parameters: one an expert."""
    return revert_weight_conversion(model, tensors)
