"""Log-probs of response tokens from final hidden states, through the vocabulary-parallel output weight.

Only positions that predict a trained token get logits, a chunk at a time, in forward and again in backward; no
vocabulary-wide tensor exists for other tokens, nor for all response tokens at once. Rows that pad the vocabulary are
masked, so that log-probs do not depend on the padding. Sums are computed in float32 (float64 stays float64).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.parallel.products import add_product, added_gradient

CHUNKS = 256, 2048
"""Smallest and largest chunk by default."""
LOGITS = 2**30
"""Bytes that the logits of a chunk may take in float32 by default, on CUDA."""


def chunk_size(rows: int, on_cuda: bool) -> int:
    """Returns the number of response tokens of a chunk by default, a power of two.

    In backward a chunk reads and writes the gradient of the whole weight in float32, which on Hopper takes as long as
    its product with some 600 to 800 tokens. The number depends on the layout alone, and not on the memory that is free
    at a moment: chunks decide the order of sums, so a resumed run needs the same, and ranks that share the vocabulary
    reduce a chunk together.

    Args:
        rows: rows of the padded output weight on this rank.
    """
    smallest, largest = CHUNKS
    if not on_cuda:
        return smallest
    return min(largest, max(smallest, 1 << (LOGITS // (4 * rows)).bit_length() - 1))


def logits_of(hidden: Tensor, weight: Tensor, total: torch.dtype) -> Tensor:
    """Returns [C, V / tp] logits in ``total``, which 16 bits would round by up to 0.06 at 16 nats.

    torch's CPU kernels have no product whose result is wider than its operands: there the logits are rounded first.
    """
    if hidden.device.type == "cuda" and hidden.dtype.itemsize == 2:
        return torch.mm(hidden, weight.t(), out_dtype=total)
    return (hidden @ weight.t()).to(total)


class _ChunkedLogProbs(torch.autograd.Function):
    """Computes log softmax(hidden @ weight^T)[target], and the logits again in backward.

    The gradient is the softmax's: (one-hot - p) times the incoming gradient.
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
        squares: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        total = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        log_probs = torch.empty(targets.shape, dtype=total, device=hidden.device)
        log_sums = torch.empty_like(log_probs)
        log_squares = torch.empty_like(log_probs) if squares else None
        for begin in range(0, targets.numel(), chunk):
            part = slice(begin, begin + chunk)
            logits = logits_of(hidden[part], weight, total)
            logits[:, real_rows:] = float("-inf")
            largest = logits.amax(dim=-1)
            local = targets[part] - first_row
            in_shard = (local >= 0) & (local < weight.shape[0])
            picked = logits.gather(1, local.clamp(0, weight.shape[0] - 1)[:, None])[:, 0].masked_fill(~in_shard, 0)
            if group is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
                dist.all_reduce(picked, group=group)
            sums = logits.sub_(largest[:, None]).exp_().sum(dim=-1)
            if group is not None:
                dist.all_reduce(sums, group=group)
            log_sums[part] = largest + sums.log()
            log_probs[part] = picked - log_sums[part]
            if log_squares is not None:
                of_squares = logits.square_().sum(dim=-1)
                if group is not None:
                    dist.all_reduce(of_squares, group=group)
                log_squares[part] = of_squares.log() - 2 * sums.log()
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.settings = first_row, real_rows, chunk, group, total
        ctx.fused = weight if fused else None
        if log_squares is None:
            return log_probs
        ctx.mark_non_differentiable(log_squares)
        return log_probs, log_squares

    @staticmethod
    def backward(ctx, grad: Tensor, *ignored: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch annotates any number
        hidden, weight, targets, log_sums = ctx.saved_tensors
        first_row, real_rows, chunk, group, total = ctx.settings
        grad_hidden = torch.empty_like(hidden)
        separate, sum_of_chunks = ctx.fused is None, None
        if ctx.needs_input_grad[1]:  # not with LoRA; bfloat16 would lose the sum over chunks
            sum_of_chunks = (
                torch.zeros(weight.shape, dtype=total, device=weight.device) if separate else ctx.fused.main_grad
            )
        for begin in range(0, targets.numel(), chunk):
            part = slice(begin, begin + chunk)
            rows = logits_of(hidden[part], weight, total).sub_(log_sums[part][:, None]).exp_().neg_()
            rows[:, real_rows:] = 0
            local = targets[part] - first_row
            in_shard = ((local >= 0) & (local < weight.shape[0])).to(total)
            rows.scatter_add_(1, local.clamp(0, weight.shape[0] - 1)[:, None], in_shard[:, None])
            rows = rows.mul_(grad[part][:, None]).to(hidden.dtype)
            grad_hidden[part] = rows @ weight
            if sum_of_chunks is not None:
                add_product(sum_of_chunks, rows.t(), hidden[part])
        if group is not None:
            dist.all_reduce(grad_hidden, group=group)
        grad_weight = None
        if sum_of_chunks is not None:
            grad_weight = sum_of_chunks.to(weight.dtype) if separate else added_gradient(ctx.fused)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def response_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
    fused: bool = False,
    squares: bool = False,
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

    Returns:
        [R] float32 (float64 for float64 inputs), nats; [2, R] with ``squares``.
    """
    rank = 0 if group is None else dist.get_rank(group)
    first_row = rank * weight.shape[0]
    real_rows = max(0, min(weight.shape[0], vocab_size - first_row))
    scores = _ChunkedLogProbs.apply(hidden, weight, targets, first_row, real_rows, chunk_size, group, fused, squares)
    return torch.stack(scores) if squares else scores


def segment_sums(log_probs: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums [..., R] log-probs by segment to [..., count]; in order on the CPU, on CUDA with --deterministic-mode."""
    return log_probs.new_zeros(*log_probs.shape[:-1], count).index_add(-1, segments, log_probs)
