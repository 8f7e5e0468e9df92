"""A transformers model that computes in float64 throughout, and its tensors under the names of its files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
        elif hasattr(module, "e_score_correction_bias"):
            module.forward = _sigmoid_router.__get__(module)
        elif type(module).__name__ == "DeepseekV2TopkRouter":
            module.forward = _router_by_group.__get__(module)
        elif type(module).__name__ == "DeepseekV2RotaryEmbedding":
            module.forward = _turns.__get__(module)
        elif type(module).__name__ == "DeepseekV2Attention":
            module.forward = _latent_attention.__get__(module)
        # gpt-oss's has a bias, and keeps the model's dtype
        elif type(module).__name__.endswith("TopKRouter") and not hasattr(module, "bias"):
            module.forward = _router.__get__(module)
        elif type(module).__name__.endswith("GatedDeltaNet"):
            module.forward = _delta_net.__get__(module)
    return model


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    if hasattr(self, "with_scale"):  # Gemma 4's, of which some have no weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * getattr(self, "weight", 1)
    if hasattr(self, "eps"):  # Gemma 3's, whose factor is 1 + weight
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


def _router_by_group(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V2's (arXiv 2405.04434, section 2.2.2), a token at a time: groups are compared by their best expert."""
    logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
    scores, groups = logits.softmax(-1), self.num_group if self.topk_method == "group_limited_greedy" else 1
    size, kept, chosen = self.num_experts // groups, self.topk_group if groups > 1 else 1, []
    for of_token in scores.tolist():
        best = sorted(range(groups), key=lambda group: max(of_token[group * size : group * size + size]))[-kept:]  # noqa: B023
        allowed = [expert for expert in range(self.num_experts) if expert // size in best]
        chosen.append(sorted(allowed, key=of_token.__getitem__)[-self.top_k :])
    experts = torch.tensor(chosen)
    return logits, scores.gather(1, experts) * self.routed_scaling_factor, experts


def _turns(self: nn.Module, x: Tensor, position_ids: Tensor) -> Tensor:
    """cos + i sin, each rounded to float32 as of all other models; `torch.polar` rounds otherwise."""
    angles = position_ids[..., None].float() * self.inv_freq
    return torch.complex(angles.cos(), angles.sin()) * self.attention_scaling


def _latent_attention(self: nn.Module, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
    """Equations 37 to 47 of arXiv 2405.04434, a head at a time; ``position_embeddings`` are cos + i sin."""
    (x,), (turns,) = hidden_states, given["position_embeddings"]
    nope, rotated, width = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim

    def turned(pairs: Tensor) -> Tensor:
        first, second, cos, sin = pairs[:, ::2], pairs[:, 1::2], turns.real.double(), turns.imag.double()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_proj is None else self.q_proj(x)
    latent, shared = self.kv_a_proj_with_mqa(x).split((self.kv_lora_rank, rotated), -1)
    expanded = self.kv_b_proj(self.kv_a_layernorm(latent))
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    outputs = []
    for query, keyed in zip(queries.split(nope + rotated, -1), expanded.split(nope + width, -1), strict=True):
        scores = query[:, :nope] @ keyed[:, :nope].T + turned(query[:, nope:]) @ turned(shared).T
        weights = (scores * self.scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(weights @ keyed[:, nope:])
    return self.o_proj(torch.cat(outputs, -1))[None], None


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
