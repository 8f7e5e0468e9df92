"""Experts in one product: by value on the CPU against one after another, and which calls CUDA gets, by fake tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from refusals import refused
from test_context_parallel import Calls
from test_model_parity import CONFIGS
from test_recompute import options
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from megatron_solopo.planning import fake

COUNTS = [5, 0, 9, 3]


def experts(dtype: torch.dtype, *flags: Any, model: str = "mixtral") -> Any:
    """The experts of the first layer of a model, with drawn weights."""
    from megatron_solopo.model.build import build_model

    layers = cast(Any, build_model(CONFIGS[model], options(*flags), dtype).decoder).layers
    generator = torch.Generator().manual_seed(0)
    for parameter in layers[0].mlp.experts.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1, generator=generator)
    return layers[0].mlp.experts


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their weights, and the gradient of the result."""
    generator = torch.Generator().manual_seed(1)
    rows, grad = (torch.randn(sum(COUNTS), 64, generator=generator).to(dtype) for _ in range(2))
    return rows.requires_grad_(), torch.rand(sum(COUNTS), generator=generator).requires_grad_(), grad


def test_the_calls_on_cuda() -> None:
    """Four calls of the grouped kernel, and one product for the gradient of each weight of an expert that has rows."""
    with fake.rehearsal("cuda", 0, 1) as rehearsal:  # before the engine's fixture starts the only process group
        from megatron_solopo.config import Config, ModelConfig
        from megatron_solopo.model.build import build_model
        from megatron_solopo.training.engine import initialize_parallel

        config = Config(model=ModelConfig(bf16=True))
        initialize_parallel(config)
        with rehearsal.mode:
            layer = cast(Any, build_model(CONFIGS["mixtral"], config).decoder).layers[0].mlp.experts
            for parameter in layer.parameters():
                parameter.main_grad = torch.zeros(parameter.shape, device="cuda")
            rows = torch.zeros(sum(COUNTS), 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            weights = torch.ones(sum(COUNTS), device="cuda", requires_grad=True)
            with Calls("_grouped_mm", "addmm", "mm") as calls:
                layer(rows, SimpleNamespace(tolist=lambda: COUNTS), weights)[0].sum().backward()
    shapes = [(name, tuple(given[0].shape), tuple(given[1].shape)) for name, given, _ in calls.calls]
    forward = [("_grouped_mm", (17, 64), (4, 64, 192)), ("_grouped_mm", (17, 96), (4, 96, 64))]
    backward = [("_grouped_mm", (17, 64), (4, 64, 96)), ("_grouped_mm", (17, 192), (4, 192, 64))]
    assert [shape for shape in shapes if shape[0] == "_grouped_mm"] == forward + backward
    products = [(64, 96)] * 3 + [(192, 64)] * 3
    assert [shape for name, shape, _ in shapes if name != "_grouped_mm"] == products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_together_they_compute_the_same_bits(engine: None, dtype: torch.dtype) -> None:
    layer = experts(dtype)
    rows, weights, grad = inputs(dtype)
    results = []
    for output in (layer.together(rows, COUNTS, weights), layer(rows, torch.tensor(COUNTS), weights)[0]):
        results.append([output, *torch.autograd.grad(output, [rows, weights, *layer.parameters()], grad)])
    for together, one_by_one in zip(*results, strict=True):
        assert torch.equal(together, one_by_one)
        assert together.dtype == one_by_one.dtype and together.norm() > 0 or one_by_one.norm() == 0


def test_the_clamped_activation_is_transformers(engine: None) -> None:
    """Value and gradient of gpt-oss's, far beyond the limits of gate and of up."""
    experts_of_gpt_oss = GptOssExperts(CONFIGS["gpt-oss"])
    generator = torch.Generator().manual_seed(2)
    x = (10 * torch.randn(7, 40, generator=generator, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    assert (x > 7).any() and (x < -7).any()
    ours = experts(torch.float64, model="gpt-oss").local_experts[0].activation_func(x)
    theirs = experts_of_gpt_oss._apply_gate(torch.stack(x.chunk(2, -1), -1).flatten(-2))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(result, x, grad)[0] for result in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_together_they_add_their_biases(engine: None) -> None:
    """gpt-oss's, of both matrices; the sums over rows have another order."""
    layer = experts(torch.float32, model="gpt-oss")
    rows, weights, grad = inputs(torch.float32)
    results = []
    for output in (layer.together(rows, COUNTS, weights), layer(rows, torch.tensor(COUNTS), weights)[0]):
        results.append([output, *torch.autograd.grad(output, [rows, weights, *layer.parameters()], grad)])
    assert sum(parameter.dim() == 1 for parameter in layer.parameters()) == 2 * len(COUNTS)
    for together, one_by_one in zip(*results, strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)


OF_EXPERTS = ("--lora-rank", 8, "--lora-modules", "gate_proj,up_proj,down_proj")


@pytest.mark.parametrize("flags", [OF_EXPERTS, (*OF_EXPERTS[:3], "down_proj")], ids=["all", "down"])
def test_together_their_adapters_compute_the_same(engine: None, flags: tuple[Any, ...]) -> None:
    """And matrices are frozen, also where an expert has no token."""
    layer = experts(torch.float32, *flags)
    rows, weights, grad = inputs(torch.float32)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert len(trained) == len(COUNTS) * 2 * len(flags[3].split(","))
    results = []
    for output in (layer.together(rows, COUNTS, weights), layer(rows, torch.tensor(COUNTS), weights)[0]):
        results.append([output, *torch.autograd.grad(output, [rows, weights, *trained], grad)])
    for together, one_by_one in zip(*results, strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)
    plain = experts(torch.float32).together(rows, COUNTS, weights)
    assert (plain - results[0][0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--lora-modules", "q_proj,gate_proj,down_proj"), "--lora-modules q_proj,gate_proj,down_proj"),
        (("--lora-modules", "gate_proj,up_proj"), "--lora-modules gate_proj,up_proj"),
        ((*OF_EXPERTS[2:], "--use-rslora"), "--use-rslora"),
        (("--lora-modules", "down_proj", "--lora-dropout", 0.1), "--lora-dropout"),
    ],
)
def test_adapters_of_experts_that_peft_would_read_otherwise_are_refused(flags: tuple[Any, ...], named: str) -> None:
    from megatron_solopo.conversion.adapters import check_adapters

    with refused("adapter-of-experts", named, "PEFT"):
        check_adapters(options("--lora-rank", 8, *flags).model, CONFIGS["mixtral"])
    check_adapters(options("--lora-rank", 8, *flags).model, CONFIGS["qwen3"])  # which has no experts


def test_together_they_add_to_ddps_sums_and_wait_for_their_parameters(engine: None) -> None:
    layer = experts(torch.bfloat16)
    rows, weights, grad = inputs(torch.bfloat16)
    expected = torch.autograd.grad(layer.together(rows, COUNTS, weights), [*layer.parameters()], grad)
    waited: list[Any] = []
    for module in layer.modules():
        module.register_forward_pre_hook(lambda module, _: waited.append(module))
    for parameter in layer.parameters():
        parameter.main_grad = torch.ones(parameter.shape)
    layer.config.gradient_accumulation_fusion = True
    layer.together(rows, COUNTS, weights).backward(grad)
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        # the sum has the product unrounded
        torch.testing.assert_close(parameter.main_grad - 1, gradient.float(), rtol=2**-8, atol=1e-6)
        assert parameter.grad_added_to_main_grad and parameter.grad.shape == parameter.shape
    linears = [getattr(expert, name) for expert in layer.local_experts for name in ("linear_fc1", "linear_fc2")]
    assert {id(module) for module in linears} <= {id(module) for module in waited}


@pytest.mark.parametrize(
    ("device", "dtype", "inner", "rank", "expected"),
    [
        ("cuda", torch.bfloat16, 96, 8, True),
        ("cuda", torch.bfloat16, 100, 8, False),
        ("cuda", torch.bfloat16, 96, 12, False),
        ("cuda", torch.float32, 96, 8, False),
        ("cpu", torch.bfloat16, 96, 8, False),
    ],
)
def test_they_are_computed_together_where_torch_has_a_kernel(
    device: str, dtype: torch.dtype, inner: int, rank: int, expected: bool
) -> None:
    from megatron_solopo.model.experts import describe_experts, grouped

    settings: Any = SimpleNamespace(params_dtype=dtype, hidden_size=64, moe_ffn_hidden_size=inner)
    settings.expert_tensor_parallel_size = 1
    assert grouped(settings, torch.device(device), rank) == expected
    assert ("one after another" in describe_experts(settings, torch.device(device), rank)) != expected
