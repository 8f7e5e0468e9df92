"""Sampling in process through transformers.

A prompt is computed once and its cache repeated for its samples. Every sample draws from its own row of
uniform numbers, made from the seed and the question's id, so that a response depends neither on the batch
it is sampled in nor on where a killed run was resumed.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_solopo.data.hf_model import check_reach, check_rows, load_model, stop_ids, weight_facts
from megatron_solopo.data.sampling.prompts import Prompt, Prompts
from megatron_solopo.data.sampling.responses import PartialFile
from megatron_solopo.data.sampling.sampled import Statistics, from_ids
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar


def uniforms(seed: int, question_id: str, samples: int, steps: int) -> torch.Tensor:
    """[samples, steps] numbers in [0, 1), float64, that depend on the seed and the question only."""
    digest = hashlib.sha256(f"{seed}\0{question_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(samples, steps, dtype=torch.float64, generator=generator)


def choose(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Samples one token a row by inverting the cumulative distribution.

    Args:
        logits: [rows, vocabulary].
        uniform: [rows] numbers in [0, 1), float64.
        temperature: 0 takes the most probable token.
        top_p: keep the smallest set of most probable tokens whose probabilities sum to at least this.

    Returns:
        [rows] token ids, never one of probability zero.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # The first index whose cumulative sum is above the threshold has a probability above zero; the
    # threshold must stay below the total for there to be one.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, threshold[:, None], right=True)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    numbers: torch.Tensor,
    *,
    temperature: float,
    top_p: float,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[list[list[int]]]:
    """Samples continuations of several prompts, computing every distinct prefix once.

    Samples of a prompt that agree so far are one row of the model's batch; a row is repeated when they
    part and dropped when all of them have ended. Two samples that never part cost as much as one.

    Args:
        prompts: Q lists of token ids.
        numbers: [Q, samples, steps] uniform numbers; steps is the most tokens a response may have.
        stop_ids: a response ends with the first of these.

    Returns:
        For each prompt and sample the ids, the stop id included where one was reached.
    """
    device = model.device
    count, samples, steps = numbers.shape
    width = max(map(len, prompts))
    ids = torch.full((count, width), pad_id)
    mask = torch.zeros(count, width + steps, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask, numbers = ids.to(device), mask.to(device), numbers.reshape(count * samples, steps).to(device)
    stop = torch.tensor(sorted(stop_ids), device=device)
    position_ids = (mask[:, :width].cumsum(-1) - 1).clamp_min(0)
    out = model(
        input_ids=ids, attention_mask=mask[:, :width], position_ids=position_ids, use_cache=True, logits_to_keep=1
    )
    cache, position = out.past_key_values, position_ids[:, -1:]

    tokens = torch.full((count * samples, steps), -1, device=device)
    alive = torch.arange(count * samples, device=device)  # samples that have not ended
    row_of = alive // samples  # the row of the model's batch that stands for each of them
    for step in range(steps):
        logits = out.logits[:, -1]
        chosen = choose(logits[row_of], numbers[alive, step], temperature, top_p)
        tokens[alive, step] = chosen
        going = ~torch.isin(chosen, stop)
        if step == steps - 1 or not going.any():
            break
        alive, vocabulary = alive[going], logits.shape[1]
        prefixes, row_of = torch.unique(row_of[going] * vocabulary + chosen[going], return_inverse=True)
        parents = prefixes // vocabulary
        if len(parents) != len(mask) or not torch.equal(parents, torch.arange(len(mask), device=device)):
            cache.batch_select_indices(parents)
            mask, position = mask[parents], position[parents]
        position = position + 1
        out = model(
            input_ids=(prefixes % vocabulary)[:, None],
            attention_mask=mask[:, : width + step + 1],
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
    rows = [[token for token in row if token >= 0] for row in tokens.tolist()]
    return [rows[start : start + samples] for start in range(0, len(rows), samples)]


def plan_batches(lengths: Sequence[int], questions_per_batch: int) -> list[list[int]]:
    """Indices of prompts in batches of like length, the longest first (out of memory shows at once)."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + questions_per_batch] for start in range(0, len(order), questions_per_batch)]


class InProcess:
    """The model of ``--model`` in this process.

    Raises:
        UserError: no model there, or a prompt that it cannot take.
    """

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
        self._options, self._tokenizer, self._prompts = options, tokenizer, prompts
        self._model = load_model(options.model, options.device, options.dtype)
        longest = max(range(len(prompts)), key=prompts.lengths.__getitem__)
        check_reach(
            options.model, prompts.lengths[longest], options.max_new_tokens, f"question {prompts.names[longest]!r}"
        )
        for prompt in prompts:
            check_rows(self._model, prompt.ids, f"question {prompt.id!r}")
        self._stops = stop_ids(self._model, tokenizer)
        # What decides a response here; the batch size only changes rounding.
        self.settings: dict[str, Any] = {
            "weights": weight_facts(options.model),
            "dtype": str(self._model.dtype),
            "stop_ids": self._stops,
        }

    def run(self, partial: PartialFile, statistics: Statistics) -> None:
        """Samples what ``partial`` lacks."""
        options, prompts = self._options, self._prompts
        if partial.questions:
            print(f"resuming: {partial.questions} of {len(prompts)} questions were sampled before")
        # Planned over all questions, done or not, so that a resumed run computes the very same batches.
        batches = plan_batches(prompts.lengths, max(1, options.batch_size // options.samples))
        with ProgressBar(desc="sampling", total=len(prompts), initial=partial.questions, unit="question") as bar:
            for indices in batches:
                if all(prompts.names[index] in partial for index in indices):
                    continue
                batch = [prompts[index] for index in indices]
                todo = [prompt for prompt in batch if prompt.id not in partial]
                try:
                    sampled = self._sample(batch)
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"--batch-size {options.batch_size}: the GPU is out of memory at prompts of "
                        f"{len(batch[0].ids)} tokens; repeat the command with a smaller one, what is finished is kept"
                    ) from None
                for prompt, ids in zip(batch, sampled, strict=True):
                    if prompt in todo:
                        finished = [bool(one) and one[-1] in self._stops for one in ids]
                        partial.add(from_ids(self._tokenizer, prompt, ids, finished, self._stops, statistics))
                bar.update(len(todo))

    def _sample(self, batch: Sequence[Prompt]) -> list[list[list[int]]]:
        """Every sample of a batch of questions, ``--batch-size`` sequences at a time."""
        options = self._options
        numbers = torch.stack(
            [uniforms(options.seed, prompt.id, options.samples, options.max_new_tokens) for prompt in batch]
        )
        sampled: list[list[list[int]]] = [[] for _ in batch]
        for part in numbers.split(max(1, options.batch_size // len(batch)), dim=1):
            found = sample_batch(
                self._model,
                [prompt.ids for prompt in batch],
                part,
                temperature=options.temperature,
                top_p=options.top_p,
                stop_ids=self._stops,
                pad_id=self._stops[0],
            )
            for responses, more in zip(sampled, found, strict=True):
                responses += more
        return sampled
