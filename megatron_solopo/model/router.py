"""The router of a layer with experts, for megatron-core's layer specs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn


class Router(TopKRouter):
    """Routes each token to its most probable experts.

    With ``moe_router_score_function`` sigmoid, as in DeepSeek-V3 (arXiv 2412.19437, equations 13 to 16) and GLM-4.5,
    each expert has a score of its own. A bias of each expert is added where experts are chosen, not in their weights;
    with several groups of experts they come from the groups whose two best experts have the largest sum. With softmax,
    as in DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), they come from the groups with the best experts.

    megatron-core's router computes the softmax in float32 whatever the model's dtype (moe_utils.py:841, 936, version
    0.19.2), and divides by 0 where a micro-batch is all padding (:138). This one keeps float64, and counts padding in
    neither the load nor the probabilities. Padding does pass through the experts: no token is dropped in favour of
    another, so it changes nothing.

    Attributes:
        aux_loss: sum of the auxiliary loss of this rank's tokens since `take_aux_loss`, without coefficient.
        expert_bias: [experts] float32, of sigmoid routers; it has no gradient, and training leaves it as it is.
    """

    aux_loss: Tensor | float = 0.0

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.config.moe_router_score_function == "sigmoid":
            zeros = torch.zeros(self.config.num_moe_experts or 0, dtype=torch.float32)
            self.expert_bias = nn.Parameter(zeros, requires_grad=False)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes the weight of each expert in each token's output, and which experts are chosen.

        Args:
            logits: [S, 1, experts].
            padding_mask: [S, 1], true where a token is padding.

        Returns:
            [S, experts] in the dtype of ``logits``, 0 where not chosen; [S, experts] bool.
        """
        logits = logits.flatten(0, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.config.moe_router_score_function == "sigmoid":
            assert self.expert_bias is not None
            scores = logits.to(wide).sigmoid()
            experts = self._chosen(scores.detach() + self.expert_bias, best=2)
            top, probs = scores.gather(1, experts), scores / scores.sum(-1, keepdim=True)
        else:
            probs = logits.softmax(-1, dtype=wide)
            experts = self._chosen(probs.detach(), best=1)
            top = probs.gather(1, experts)
        if not self.config.moe_router_pre_softmax:
            top = top / top.sum(-1, keepdim=True)
        if self.config.moe_router_topk_scaling_factor is not None:
            top = top * self.config.moe_router_topk_scaling_factor
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, experts, True)
        weights = torch.zeros_like(probs).scatter(1, experts, top).to(logits.dtype)
        if self.config.moe_aux_loss_coeff and self.training and torch.is_grad_enabled():
            loss = self._load_balancing_loss(probs, chosen, padding_mask)
            self.aux_loss = self.aux_loss + loss.detach()
            weights = MoEAuxLossAutoScaler.apply(weights, self.config.moe_aux_loss_coeff * loss)
        return weights, chosen

    def _chosen(self, scores: Tensor, best: int) -> Tensor:
        """[S, experts] -> [S, k], the experts of each token; groups are compared by the sum of their ``best`` ones."""
        groups, chosen = self.config.moe_router_num_groups or 1, self.config.moe_router_group_topk or 1
        if chosen < groups:
            of_groups = scores.unflatten(1, (groups, -1))
            kept = of_groups.topk(best, dim=-1).values.sum(-1).topk(chosen, dim=-1).indices
            left_out = torch.ones_like(of_groups[..., 0], dtype=torch.bool).scatter(1, kept, False)
            scores = of_groups.masked_fill(left_out[..., None], float("-inf")).flatten(1)
        return scores.topk(self.topk, dim=-1).indices

    def _load_balancing_loss(self, probs: Tensor, chosen: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Computes Switch Transformers' loss (arXiv 2101.03961, equations 4 to 6) over T tokens for the top k.

        It is E sum_i f_i P_i with E experts, f_i the fraction of the k T choices of expert i, and P_i its mean
        probability, of sigmoid scores its share in their sum (arXiv 2412.19437, equation 19); 1 where balanced. Where
        ranks share a micro-batch, each returns its tokens' part of the sum.
        """
        if padding_mask is not None:
            real = ~padding_mask.reshape(-1, 1)
            probs, chosen = probs * real, chosen & real
        load = chosen.sum(0)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(load, group=self.tp_cp_group)
        choices = load.sum().clamp(min=1)  # a micro-batch of padding has none, and its loss is 0
        tokens = choices / self.topk
        return probs.shape[-1] * (load.to(probs.dtype) / choices * probs.sum(0) / tokens).sum()


def padding_mask(model: nn.Module, mask: Tensor) -> Tensor | None:
    """Returns [1, S] true where a token is padding, as megatron-core expects it; None without an auxiliary loss.

    mcore shards it for sequence parallelism on the first pipeline stage only (gpt_model.py:352, version 0.19.2);
    this function shards it for the others.

    Args:
        mask: [S] of the rows of the pack that this context-parallel rank computes.
    """
    config = get_model_config(model)
    if not (config.num_moe_experts and config.moe_aux_loss_coeff):
        return None
    if config.sequence_parallel and not get_attr_wrapped_model(model, "pre_process"):
        group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()  # pyright: ignore[reportAssignmentType]
        mask = mask.chunk(group.size())[group.rank()]
    return mask[None]


def take_aux_loss(model: nn.Module) -> Tensor | float:
    """Returns the sum of the auxiliary loss over this rank's layers and micro-batches since the last call."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    total = sum(router.aux_loss for router in routers)
    for router in routers:
        router.aux_loss = 0.0
    return total
