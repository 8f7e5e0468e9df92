"""The chunked head against log_softmax: value, gradient, padding rows, dtypes, and what it keeps in memory."""

import pytest
import torch
from test_context_parallel import Calls
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_solopo.model.log_probs import chunk_size, most_likely, response_log_probs, segment_sums
from megatron_solopo.planning import fake
from megatron_solopo.planning.memory import Ledger

TOKENS, HIDDEN, VOCABULARY, PADDED = 11, 6, 23, 32


def draw(tokens=TOKENS, hidden=HIDDEN, real=VOCABULARY, rows=PADDED, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(rows, hidden, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
    return states, weight, torch.randint(0, real, (tokens,), generator=g)


def whole(states, weight, targets, real=VOCABULARY, cap=None):
    """The same through one logits tensor, padding rows cut off."""
    logits = states @ weight[:real].t()
    logits = logits if cap is None else cap * (logits / cap).tanh()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 64])
def test_value_and_gradient_equal_log_softmax(chunk, cap):
    states, weight, targets = draw()
    factors = torch.linspace(-2, 3, TOKENS, dtype=torch.float64)
    ours = response_log_probs(states, weight, targets, VOCABULARY, chunk, cap=cap)
    theirs = whole(states, weight, targets, cap=cap)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad((ours * factors).sum(), (states, weight)),
        torch.autograd.grad((theirs * factors).sum(), (states, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_gradcheck(chunk):
    states, weight, targets = draw(tokens=5, hidden=3, real=7, rows=8)
    assert torch.autograd.gradcheck(lambda s, w: response_log_probs(s, w, targets, 7, chunk), (states, weight))


@pytest.mark.parametrize("fill", [0.0, 1e4, -1e4, 1e30, 1e300])
def test_padding_rows_never_count(fill):
    states, weight, targets = draw()
    with torch.no_grad():
        weight[VOCABULARY:] = fill
    ours = response_log_probs(states, weight, targets, VOCABULARY, 4)
    torch.testing.assert_close(ours, whole(states, weight, targets), rtol=1e-12, atol=1e-12)
    ours.sum().backward()
    assert weight.grad[VOCABULARY:].abs().max() == 0
    assert states.grad.isfinite().all() and states.grad.abs().max() > 0


def test_large_logits_do_not_overflow():
    states, weight, targets = draw(dtype=torch.float32)
    ours = response_log_probs(states * 1e4, weight, targets, VOCABULARY, 4)
    theirs = whole(states.double() * 1e4, weight.double(), targets)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0.1)
    ours.sum().backward()
    assert states.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_sums_run_in_float32(dtype, tolerance):
    states, weight, targets = draw(dtype=dtype)
    ours = response_log_probs(states, weight, targets, VOCABULARY, 4)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours.double(), whole(states.double(), weight.double(), targets), rtol=tolerance, atol=tolerance
    )
    ours.sum().backward()
    assert states.grad.dtype == weight.grad.dtype == dtype


def test_bfloat16_weight_gradient_does_not_lose_small_chunks():
    """Sums over chunks are kept in float32; in bfloat16 a sum of equal terms does not grow after about 256 of them."""
    states, weight, targets = draw(tokens=1, dtype=torch.bfloat16)
    states, targets = states.detach().expand(1024, -1).clone().requires_grad_(), targets.expand(1024)
    gradients = [
        torch.autograd.grad(response_log_probs(states, weight, targets, VOCABULARY, chunk).sum(), weight)[0].double()
        for chunk in (1, 1024)
    ]
    wide = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(whole(states.detach().double(), wide, targets).sum(), wide)
    assert all((gradient - exact).norm() < 0.02 * exact.norm() for gradient in gradients)


def test_no_token_has_no_log_prob():
    states, weight, _ = draw()
    nothing = response_log_probs(states[:0], weight, torch.zeros(0, dtype=torch.int64), VOCABULARY, 4)
    assert nothing.shape == (0,)
    nothing.sum().backward()
    assert weight.grad.abs().max() == 0 and states.grad.abs().max() == 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))]
        )
        return result


def largest(head, *inputs):
    with Largest() as watched:
        head(*inputs).sum().backward()
    return watched.elements


@pytest.mark.parametrize("chunk", [1, 8, 32])
def test_logits_of_all_tokens_never_exist(chunk):
    tokens, hidden, rows = 96, 16, 640
    states, weight, targets = draw(tokens, hidden, 600, rows)
    bound = max(chunk * rows, weight.numel(), states.numel())
    assert largest(lambda s, w: response_log_probs(s, w, targets, 600, chunk), states, weight) <= bound < tokens * rows
    assert (
        largest(lambda s, w: whole(s, w, targets, 600), states, weight) >= tokens * 600
    )  # the watcher sees such tensors


@pytest.mark.parametrize(
    ("rows", "on_cuda", "on_cpu"),
    [
        (1000, 2048, 2048),
        (65_536, 2048, 2048),
        (131_072, 2048, 1024),
        (131_200, 1024, 512),
        (152_064, 1024, 512),
        (2**22, 256, 256),
        (2**30, 256, 256),
    ],
)
def test_a_chunk_is_a_power_of_two_whose_logits_fit(rows, on_cuda, on_cpu):
    assert (chunk_size(rows, on_cuda=True), chunk_size(rows, on_cuda=False)) == (on_cuda, on_cpu)


@pytest.mark.parametrize(("tokens", "products"), [(8, 3), (9, 4), (30, 4)])
def test_backward_computes_logits_only_where_forward_could_not_keep_them(tokens, products):
    """2 R H V operations each: logits, the two gradients, and in longer packs the logits again."""
    states, weight, targets = draw(tokens, 16, 64, 64, dtype=torch.float32)
    with FlopCounterMode(display=False) as counted:
        response_log_probs(states, weight, targets, 64, 8).sum().backward()
    assert counted.get_total_flops() == products * 2 * tokens * 16 * 64


def test_without_gradients_nothing_is_kept():
    states, weight, targets = draw(dtype=torch.float32)
    for enabled, kept in ((True, 1), (False, 0)):
        with torch.set_grad_enabled(enabled), Calls("neg_") as calls:  # of p
            response_log_probs(states, weight, targets, VOCABULARY, 64)
        assert len(calls.calls) == kept


def test_backward_may_run_twice():
    states, weight, targets = draw()
    total = response_log_probs(states, weight, targets, VOCABULARY, 64).sum()
    first, second = (torch.autograd.grad(total, (states, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


CHUNK, ROWS, WIDTH = 256, 32_000, 512


@pytest.mark.parametrize("tokens", [200, 256, 511, 600, 4000])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize(
    ("device", "dtype", "fused", "cap"),
    [
        ("cpu", torch.float32, False, None),
        ("cpu", torch.bfloat16, False, None),
        ("cuda", torch.float32, False, None),
        ("cuda", torch.bfloat16, False, None),
        ("cuda", torch.bfloat16, True, None),
        ("cuda", torch.bfloat16, True, 30.0),
    ],
)
def test_the_head_needs_two_chunks_and_a_gradient(tokens, tensor_parallel, device, dtype, fused, cap):
    """At most 2 x chunk x V / tp x 4 bytes, and the weight's gradient in its dtype where there is no main_grad."""
    with (
        fake.rehearsal(device, 0, tensor_parallel) as rehearsal,
        rehearsal.mode,
        Ledger(rehearsal.platform.device) as held,
    ):
        group = torch.distributed.group.WORLD if tensor_parallel > 1 else None
        rows = ROWS // tensor_parallel
        states = torch.zeros(tokens, WIDTH, dtype=dtype, device=device, requires_grad=True)
        weight = torch.zeros(rows, WIDTH, dtype=dtype, device=device, requires_grad=True)
        if fused:
            vars(weight)["main_grad"] = torch.zeros(rows, WIDTH, device=device)
        targets = torch.zeros(tokens, dtype=torch.int64, device=device)
        held.enter("head")
        before = held.total
        response_log_probs(states, weight, targets, ROWS - 5, CHUNK, group, fused, cap=cap).sum().backward()
    gradient = 0 if fused else weight.nbytes
    assert held.peaks["head"].total - before <= 2 * CHUNK * rows * 4 + gradient


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_squared_probabilities_are_a_second_row_without_gradient(chunk):
    states, weight, targets = draw()
    ours = response_log_probs(states, weight, targets, VOCABULARY, chunk, squares=True)
    plain = (states @ weight[:VOCABULARY].t()).log_softmax(-1)
    torch.testing.assert_close(ours[1], plain.exp().square().sum(-1).log().to(ours.dtype), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[0], response_log_probs(states, weight, targets, VOCABULARY, chunk), rtol=0, atol=0)
    wanted = torch.autograd.grad(ours[0].sum(), states, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), states), wanted, rtol=0, atol=0)


def test_segment_sums():
    log_probs = torch.tensor([-1.0, -2.0, -4.0, -8.0], dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([0, 0, 2, 2])
    assert segment_sums(log_probs, segments, 4).tolist() == [-3.0, 0.0, -12.0, 0.0]
    assert torch.autograd.gradcheck(lambda x: segment_sums(x, segments, 4), (log_probs,))
    assert segment_sums(log_probs[:0], segments[:0], 0).shape == (0,)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_most_likely_token_is_none_of_the_padding_and_the_first_of_equal_ones(chunk: int) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 5, generator=draw), torch.randn(16, 5, generator=draw)
    weight[12:] *= 100  # rows of padding
    weight[3] *= 10
    weight[7] = weight[3]
    tokens = most_likely(hidden, weight, 12, chunk)
    assert torch.equal(tokens, (hidden @ weight[:12].t()).argmax(-1)) and not (tokens == 7).any()
    assert (most_likely(weight[3:4], weight, 12, chunk) == 3).all()
    assert most_likely(torch.full((1, 5), 1e4), weight.abs(), 12, chunk, cap=1.0).item() == 0  # all reach the cap
    assert most_likely(hidden[:0], weight, 12, chunk).shape == (0,)
