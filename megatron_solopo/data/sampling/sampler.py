"""Sampling in process through transformers.

Each sample draws from a row of uniform numbers, derived from the seed, the question's id and the sample's number.
So, up to the rounding of the model's logits, a response does not depend on the rest of its batch, on the number of
samples or questions, or on where a killed run resumed.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.hf_model import check_reach, check_rows, load_model, stop_ids, weight_facts
from megatron_solopo.data.sampling.decoding import Job, decode, decode_by_generate, shares_prompts
from megatron_solopo.data.sampling.packing import pack_linears
from megatron_solopo.data.sampling.prompts import Prompt, Prompts
from megatron_solopo.data.sampling.responses import SampledJobs, runs
from megatron_solopo.data.sampling.sampled import Statistics, from_ids
from megatron_solopo.errors import UserError
from megatron_solopo.progress import ProgressBar
from megatron_solopo.terminal import write_line


def uniforms(seed: int, question_id: str, samples: int, steps: int) -> torch.Tensor:
    """Returns float64 numbers in [0, 1), [samples, steps], of a seed and a question; more samples add rows only."""
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


class InProcess:
    """The model of ``--model`` in this process.

    Raises:
        UserError: the folder has no model, or a prompt is too long or has a token id without embedding.
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
        pack_linears(self._model, options.batch_size)
        # What determines a response; the batch size changes only its rounding.
        self.settings: dict[str, object] = {
            "weights": weight_facts(options.model),
            "dtype": str(self._model.dtype),
            "stop_ids": self._stops,
        }
        self.notes: dict[str, object] = {}

    def run(self, jobs: SampledJobs, statistics: Statistics) -> None:
        """Samples the missing responses of ``jobs``, longest prompts first, so that a lack of memory shows at once.

        Raises:
            UserError: the GPU is out of memory.
        """
        options, prompts = self._options, self._prompts
        missing = {
            index: numbers
            for index, name in enumerate(prompts.names)
            if (numbers := jobs.missing(name, options.samples))
        }
        total = len(prompts) * options.samples
        before = total - sum(map(len, missing.values()))
        if before:
            print(f"resuming: {before} of {total} responses were sampled before")
        order = sorted(missing, key=lambda index: (-prompts.lengths[index], index))
        shared = not missing or shares_prompts(self._model)
        if not shared:
            write_line(
                f"note: {options.model}: samples of a prompt cannot share its keys in this model's attention; "
                "transformers' generate samples it, which is slower"
            )
        decoder = decode if shared else decode_by_generate
        draw = partial(choose, temperature=options.temperature, top_p=options.top_p)
        prompted = (self._job(prompts[index], missing[index]) for index in order)
        with ProgressBar(desc="sampling", total=total, initial=before, unit="response") as bar:
            sampled = decoder(
                self._model, prompted, rows=options.batch_size, draw=draw, stops=set(self._stops), ended=bar.update
            )
            try:
                for place, responses in sampled:
                    self._add(prompts[order[place]], missing[order[place]], responses, jobs, statistics)
                    bar.update(len(missing[order[place]]) - len(responses))  # at temperature 0: copies of one
            except torch.OutOfMemoryError:
                raise UserError(
                    "gpu-out-of-memory",
                    f"--batch-size {options.batch_size}: the GPU is out of memory at prompts of up to "
                    f"{prompts.lengths[order[0]]} tokens; repeat the command with a smaller one (finished responses "
                    "are kept)",
                ) from None

    def _job(self, prompt: Prompt, missing: Sequence[int]) -> Job:
        """Returns a prompt and the numbers of its missing samples; at temperature 0 one row, as all samples are
        equal."""
        options = self._options
        numbers = uniforms(options.seed, prompt.id, missing[-1] + 1, options.max_new_tokens)[missing]
        return prompt.ids, numbers if options.temperature > 0 else numbers[:1]

    def _add(
        self,
        prompt: Prompt,
        missing: Sequence[int],
        sampled: list[list[int]],
        jobs: SampledJobs,
        statistics: Statistics,
    ) -> None:
        """Writes the samples of a question, one line for each run of consecutive numbers."""
        by_number = dict(zip(missing, sampled if len(sampled) == len(missing) else sampled * len(missing), strict=True))
        for numbers in runs(missing):
            ids = [by_number[number] for number in numbers]
            finished = [tokens[-1] in self._stops for tokens in ids]
            jobs.add_samples(from_ids(self._tokenizer, prompt, ids, finished, self._stops, statistics), numbers[0])
