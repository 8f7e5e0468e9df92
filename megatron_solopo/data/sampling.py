"""``solopo sample-responses``: N sampled responses a question, in process through transformers.

A prompt is computed once and its cache repeated for its samples. Every sample draws from its own row of
uniform numbers, made from the seed and the question's id, so that a response depends neither on the batch
it is sampled in nor on where a killed run was resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_solopo.data.chat import load_tokenizer, prompt_ids
from megatron_solopo.data.contexts import ContextPair, read_contexts
from megatron_solopo.data.hf_model import DTYPES, check_reach, check_rows, load_model, stop_ids
from megatron_solopo.data.options import add_tokenizer_options
from megatron_solopo.data.responses import PartialFile, Responses
from megatron_solopo.errors import UserError


@dataclass
class Statistics:
    """Counts over responses; a mismatch is a response whose text gives other token ids than were sampled."""

    responses: int = 0
    tokens: int = 0
    unfinished: int = 0
    empty: int = 0
    mismatches: int = 0


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


def decode_responses(
    tokenizer: PreTrainedTokenizerBase,
    question_id: str,
    sampled: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    statistics: Statistics,
) -> Responses:
    """Texts without the end-of-turn token, counted into ``statistics``."""
    finished = [bool(ids) and ids[-1] in stop_ids for ids in sampled]
    bodies = [list(ids[:-1]) if end else list(ids) for ids, end in zip(sampled, finished, strict=True)]
    texts = tokenizer.batch_decode(bodies, skip_special_tokens=True)
    statistics.responses += len(texts)
    statistics.tokens += sum(map(len, sampled))
    statistics.unfinished += finished.count(False)
    statistics.empty += sum(not text.strip() for text in texts)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    statistics.mismatches += sum(ids != body for ids, body in zip(again, bodies, strict=True))
    return Responses(question_id, texts, finished)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="solopo sample-responses",
        description="Sample responses to every question of a contexts file with a Hugging Face model. "
        "A killed run continues where it was when the command is repeated.",
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--contexts", required=True, metavar="FILE", help="what prepare-data wrote")
    group.add_argument("--output", required=True, metavar="FILE", help="responses, JSONL of {id, responses, finished}")
    group.add_argument("--overwrite", action="store_true", help="replace an output that is already complete")
    group.add_argument("--limit", type=int, metavar="N", help="use the first N questions")
    group.add_argument(
        "--num-samples-context",
        choices=("short", "long"),
        default="short",
        help="context the responses are sampled on (default: short, as SoLoPO does)",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one (default)"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: the checkpoint's on a GPU, float32 on a CPU (default)",
    )
    add_tokenizer_options(parser, required=False)
    group = parser.add_argument_group("sampling")
    group.add_argument("--samples", type=int, default=32, metavar="N", help="responses a question (default: 32)")
    group.add_argument(
        "--temperature", type=float, default=0.85, metavar="T", help="0: the most probable token (default: 0.85)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="nucleus: most probable tokens up to this mass (default: 1)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="a response that has not ended by then is marked as unfinished (default: 512)",
    )
    group.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="sequences decoded at once (default: 64)"
    )
    group.add_argument("--seed", type=int, default=0, help="with a question's id it decides its responses (default: 0)")
    return parser


def _check(options: argparse.Namespace) -> None:
    for flag, value, low in (
        ("--samples", options.samples, 1),
        ("--max-new-tokens", options.max_new_tokens, 1),
        ("--batch-size", options.batch_size, 1),
        ("--limit", options.limit, 1),
    ):
        if value is not None and value < low:
            raise UserError(f"{flag} {value}: give a number of at least {low}")
    if not options.temperature >= 0:
        raise UserError(f"--temperature {options.temperature}: give 0 (most probable token) or a positive number")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}: give a number above 0 and at most 1")
    if Path(options.output).exists() and not options.overwrite:
        raise UserError(
            f"--output {options.output}: is already complete; give another name, or --overwrite to sample again"
        )


def _encode_prompts(
    options: argparse.Namespace,
    pairs: Sequence[ContextPair],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> list[list[int]]:
    prompts = [prompt_ids(tokenizer, getattr(pair, f"{options.num_samples_context}_messages")) for pair in pairs]
    longest = max(range(len(pairs)), key=lambda index: len(prompts[index]))
    check_reach(options.model, len(prompts[longest]), options.max_new_tokens, f"question {pairs[longest].id!r}")
    for pair, prompt in zip(pairs, prompts, strict=True):
        check_rows(model, prompt, f"question {pair.id!r}")
    return prompts


def _sample(
    options: argparse.Namespace,
    model: PreTrainedModel,
    ids: Sequence[str],
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
) -> list[list[list[int]]]:
    """Every sample of a batch of questions, ``--batch-size`` sequences at a time."""
    numbers = torch.stack(
        [uniforms(options.seed, question_id, options.samples, options.max_new_tokens) for question_id in ids]
    )
    sampled: list[list[list[int]]] = [[] for _ in prompts]
    for part in numbers.split(max(1, options.batch_size // len(prompts)), dim=1):
        found = sample_batch(
            model,
            prompts,
            part,
            temperature=options.temperature,
            top_p=options.top_p,
            stop_ids=stops,
            pad_id=stops[0],
        )
        for responses, more in zip(sampled, found, strict=True):
            responses += more
    return sampled


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = _parser().parse_args(argv)
    _check(options)
    pairs = list(read_contexts(options.contexts))[: options.limit]
    if not pairs:
        raise UserError(f"--contexts {options.contexts}: holds no question")
    tokenizer = load_tokenizer(options.tokenizer or options.model, options.chat_template, options.eos_token)
    model = load_model(options.model, options.device, options.dtype)
    prompts = _encode_prompts(options, pairs, tokenizer, model)
    stops = stop_ids(model, tokenizer)
    # What decides a response; the batch size only changes rounding.
    settings = {
        "contexts": hashlib.sha256(Path(options.contexts).read_bytes()).hexdigest(),
        "model": str(Path(options.model).resolve()),
        "dtype": str(model.dtype),
        "chat_template": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "stop_ids": stops,
        **{
            name: getattr(options, name)
            for name in ("limit", "num_samples_context", "samples", "temperature", "top_p", "max_new_tokens", "seed")
        },
    }
    partial = PartialFile(Path(options.output), settings)
    if partial.done:
        print(f"resuming: {len(partial.done)} of {len(pairs)} questions were sampled before")

    statistics = Statistics()
    begin = time.monotonic()
    # Planned over all questions, done or not, so that a resumed run computes the very same batches.
    batches = plan_batches([len(prompt) for prompt in prompts], max(1, options.batch_size // options.samples))
    with tqdm(total=len(pairs), initial=len(partial.done), unit="question", disable=None) as bar:
        for batch in batches:
            todo = [index for index in batch if pairs[index].id not in partial.done]
            if not todo:
                continue
            try:
                sampled = _sample(
                    options, model, [pairs[index].id for index in batch], [prompts[index] for index in batch], stops
                )
            except torch.OutOfMemoryError:
                raise UserError(
                    f"--batch-size {options.batch_size}: the GPU is out of memory at prompts of "
                    f"{len(prompts[batch[0]])} tokens; repeat the command with a smaller one, what is finished is kept"
                ) from None
            for index, ids in zip(batch, sampled, strict=True):
                if index in todo:
                    partial.add(decode_responses(tokenizer, pairs[index].id, ids, stops, statistics))
            bar.update(len(todo))
    seconds = time.monotonic() - begin
    partial.finish(Path(options.output), [pair.id for pair in pairs])
    print(f"wrote {len(pairs)} questions x {options.samples} responses to {options.output}")
    if statistics.responses:
        speed, mean = statistics.tokens / max(seconds, 1e-9), statistics.tokens / statistics.responses
        print(
            f"sampled now: {statistics.responses} responses, {statistics.tokens} tokens in {seconds:.1f} s "
            f"({speed:.0f} tokens/s), mean length {mean:.1f} tokens"
        )
        print(
            f"  unfinished after {options.max_new_tokens} tokens: {statistics.unfinished}; empty: {statistics.empty}; "
            f"text re-tokenises to other ids: {statistics.mismatches}"
        )
    return 0
