"""The choice of attention kernels on CUDA, by fake CUDA tensors, stub wheels and tables; no GPU is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from test_context_parallel import Calls
from tiny_models import SHAPE
from torch.nn.attention import SDPBackend, current_flash_attention_impl, restore_flash_attention_impl
from transformers import Gemma4TextConfig, LlamaConfig

from megatron_solopo.config import Config, ModelConfig, ParallelConfig
from megatron_solopo.model.hf_config import check_attention_on_cuda
from megatron_solopo.pack import Piece
from megatron_solopo.parallel import flash
from megatron_solopo.parallel.context import method_of
from megatron_solopo.parallel.cpu_attention import CpuLayout
from megatron_solopo.parallel.kernels import Kernels, kernels_for
from megatron_solopo.parallel.layout import BlockLayout, RankLayout, backends_of, block_layout, repeated
from megatron_solopo.parallel.sequences import PromptLayout, SequenceLayout
from megatron_solopo.planning import fake

PIECES = (Piece(0, 128), Piece(128, 9, 0), Piece(137, 5, 0), Piece(142, 128))
"""A prompt, two responses of it, and a prompt."""


@pytest.mark.parametrize(
    ("arguments", "kernels", "layout"),
    [
        ((False, False, True, "auto", False), Kernels.CPU, CpuLayout),
        ((False, False, False, "auto", True), Kernels.CPU, CpuLayout),
        ((False, True, False, "auto", False), Kernels.BLOCKS, BlockLayout),
        ((False, True, True, "auto", False), Kernels.PROMPTS, PromptLayout),
        ((False, True, True, "fused", False), Kernels.CUDNN, PromptLayout),
        ((False, True, True, "flash", False), Kernels.FLASH, SequenceLayout),
        ((False, True, True, "auto", True), Kernels.FLASH, SequenceLayout),
        ((True, True, True, "fused", False), Kernels.ENGINE, SequenceLayout),
    ],
)
def test_kernels_of_an_option(arguments: Any, kernels: Kernels, layout: type[RankLayout]) -> None:
    assert kernels_for(*arguments) is kernels
    method = method_of(1, "all_gather")
    result = method.layout(PIECES, 0, 1, None, kernels)
    assert type(result) is layout
    if kernels is not Kernels.CPU:
        windowed = method.layout(PIECES, 0, 1, None, kernels, window=4)
        assert isinstance(windowed, SequenceLayout) and windowed.window == 4
    if isinstance(result, PromptLayout):
        assert result.runs == (128, 14, 128) and result.cudnn_only == (kernels is Kernels.CUDNN)
        assert result.completions is not None and result.completions.query_lengths == (9, 5)


@pytest.mark.parametrize(("backend", "multiple"), [("auto", 128), ("fused", 128), ("flash", 1)])
def test_prompts_are_rounded_up_for_cudnn_alone(backend: str, multiple: int) -> None:
    config = Config(model=ModelConfig(bf16=True, attention_backend=backend))
    assert method_of(1, "all_gather").prompt_multiple(1, config, "cuda") == multiple


def test_no_kernel_that_holds_all_scores() -> None:
    assert backends_of(torch.bfloat16, False) == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    assert backends_of(torch.bfloat16, True) == [SDPBackend.CUDNN_ATTENTION]
    assert backends_of(torch.float32, False) == [SDPBackend.EFFICIENT_ATTENTION]
    assert backends_of(torch.bfloat16, False, True) == [SDPBackend.EFFICIENT_ATTENTION]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 16), (torch.bfloat16, 512)])
def test_heads_are_repeated_in_float32_and_wide_ones_on_cuda(dtype: torch.dtype, size: int) -> None:
    """torch's memory-efficient kernel has no grouped heads, and would leave them to the one that holds all scores."""
    with fake.rehearsal("cuda", 0, 1) as rehearsal, rehearsal.mode:
        from megatron_solopo.model import forward

        with Calls("_scaled_dot_product_efficient_attention") as calls:
            options: dict[str, Any] = dict(device="cuda", dtype=dtype, requires_grad=True)
            inputs = [torch.zeros(270, heads, size, **options) for heads in (4, 2, 2)]
            layout = forward.on_device(block_layout(PIECES), rehearsal.platform.device)
            layout.attend(*inputs, None).sum().backward()
        assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]
        assert [[x.shape[1] for x in arguments[:3]] for _, arguments, _ in calls.calls] == [[4, 4, 4]] * 3
    query, key = torch.randn(7, 6, 8, dtype=torch.float64), torch.randn(7, 2, 8, dtype=torch.float64)
    q, k, all_k = (x.transpose(0, 1)[None] for x in (query, key, repeated(key, 6)))
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, all_k, all_k, is_causal=True),
        F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True),
    )


@pytest.mark.parametrize("size", [8, 128, 256, 12, 264])
def test_head_dims_of_the_flash_kernel(size: int) -> None:
    hf_config = LlamaConfig(**SHAPE | dict(head_dim=size))
    check_attention_on_cuda(hf_config, Config())
    if size == 12:
        with refused("attention-unsupported", f"head_dim {size}: ", "leave --bf16 out"):
            check_attention_on_cuda(hf_config, Config(model=ModelConfig(bf16=True)))
    else:
        check_attention_on_cuda(hf_config, Config(model=ModelConfig(bf16=True)))


@pytest.mark.parametrize(
    ("model", "parallel", "fields", "remedy"),
    [
        ({}, {}, {}, None),
        ({"attention_backend": "flash"}, {}, {}, "use --attention-backend auto"),
        ({}, {"context_parallel_size": 2}, {}, "use --context-parallel-size 1"),
        ({}, {}, {"head_dim": 264}, "leave --bf16 out"),
    ],
)
def test_wide_heads_are_the_memory_efficient_kernels(
    model: dict[str, Any], parallel: dict[str, Any], fields: dict[str, Any], remedy: str | None
) -> None:
    """512 channels in layers without a window; a window is the flash kernel's, whatever the size."""
    config = Config(model=ModelConfig(bf16=True, **model), parallel=ParallelConfig(**parallel))
    hf_config = Gemma4TextConfig(**SHAPE | {"hidden_size_per_layer_input": 0} | fields)
    if remedy is None:
        check_attention_on_cuda(hf_config, config)
    else:
        with refused("attention-unsupported", f"head_dim {fields.get('head_dim', 512)}: ", "up to 256", remedy):
            check_attention_on_cuda(hf_config, config)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder on the path for a stub of FlashAttention 3's wheel, on a device of Hopper's capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop(flash.FA3, None)
    restore_flash_attention_impl(_raise_warn=False)


def test_flash_attention_3_is_used_where_its_wheel_is(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash.use_fastest() is None and current_flash_attention_impl() is None
    (wheel / f"{flash.FA3}.py").write_text("")
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(fwd=None, bwd=None), raising=False)
    assert flash.use_fastest() is None and current_flash_attention_impl() == "FA3"
    restore_flash_attention_impl()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    assert flash.use_fastest() is None and current_flash_attention_impl() is None


def test_a_broken_wheel_stops_no_run(wheel: Path) -> None:
    (wheel / f"{flash.FA3}.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    assert "its import fails: OSError: libcudart.so.12" in str(flash.use_fastest())
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize(
    ("change", "chosen", "words"),
    [
        ({}, SDPBackend.CUDNN_ATTENTION, "prompts on cuDNN "),
        ({}, SDPBackend.FLASH_ATTENTION, "prompts on torch's flash kernel (FA2), all responses of a pack in one call"),
        ({"attention_backend": "flash"}, None, "torch's flash kernel (FA2), one call for all sequences"),
        ({"softmax_type": "learnable"}, None, "torch's flash kernel (FA2), one call for all sequences"),
        ({"window_size": (7, 0)}, SDPBackend.CUDNN_ATTENTION, "layers with a window in one call of torch's flash"),
        ({"context_parallel_size": 2}, None, "torch's flash kernel (FA2), one call for all sequences"),
        ({"params_dtype": torch.float32}, None, "memory-efficient"),
        ({"kv_channels": 512, "window_size": (7, 0)}, None, "query head; layers with a window in one call of torch's"),
        ({"transformer_impl": "transformer_engine", "attention_backend": "fused"}, None, "Transformer Engine, fused"),
        ({"attention_backend": "fused"}, SDPBackend.ERROR, None),
    ],
)
def test_the_log_names_the_kernels(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], chosen: SDPBackend | None, words: str | None
) -> None:
    with fake.rehearsal("cuda", 0, 1) as rehearsal, rehearsal.mode:
        from megatron_solopo.model.attention import describe_kernels

        settings = dict(attention_backend="auto", transformer_impl="local", params_dtype=torch.bfloat16)
        settings |= dict(deterministic_mode=False, context_parallel_size=1, cp_comm_type="all_gather", kv_channels=128)
        settings |= dict(num_attention_heads=28, num_query_groups=4, window_size=None, softmax_type="vanilla") | change
        settings["attention_backend"] = SimpleNamespace(name=settings["attention_backend"])

        def choose(query: torch.Tensor, key: torch.Tensor, *rest: Any, **more: Any) -> int:
            assert query.shape == (1, 28, 128, 128) and key.shape == (1, 4, 128, 128) and query.device.type == "cuda"
            assert chosen is not None
            return chosen.value

        monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
        config: Any = SimpleNamespace(**settings)
        if words is None:
            with refused("attention-unsupported", "--attention-backend fused: ", "28 heads of 128", "use flash"):
                describe_kernels(config, rehearsal.platform.device)
        else:
            assert words in describe_kernels(config, rehearsal.platform.device)
