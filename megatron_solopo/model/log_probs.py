"""Log-probs of response tokens from final hidden states, through the vocabulary-parallel output weight.

Only positions that predict a trained token get logits: R tokens, H wide, V rows of the vocabulary on this rank. Forward
computes them by chunks of C tokens, since their softmax needs whole rows. Backward needs the logits' gradient, g times
(one-hot - p), where g is known once the loss of all segments is. It computes blocks of rows of the vocabulary for all
tokens: each row of the weight's gradient is then one product, rounded once and written once, and only the [R, H]
gradient of the hidden states is summed over blocks, in float32.

Each product of R, H and V takes 2 R H V operations. Which of them are computed is a matter of shapes:

- R <= C (R < 2 C in 16 bits on CUDA): forward keeps one-hot - p, at most 4 C V bytes, and backward computes no logits.
  Three products: one forward, two for gradients.
- Else, and with a cap on the logits (cap x tanh(logit / cap), Gemma's ``final_logit_softcapping``), backward computes
  the logits of each block again: four products, and no more than C V logits at a time, of which a cap needs two.

Chunked losses that compute gradients in forward (Liger's) have three products by a scalar that is known there, the loss
of the chunk; here a group's segments may lie in several chunks. The unscaled gradient of the hidden states could be
computed in forward too, but the weight's needs g per token, so p again: four products, and nothing is saved. Skipping
blocks of small p (Cut Cross Entropy, arXiv 2411.09009) would save more and is not exact.

No vocabulary-wide tensor exists for other tokens, and none larger than the logits of a chunk. Beside the weight's
gradient backward needs at most 8 C V bytes and a few [R, H]. Rows that pad the vocabulary are masked, so that log-probs
do not depend on the padding. Sums are computed in float32 (float64 stays float64).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.parallel.products import add_product, added_gradient

CHUNKS = 256, 2048
"""Smallest and largest chunk by default."""
LOGITS = {"cuda": 2**30, "cpu": 2**29}
"""Bytes that the logits of a chunk may take in float32 by default."""


def chunk_size(rows: int, on_cuda: bool) -> int:
    """Returns the number of response tokens of a chunk by default, a power of two.

    It depends on the layout alone, and not on the memory that is free at a moment: chunks decide the order of sums, so
    a resumed run needs the same, and ranks that share the vocabulary reduce a chunk together.

    Args:
        rows: rows of the padded output weight on this rank.
    """
    smallest, largest = CHUNKS
    fitting = LOGITS["cuda" if on_cuda else "cpu"] // (4 * rows)
    return min(largest, max(smallest, 1 << fitting.bit_length() - 1)) if fitting else smallest


def block_size(tokens: int, hidden_size: int, chunk: int, rows: int) -> int:
    """Returns how many rows of the vocabulary backward computes at a time, for all tokens: so many that their logits
    and their weights in float32 take together what the logits of a chunk take; a multiple of 64 where they are more.

    Args:
        rows: rows of the padded output weight on this rank.
    """
    block = max(chunk * rows // (tokens + hidden_size), 1)
    return block - block % 64 if block > 64 else block


def kept_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the dtype in which forward keeps the logits' gradients: that of the hidden states, in which backward
    multiplies them; but float32 at least on the CPU, where the logits were rounded once already."""
    return hidden.dtype if hidden.device.type == "cuda" else torch.promote_types(hidden.dtype, torch.float32)


def is_kept(tokens: int, chunk: int, itemsize: int) -> bool:
    """Whether forward keeps the logits' gradients for backward: where they are no larger than the logits of a chunk.

    Args:
        itemsize: bytes of `kept_dtype`.
    """
    return tokens <= chunk or tokens * itemsize < chunk * 4


def logits_of(hidden: Tensor, weight: Tensor, total: torch.dtype) -> Tensor:
    """Returns [C, V / tp] logits in ``total``, which 16 bits would round by up to 0.06 at 16 nats.

    torch's CPU kernels have no product whose result is wider than its operands: there the logits are rounded first.
    """
    if hidden.device.type == "cuda" and hidden.dtype.itemsize == 2:
        return torch.mm(hidden, weight.t(), out_dtype=total)
    return (hidden @ weight.t()).to(total)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    """Returns cap x tanh(logits / cap), in place."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _places(targets: Tensor, first_row: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns [C, 1] the column of each target among ``rows`` rows from ``first_row`` on, and 1 where it is there."""
    local = targets - first_row
    inside = (local >= 0) & (local < rows)
    return local.clamp(0, rows - 1)[:, None], inside.to(dtype)[:, None]


class _ChunkedLogProbs(torch.autograd.Function):
    """Computes log softmax(hidden @ weight^T)[target].

    The gradient of the logits is (one-hot - p) times the incoming gradient, and with a cap times the slope of
    `_capped`, 1 - (capped / cap)^2; see the module.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first_row: int,
        real_rows: int,
        chunk: int,
        group: dist.ProcessGroup | None,
        fused: bool,
        keeps: bool,
        squares: bool,
        cap: float | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        total = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(targets.shape, dtype=total, device=hidden.device)
        log_sums = torch.empty_like(log_probs)
        log_squares = torch.empty_like(log_probs) if squares else None
        kept: list[Tensor] = []
        for begin in range(0, targets.numel(), chunk):
            part = slice(begin, begin + chunk)
            logits = _capped(logits_of(hidden[part], weight, total), cap)
            logits[:, real_rows:] = float("-inf")
            largest = logits.amax(dim=-1)
            columns, inside = _places(targets[part], first_row, weight.shape[0], total)
            picked = logits.gather(1, columns).masked_fill_(inside == 0, 0)[:, 0]
            if group is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
                dist.all_reduce(picked, group=group)
            sums = logits.sub_(largest[:, None]).exp_().sum(dim=-1)
            if group is not None:
                dist.all_reduce(sums, group=group)
            log_sums[part] = largest + sums.log()
            log_probs[part] = picked - log_sums[part]
            if log_squares is not None:
                of_squares = torch.linalg.vector_norm(logits, dim=-1).square_()
                if group is not None:
                    dist.all_reduce(of_squares, group=group)
                log_squares[part] = of_squares.log() - 2 * sums.log()
            if keeps:
                logits.div_(sums[:, None]).neg_().scatter_add_(1, columns, inside)
                kept.append(logits.to(kept_dtype(hidden)))
            del logits  # else they would exist beside those of the next chunk
        whole = torch.cat(kept) if len(kept) > 1 else next(iter(kept), None)
        ctx.save_for_backward(hidden, weight, targets, log_sums, whole)
        ctx.settings = first_row, real_rows, chunk, group, total, cap
        ctx.fused = weight if fused else None
        if log_squares is None:
            return log_probs
        ctx.mark_non_differentiable(log_squares)
        return log_probs, log_squares

    @staticmethod
    def backward(ctx, grad: Tensor, *ignored: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch annotates any number
        hidden, weight, targets, log_sums, kept = ctx.saved_tensors
        first_row, real_rows, chunk, group, total, cap = ctx.settings
        grad_hidden = torch.zeros(hidden.shape, dtype=total, device=hidden.device)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight) if ctx.fused is None else ctx.fused.main_grad
        product = _write_product if ctx.fused is None else add_product
        computed = real_rows if targets.numel() else 0
        share = chunk if kept is None and cap is None else max(chunk // 2, 1)
        size = block_size(len(hidden), hidden.shape[1], share, len(weight))
        for begin in range(0, computed, size):
            block = slice(begin, min(begin + size, computed))
            if kept is None:
                rows = _capped(logits_of(hidden, weight[block], total), cap)
                slopes = None if cap is None else (rows / cap).square_().neg_().add_(1)
                rows.sub_(log_sums[:, None]).exp_().neg_()
                rows.scatter_add_(1, *_places(targets, first_row + begin, rows.shape[1], total)).mul_(grad[:, None])
                if slopes is not None:
                    rows.mul_(slopes)
                    del slopes
            else:
                rows = kept[:, block] * grad[:, None]
            rows = rows.to(hidden.dtype)
            if hidden.device.type == "cuda":
                add_product(grad_hidden, rows, weight[block])
            else:  # a product in 16 bits would be rounded in every block
                torch.addmm(grad_hidden, rows.to(total), weight[block].to(total), out=grad_hidden)
            if grad_weight is not None:
                product(grad_weight[block], rows.t(), hidden)
            del rows
        if ctx.fused is not None:
            grad_weight = added_gradient(ctx.fused)
        elif grad_weight is not None:
            grad_weight[computed:] = 0
        if group is not None:
            dist.all_reduce(grad_hidden, group=group)
        return grad_hidden.to(hidden.dtype), grad_weight, *[None] * 9


def _write_product(result: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out=result)


def response_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
    fused: bool = False,
    squares: bool = False,
    cap: float | None = None,
) -> Tensor:
    """Computes the log-probs of ``targets``.

    Args:
        hidden: [R, H], the states that predict each target.
        weight: [V / tp, H], this rank's rows of the padded output weight.
        targets: [R] token ids.
        vocab_size: rows of the vocabulary; the rows beyond are padding.
        chunk_size: rows whose logits exist at one time.
        group: the tensor-parallel group, or None where the weight is not sharded.
        fused: whether backward adds the weight's gradient to its ``main_grad``, DDP's sum in float32.
        squares: whether the result has a second row, without gradient: the logarithm of the sum over the vocabulary of
            the squared probabilities, at each target.
        cap: of the logits, `fields.logit_cap`.

    Returns:
        [R] float32 (float64 for float64 inputs), nats; [2, R] with ``squares``.
    """
    rank = 0 if group is None else dist.get_rank(group)
    first_row = rank * weight.shape[0]
    real_rows = max(0, min(weight.shape[0], vocab_size - first_row))
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keeps = differentiable and cap is None and is_kept(len(hidden), chunk_size, kept_dtype(hidden).itemsize)
    fused = fused and weight.requires_grad  # a frozen weight has no gradient, as with LoRA
    settings = first_row, real_rows, chunk_size, group, fused, keeps, squares, cap
    scores = _ChunkedLogProbs.apply(hidden, weight, targets, *settings)
    return torch.stack(scores) if squares else scores


def segment_sums(log_probs: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums [..., R] log-probs by segment to [..., count]; in order on the CPU, on CUDA with --deterministic-mode."""
    return log_probs.new_zeros(*log_probs.shape[:-1], count).index_add(-1, segments, log_probs)


@torch.no_grad()
def most_likely(
    hidden: Tensor,
    weight: Tensor,
    vocab_size: int,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
    cap: float | None = None,
) -> Tensor:
    """Returns [R] int64, the token with the largest logit for each row of [R, H] ``hidden``; the lowest of equal ones.

    Args:
        weight, vocab_size, chunk_size, group, cap: see `response_log_probs`. A cap makes large logits equal.
    """
    first_row = 0 if group is None else dist.get_rank(group) * weight.shape[0]
    real_rows = max(0, min(weight.shape[0], vocab_size - first_row))
    total = torch.promote_types(hidden.dtype, torch.float32)
    tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    for begin in range(0, len(hidden), chunk_size):
        part = slice(begin, begin + chunk_size)
        logits = _capped(logits_of(hidden[part], weight, total), cap)
        logits[:, real_rows:].fill_(float("-inf"))
        largest, places = logits.max(dim=-1)
        places += first_row
        if group is not None:
            local = largest.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            places = torch.where(local == largest, places, torch.iinfo(torch.int64).max)
            dist.all_reduce(places, op=dist.ReduceOp.MIN, group=group)
        tokens[part] = places
    return tokens
