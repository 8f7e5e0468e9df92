"""The gated delta rule (arXiv 2412.06464, equation 10) over a pack, in chunks of tokens, in pure PyTorch.

Of each head a state S [dk, dv] is decayed, what it holds under a token's key is corrected towards the token's value,
and the token's query reads it:

    S_t = exp(g_t) S_{t-1} + b_t k_t (v_t - exp(g_t) k_t^T S_{t-1})^T,    o_t = q_t^T S_t

Within a chunk, with G the sum of g up to a token, the corrections of all tokens solve a triangular system (section 3.3
there): (I + tril(b_i k_i k_j exp(G_i - G_j), -1)) [U, W] = [b v, b exp(G) k], and behind a state S they are U - W S. So
the products with S alone follow each other chunk by chunk; the others are of all chunks at once.

A response starts from the state of its prompt. The gradients of that state are summed over the prompt's responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_solopo.parallel.recurrence import CHUNK, RecurrentLayout

EPSILON = 1e-6
"""Of the norm of queries and keys, as in transformers and fla."""


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, layout: RecurrentLayout
) -> Tensor:
    """Computes the rule over the chunks of a pack, in float32 or float64.

    Args:
        query, key: [N, CHUNK, key heads, dk], which are scaled to length 1 here, and queries by 1 / sqrt(dk).
        value: [N, CHUNK, value heads, dv]; a key head serves as many adjacent value heads each.
        log_decay: [N, CHUNK, value heads], g, at most 0.
        beta: the same shape, from 0 to 1. Where a chunk has no token both are 0, which leaves the state as it is.

    Returns:
        [S, value heads, dv] of the rows of the pack, in the dtype of ``log_decay``; a padding row has row 0's.
    """
    wide = log_decay.dtype
    query, key = (_of_heads(_unit(x.to(wide))) for x in (query, key))  # [N, key heads, CHUNK, dk]
    query = query * query.shape[-1] ** -0.5
    value, log_decay, beta = _of_heads(value.to(wide)), log_decay.transpose(1, 2), beta.to(wide).transpose(1, 2)
    repeats = value.shape[1] // key.shape[1]
    total = log_decay.cumsum(-1)  # [N, heads, CHUNK]
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    system = _repeated(key @ key.transpose(-1, -2), repeats) * decay * beta[..., None]
    scores = _repeated(query @ key.transpose(-1, -2), repeats) * decay
    query, key, grown = _repeated(query, repeats), _repeated(key, repeats), total.exp()[..., None]
    right = torch.cat((value, key * grown), -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    updates, reads = solved.split((value.shape[-1], key.shape[-1]), -1)
    query, key = query * grown, key * (total[..., -1:] - total).exp()[..., None]
    kept = total[..., -1].exp()
    corrections, outputs = _two_passes(updates, reads, query, key, kept, layout)
    return (outputs + scores @ corrections).transpose(1, 2).flatten(0, 1).index_select(0, layout.places)


def _two_passes(
    updates: Tensor, reads: Tensor, query: Tensor, key: Tensor, kept: Tensor, layout: RecurrentLayout
) -> tuple[Tensor, Tensor]:
    """Scans the prompts from a state of zeros, then the responses each from its prompt's."""
    steps = (layout.prompts, layout.responses)
    passes = list(
        zip(*(x.split([sum(step) for step in steps]) for x in (updates, reads, query, key, kept)), strict=True)
    )
    heads, width, columns = key.shape[1], key.shape[-1], updates.shape[-1]
    start = updates.new_zeros(layout.prompts[0], heads, width, columns)
    *of_prompts, states = Scan.apply(layout.prompts, start, *passes[0])
    if not layout.responses:
        return of_prompts[0], of_prompts[1]
    *of_responses, _ = Scan.apply(layout.responses, states.index_select(0, layout.forks), *passes[1])
    corrections, outputs = (torch.cat(each) for each in zip(of_prompts, of_responses, strict=True))
    return corrections, outputs


class Scan(torch.autograd.Function):
    """The recurrence over the chunks of n sequences, whose states are [n, heads, dk, dv].

    A chunk with the state S before it has the corrections C = U - W S and the outputs Q S, and the state behind it is
    exp(G of its end) S + K^T C.
    """

    @staticmethod
    def forward(
        ctx,
        steps: Sequence[int],
        start: Tensor,
        updates: Tensor,
        reads: Tensor,
        query: Tensor,
        key: Tensor,
        kept: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Args: how many sequences have each chunk, and of all chunks U, W, Q, K [chunks, heads, CHUNK, ...] and the
        factor exp(G) [chunks, heads]. Returns C, Q S, and the last state of each sequence."""
        corrections, outputs = torch.empty_like(updates), torch.empty_like(updates)
        states = updates.new_empty(len(updates), *start.shape[1:])  # before each chunk
        last = torch.empty_like(start)
        state = start
        for chunks, following in _steps(steps):
            count = chunks.stop - chunks.start
            before = states[chunks].copy_(state[:count])
            torch.sub(updates[chunks], reads[chunks] @ before, out=corrections[chunks])
            torch.matmul(query[chunks], before, out=outputs[chunks])
            state = _behind(before, kept[chunks], key[chunks], corrections[chunks])
            last[following:count] = state[following:]
        ctx.save_for_backward(reads, query, key, kept, corrections, states)
        ctx.steps = steps
        return corrections, outputs, last

    @staticmethod
    def backward(ctx, of_corrections: Tensor, of_outputs: Tensor, of_last: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        reads, query, key, kept, corrections, states = ctx.saved_tensors
        of_updates, of_behind = torch.empty_like(corrections), torch.empty_like(states)
        of_state = of_last[:0]
        for chunks, following in _steps(ctx.steps, backwards=True):
            count = chunks.stop - chunks.start
            behind = of_behind[chunks]
            behind[:following], behind[following:] = of_state, of_last[following:count]
            torch.add(of_corrections[chunks], key[chunks] @ behind, out=of_updates[chunks])
            of_state = kept[chunks][..., None, None] * behind
            of_state += query[chunks].transpose(-1, -2) @ of_outputs[chunks]
            of_state -= reads[chunks].transpose(-1, -2) @ of_updates[chunks]
        of_reads = (of_updates @ states.transpose(-1, -2)).neg_()
        of_query = of_outputs @ states.transpose(-1, -2)
        of_key = corrections @ of_behind.transpose(-1, -2)
        of_kept = (of_behind * states).sum((-1, -2))
        return None, of_state, of_updates, of_reads, of_query, of_key, of_kept


def _behind(state: Tensor, kept: Tensor, key: Tensor, corrections: Tensor) -> Tensor:
    return torch.addcmul(key.transpose(-1, -2) @ corrections, kept[..., None, None], state)


def _steps(steps: Sequence[int], backwards: bool = False) -> Iterator[tuple[slice, int]]:
    """Yields the chunks of each step, and how many sequences have one in the next step."""
    ends = list(accumulate(steps, initial=0))
    each = [
        (slice(first, end), following)
        for first, end, following in zip(ends[:-1], ends[1:], [*steps[1:], 0], strict=True)
    ]
    yield from reversed(each) if backwards else each


def uses_fla(x: Tensor, deterministic: bool) -> bool:
    """Whether `fla_rule` computes the rule of a layer whose tensors are like ``x``: on CUDA in 16 bits where fla is
    installed. Its sums have no fixed order."""
    return x.is_cuda and x.dtype.itemsize == 2 and not deterministic and _fla() is not None


@cache
def _fla() -> Callable[..., tuple[Tensor, Tensor]] | None:
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        return None
    return chunk_gated_delta_rule


def fla_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, layout: RecurrentLayout
) -> Tensor:
    """`gated_delta_rule` by the kernels of flash-linear-attention, a call for all prompts and one for all responses."""
    kernel = _fla()
    assert kernel is not None
    repeats = value.shape[2] // key.shape[2]
    tensors = (query.repeat_interleave(repeats, 2), key.repeat_interleave(repeats, 2), value, log_decay, beta)
    tokens = [x.flatten(0, 1).index_select(0, layout.sequences) for x in tensors]
    in_prompts = len(layout.sequences) - layout.response_tokens
    outputs, states = [], None
    for ends, part in ((layout.prompt_ends, slice(in_prompts)), (layout.response_ends, slice(in_prompts, None))):
        if len(ends) == 1:
            continue
        start = None if states is None else states.index_select(0, layout.forks)
        *sequences, decay, rate = (x[None, part] for x in tokens)
        output, states = kernel(
            *sequences,
            g=decay,
            beta=rate,
            initial_state=start,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=ends,
        )
        outputs.append(output[0])
    return torch.cat(outputs).index_select(0, layout.behind)


def _of_heads(x: Tensor) -> Tensor:
    """[N, CHUNK, heads, d] -> [N, heads, CHUNK, d]."""
    return x.transpose(1, 2).contiguous()


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


def _repeated(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


class CausalConvolution(torch.autograd.Function):
    """silu of a convolution of each channel over the tokens of its sequence, in the chunks of a pack; it keeps its
    input alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, rows: Tensor, present: Tensor) -> Tensor:
        """Args: [S, channels], [channels, taps], and those of the layout. Returns [N, CHUNK, channels]."""
        ctx.save_for_backward(x, weight, rows, present)
        return F.silu(_convolved(_gathered(x, rows, present), _wide(weight))).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] (one output, one gradient)
        x, weight, rows, present = ctx.saved_tensors
        gathered, wide = _gathered(x, rows, present), _wide(weight)
        grad = torch.ops.aten.silu_backward(_wide(grad), _convolved(gathered, wide))
        of_gathered, of_weight = torch.zeros_like(gathered), torch.empty_like(wide)
        for tap in range(weight.shape[1]):
            of_gathered[:, tap : tap + CHUNK].addcmul_(grad, wide[:, tap])
            of_weight[:, tap] = (grad * gathered[:, tap : tap + CHUNK]).sum((0, 1))
        of_gathered.masked_fill_(~present[..., None], 0)
        of_x = of_gathered.new_zeros(x.shape).index_add_(0, rows.flatten(), of_gathered.flatten(0, 1))
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None, None


def _gathered(x: Tensor, rows: Tensor, present: Tensor) -> Tensor:
    """Returns [N, taps - 1 + CHUNK, channels], zeros where a sequence has not begun."""
    return _wide(x.index_select(0, rows.flatten()).view(*rows.shape, -1)).masked_fill_(~present[..., None], 0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _convolved(gathered: Tensor, weight: Tensor) -> Tensor:
    result = gathered[:, :CHUNK] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        result.addcmul_(gathered[:, tap : tap + CHUNK], weight[:, tap])
    return result
