"""Norm, SwiGLU and logits: by value on the CPU, and which operators CUDA gets, by fake CUDA tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_context_parallel import Calls
from torch import Tensor

from megatron_solopo.planning import fake

SETTINGS: Any = SimpleNamespace(
    sequence_parallel=False,
    params_dtype=torch.bfloat16,
    activation_func=F.silu,
    activation_func_clamp_value=None,
    glu_linear_offset=0.0,
    layernorm_zero_centered_gamma=False,
)


def in_double(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(SETTINGS) | dict(params_dtype=torch.float64) | changes)


def gated(x: Tensor) -> Tensor:
    """As megatron-core's mlp.py:323 computes it."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * (up + 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu_is_megatrons_bit_for_bit_and_keeps_its_input_alone(dtype: torch.dtype) -> None:
    from megatron_solopo.model.swiglu import SwiGLU

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(5, 3, size, generator=generator).to(dtype) for size in (14, 7))
    x.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours = SwiGLU(SETTINGS)(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    theirs = gated(x)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad((out * weight).sum(), x)[0] for out in (ours, theirs)))


def test_swiglus_gradient() -> None:
    from megatron_solopo.model.swiglu import SwiGLU

    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU(SETTINGS), (x,))


def test_geglu_and_its_gradient() -> None:
    from megatron_solopo.model.swiglu import ACTIVATIONS, SwiGLU

    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    geglu: Any = SwiGLU(in_double(activation_func=ACTIVATIONS["gelu_pytorch_tanh"]))  # pyright: ignore
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(geglu(x), F.gelu(gate, approximate="tanh") * up, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(geglu, (x,))


def test_a_norm_around_zero() -> None:
    """Gemma's, whose factor is 1 + weight; its product is rounded alone, so that 16 bits keep the weight's digits."""
    from megatron_solopo.model.norm import RMSNorm

    norm = RMSNorm(in_double(layernorm_zero_centered_gamma=True), 24, 1e-3)  # pyright: ignore
    assert not norm.weight.any()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), 1 + norm.weight, 1e-3), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(norm, (x,))
    low, inputs = norm.to(torch.bfloat16), x.detach().to(torch.bfloat16)
    exact = F.rms_norm(inputs.float(), (24,), 1 + low.weight.float(), 1e-3)
    assert torch.equal(low(inputs), exact.to(torch.bfloat16))


def test_the_fused_norm_is_the_norm() -> None:
    from megatron_solopo.model.norm import RMSNorm

    norm = RMSNorm(in_double(), 24, 1e-3)  # pyright: ignore
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-3), rtol=1e-13, atol=1e-13)


def test_a_norm_keeps_its_input_alone() -> None:
    from megatron_solopo.model.norm import RMSNorm

    norm = RMSNorm(in_double(), 6, 1e-3)  # pyright: ignore
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: norm(x), (x, norm.weight))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()} == {x.data_ptr()}


def test_norms_on_cuda_are_one_kernel() -> None:
    with fake.rehearsal("cuda", 0, 1) as rehearsal, rehearsal.mode:
        from megatron_solopo.model.norm import RMSNorm

        norm = RMSNorm(SETTINGS, 24, 1e-3).cuda()
        x = torch.zeros(5, 24, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        with Calls("_fused_rms_norm", "_fused_rms_norm_backward", "rsqrt") as calls:
            out = norm(x)
            out.sum().backward()
        assert [name for name, _, _ in calls.calls] == ["_fused_rms_norm", "_fused_rms_norm_backward"]
        assert calls.calls[0][1][1:] == ([24], norm.weight, 1e-3)
        assert out.dtype == x.grad.dtype == norm.weight.grad.dtype == torch.bfloat16


def head_on_cuda(tokens: int, chunk: int, fused: bool, *watched: str) -> tuple[Tensor, Tensor, list[Any]]:
    """Hidden states and weight after backward, and the calls of the watched operators; 30 of 32 rows are real."""
    with fake.rehearsal("cuda", 0, 1) as rehearsal, rehearsal.mode:
        from megatron_solopo.model.log_probs import response_log_probs

        hidden, weight = (
            torch.zeros(rows, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True) for rows in (tokens, 32)
        )
        vars(weight).update(main_grad=torch.zeros(32, 16, device="cuda"), grad_added_to_main_grad=False)
        targets = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        with Calls(*watched) as calls:
            response_log_probs(hidden, weight, targets, 30, chunk, fused=fused).sum().backward()
    return hidden, weight, calls.calls


@pytest.mark.parametrize(
    ("tokens", "logits"),
    [
        (24, [(4, 32)] * 6 + [(24, 3)] * 10),  # forward by tokens, backward by rows of the vocabulary
        (7, [(4, 32), (3, 32)]),  # below twice a chunk: backward computes none
    ],
)
def test_logits_on_cuda_are_products_in_float32(tokens: int, logits: list[tuple[int, int]]) -> None:
    """Nothing is rounded to bfloat16 before the softmax."""
    hidden, weight, calls = head_on_cuda(tokens, 4, False, "mm")
    found = [result for _, arguments, result in calls if arguments[1].shape[0] == 16 and result.dtype == torch.float32]
    assert [tuple(x.shape) for x in found] == logits
    assert (hidden.grad.dtype, weight.grad.shape) == (torch.bfloat16, (32, 16))


@pytest.mark.parametrize(("tokens", "rows"), [(24, [3] * 10), (7, [2] * 15)])
def test_gradients_of_weights_on_cuda_are_added_by_the_product(tokens: int, rows: list[int]) -> None:
    """The product of bfloat16 matrices is added to DDP's float32 sum, each row once, and autograd gets a gradient
    without values, and without memory of its own."""
    hidden, weight, calls = head_on_cuda(tokens, 4, True, "addmm")
    of_hidden, of_weight = calls[::2], calls[1::2]
    assert [[tuple(x.shape) for x in arguments[:3]] for _, arguments, _ in of_weight] == [
        [(count, 16), (count, tokens), (tokens, 16)] for count in rows
    ]
    assert [[tuple(x.shape) for x in arguments[:3]] for _, arguments, _ in of_hidden] == [
        [(tokens, 16), (tokens, count), (count, 16)] for count in rows
    ]
    assert all(arguments[3] == torch.float32 and result.dtype == torch.float32 for _, arguments, result in calls)
    main_grad = vars(weight)["main_grad"]
    storages = [result.untyped_storage()._cdata for _, _, result in of_weight] + [weight.grad.untyped_storage()._cdata]
    assert set(storages) == {main_grad.untyped_storage()._cdata}
    assert vars(weight)["grad_added_to_main_grad"] and weight.grad.dtype == torch.bfloat16
    assert weight.grad.shape == weight.shape
