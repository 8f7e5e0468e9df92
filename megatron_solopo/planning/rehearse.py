"""A rehearsal of one process's training step: the product's engine, optimizer, packs, schedule and step, under `fake`.

Everything is as large as in a run and nothing is computed, so a layout of hundreds of processes is rehearsed in
seconds on one CPU. What is not rehearsed: the allocator's fragmentation, the CUDA context and NCCL's buffers
(docs/planning.md states an allowance), workspaces inside of kernels, loading weights, saving.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from megatron_solopo.config import Config, MethodConfig
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.losses.solopo import needs_reference, policy_scores, reference_context, tail_weight
from megatron_solopo.pack import Context, Side
from megatron_solopo.planning import fake
from megatron_solopo.planning.counts import Counts, Work
from megatron_solopo.planning.memory import (
    BUILD,
    FORWARD,
    GRADIENTS,
    INPUTS,
    OPTIMIZER,
    SCORE,
    UPDATE,
    WEIGHTS,
    Ledger,
    Moment,
    followed,
)


@dataclass(frozen=True)
class Outcome:
    """What a rehearsal found of one process.

    Attributes:
        rank: the process.
        standing: bytes between steps, by kind.
        peaks: phase -> its largest moment.
        tokens: tokens of the pack, of all processes that share it.
        packs: packs of the step that were rehearsed.
        work: what the process computes and exchanges.
        host: bytes that are kept on the host for the GPU, at their peak within a step; 0 on the CPU, where all memory
            is the host's.
    """

    rank: int
    standing: dict[str, int]
    peaks: dict[str, Moment]
    tokens: int
    packs: int
    work: Work
    host: int = 0

    @property
    def peak(self) -> Moment:
        """The largest moment of all."""
        return max(self.peaks.values(), key=lambda moment: moment.total)


def rehearse(
    config: Config,
    hf_config: PretrainedConfig,
    groups: Sequence[TokenGroup],
    packs: int = 1,
    rank: int = 0,
    world: int = 1,
    device: str = "cuda",
) -> Outcome:
    """Rehearses one step of a process in the steady state, when the optimizer has its moments.

    Args:
        config: of the run; ``hf_path`` is not read.
        groups: those of one pack. Every pack of the step is like it.
        packs: packs of the step; see `packs_that_matter`.
        rank, world: which of how many processes.
        device: whose code path, ``cuda`` or ``cpu``.

    Raises:
        RuntimeError: this process has a process group already.
    """
    with fake.rehearsal(device, rank, world) as rehearsal:
        # behind the start of the platform, as in training/run.py
        from megatron_solopo.training import engine as engines
        from megatron_solopo.training import resident
        from megatron_solopo.training.step import train_step

        engines.initialize_parallel(config)
        ledger, host = Ledger(rehearsal.platform.device), Ledger(torch.device("cpu"))
        with rehearsal.mode, host, ledger:
            ledger.enter(BUILD, WEIGHTS)
            engine = engines.build_engine(rehearsal.platform, hf_config, config)
            buffers = [buffer for chunk in engine.chunks for buffer in engines.gradient_buffers(chunk)]
            ledger.mark((bucket.grad_data for buffer in buffers for bucket in buffer.buckets), GRADIENTS)
            ledger.enter(BUILD, OPTIMIZER)
            optimizer, scheduler = engines.build_optimizer(engine, config.training, 2)
            engine.zero_gradients()
            engines.squared_gradient_norm(optimizer)
            engines.update(optimizer, 1.0)  # Adam makes its moments in its first step
            engine.train()
            gc.collect()
        work, counts = _work(engine, config, groups, packs), Counts(device, rehearsal.repeats)
        if config.method.reference == "resident" and needs_reference(config.method):
            with rehearsal.mode, host, ledger, ledger.making(WEIGHTS):
                reference = _reference(engine, config.method, groups, counts)
            packs_of_reference = _packs(engine, config, reference.dataset.groups, work.plan, packs)
            work = resident.scored(reference, work, packs_of_reference, config)
            del reference, packs_of_reference
        tokens = work.packs[0].tokens
        rehearsal.stage.hidden = _hidden(work.packs[0].pack.tokens.numel(), hf_config, config)
        arguments: Any = (
            SimpleNamespace(groups=[*groups] * packs),
            SimpleNamespace(examples=1, global_batch_size=1, total=1),
            SimpleNamespace(take=lambda step, work=work: _in_phases(work, ledger)),
            0,
            config,
            # Asked for the peak between backward and the update.
            SimpleNamespace(on_this_rank=lambda: ledger.enter(UPDATE) or 0.0),
        )
        with rehearsal.mode, counts, host, ledger, followed(ledger, engine.models), counts.following(engine):
            ledger.mark(fake.fakes([work]), INPUTS)
            standing = dict(ledger.held)
            ledger.enter(FORWARD)
            host.enter(FORWARD)
            train_step(engine, optimizer, scheduler, *arguments)
        engine.close()
        in_step = [moment.total for phase, moment in host.peaks.items() if phase]
        on_host = max(in_step) if device == "cuda" else 0
        outcome = Outcome(rank, standing, ledger.peaks, tokens, packs, counts.work(packs), on_host)
        del engine, optimizer, scheduler, work, arguments, buffers
    return outcome


def _work(engine: Any, config: Config, groups: Sequence[TokenGroup], packs: int) -> Any:
    """Returns the work of a step as `step_work.step_work` makes it, of packs that are all alike."""
    from megatron_solopo.data.tokenized.batches import plan_step
    from megatron_solopo.model.cost import width_of_cost, windows_of
    from megatron_solopo.training.objective import step_inputs
    from megatron_solopo.training.step_work import StepWork

    width, windows = width_of_cost(engine.hf_config), windows_of(engine.hf_config)
    plan = plan_step(groups, width, 1, config, engine.platform.name, windows)
    packs_of_step = _packs(engine, config, groups, plan, packs)
    # what the reference says is a number a segment
    zeros = SimpleNamespace(of_pack=lambda pack, contexts: torch.zeros(len(pack.scored), dtype=torch.float64))
    reference = cast(Any, zeros) if needs_reference(config.method) else None
    each = [pack.pack for pack in packs_of_step]
    inputs = step_inputs(each, reference, config.method, engine.platform.device)
    return StepWork(list(range(len(groups))) * packs, plan, packs_of_step, inputs)


def _packs(engine: Any, config: Config, groups: Sequence[TokenGroup], plan: Any, count: int) -> Any:
    """Returns ``count`` equal packs, each of all the groups."""
    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.training.step_work import sent

    multiples = plan.of_packs, plan.of_pieces, plan.of_prompts
    pack = build_pack(groups, range(len(groups)), config.data.share_prompts, *multiples, tail_weight(config.method))
    return sent(engine, [pack] + [pack.to(torch.device("cpu")) for _ in range(count - 1)])


def _reference(engine: Any, method: MethodConfig, groups: Sequence[TokenGroup], counts: Counts) -> Any:
    """Returns the resident reference, which scores the same examples, and whose exchanges are counted as such."""
    from megatron_solopo.training.resident import ResidentReference

    those = [_for_reference(group, method) for group in groups]
    reference: Any = ResidentReference(engine, cast(Any, SimpleNamespace(groups=those)))
    reference._exchange = counts.exchanging_weights(reference._exchange)
    return reference


def _in_phases(work: Any, ledger: Ledger) -> Any:
    """Returns the work whose scoring by the reference is a phase of the ledger."""
    if work.score is None:
        return work

    def score() -> Any:
        ledger.enter(SCORE)
        inputs = work.score()
        ledger.enter(FORWARD)
        return inputs

    return replace(work, score=score)


def _for_reference(group: TokenGroup, method: MethodConfig) -> TokenGroup:
    """Returns the group as the reference scores it; where the policy does not score the context, with a longer prompt
    than the reference's."""
    prompts: dict[Context, Prompt] = {}
    for prompt in sorted(group.prompts, key=lambda it: it.context != reference_context(it.context, method)):
        context = reference_context(prompt.context, method)
        prompts.setdefault(context, replace(prompt, context=context))
    return TokenGroup(group.id, tuple(prompts[context] for context in sorted(prompts)))


def example(
    method: MethodConfig, short: int, long: int, response: int, chosen: int = 1, rejected: int = 1
) -> TokenGroup:
    """Returns a group of what ``method`` scores, whose ids count up from 0.

    Args:
        short, long: tokens of the prompts; response: of each response. A conversation has the long prompt's.
        chosen, rejected: number of responses of each side.
    """
    if method.objective == "sft":
        completions = (Completion(Side.PLAIN, range(response)),)
        return TokenGroup("example", (Prompt(Context.SHORT, range(long), completions),))
    scored = sorted(policy_scores(method))
    lengths, counts = {Context.SHORT: short, Context.LONG: long}, {Side.CHOSEN: chosen, Side.REJECTED: rejected}

    def prompt(context: Context) -> Prompt:
        sides = [side for other, side in scored if other == context]
        each = (Completion(side, range(response), response=number) for side in sides for number in range(counts[side]))
        return Prompt(context, range(lengths[context]), tuple(each))

    return TokenGroup("example", tuple(prompt(context) for context in sorted({context for context, _ in scored})))


def _hidden(tokens: int, hf_config: PretrainedConfig, config: Config) -> tuple[int, int, int]:
    """Returns the shape of the states between pipeline stages; ``tokens`` of a context-parallel rank."""
    parallel = config.parallel
    cut = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return tokens // cut, 1, hf_config.hidden_size
