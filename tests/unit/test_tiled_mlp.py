"""The MLP in tiles: the same numbers as at once, one gradient a weight, and less memory."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from bf16_bound import BOUND, SEEDS, normal
from refusals import refused
from test_recompute import FULL, built, gradients
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen3MoeConfig

from megatron_solopo.config import Config
from megatron_solopo.model.tiles import check_tiles, tiles_of

HIDDEN, INNER, TOKENS = 16, 24, 50
TILES = ("1", "3", "auto", "99")
SHAPE: dict[str, Any] = dict(hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, vocab_size=128, max_position_embeddings=512)


def mlp_of(tiles: str | None, dtype: torch.dtype, repeat_activation: bool = False) -> Any:
    """The MLP of a layer with weights that depend on nothing but a seed."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_solopo.model.build import layer_spec, transformer_config

    settings = transformer_config(Qwen2Config(**SHAPE), Config(), dtype)
    spec: Any = layer_spec(settings, False, tiles, repeat_activation)[0]
    groups = ProcessGroupCollection(tp=parallel_state.get_tensor_model_parallel_group())
    mlp = spec.submodules.mlp(config=settings, pg_collection=groups, is_mtp_layer=False, ffn_hidden_size=INNER)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(normal(generator, *parameter.shape, scale=0.3))
    return mlp


def passed(mlp: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    """The result and the gradients of the input and of the weights, in float64."""
    x = x.detach().requires_grad_()
    result, bias = mlp(x)
    assert bias is None
    gradients = torch.autograd.grad(result, [x, *mlp.parameters()], weight.to(result.dtype))
    return [tensor.double() for tensor in (result, *gradients)]


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(normal(generator, TOKENS, 1, HIDDEN).bfloat16().double() for _ in range(2))  # pyright: ignore


@pytest.mark.parametrize("tiles", TILES)
def test_tiles_compute_what_the_mlp_computes(engine: Any, tiles: str) -> None:
    x, weight = drawn(1)
    for ours, theirs in zip(
        passed(mlp_of(tiles, torch.float64), x, weight), passed(mlp_of(None, torch.float64), x, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_matrix_keeps_no_result_of_a_norm(engine: Any) -> None:
    from megatron_solopo.model.norm import RMSNorm

    mlp = mlp_of(None, torch.float64)
    norm, x = RMSNorm(mlp.config, HIDDEN), drawn(5)[0].requires_grad_()
    result, _ = mlp.linear_fc1(norm(x))
    assert result.grad_fn.saved_tensors == (mlp.linear_fc1.weight,)
    again, plain = torch.autograd.grad(result.sum(), [x, mlp.linear_fc1.weight])[1], norm(x).sum((0, 1))
    torch.testing.assert_close(again, plain.expand_as(again), rtol=1e-13, atol=1e-13)


def test_a_frozen_matrix_has_no_gradient(engine: Any) -> None:
    """As under adapters, beside which DDP has no sum for its gradient."""
    x, weight = drawn(4)
    mlp = mlp_of(None, torch.float64, repeat_activation=True)
    _, of_x, *_ = passed(mlp, x, weight)
    x.requires_grad_()
    mlp.requires_grad_(False)(x)[0].backward(weight)
    torch.testing.assert_close(x.grad, of_x, rtol=1e-13, atol=1e-13)
    assert all(parameter.grad is None for parameter in mlp.parameters())


@pytest.mark.parametrize("tiles", [None, "3"])
def test_the_product_of_swiglu_is_computed_again(engine: Any, tiles: str | None) -> None:
    """Not kept, and the gradients are the same bit for bit."""
    x, weight = drawn(2)
    again, kept = (mlp_of(tiles, torch.float32, repeat_activation) for repeat_activation in (True, False))
    alive: list[list[bool]] = []
    for mlp in (again, kept):
        made: list[Any] = []
        handle = mlp.activation_func.register_forward_hook(lambda *call, made=made: made.append(weakref.ref(call[2])))
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            result, _ = mlp(x.float().requires_grad_())
        alive.append([one() is not None for one in made])
        handle.remove()
        del result
    assert not any(alive[0]) and any(alive[1]) == (tiles is None)
    for ours, theirs in zip(passed(again, x.float(), weight), passed(kept, x.float(), weight), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tiles", ["3", "auto", "25"])
def test_tiles_in_bfloat16_are_as_near_to_float64(engine: Any, tiles: str, seed: int) -> None:
    """By the bound of bf16_bound.py: of the result and of every gradient."""
    x, weight = drawn(seed)
    exact_mlp = mlp_of(None, torch.float64)
    plain_mlp, tiled_mlp = mlp_of(None, torch.bfloat16), mlp_of(tiles, torch.bfloat16)
    with torch.no_grad():
        for exact, plain in zip(exact_mlp.parameters(), plain_mlp.parameters(), strict=True):
            exact.copy_(plain)
    exact = passed(exact_mlp, x, weight)
    plain, tiled = (passed(mlp, x.bfloat16(), weight) for mlp in (plain_mlp, tiled_mlp))
    for truth, theirs, ours in zip(exact, plain, tiled, strict=True):
        assert 0 < (ours - truth).norm() <= BOUND * (theirs - truth).norm()


def test_a_weight_gets_one_gradient_whatever_the_number_of_tiles(engine: Any) -> None:
    """DDP's overlapped reduction counts the gradients of each weight in a batch, and packs differ in length."""
    mlp, counts = mlp_of("auto", torch.float64), dict.fromkeys(("linear_fc1.weight", "linear_fc2.weight"), 0)

    def counting(name: str) -> Any:
        def count(gradient: Tensor) -> None:
            counts[name] += 1

        return count

    for name, parameter in mlp.named_parameters():
        parameter.register_hook(counting(name))
    for packs, tokens in enumerate((50, 7, 33), 1):
        mlp(torch.ones(tokens, 1, HIDDEN, dtype=torch.float64, requires_grad=True))[0].sum().backward()
        assert set(counts.values()) == {packs}


@pytest.mark.parametrize("sums", [torch.float32, torch.bfloat16])
def test_products_add_the_gradients_to_ddps_sums(engine: Any, sums: torch.dtype) -> None:
    """In float32, of which autograd gets a placeholder; sums in 16 bits get the gradient rounded once."""
    x, weight = drawn(1)
    mlp, plain = (mlp_of("3", torch.bfloat16) for _ in range(2))
    mlp.config.gradient_accumulation_fusion = True
    for parameter in mlp.parameters():
        vars(parameter).update(main_grad=torch.ones_like(parameter, dtype=sums), grad_added_to_main_grad=False)
    _, _, *gradients = passed(mlp, x.bfloat16(), weight)
    _, _, *expected = passed(plain, x.bfloat16(), weight)
    for parameter, gradient, theirs in zip(mlp.parameters(), gradients, expected, strict=True):
        added = parameter.main_grad.double() - 1
        assert parameter.grad_added_to_main_grad == (sums == torch.float32)
        ours = added if sums == torch.float32 else gradient
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)
        assert sums == torch.float32 or not added.any()


def recomputed(mlp: Any, x: Tensor) -> tuple[list[Tensor], int, Tensor]:
    """Gradients with the MLP in a layer that is recomputed, how often a tile was computed forward, and the result of
    the recomputation."""
    from megatron.core.tensor_parallel import checkpoint

    tiles, results, compute = 0, [], mlp.tile

    def tile(rows: Tensor) -> Tensor:
        nonlocal tiles
        tiles += 1
        return compute(rows)

    def layer(states: Tensor) -> Tensor:
        results.append(mlp(states * 2)[0])
        return states + results[-1]

    x = x.detach().requires_grad_()
    with mock.patch.object(mlp, "tile", tile):
        checkpoint(layer, False, x).sum().backward()
    return [x.grad, *(parameter.grad for parameter in mlp.parameters())], tiles, results[-1]


@pytest.mark.parametrize(
    ("method", "layers", "alone"), [("uniform", 1, True), ("block", 3, True), ("uniform", 2, False)]
)
def test_a_recomputed_layer_leaves_its_mlp_out(engine: Any, method: str, layers: int, alone: bool) -> None:
    """Unless another layer reads its result: then it is there."""
    x, _ = drawn(3)
    mlp, plain = mlp_of("3", torch.float64), mlp_of(None, torch.float64)
    for config in (mlp.config, plain.config):
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", method, layers
    plain.tile = plain.forward
    ours, tiles, result = recomputed(mlp, x)
    theirs, _, expected = recomputed(plain, x)
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-13, atol=1e-13)
    assert tiles == (3 if alone else 6)
    assert result.isnan().all() if alone else torch.allclose(result, expected)


@pytest.mark.parametrize("flags", [(), FULL], ids=["", "full"])
@pytest.mark.parametrize("modules", ["q_proj,gate_proj,up_proj,down_proj", "up_proj", "down_proj", "o_proj"])
def test_adapters_in_tiles_have_the_gradients_of_those_without(
    engine: Any, modules: str, flags: tuple[str, ...]
) -> None:
    """In a model whose matrices are frozen: of adapters in the MLP, and of others, whose gradient passes through it."""
    lora = ("--lora-rank", 2, "--lora-modules", modules)
    plain = gradients(built("qwen3", *lora), "qwen3")
    tiled = gradients(built("qwen3", *lora, *flags, "--mlp-tiles", 3), "qwen3")
    assert tiled.keys() == plain.keys() and len(plain) == 3 * 2 * len(modules.split(","))  # three layers
    for name, gradient in tiled.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-12, atol=1e-12)
        assert gradient.norm() > 0, name


def test_tiles_of_experts_are_refused() -> None:
    config = Config()
    config.model.mlp_tiles = "auto"
    check_tiles(Qwen2Config(**SHAPE), config)
    with refused("option-conflict", "--mlp-tiles", "experts"):
        check_tiles(Qwen3MoeConfig(**SHAPE, num_experts=16), config)


@pytest.mark.parametrize(
    ("tiles", "tokens", "hidden", "expected"),
    [("auto", 1, 16, 1), ("auto", 16, 16, 1), ("auto", 17, 16, 2), ("auto", 132_861, 3584, 38), ("8", 99, 16, 8),
     ("8", 5, 16, 5)],
)  # fmt: skip
def test_tiles_follow_from_shapes(tiles: str, tokens: int, hidden: int, expected: int) -> None:
    assert tiles_of(tiles, tokens, hidden) == expected
