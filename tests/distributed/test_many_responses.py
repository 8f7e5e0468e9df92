"""Several chosen and rejected responses for each group, against the oracle's formulas on generated sums."""

from __future__ import annotations

from itertools import product
from typing import Any

import oracle
import pytest
import torch
from methods import OPTIONS, method_roles
from segment_names import SEGMENTS

from megatron_solopo.config import OWNER, MethodConfig
from megatron_solopo.losses import solopo_loss
from megatron_solopo.losses.solopo import aligned_sides, pair_context, reference_context
from megatron_solopo.pack import Segments, segment_name

COUNTS = [(2, 3), (1, 2), (3, 1), (1, 1), (4, 8)]
"""(chosen, rejected) responses of each group."""


def config_of(method: dict[str, Any]) -> MethodConfig:
    of_loss = {name: value for name, value in method.items() if OWNER[name].of_loss}
    common = {name: value for name, value in method.items() if name not in of_loss}
    return MethodConfig(**common, loss_options=of_loss)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_groups_loss_is_the_mean_over_its_pairs(name: str) -> None:
    """Value and gradient; an alignment is so the mean over the responses of its side."""
    method, config = OPTIONS[name], config_of(OPTIONS[name])
    draw = torch.Generator().manual_seed(3)
    keys = [
        (group, role, k)
        for group, counts in enumerate(COUNTS)
        for role in SEGMENTS
        for k in range(counts["rejected" in role])
        if role != "response"
    ]
    lengths = {
        (group, side, k): int(torch.randint(1, 9, (), generator=draw))
        for group, counts in enumerate(COUNTS)
        for side in ("chosen", "rejected")
        for k in range(counts[side == "rejected"])
    }
    tokens = {(group, role, k): lengths[group, role.split("_")[1], k] for group, role, k in keys}
    policy, reference = (
        {key: -4 * tokens[key] * torch.rand((), generator=draw, dtype=torch.float64) for key in keys} for _ in range(2)
    )
    policy = {key: value.requires_grad_() for key, value in policy.items()}
    squares = {key: -tokens[key] * torch.rand((), generator=draw, dtype=torch.float64) for key in keys}
    chosen = [[lengths[group, "chosen", k] for k in range(counts[0])] for group, counts in enumerate(COUNTS)]
    mean_length = sum(sum(each) / len(each) for each in chosen) / len(COUNTS)

    wanted = []
    for group, counts in enumerate(COUNTS):
        losses = []
        for which in product(*map(range, counts)):
            at = {role: (group, role, which["rejected" in role]) for role in SEGMENTS if role != "response"}
            sums, refs = ({role: values[key] for role, key in at.items()} for values in (policy, reference))
            sums |= {f"{role} squares": squares[key] for role, key in at.items()}
            for each in (sums, refs):  # LD-DPO's sums have their weights already
                each |= {f"{role} tail": torch.zeros(()) for role in at}
            rivals = []
            for k in range(counts[1]):
                one = {role: (group, role, k if "rejected" in role else which[0]) for role in at}
                rivals.append([{r: values[key] for r, key in one.items()} for values in (policy, reference, tokens)])
            losses.append(
                oracle.loss_of(sums, {r: tokens[key] for r, key in at.items()}, refs, method, mean_length, rivals)
            )
        wanted.append(torch.stack(losses).mean())
    scored = [key for key in keys if key[1] in method_roles(method)]
    gradient = torch.autograd.grad(torch.stack(wanted).sum(), [policy[key] for key in scored])

    segments = Segments.of(
        [(group, *SEGMENTS[role], k, tokens[group, role, k]) for group, role, k in scored], len(COUNTS)
    )
    compared = [
        (group, segment_name(reference_context(SEGMENTS[role][0], config), SEGMENTS[role][1]), k)
        for group, role, k in scored
    ]
    got = solopo_loss(
        torch.stack([policy[key] for key in scored]),
        segments,
        segments.pairs(pair_context(config)),
        segments.alignments(aligned_sides(config)),
        torch.stack([reference[key] for key in compared]),
        config,
        torch.tensor(mean_length, dtype=torch.float64),
        torch.stack([squares[key] for key in scored]),
    ).loss
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(got.sum(), [policy[key] for key in scored])
    torch.testing.assert_close(torch.stack(ours), torch.stack(gradient), rtol=1e-10, atol=1e-12)
