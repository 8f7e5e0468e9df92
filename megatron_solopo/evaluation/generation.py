"""Generation from a Hugging Face folder, in batches sorted by length under a token budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cache_utils import Cache, DynamicLayer

from megatron_solopo.data.hf_model import check_rows, stop_ids
from megatron_solopo.progress import ProgressBar

DEFAULT_BATCH_TOKENS = 32768  # about 2 GB of keys and values for a 7B model with grouped-query attention in bf16


@dataclass(frozen=True)
class Response:
    """What a model answered; ``finished`` is False where it was cut after the most new tokens.

    Attributes:
        gold_log_prob: mean log-prob of the gold answer's tokens after the prompt, nats per token; None: not wanted.
    """

    text: str
    finished: bool
    gold_log_prob: float | None = None


def batches_by_length(lengths: Sequence[int], new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Returns the indices of prompts in batches, longest first, each at most ``batch_tokens`` with its padding and
    responses.

    Longest first, so that a batch too large for the memory fails at the start and the ETA shrinks.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        row = (lengths[batches[-1][0]] if batches else 0) + new_tokens
        if batches and (len(batches[-1]) + 1) * row <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: str = "answering",
    generated: Mapping[int, Response] | None = None,
    add: Callable[[dict[int, Response]], None] | None = None,
    golds: Sequence[Sequence[int]] | None = None,
) -> list[Response]:
    """Returns the greedy response to each prompt, in the order of the prompts.

    A response ends at an end-of-turn token (which is not part of the text) or after ``max_new_tokens``.
    Generation settings stored with the checkpoint (sampling, repetition penalty, ...) are not used: what
    is measured depends on the arguments alone.

    Args:
        prompts: token ids, one non-empty list a prompt.
        batch_tokens: rows x (longest prompt + ``max_new_tokens``) of a batch stays within this number; a
            single prompt that is longer than that runs alone.
        progress: the name of its progress, counted in tokens of prompts.
        generated: responses of an earlier call by the index of their prompts; they are not generated again.
        add: called with the responses of each batch, by index.
        golds: token ids of each prompt's gold answer, of which `Response.gold_log_prob` is wanted.

    Raises:
        UserError: the tokenizer has more ids than the model.
    """
    check_rows(model, [max(ids) for ids in (*prompts, *(golds or ()))], "--model")
    stops = stop_ids(model, tokenizer)
    pad = stops[0]  # attended by nothing; the tokenizer's pad token may have no row in the model
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=pad,
        return_dict_in_generate=True,
    )
    lengths = [len(prompt) for prompt in prompts]
    responses = dict(generated or {})
    # transformers fills unset fields from the model's generation config, which is therefore replaced meanwhile.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    before = sum(lengths[index] for index in responses)
    bar = ProgressBar(total=sum(lengths), initial=before, desc=progress, unit=" tokens", unit_scale=True, leave=False)
    try:
        for batch in batches_by_length(lengths, max_new_tokens, batch_tokens):
            batch = [index for index in batch if index not in responses]
            if not batch:
                continue
            longest = lengths[batch[0]]
            ids = torch.full((len(batch), longest), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(batch):
                ids[row, longest - lengths[index] :] = torch.tensor(prompts[index], dtype=torch.long)
                mask[row, longest - lengths[index] :] = 1
            out = cast(Any, model).generate(  # a GenerationMixin too, which its type does not show
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                stopping_criteria=[steps := _Steps(bar, sum(lengths[index] for index in batch), max_new_tokens)],
            )
            steps.finish()
            answered = {}
            of_golds: list[float | None] = [None] * len(batch)
            if golds is not None:
                of_golds = [*_gold_log_probs(model, ids, mask, [golds[index] for index in batch], out.past_key_values)]
            for index, row, log_prob in zip(batch, out.sequences[:, longest:].tolist(), of_golds, strict=True):
                end = next((position for position, token in enumerate(row) if token in stops), len(row))
                text = str(tokenizer.decode(row[:end], skip_special_tokens=True))
                answered[index] = Response(text, end < len(row), log_prob)
            responses |= answered
            if add is not None:
                add(answered)
    finally:
        bar.close()
        model.generation_config = kept
    return [responses[index] for index in range(len(prompts))]


def _gold_log_probs(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, golds: Sequence[Sequence[int]], cache: Cache | None
) -> list[float]:
    """Returns the mean log-prob of each row's gold answer after its prompt, nats per token.

    Args:
        ids, mask: [rows, longest prompt], padded on the left.
        cache: of the prompts and what was generated after them. Where it holds every key of every layer, its prompts
            are not computed again; sliding windows and recurrent states are past the prompts.
    """
    known = 0
    if cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers):
        known = ids.shape[1] - 1
        for layer in cast("list[DynamicLayer]", cache.layers):
            assert layer.keys is not None and layer.values is not None
            layer.keys, layer.values = layer.keys[..., :known, :], layer.values[..., :known, :]
    kept = max(map(len, golds))
    after = torch.zeros(len(golds), kept - 1, dtype=torch.long)
    for row, gold in zip(after, golds, strict=True):
        row[: len(gold) - 1] = torch.tensor(gold[:-1], dtype=torch.long)
    ids = torch.cat([ids, after], 1)
    mask = torch.cat([mask, torch.ones_like(after)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids[:, known:].to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=positions[:, known:].to(model.device),
        past_key_values=cache if known else None,
        use_cache=bool(known),
        logits_to_keep=kept,
    ).logits
    log_probs = logits.float().log_softmax(-1).cpu()
    return [
        float(row[: len(gold)].gather(1, torch.tensor(gold)[:, None]).mean())
        for row, gold in zip(log_probs, golds, strict=True)
    ]


@torch.inference_mode()
def choose(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: str = "choosing",
    chosen: Mapping[int, int] | None = None,
    add: Callable[[dict[int, int]], None] | None = None,
) -> list[int]:
    """Returns for each prompt the index of the choice with the highest log-prob after it; the first of equal ones.

    Args:
        prompts, choices: token ids; the log-prob of a choice is the sum of its tokens'.
        batch_tokens: rows x longest row of a batch stays within this number.
        chosen, add: indices of an earlier call, and what is called with those of each batch; see `generate`.

    Raises:
        UserError: the tokenizer has more ids than the model.
    """
    used = [token for ids in (*prompts, *(one for of in choices for one in of)) for token in ids]
    check_rows(model, used, "--model")
    answers = dict(chosen or {})
    left = [index for index in range(len(prompts)) if index not in answers]
    rows: dict[tuple[int, tuple[int, ...]], None] = {}  # choices of one token share the row of their prompt
    for index in left:
        rows |= {(index, tuple(one[:-1])): None for one in choices[index]}
    keys, scores = list(rows), dict[tuple[int, int], float]()
    lengths = [len(prompts[index]) + len(before) for index, before in keys]
    kept = max((len(before) for _, before in keys), default=0) + 1
    with ProgressBar(total=len(prompts), initial=len(answers), desc=progress, unit=" questions", leave=False) as bar:
        for batch in batches_by_length(lengths, 0, batch_tokens):
            log_probs = _last_log_probs(model, [[*prompts[keys[row][0]], *keys[row][1]] for row in batch], kept)
            for row, of_row in zip(batch, log_probs, strict=True):
                index, before = keys[row]
                for number, one in enumerate(choices[index]):
                    if tuple(one[:-1]) == before:
                        picked = of_row[len(of_row) - len(one) :].gather(1, torch.tensor(one)[:, None])
                        scores[index, number] = float(picked.sum())
            answered = {}
            for index in dict.fromkeys(keys[row][0] for row in batch):
                numbers = range(len(choices[index]))
                if all((index, number) in scores for number in numbers):  # its rows may be in several batches
                    answered[index] = max(numbers, key=lambda number, index=index: scores[index, number])
            answers |= answered
            bar.update(len(answered))
            if add is not None and answered:
                add(answered)
    return [answers[index] for index in range(len(prompts))]


def _last_log_probs(model: PreTrainedModel, rows: Sequence[Sequence[int]], kept: int) -> torch.Tensor:
    """Returns [rows, kept, vocabulary] float32 log-probs after the last tokens of each row, on the CPU."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[number, longest - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids, mask, positions = (one.to(model.device) for one in (ids, mask, positions))
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept).logits
    return logits.float().log_softmax(-1).cpu()


class _Steps(StoppingCriteria):
    """Never stops: counts a batch's ``tokens`` evenly over the steps that it may take, for a batch takes minutes."""

    def __init__(self, bar: ProgressBar, tokens: int, steps: int) -> None:
        self._bar, self._tokens, self._steps = bar, tokens, steps
        self._step = self._counted = 0

    def __call__(self, input_ids: torch.Tensor, scores: object, **unused: object) -> torch.BoolTensor:
        self._step += 1
        self._count(self._tokens * self._step // self._steps)
        return cast(torch.BoolTensor, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device))

    def finish(self) -> None:
        """The batch has ended, maybe before the last step."""
        self._count(self._tokens)

    def _count(self, tokens: int) -> None:
        self._bar.update(tokens - self._counted)
        self._counted = tokens
