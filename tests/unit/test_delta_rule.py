"""The gated delta rule over packs: token by token in float64, transformers' own, and states that fork."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_solopo.model.delta_rule import CausalConvolution, gated_delta_rule
from megatron_solopo.pack import Piece
from megatron_solopo.parallel.recurrence import CHUNK, RecurrentLayout, recurrent_layout

PIECES = (Piece(0, 150, None, 3), Piece(153, 5, 0), Piece(158, 70, 0, 2), Piece(230, 2), Piece(232, 4, 3, 1))
PIECES = (*PIECES, Piece(237, 0, None, 3))
"""Prompts of three chunks and of fewer tokens than the convolution's taps; padding behind pieces and at the end."""
ROWS, TAPS = 240, 4
KEY_HEADS, VALUE_HEADS, KEY, VALUE = 2, 4, 8, 6
REAL = torch.cat([torch.arange(piece.start, piece.start + piece.length) for piece in PIECES])


def layout_of(order: list[np.ndarray] | None = None, pieces: tuple[Piece, ...] = PIECES) -> RecurrentLayout:
    return recurrent_layout(pieces, TAPS, order or [np.arange(sum(piece.slot for piece in pieces))])


def drawn(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value, log of the decay, and beta."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, dtype=dtype, generator=generator)

    query, key, value = normal(KEY_HEADS, KEY), normal(KEY_HEADS, KEY), normal(VALUE_HEADS, VALUE)
    tensors = [query, key, value, -normal(VALUE_HEADS).exp() / 4, normal(VALUE_HEADS).sigmoid()]
    return [tensor.requires_grad_() for tensor in tensors]


def ours(layout: RecurrentLayout, tensors: list[Tensor]) -> Tensor:
    """[rows, heads, dv] by the layout's chunks."""
    return gated_delta_rule(*(layout.in_chunks(tensor) for tensor in tensors), layout)


def token_by_token(tensors: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 10 of arXiv 2412.06464: the outputs and the last state of one sequence."""
    query, key, value, log_decay, beta = tensors
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    query, key = (x.repeat_interleave(VALUE_HEADS // KEY_HEADS, 1) for x in (query / KEY**0.5, key))
    outputs = []
    for q, k, v, g, b in zip(query, key, value, log_decay, beta, strict=True):
        state = state * g.exp()[:, None, None]
        correction = b[:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
        state = state + torch.einsum("hk,hv->hkv", k, correction)
        outputs.append(torch.einsum("hkv,hk->hv", state, q))
    return torch.stack(outputs), state


def expected(tensors: list[Tensor]) -> Tensor:
    """[real rows, heads, dv], each response from its prompt's last state."""
    states, outputs = {}, []
    for number, piece in enumerate(PIECES[:-1]):
        rows = slice(piece.start, piece.start + piece.length)
        zeros = torch.zeros(VALUE_HEADS, KEY, VALUE, dtype=torch.float64)
        start = zeros if piece.prompt is None else states[piece.prompt]
        output, states[number] = token_by_token([tensor[rows] for tensor in tensors], start)
        outputs.append(output)
    return torch.cat(outputs)


def test_a_pack_has_the_outputs_and_gradients_of_its_tokens_one_by_one() -> None:
    tensors = drawn()
    here, there = ours(layout_of(), tensors)[REAL], expected(tensors)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-13)
    weights = torch.randn(there.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad((each * weights).sum(), tensors) for each in (here, there))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-13 * other.norm()


FORKS: dict[str, Callable[[RecurrentLayout], RecurrentLayout]] = {
    "another prompt's state": lambda layout: replace(layout, forks=layout.forks.flip(0)),
    "the first prompt's state": lambda layout: replace(layout, forks=torch.zeros_like(layout.forks)),
}


@pytest.mark.parametrize("wrong", FORKS)
def test_a_wrong_fork_of_the_state_is_seen(wrong: str) -> None:
    tensors = drawn()
    layout = FORKS[wrong](layout_of())
    off = (ours(layout, tensors)[REAL] - expected(tensors)).abs().amax((1, 2))
    assert off[:150].max() <= 1e-13 and off[REAL >= 153].max() > 1e-3


def test_the_state_behind_a_prompt_is_that_of_its_last_token_in_every_response() -> None:
    """A prompt with each response behind it, as sequences of their own."""
    tensors = drawn()
    shared = ours(layout_of(), tensors)
    for number, piece in enumerate(PIECES):
        if piece.prompt is None:
            continue
        prompt = PIECES[piece.prompt]
        rows = torch.cat([torch.arange(each.start, each.start + each.length) for each in (prompt, piece)])
        alone = ours(layout_of(pieces=(Piece(0, len(rows)),)), [tensor[rows] for tensor in tensors])
        torch.testing.assert_close(alone, shared[rows], rtol=0, atol=1e-13, msg=f"piece {number}")


def test_the_rule_is_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one sequence, transformers' chunked function with its own casts to float32 made to float64."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as theirs

    tensors, repeats = drawn(130), VALUE_HEADS // KEY_HEADS
    query, key, *others = (tensor[None] for tensor in tensors)
    monkeypatch.setattr(torch, "float32", torch.float64)
    repeated = (x.repeat_interleave(repeats, 2) for x in (query, key))
    there, _ = theirs(*repeated, *others, use_qk_l2norm_in_kernel=True)
    here = ours(layout_of(pieces=(Piece(0, 130),)), tensors)
    torch.testing.assert_close(here, there[0], rtol=0, atol=1e-13)


def test_the_convolution_of_a_response_reads_its_prompts_last_tokens() -> None:
    layout = layout_of()
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((ROWS, 3), (3, TAPS)))
    convolved = CausalConvolution.apply(x, weight, layout.rows, layout.present).flatten(0, 1)[layout.places]
    for piece in PIECES[:-1]:
        before = () if piece.prompt is None else (PIECES[piece.prompt],)
        sequence = torch.cat([x[each.start : each.start + each.length] for each in (*before, piece)])
        padded = torch.nn.functional.pad(sequence.T, (TAPS - 1, 0))[None]
        whole = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], groups=3))[0].T
        torch.testing.assert_close(convolved[piece.start : piece.start + piece.length], whole[-piece.length :])


def test_the_convolution_has_its_gradient() -> None:
    layout = layout_of()
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((ROWS, 2), (2, TAPS)))
    arguments = (x, weight, layout.rows, layout.present)
    assert torch.autograd.gradcheck(lambda *two: CausalConvolution.apply(*two, *arguments[2:]), arguments[:2])


def test_rows_that_ranks_hold_are_the_packs() -> None:
    """Of context-parallel ranks: the same chunks of the rows as the ranks' parts follow each other."""
    order = [np.arange(0, ROWS, 2), np.arange(1, ROWS, 2)]
    tensors, held = drawn(), np.concatenate(order)
    there = ours(layout_of(), tensors)
    here = ours(layout_of(order), [tensor[held] for tensor in tensors])
    assert torch.equal(here[np.isin(held, REAL)], there[held[np.isin(held, REAL)]])


def test_chunks_are_those_of_prompts_and_then_of_responses() -> None:
    layout = layout_of()
    assert (layout.prompts, layout.responses) == ((3, 1, 1), (3, 1))
    assert layout.rows.shape == (9, CHUNK + TAPS - 1)
    assert layout.forks.tolist() == [0, 0, 2]  # prompts of 150, 3 (padding alone) and 2 tokens
    assert layout.response_tokens == 79 and layout.prompt_ends.tolist() == [0, 150, 153, 155]
