"""Decodes many samples of few prompts: a prompt is computed and stored once, and all of its samples attend to it.

The model's attention computes the prompt. A sample then attends to the keys K_p and values V_p of the prompt, which all
samples of the prompt share, and to its K_s and V_s, which are written in place. The two attentions have outputs o and
log-sum-exps l of their scores; the sample's output is exp(l_p - l) o_p + exp(l_s - l) o_s, where
l = log(exp l_p + exp l_s). When a sample ends, the next one, of the same prompt or of the following one, uses its row.
transformers' caches have a copy of the prompt for each row and are copied at every step; its continuous batching masks
every row's keys for every other row where there is no flash attention.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin

from megatron_solopo.data.hf_model import embedding_rows

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From logits [rows, vocabulary] and uniform numbers [rows] to token ids [rows]."""
Job = tuple[Sequence[int], torch.Tensor]
"""A prompt's token ids, and uniform numbers [samples, steps]; steps is the maximum number of tokens of a response."""
_NAME = "solopo_shared_prompt"
_ROOM = 32  # keys of a row's first buffer; full buffers double


def _states(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the keys and values of a layer of a cache."""
    if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
        raise TypeError(f"{type(layer).__name__} has no keys and values")
    return layer.keys, layer.values


class _Prompt:
    """A prompt and the tokens of its samples.

    Args:
        logits: [vocabulary] after the prompt.
        cache: the prompt's keys and values.

    Attributes:
        tokens: of every sample so far.
        states: keys and values [1, heads, prompt, dimension] for each layer.
        started, ended: numbers of samples that have started and that have ended.
    """

    def __init__(self, job: Job, logits: torch.Tensor, cache: DynamicCache) -> None:
        ids, self.numbers = job
        self.length, self.logits = len(ids), logits
        self.tokens: list[list[int]] = [[] for _ in self.numbers]
        self.states = [_states(layer) for layer in cache.layers]
        self.started = self.ended = 0

    def add(self, sample: int, token: int, stops: Collection[int]) -> bool:
        """Adds a token to a sample; returns whether the sample ends with it."""
        tokens = self.tokens[sample]
        tokens.append(token)
        ends = token in stops or len(tokens) == self.numbers.shape[1]
        self.ended += ends
        return ends

    def begin(self, count: int, draw: Draw, stops: Collection[int]) -> list[int]:
        """Draws the first token of the next ``count`` samples; returns the numbers of those that do not end with it."""
        samples = range(self.started, self.started + count)
        self.started += count
        numbers = self.numbers[samples.start : samples.stop, 0].to(self.logits.device)
        drawn = draw(self.logits.expand(count, -1), numbers).tolist()
        return [sample for sample, token in zip(samples, drawn, strict=True) if not self.add(sample, token, stops)]


class _Rows:
    """The samples that are being decoded, one per row, with the keys and values of their tokens.

    Attributes:
        live: the prompt and the number of the sample of each row.
        states: keys and values [rows, heads, room, dimension] of each layer.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.live: list[tuple[_Prompt, int]] = []
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._room = _ROOM

    def remove(self, ended: Sequence[int]) -> None:
        """Removes rows; the last rows move into their places."""
        count = len(self.live) - len(ended)
        holes = [row for row in ended if row < count]
        last = sorted(set(range(count, len(self.live))) - set(ended))
        if holes:
            for part in (part for parts in self.states.values() for part in parts):
                part[holes] = part[last]
        for hole, row in zip(holes, last, strict=True):
            self.live[hole] = self.live[row]
        del self.live[count:]

    def begin_step(self, device: torch.device) -> None:
        """Prepares a step: where its keys are written, and which rows attend to which prompt."""
        lengths = [len(prompt.tokens[sample]) - 1 for prompt, sample in self.live]
        self._span = max(lengths) + 1
        if self._span > self._room:
            self._room *= 2
            self.states = {
                layer: (self._buffer(keys.shape[1:], keys), self._buffer(values.shape[1:], values))
                for layer, (keys, values) in self.states.items()
            }
        self._row, self._last = torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
        rows_of: dict[_Prompt, list[int]] = {}
        for row, (prompt, _) in enumerate(self.live):
            rows_of.setdefault(prompt, []).append(row)
        self._prompts = {prompt: torch.tensor(rows, device=device) for prompt, rows in rows_of.items()}
        self._order = torch.cat(list(self._prompts.values()))
        self._back = self._order.argsort()
        self._biases: dict[tuple[_Prompt | None, int | None], torch.Tensor | None] = {}

    def _buffer(self, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        """Returns a larger buffer; zeros, because a masked value is multiplied by zero and must be finite."""
        heads, room, dimension = shape
        new = like.new_zeros(self.count, heads, self._room, dimension)
        new[:, :, :room] = like
        return new

    def _bias(self, prompt: _Prompt | None, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns a mask to add to scores, [rows, keys]: of a prompt's rows, or (None) of all rows for their keys."""
        name = prompt, window
        if name not in self._biases:
            last = self._last if prompt is None else self._last[self._prompts[prompt]] + prompt.length
            places = torch.arange(self._span if prompt is None else prompt.length, device=last.device)
            hidden = places > last[:, None]
            if window is not None:
                hidden |= places <= last[:, None] - window
            # Finite, so that the log-sum-exp of a row that sees no key exists; half, so that a score can be added.
            bias = hidden.to(dtype) * (torch.finfo(dtype).min / 2)
            self._biases[name] = bias if hidden.any() else None
        return self._biases[name]

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
        """Computes the attention of one token per row.

        Args:
            query: [rows, query heads, dimension].
            key, value: [rows, heads, dimension].
            sinks: [query heads] scores of a key without value.

        Returns:
            [rows, query heads, dimension of the values].
        """
        rows, heads = key.shape[:2]
        if layer not in self.states:
            self.states[layer] = (
                key.new_zeros(self.count, heads, self._room, key.shape[-1]),
                value.new_zeros(self.count, heads, self._room, value.shape[-1]),
            )
        keys, values = self.states[layer]
        keys[self._row, :, self._last], values[self._row, :, self._last] = key, value
        query = query.view(rows, heads, -1, query.shape[-1])  # [rows, heads, queries a head, dimension]
        bias = self._bias(None, window, query.dtype)
        sample, sample_sum = _attend(
            query,
            keys[:rows, :, : self._span],
            values[:rows, :, : self._span],
            None if bias is None else bias[:, None, None],
            scaling,
            softcap,
        )
        queries = query[self._order].split([len(rows) for rows in self._prompts.values()])
        parts = [
            self._to_prompt(prompt, layer, part, scaling, window, softcap)
            for prompt, part in zip(self._prompts, queries, strict=True)
        ]
        shared, shared_sum = (torch.cat(part)[self._back] for part in zip(*parts, strict=True))
        total = torch.logaddexp(sample_sum, shared_sum)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.float().view(heads, -1))
        out = sample * (sample_sum - total).exp()[..., None] + shared * (shared_sum - total).exp()[..., None]
        return out.to(value.dtype).flatten(1, 2)

    def _to_prompt(
        self,
        prompt: _Prompt,
        layer: int,
        query: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of a prompt's rows to the prompt: one product per head for all queries of all rows."""
        rows, heads, each, _ = query.shape
        bias = None if window is None else self._bias(prompt, window, query.dtype)
        out, log_sum = _attend(
            query.transpose(0, 1).flatten(1, 2)[None],
            *prompt.states[layer],
            None if bias is None else bias.repeat_interleave(each, 0)[None, None],
            scaling,
            softcap,
        )
        return out.view(heads, rows, each, -1).transpose(0, 1), log_sum.view(heads, rows, each).transpose(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log-sum-exp of its scores, which are float32, as in fused kernels.

    Args:
        query: [batch, heads, queries, dimension].
        keys, values: [batch, heads, keys, dimension]; the dimension of the values may differ.
        bias: added to the scores; its shape expands to [batch, heads, queries, keys].

    Returns:
        [batch, heads, queries, dimension of the values], and [batch, heads, queries] float32.
    """
    # The fused kernel is faster for the many queries of one prompt, slower for the few queries of each of many rows.
    plain = softcap is None and query.shape[-1] == values.shape[-1]
    if query.device.type == "cpu" and plain and len(query) == 1:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=bias, scale=scaling
        )
    scores = (query * scaling).float() @ keys.float().transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores += bias
    largest = scores.amax(-1, keepdim=True)
    total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
    return (scores.to(values.dtype) @ values / total).to(values.dtype), (largest + total.log()).squeeze(-1)


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
    shared_prompts: _Rows,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' interface of an attention function; query, key and value are [rows, heads, 1, dimension]."""
    query, key, value = query[:, :, 0], key[:, :, 0], value[:, :, 0]
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    layer = module.layer_idx
    assert isinstance(layer, int)
    out = shared_prompts.attend(layer, query, key, value, scale, sliding_window, softcap, s_aux)
    return out[:, None], None


AttentionInterface.register(_NAME, _attention)


def _prefill(model: PreTrainedModel, job: Job) -> _Prompt:
    """Computes a prompt. The cache has no config, which would drop keys outside a sliding window."""
    cache = DynamicCache()
    ids = torch.tensor([list(job[0])], device=model.device)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _Prompt(job, out.logits[0, -1], cache)


def _step(model: PreTrainedModel, rows: _Rows) -> torch.Tensor:
    """Returns the logits after the last token of every row, [rows, vocabulary]."""
    rows.begin_step(model.device)
    live = [(prompt, prompt.tokens[sample]) for prompt, sample in rows.live]
    ids = torch.tensor([[tokens[-1]] for _, tokens in live], device=model.device)
    positions = torch.tensor([[prompt.length + len(tokens) - 1] for prompt, tokens in live], device=model.device)
    implementation = str(model.config._attn_implementation)
    model.set_attn_implementation(_NAME)
    try:
        return model(input_ids=ids, position_ids=positions, use_cache=False, shared_prompts=rows).logits[:, -1]
    finally:
        model.set_attn_implementation(implementation)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    jobs: Iterable[Job],
    *,
    rows: int,
    draw: Draw,
    stops: Collection[int],
    ended: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[int, list[list[int]]]]:
    """Samples responses, ``rows`` of them at a time.

    Args:
        jobs: read when rows are free. Sample s of a prompt draws its token t by the number [s, t].
        stops: a response ends with the first of these ids.
        ended: called with a number of samples when they have ended.

    Yields:
        The number of a job and the ids of its samples, with the stop id where one was reached, as soon as all samples
        of the job have ended.
    """
    queue = enumerate(jobs)
    prompts: dict[int, _Prompt] = {}
    newest: _Prompt | None = None
    table = _Rows(rows)
    while True:
        while free := rows - len(table.live):
            if newest is None or newest.started == len(newest.tokens):
                index, job = next(queue, (-1, None))
                if job is None:
                    break
                prompts[index] = newest = _prefill(model, job)
            count = min(free, len(newest.tokens) - newest.started)
            started = newest.begin(count, draw, stops)
            table.live += [(newest, sample) for sample in started]
            ended(count - len(started))
        for index in [index for index, prompt in prompts.items() if prompt.ended == len(prompt.tokens)]:
            yield index, prompts.pop(index).tokens
        if not table.live:
            return
        logits = _step(model, table)
        numbers = torch.stack([prompt.numbers[sample, len(prompt.tokens[sample])] for prompt, sample in table.live])
        tokens = draw(logits, numbers.to(logits.device)).tolist()
        ends = [
            row
            for row, ((prompt, sample), token) in enumerate(zip(table.live, tokens, strict=True))
            if prompt.add(sample, token, stops)
        ]
        table.remove(ends)
        ended(len(ends))


class _Drawn(LogitsProcessor):
    """Masks all tokens but the drawn one, so that greedy decoding takes it."""

    def __init__(self, numbers: torch.Tensor, width: int, draw: Draw) -> None:
        self._numbers, self._width, self._draw = numbers, width, draw

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        numbers = self._numbers[:, input_ids.shape[1] - self._width].to(scores.device)
        only = torch.full_like(scores, float("-inf"))
        return cast(torch.FloatTensor, only.scatter_(1, self._draw(scores, numbers)[:, None], 0.0))


@torch.inference_mode()
def decode_by_generate(
    model: PreTrainedModel,
    jobs: Iterable[Job],
    *,
    rows: int,
    draw: Draw,
    stops: Collection[int],
    ended: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[int, list[list[int]]]]:
    """As `decode`, through transformers' ``generate``, for models whose attention `decode` does not support."""
    end = sorted(stops)
    # transformers fills unset fields of a config from the model's, so that one is replaced meanwhile.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        for index, (prompt, numbers) in enumerate(jobs):
            samples: list[list[int]] = []
            config = GenerationConfig(max_new_tokens=numbers.shape[1], eos_token_id=end, pad_token_id=end[0])
            for part in numbers.split(rows):
                ids = torch.tensor([list(prompt)] * len(part), device=model.device)
                drawn = LogitsProcessorList([_Drawn(part, len(prompt), draw)])
                out = cast(Any, model).generate(  # a GenerationMixin too, which its type does not show
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
    """Whether `decode` computes this model's distribution, judged by its layer types and a trial of a few tokens.

    `decode` does not support attention with a bias, keys shared by layers, recurrent states and the like; the trial
    compares it with the model's attention. bfloat16 rounding moves a few percent of the probability.
    """
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    if set(types) - {"full_attention", "sliding_attention"} or not model._can_set_attn_implementation():
        return False
    tokens = torch.arange(19) * 7919 % embedding_rows(model)
    ids = tokens.tolist()
    bound = 1e-3 if model.dtype == torch.float32 else 0.1
    try:
        full = model(input_ids=tokens[None].to(model.device), use_cache=False).logits[0, -3:]
        prompt, rows = _prefill(model, (ids[:16], torch.zeros(2, 4))), _Rows(2)
        rows.live = [(prompt, 0), (prompt, 1)]
        logits = []
        for token in ids[16:]:
            for tokens_of_sample in prompt.tokens:
                tokens_of_sample.append(token)
            logits.append(_step(model, rows)[1])
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError):
        return False
    differ = torch.softmax(full.float(), -1) - torch.softmax(torch.stack(logits).float(), -1)
    return differ.abs().sum(-1).mean().item() / 2 < bound
