"""Packs cut over context-parallel ranks: who computes which rows, what they see, and attention over sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from drawn_packs import draw_pack, visible
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.pack import Context, Pack, Side
from megatron_solopo.parallel import flash
from megatron_solopo.parallel.cpu_attention import cpu_layout
from megatron_solopo.parallel.layout import RankLayout, block_layout
from megatron_solopo.parallel.sequences import PromptLayout, SequenceLayout, prompt_layout, sequence_layout
from megatron_solopo.parallel.zigzag import rows_of
from megatron_solopo.planning import fake
from megatron_solopo.planning.operators import ATTENTION_BACKWARD, ATTENTION_FORWARD, operation_of


def seen_by(layout: SequenceLayout, order: np.ndarray) -> np.ndarray:
    """[queries of a rank, S] how often each query attends to each row of the pack; ``order``: rows as gathered."""
    rows = order if layout.keys is None else order[layout.keys.numpy()]
    seen, query, key = np.zeros((sum(layout.query_lengths), len(order)), dtype=int), 0, 0
    for queries, keys in zip(layout.query_lengths, layout.key_lengths, strict=True):
        reached = np.tri(queries, keys, keys - queries)
        if layout.window is not None:
            reached -= np.tri(queries, keys, keys - queries - layout.window)
        np.add.at(seen[query : query + queries].T, rows[key : key + keys], reached.T)
        query, key = query + queries, key + keys
    assert layout.cu_seqlens_q.tolist() == [0, *np.cumsum(layout.query_lengths)]
    assert layout.cu_seqlens_kv.tolist() == [0, *np.cumsum(layout.key_lengths)]
    return seen


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [None, 6])
def test_ranks_share_the_rows_and_attend_as_the_pack_does(
    seed: int, size: int, share: bool, window: int | None
) -> None:
    pack = draw_pack(seed, size, share)
    wanted, rows, work = visible(pack, window), [rows_of(pack.pieces, rank, size) for rank in range(size)], []
    order = np.concatenate(rows)
    assert sorted(order) == list(range(len(pack.tokens)))
    for rank in range(size):
        layout = sequence_layout(pack.pieces, rank, size, window=window)
        seen = seen_by(layout, np.arange(len(order)) if size == 1 else order)
        assert (seen == wanted[rows[rank] if size > 1 else slice(None)]).all()  # and nothing twice
        work.append(seen.sum() if window is None else 0)
    assert max(work) == min(work)  # zig-zag: every rank attends to the same number of pairs


SCALE = 0.7


def scores_of(query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """[heads, S, T] scores, -inf where hidden."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (torch.einsum("shd,thd->hst", query, key) * SCALE).masked_fill(~seen, float("-inf"))


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax attention with the whole score matrix; a sink is the score of a key more, whose value is 0."""
    value, scores = value.repeat_interleave(query.shape[1] // value.shape[1], 1), scores_of(query, key, seen)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(query), 1)), dim=-1)
    return torch.einsum("hst,thd->shd", scores.softmax(-1)[..., : len(key)], value)


def layouts_of(
    pack: Pack, kind: str, size: int, window: int | None = None
) -> Iterator[tuple[RankLayout, Tensor, Tensor]]:
    """(layout, rows of its queries, rows of the keys that it is given) of each rank."""
    everything = torch.arange(len(pack.tokens))
    whole = {"prompts": lambda pieces: prompt_layout(pieces, False), "blocks": block_layout}
    make = {"sequences": partial(sequence_layout, window=window), "cpu": partial(cpu_layout, window=window)}
    if size == 1:
        yield (whole | make)[kind](pack.pieces), everything, everything
    else:
        each = [torch.from_numpy(rows_of(pack.pieces, rank, size)) for rank in range(size)]
        for rank, rows in enumerate(each):
            yield make[kind](pack.pieces, rank, size), rows, torch.cat(each)


@pytest.fixture
def flash_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flash kernel of CUDA with whole score matrices, in float64 within; backward from what forward returned."""

    def sequences(layout: SequenceLayout, of_queries: list[Tensor], of_keys: list[Tensor]) -> Iterator[Any]:
        for parts in zip(
            *(x.double().split(layout.query_lengths) for x in of_queries),
            *(x.double().split(layout.key_lengths) for x in of_keys),
            strict=True,
        ):
            queries, keys = len(parts[0]), len(parts[-1])
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            yield *parts, (distance >= 0) & (distance < (layout.window or keys))

    def forward(query: Tensor, keys: Tensor, values: Tensor, layout: SequenceLayout, scale: float) -> tuple:
        assert scale == SCALE
        outputs, log_sums = [], []
        for q, k, v, seen in sequences(layout, [query], [keys, values]):
            outputs.append(dense(q, k, v, seen))
            log_sums.append(scores_of(q, k, seen).logsumexp(-1))
        precise = torch.promote_types(query.dtype, torch.float32)
        return torch.cat(outputs).to(query.dtype), torch.cat(log_sums, 1).to(precise)

    def backward(
        grad: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        log_sums: Tensor,
        layout: Any,
        scale: Any,
    ) -> tuple[Tensor, ...]:
        grads: list[tuple[Tensor, ...]] = []
        for g, q, out, log_sum, k, v, seen in sequences(layout, [grad, query, output, log_sums.t()], [keys, values]):
            groups = q.shape[1] // k.shape[1]
            wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (k, v))
            shares = torch.exp(scores_of(q, k, seen) - log_sum.t()[..., None])
            of_scores = torch.einsum("shd,thd->hst", g, wide_v) - (g * out).sum(-1).t()[..., None]
            of_scores = of_scores * shares * SCALE
            of_k, of_v = torch.einsum("hst,shd->thd", of_scores, q), torch.einsum("hst,shd->thd", shares, g)
            narrow = (x.unflatten(1, (-1, groups)).sum(2) for x in (of_k, of_v))
            grads.append((torch.einsum("hst,thd->shd", of_scores, wide_k), *narrow))
        return tuple(torch.cat(parts).to(grad.dtype) for parts in zip(*grads, strict=True))

    monkeypatch.setattr(flash, "forward", forward)
    monkeypatch.setattr(flash, "backward", backward)


ON_CUDA = [("sequences", 1), ("sequences", 2), ("sequences", 4), ("prompts", 1)]
KINDS = [*ON_CUDA, ("blocks", 1), ("cpu", 1), ("cpu", 2), ("cpu", 3)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("kind", "size"), KINDS)
@pytest.mark.parametrize("share", [True, False])
def test_attention_over_sequences_is_attention(
    dtype: Any, bound: float, heads: int, kv_heads: int, kind: str, size: int, share: bool, flash_of_cuda: None
) -> None:
    check_attention(dtype, bound, heads, kv_heads, kind, size, share)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize(("kind", "size"), [("cpu", 1), ("cpu", 2), ("cpu", 3), ("sequences", 1), ("sequences", 2)])
@pytest.mark.parametrize("share", [True, False])
def test_attention_in_a_window_is_attention(
    kind: str, size: int, share: bool, window: int, flash_of_cuda: None
) -> None:
    """Shorter and longer than completions, chunks and prompts; a completion's reaches into its prompt."""
    check_attention(torch.float64, 1e-12, 4, 2, kind, size, share, window)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(("kind", "size"), [("cpu", 1), ("cpu", 2), ("sequences", 1), ("sequences", 2)])
@pytest.mark.parametrize("window", [None, 5])
def test_a_sink_is_a_key_more_whose_value_is_0(
    dtype: Any, bound: float, kind: str, size: int, window: int | None, flash_of_cuda: None
) -> None:
    check_attention(dtype, bound, 4, 2, kind, size, True, window, sinks=True)


def check_attention(
    dtype: Any,
    bound: float,
    heads: int,
    kv_heads: int,
    kind: str,
    size: int,
    share: bool,
    window: int | None = None,
    sinks: bool = False,
) -> None:
    """Output of every rank's rows, and the gradients that the ranks' parts add up to, relative to their norms."""
    pack = draw_pack(11, size, share)
    count, generator = len(pack.tokens), torch.Generator().manual_seed(0)
    seen = torch.from_numpy(visible(pack, window))
    query, key, value, weight = (
        torch.randn(count, n, 16, dtype=torch.float64, generator=generator).to(dtype).double()
        for n in (heads, kv_heads, kv_heads, heads)
    )
    inputs = [query, key, value]
    if sinks:
        inputs.append(torch.linspace(-3, 2, heads, dtype=torch.float64).to(dtype).double())
    whole = [x.clone().requires_grad_() for x in inputs]
    expected = dense(*whole[:3], seen, *whole[3:])
    (expected * weight).sum().backward()
    ours = [x.to(dtype).requires_grad_() for x in inputs]
    for layout, rows, order in layouts_of(pack, kind, size, window):
        result = layout.attend(ours[0][rows], ours[1][order], ours[2][order], SCALE, *ours[3:])
        assert (result.double() - expected[rows]).norm() <= bound * expected[rows].norm()
        (result * weight[rows].to(dtype)).sum().backward()
    for mine, theirs in zip(ours, whole, strict=True):
        norm = theirs.grad.norm().clamp(min=1)  # in a window of 1 nothing depends on queries and keys
        assert (mine.grad.double() - theirs.grad).norm() <= bound * norm


class Calls(TorchDispatchMode):
    """The calls of operators of these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.calls = names, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (name := func.overloadpacket.__name__) in self.names:
            self.calls.append((name, args, result))
        return result


def completions(*lengths: int, prompt: int = 8) -> Pack:
    """A prompt with completions of these lengths."""
    each = tuple(Completion(Side.CHOSEN, [2] * length, None, i) for i, length in enumerate(lengths))
    return build_pack([TokenGroup("g", (Prompt(Context.SHORT, [1] * prompt, each),))], [0], True)


ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"


def test_no_mask_and_all_completions_of_a_prompt_in_one_call_on_the_cpu() -> None:
    """Of 300 completions in two lengths: the prompt, the completions of each length, and all of these over it."""
    pack = completions(*[3, 5] * 150, prompt=1000)
    inputs = [torch.randn(len(pack.tokens), n, 8, requires_grad=True) for n in (2, 1, 1)]
    with Calls(ON_CPU, f"{ON_CPU}_backward") as calls:
        cpu_layout(pack.pieces).attend(*inputs, None).sum().backward()
    wanted = {(1, 1000, 1000): 1, (150, 2, 2): 1, (150, 4, 4): 1, (1, 900, 1000): 1}
    for name, operands in ((ON_CPU, 0), (f"{ON_CPU}_backward", 1)):
        shapes = [
            (query.shape[0], query.shape[2], key.shape[2])
            for called, arguments, _ in calls.calls
            if called == name
            for query, key in [arguments[operands : operands + 2]]
        ]
        assert Counter(shapes) == wanted


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 3, 7])
def test_no_call_computes_what_causality_or_a_window_hides(size: int, window: int | None) -> None:
    """The pairs of all ranks' calls are those of the pack, with the diagonal blocks as triangles."""
    pack = draw_pack(3, size)
    calls = [call for rank in range(size) for call in cpu_layout(pack.pieces, rank, size, window=window).calls]
    pairs = sum(len(c.places) * c.query_length * c.key_length for c in calls if not c.causal)
    pairs += sum(len(c.places) * c.query_length * (c.query_length + 1) // 2 for c in calls if c.causal)
    assert pairs == visible(pack, window).sum()


def test_gradients_of_keys_are_summed_in_float32() -> None:
    """300 completions of one prompt give each key of it the same gradient, whose sum bfloat16 loses at 256."""
    pack = completions(*[2] * 300)
    layout = sequence_layout(pack.pieces)
    x = torch.zeros(8 + 300, 1, 4, dtype=torch.bfloat16)
    with Calls("index_add_") as sums:
        total = layout.sum_to_rows(torch.ones(layout.keys.numel(), 1, 4, dtype=torch.bfloat16), x)
    assert total[0, 0, 0].item() > 299 and total.dtype == torch.bfloat16
    # The CPU's kernel would sum in float32 within.
    assert [arguments[0].dtype for _, arguments, _ in sums.calls] == [torch.float32]


FLASH = ("_flash_attention_forward", "_flash_attention_backward")


def test_the_flash_kernel_gets_the_window() -> None:
    """Its keys are those that the window reaches; the planner counts the pairs in it."""
    pack, window = completions(30, 20, prompt=100), 8
    on_host = sequence_layout(pack.pieces, window=window)
    with fake.rehearsal("cuda", 0, 1) as rehearsal, rehearsal.mode:
        from megatron_solopo.model import forward

        layout = forward.on_device(on_host, rehearsal.platform.device)
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):  # as the platform of a rehearsal keeps them
            setattr(getattr(layout, name), "host_values", getattr(on_host, name))
        shapes = ((len(pack.tokens), 4, 16), *[(len(pack.tokens), 2, 16)] * 2)
        inputs = [torch.zeros(s, dtype=torch.bfloat16, device="cuda", requires_grad=True) for s in shapes]
        with Operations() as operations:
            layout.attend(*inputs, 0.7).sum().backward()
    assert layout.key_lengths == (100, 29 + window - 1, 19 + window - 1)
    pairs = visible(pack, window).sum()
    assert operations.flops == {ATTENTION_FORWARD: 4 * pairs * 4 * 16, ATTENTION_BACKWARD: 10 * pairs * 4 * 16}


class Operations(TorchDispatchMode):
    """Floating-point operations of attention by kind, and the window that each kernel gets."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = operation_of(func, args, kwargs or {}, result)
        if operation is not None and operation.kind in (ATTENTION_FORWARD, ATTENTION_BACKWARD):
            self.flops[operation.kind] = self.flops.get(operation.kind, 0) + operation.flops
        return result


@pytest.mark.parametrize(("kind", "size"), ON_CUDA)
def test_one_call_of_the_flash_kernel_on_cuda(kind: str, size: int) -> None:
    """All completions, or all pieces of a rank: what torch's operators are called with, and what they return."""
    pack = draw_pack(11, size)
    with fake.rehearsal("cuda", 0, 1) as rehearsal, rehearsal.mode, Calls(*FLASH) as flash:
        from megatron_solopo.model import forward

        for layout, rows, _ in layouts_of(pack, kind, size):
            shapes = ((len(rows), 4, 16), *[(len(pack.tokens), 2, 16)] * 2)
            inputs = [torch.zeros(s, dtype=torch.bfloat16, device="cuda", requires_grad=True) for s in shapes]
            sequences = layout.completions if isinstance(layout, PromptLayout) else layout
            result = forward.on_device(layout, rehearsal.platform.device).attend(*inputs, 0.7)
            result.backward(torch.zeros_like(result))
            assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]
            assert {x.grad.dtype for x in inputs} == {torch.bfloat16}
            (first, arguments, returned), (second, more, _) = flash.calls
            assert (first, second) == FLASH
            queries, keys = sum(sequences.query_lengths), sum(sequences.key_lengths)
            assert [tuple(x.shape) for x in arguments[:3]] == [(queries, 4, 16), (keys, 2, 16), (keys, 2, 16)]
            assert returned[1].shape == (4, queries) and returned[1].dtype == torch.float32
            assert all(x.dtype == torch.int32 and len(x) == len(sequences.key_lengths) + 1 for x in arguments[3:5])
            lengths = (max(sequences.query_lengths), max(sequences.key_lengths))
            assert arguments[5:] == (*lengths, 0.0, True, False) and more[8:12] == (*lengths, 0.0, True)
            flash.calls.clear()
