"""Which groups a step trains on, and which process computes which of them in which pack.

Everything here is a function of (number of examples, seed, step, sizes): the same on every process, and the same
when a run resumes from a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_solopo.config import FP8_MULTIPLES, Config
from megatron_solopo.data.tokenized.tokens import TokenGroup
from megatron_solopo.errors import UserError
from megatron_solopo.pack import Windows
from megatron_solopo.parallel.context import method_of

FULL_ATTENTION = Windows()


@dataclass(frozen=True)
class Schedule:
    """The order of examples over a whole run.

    Attributes:
        examples: examples in the training set.
        global_batch_size: examples a step; the last step takes what is left.
        total: examples the run consumes, over all epochs.
        seed: of the shuffles, one for each epoch.
        shuffle: False keeps the file's order in every epoch.
    """

    examples: int
    global_batch_size: int
    total: int
    seed: int
    shuffle: bool

    @property
    def steps(self) -> int:
        return math.ceil(self.total / self.global_batch_size)

    def step(self, number: int) -> list[int]:
        """Returns the examples of step 0, 1, ...; each example once an epoch."""
        return [self._example(place) for place in self._places(number)]

    def epochs(self, number: int) -> list[int]:
        """Returns the epoch of each example of a step, from 0."""
        return [place // self.examples for place in self._places(number)]

    def _places(self, number: int) -> range:
        first = number * self.global_batch_size
        return range(first, min(first + self.global_batch_size, self.total))

    def _example(self, place: int) -> int:
        epoch, within = divmod(place, self.examples)
        return int(_order(self.examples, self.seed, epoch)[within]) if self.shuffle else within


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def make_schedule(
    examples: int, global_batch_size: int, iters: int | None, epochs: float | None, seed: int, shuffle: bool
) -> Schedule:
    """Returns a schedule of ``iters`` full steps, or of ``epochs`` passes whose last step may be smaller."""
    total = iters * global_batch_size if iters is not None else max(1, round(epochs * examples))
    return Schedule(examples, global_batch_size, total, seed, shuffle)


def attention_cost(
    group: TokenGroup, width: float, share_prompts: bool = True, windows: Windows = FULL_ATTENTION
) -> float:
    """Relative compute of a group, in tokens: linear layers grow with its tokens, attention with pairs of tokens that
    attend, of which 6 ``width`` cost as much as a token (`model.cost.width_of_cost`)."""
    pairs = 0
    for prompt in group.prompts:
        p = len(prompt.ids)
        prompt_pairs = windows.pairs(p, 0)
        pairs += prompt_pairs if share_prompts else prompt_pairs * len(prompt.completions)
        pairs += sum(windows.pairs(len(c.ids), p) for c in prompt.completions)
    return group.tokens(share_prompts) + pairs / (6 * width)


@dataclass(frozen=True)
class StepPlan:
    """Who computes which groups of a step.

    Attributes:
        shares: data-parallel rank -> packs -> places in the step.
        loads: estimated compute of each rank.
        of_pieces, of_packs: pieces and packs are padded to multiples of these.
        of_prompts: and pieces that attend to themselves alone (prompts, or each prompt with its completion where
            prompts are separate) to multiples of this.
    """

    shares: list[list[list[int]]]
    loads: list[float]
    of_pieces: int
    of_packs: int
    of_prompts: int

    @property
    def imbalance(self) -> float:
        """How much longer than the mean the dearest rank computes, as a share; the others wait for it."""
        mean = sum(self.loads) / len(self.loads)
        return max(self.loads) / mean - 1 if mean else 0.0


def plan_step(
    groups: Sequence[TokenGroup],
    width: float,
    ranks: int,
    config: Config,
    device: str = "cpu",
    windows: Windows = FULL_ATTENTION,
) -> StepPlan:
    """Returns the plan of a step's groups over ``ranks`` data-parallel processes, the same on every process.

    Args:
        width: see `attention_cost`.
        device: ``cuda`` or ``cpu``, where the packs are computed.
        windows: of the model's layers.
    """
    training, share_prompts, parallel = config.training, config.data.share_prompts, config.parallel
    context = parallel.context_parallel_size
    of_pieces, of_prompts = pieces_multiple_of(config), prompts_multiple_of(config, device)
    costs = [attention_cost(group, width, share_prompts, windows) for group in groups]
    shares = plan(
        costs,
        [group.tokens(share_prompts, of_pieces, of_prompts) for group in groups],
        ranks,
        training.micro_batch_size,
        most_tokens_of_a_pack(config),
        # The interleaved schedule sends packs through the chunks in groups of one pack a stage.
        parallel.pipeline_model_parallel_size if parallel.num_virtual_stages_per_pipeline_rank > 1 else 1,
    )
    loads = [sum(costs[place] for pack in share for place in pack) for share in shares]
    # Sequence parallelism cuts what context parallelism left into even parts, each as FP8's kernels take it.
    even = context * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    if config.model.fp8_format is not None:
        even *= FP8_MULTIPLES[config.model.fp8_recipe]
    return StepPlan(shares, loads, of_pieces, math.lcm(of_pieces, even), of_prompts)


def pieces_multiple_of(config: Config) -> int:
    """Each piece is padded to a multiple of this, so that context parallelism can cut it."""
    size = config.parallel.context_parallel_size
    return method_of(size, config.parallel.cp_comm_type).piece_multiple(size)


def prompts_multiple_of(config: Config, device: str) -> int:
    """Each piece that attends to itself alone is padded to a multiple of this."""
    size = config.parallel.context_parallel_size
    return method_of(size, config.parallel.cp_comm_type).prompt_multiple(size, config, device)


def most_tokens_of_a_pack(config: Config) -> int | None:
    """--max-tokens-per-rank of all context-parallel ranks together, or None.

    Raises:
        UserError: it is auto, which only a training run and its dry run resolve.
    """
    most = config.training.max_tokens_per_rank
    if isinstance(most, str):
        raise UserError(
            "option-conflict",
            f"--max-tokens-per-rank {most}: only training and its dry run choose the number; set one",
        )
    return most and most * config.parallel.context_parallel_size


def above_the_token_limit(groups: Iterable[TokenGroup], config: Config, device: str = "cpu") -> str | None:
    """Returns a line about the groups that alone are above --max-tokens-per-rank, or None; ``device`` as in
    `plan_step`.

    They are no mistake: a group has two prompts and all responses, and is larger than --seq-length where its long
    context is near it. None is split, so each is a separate pack.
    """
    most, context = most_tokens_of_a_pack(config), config.parallel.context_parallel_size
    if most is None:
        return None
    multiples = pieces_multiple_of(config), prompts_multiple_of(config, device)
    tokens = [group.tokens(config.data.share_prompts, *multiples) for group in groups]
    above = [count for count in tokens if count > most]
    if not above:
        return None
    return (
        f"{len(above):,} of {len(tokens):,} examples alone are above --max-tokens-per-rank "
        f"{config.training.max_tokens_per_rank:,}: with both contexts and all responses up to "
        f"{math.ceil(max(above) / context):,} tokens a process, each in a separate pack; memory must suffice for that"
    )


def plan(
    costs: Sequence[float],
    tokens: Sequence[int],
    ranks: int,
    most_groups: int,
    most_tokens: int | None,
    packs_multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Splits a step's groups over processes and packs: result[rank][micro-batch] = places in the step.

    The dearest group goes to the cheapest process first (longest processing time first), then each process fills
    packs the same way. Every process gets the same number of packs, because pipeline schedules require it; a pack may
    be empty (weight zero). No group is left out and none appears twice.

    Args:
        costs: relative compute of each group.
        tokens: tokens of each group.
        ranks: data-parallel processes.
        most_groups: the most groups of a pack.
        most_tokens: the most tokens of a pack; None for no limit.
        packs_multiple_of: the number of packs of a process is a multiple of this.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    shares = _spread(order, costs, ranks)
    packs = max(max(_packs_needed(share, tokens, most_groups, most_tokens) for share in shares), 1)
    packs += -packs % packs_multiple_of
    while True:
        result = [_fill(share, costs, tokens, packs, most_groups, most_tokens) for share in shares]
        if all(filled is not None for filled in result):
            return result
        packs += packs_multiple_of  # the token limit did not work out with this many packs


def _spread(order: Sequence[int], costs: Sequence[float], bins: int) -> list[list[int]]:
    loads, shares = [0.0] * bins, [[] for _ in range(bins)]
    for item in order:
        target = min(range(bins), key=lambda b: (loads[b], len(shares[b]), b))
        shares[target].append(item)
        loads[target] += costs[item]
    return shares


def _packs_needed(share: Sequence[int], tokens: Sequence[int], most_groups: int, most_tokens: int | None) -> int:
    needed = math.ceil(len(share) / most_groups)
    if most_tokens is not None:
        # A group above the limit is the only one of its pack.
        needed = max(needed, math.ceil(sum(min(tokens[i], most_tokens) for i in share) / most_tokens))
    return needed


def _fill(
    share: Sequence[int],
    costs: Sequence[float],
    tokens: Sequence[int],
    packs: int,
    most_groups: int,
    most_tokens: int | None,
) -> list[list[int]] | None:
    """Returns the share in this many packs, each within the limits, or None. A group alone may exceed the token
    limit."""
    filled: list[list[int]] = [[] for _ in range(packs)]
    loads = [0.0] * packs
    for item in share:
        open_packs = [
            b
            for b in range(packs)
            if not filled[b]
            or (
                len(filled[b]) < most_groups
                and (most_tokens is None or sum(tokens[i] for i in filled[b]) + tokens[item] <= most_tokens)
            )
        ]
        if not open_packs:
            return None
        target = min(open_packs, key=lambda b: (loads[b], b))
        filled[target].append(item)
        loads[target] += costs[item]
    return filled
