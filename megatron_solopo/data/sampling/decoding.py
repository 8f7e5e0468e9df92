"""Decoding many samples of few prompts: a prompt is computed once, kept once, and attended to by all of its samples.

The model's own attention computes the prompt. A sample then attends to the prompt's keys K_p and values V_p, which its
prompt's samples share, and to its own K_s and V_s, which are written in place: softmax([q K_p', q K_s']) [V_p; V_s]. A
sample that ends gives its row to the next one, of the same prompt or of the one after. transformers' caches hold a copy
of the prompt for each row and are copied at every step; its continuous batching masks every row's keys for every other
row where there is no flash attention.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From logits [rows, vocabulary] and uniform numbers [rows] to token ids [rows]."""
Job = tuple[Sequence[int], torch.Tensor]
"""A prompt's token ids, and [samples, steps] uniform numbers: steps is the most tokens a response may have."""
_NAME = "solopo_shared_prompt"
_ROOM = 32  # keys that a sample's first buffer has room for; a full buffer doubles


class _Group:
    """The samples of one prompt: their tokens, and the keys and values of those that are being decoded.

    Args:
        logits: [vocabulary] after the prompt.
        cache: the prompt's keys and values.
        rows: the most samples decoded at once.

    Attributes:
        tokens: of every sample, so far.
        live: the numbers of the samples being decoded, in the order of their rows in the buffers.
        prompt: keys and values [heads, prompt, dimension] for each layer.
        own: keys and values [rows, heads, room, dimension] for each layer.
    """

    def __init__(self, job: Job, logits: torch.Tensor, cache: DynamicCache, rows: int) -> None:
        prompt, self.numbers = job
        self.length, self.logits = len(prompt), logits
        self.tokens: list[list[int]] = [[] for _ in self.numbers]
        self.live: list[int] = []
        self.prompt = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        self._rows = min(rows, len(self.tokens))
        self.own = [tuple(self._buffer(part, _ROOM) for part in parts) for parts in self.prompt]
        self._started = 0

    def _buffer(self, like: torch.Tensor, room: int) -> torch.Tensor:
        """Zeros, because a masked key counts zero times its value, which must be a number."""
        return like.new_zeros(self._rows, like.shape[0], room, like.shape[-1])

    @property
    def waiting(self) -> int:
        """Samples that have not begun."""
        return len(self.tokens) - self._started

    def begin(self, count: int, draw: Draw, stops: Collection[int]) -> int:
        """Draws the first token of the next samples; how many of them that ended."""
        new = range(self._started, self._started + count)
        numbers = self.numbers[new.start : new.stop, 0].to(self.logits.device)
        self._started += count
        return len(self._append(new, draw(self.logits.expand(count, -1), numbers).tolist(), stops))

    def _append(self, samples: Iterable[int], tokens: Sequence[int], stops: Collection[int]) -> list[int]:
        """Adds a token to each sample and puts those that have not ended at the end of ``live``; the others' places."""
        ended = []
        for place, (sample, token) in enumerate(zip(samples, tokens, strict=True)):
            self.tokens[sample].append(token)
            if token in stops or len(self.tokens[sample]) == self.numbers.shape[1]:
                ended.append(place)
            else:
                self.live.append(sample)
        return ended

    def take(self, tokens: Sequence[int], stops: Collection[int]) -> int:
        """Adds the tokens of a step; the rows of samples that end, so many, are filled with the last ones."""
        before, self.live = self.live, []
        ended = self._append(before, tokens, stops)
        count = len(self.live)
        holes = [place for place in ended if place < count]
        if holes:
            last = [place for place in range(count, len(before)) if place not in set(ended)]
            for part in (part for parts in self.own for part in parts):
                part[holes] = part[last]
            self.live = before[:count]
            for hole, place in zip(holes, last, strict=True):
                self.live[hole] = before[place]
        return len(ended)

    def begin_step(self) -> None:
        """Where this step's keys are written, and which keys a sample sees."""
        device = self.logits.device
        lengths = [len(self.tokens[sample]) - 1 for sample in self.live]
        self._span = max(lengths) + 1
        room = self.own[0][0].shape[2]
        if self._span > room:
            self.own = [tuple(self._grown(part, 2 * room) for part in parts) for parts in self.own]
        self._place = torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
        self._even = min(lengths) == max(lengths)
        self._hidden: dict[int | None, torch.Tensor | None] = {}

    def _grown(self, part: torch.Tensor, room: int) -> torch.Tensor:
        new = part.new_zeros(*part.shape[:2], room, part.shape[-1])
        new[:, :, : part.shape[2]] = part
        return new

    def _hide(self, window: int | None) -> torch.Tensor | None:
        """[rows, 1, keys], True at keys of a row's future, of no row, or outside its window; None: all are seen."""
        if window not in self._hidden:
            last = self.length + self._place[1][:, None]
            places = torch.arange(self.length + self._span, device=last.device)
            hidden = places > last
            if window is not None:
                hidden |= places <= last - window
            whole = self._even and (window is None or self.length + self._span <= window)
            self._hidden[window] = None if whole else hidden[:, None]
        return self._hidden[window]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one token a row.

        Scores are float32, as in fused kernels; they are laid out with the heads outside, so that the prompt's keys
        meet the queries of all rows in one product a head.

        Args:
            query: [rows, query heads, dimension].
            key: [rows, heads, dimension], as is the value.
            sinks: [query heads] scores of a key without value.

        Returns:
            [rows, query heads, dimension of the values].
        """
        (prompt_keys, prompt_values), (keys, values) = self.prompt[layer], self.own[layer]
        rows, span, heads = len(query), self._span, key.shape[1]
        row, place = self._place
        keys[row, :, place], values[row, :, place] = key, value
        keys, values = keys[:rows, :, :span], values[:rows, :, :span]
        query = (query * scaling).view(rows, heads, -1, query.shape[-1])
        flat = query.transpose(0, 1).reshape(heads, -1, query.shape[-1])
        to_prompt = flat.float() @ prompt_keys.float().transpose(-1, -2)
        to_own = query.float() @ keys.float().transpose(-1, -2)
        to_prompt = to_prompt.view(heads, rows, -1, self.length)
        scores = torch.cat([to_prompt, to_own.transpose(0, 1)], -1)  # [heads, rows, queries a head, keys]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = self._hide(window)
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        if sinks is not None:
            column = sinks.float().view(heads, 1, -1, 1).expand(-1, rows, -1, 1)
            weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
        else:
            weights = torch.softmax(scores, -1)
        weights = weights.to(value.dtype)
        of_prompt = weights[..., : self.length].flatten(1, 2) @ prompt_values
        of_own = weights[..., self.length :].transpose(0, 1) @ values
        return (of_prompt.view(heads, rows, -1, of_prompt.shape[-1]).transpose(0, 1) + of_own).flatten(1, 2)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    shared_prompts: Sequence[_Group],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface of an attention function; query, key and value are [rows, heads, 1, dimension]."""
    query, key, value = query[:, :, 0], key[:, :, 0], value[:, :, 0]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sizes = [len(group.live) for group in shared_prompts]
    parts = zip(shared_prompts, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    outs = [
        group.attend(module.layer_idx, *states, scaling, sliding_window, softcap, s_aux) for group, *states in parts
    ]
    return torch.cat(outs)[:, None], None


AttentionInterface.register(_NAME, _attention)


def _prefill(model: PreTrainedModel, job: Job, rows: int) -> _Group:
    """Computes a prompt; the cache is made without the config, which would drop what is outside a sliding window."""
    cache = DynamicCache()
    ids = torch.tensor([list(job[0])], device=model.device)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _Group(job, out.logits[0, -1], cache, rows)


def _step(model: PreTrainedModel, groups: Sequence[_Group]) -> torch.Tensor:
    """[live samples, vocabulary] logits after the last token of every live sample, group after group."""
    for group in groups:
        group.begin_step()
    live = [(group, group.tokens[sample]) for group in groups for sample in group.live]
    ids = torch.tensor([[tokens[-1]] for _, tokens in live], device=model.device)
    positions = torch.tensor([[group.length + len(tokens) - 1] for group, tokens in live], device=model.device)
    own = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        return model(input_ids=ids, position_ids=positions, use_cache=False, shared_prompts=groups).logits[:, -1]
    finally:
        model.set_attn_implementation(own)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    jobs: Iterable[Job],
    *,
    rows: int,
    draw: Draw,
    stops: Collection[int],
    ended: Callable[[int], Any] = lambda count: None,
) -> Iterator[tuple[int, list[list[int]]]]:
    """Samples continuations, ``rows`` of them at a time.

    Args:
        jobs: read when there are free rows. Sample s of a prompt draws its token t by the number [s, t].
        stops: a response ends with the first of these ids.
        ended: called with the number of samples that have ended, as they do.

    Yields:
        The number of a job and the ids of its samples, the stop id included where one was reached, as soon as all of
        them have ended.
    """
    queue = enumerate(jobs)
    groups: dict[int, _Group] = {}
    newest: _Group | None = None
    while True:
        free = rows - sum(len(group.live) for group in groups.values())
        while free:
            if newest is None or not newest.waiting:
                index, job = next(queue, (-1, None))
                if job is None:
                    break
                groups[index] = newest = _prefill(model, job, rows)
            count = min(free, newest.waiting)
            at_once = newest.begin(count, draw, stops)
            free -= count - at_once
            ended(at_once)
        for index in [index for index, group in groups.items() if not group.live and not group.waiting]:
            yield index, groups.pop(index).tokens
        if not groups:
            return
        running = [group for group in groups.values() if group.live]
        logits = _step(model, running)
        numbers = [group.numbers[group.live, [len(group.tokens[one]) for one in group.live]] for group in running]
        tokens = iter(draw(logits, torch.cat(numbers).to(logits.device)).tolist())
        for group in running:
            ended(group.take(list(islice(tokens, len(group.live))), stops))


class _Drawn(LogitsProcessor):
    """Leaves the drawn token only, for a search that takes the most probable one."""

    def __init__(self, numbers: torch.Tensor, width: int, draw: Draw) -> None:
        self._numbers, self._width, self._draw = numbers, width, draw

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        numbers = self._numbers[:, input_ids.shape[1] - self._width].to(scores.device)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(1, self._draw(scores, numbers)[:, None], 0.0)


@torch.inference_mode()
def decode_by_generate(
    model: PreTrainedModel,
    jobs: Iterable[Job],
    *,
    rows: int,
    draw: Draw,
    stops: Collection[int],
    ended: Callable[[int], Any] = lambda count: None,
) -> Iterator[tuple[int, list[list[int]]]]:
    """The same as `decode` through transformers' ``generate``, for models whose attention `decode` cannot compute."""
    end = sorted(stops)
    # transformers fills what a config leaves open from the model's own, so that one is put away meanwhile.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        for index, (prompt, numbers) in enumerate(jobs):
            samples: list[list[int]] = []
            config = GenerationConfig(max_new_tokens=numbers.shape[1], eos_token_id=end, pad_token_id=end[0])
            for part in numbers.split(rows):
                ids = torch.tensor([list(prompt)] * len(part), device=model.device)
                drawn = LogitsProcessorList([_Drawn(part, len(prompt), draw)])
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=drawn,
                )
                for row in out[:, len(prompt) :].tolist():
                    size = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
                    samples.append(row[:size])
                ended(len(part))
            yield index, samples
    finally:
        model.generation_config = kept


@torch.inference_mode()
def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether `decode` computes this model's distribution, by its layers' types and a trial of a few tokens.

    Attention with a bias, keys shared by layers, recurrent states and the like are not known to `decode`; the trial
    compares it with the model's own attention. Rounding of bfloat16 moves some percent of the probability.
    """
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    if set(types) - {"full_attention", "sliding_attention"} or not model._can_set_attn_implementation():
        return False
    tokens = torch.arange(19) * 7919 % model.get_input_embeddings().num_embeddings
    ids = tokens.tolist()
    bound = 1e-3 if model.dtype == torch.float32 else 0.1
    try:
        full = model(input_ids=tokens[None].to(model.device), use_cache=False).logits[0, -3:]
        group = _prefill(model, (ids[:16], torch.zeros(2, 4)), 2)
        group.tokens, group.live = [[], []], [0, 1]
        logits = []
        for token in ids[16:]:
            for sample in group.tokens:
                sample.append(token)
            logits.append(_step(model, [group])[1])
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError):
        return False
    differ = torch.softmax(full.float(), -1) - torch.softmax(torch.stack(logits).float(), -1)
    return differ.abs().sum(-1).mean().item() / 2 < bound
