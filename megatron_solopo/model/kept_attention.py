"""Attention whose results are kept while the rest of its layer is recomputed (--recompute-keep core_attn).

megatron-core runs a recomputed layer twice: without gradients in forward, with gradients in backward. The first run
records what the attention kernels return, which is their output and log-sum-exps; the second takes it from there, so a
kernel computes once forward and once backward. torch's selective checkpoints do the same for every operator of a
non-reentrant checkpoint (`torch.utils.checkpoint.create_selective_checkpoint_contexts`); megatron-core's are reentrant,
and their inputs are offloaded as they are (model/offload.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
KERNELS = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._efficient_attention_forward.default,
        _aten._flash_attention_forward.default,
    }
)
"""The kernels that parallel/layout.py and parallel/flash.py call; float64 on CUDA has none and is computed again."""

Results = list[Any]
"""What the kernels of a layer returned for a pack, in the order of their calls."""


def recording(attend: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Results]:
    """Returns ``attend(*inputs)`` and what its kernels returned.

    Gradients are on, as they will be in the second run: without them some kernels return no log-sum-exps. Nothing is
    saved for them.
    """
    recorder = _Recorder()
    nothing = torch.autograd.graph.saved_tensors_hooks(lambda saved: None, lambda saved: saved)
    with torch.enable_grad(), nothing, recorder:
        output = attend(*(x.detach().requires_grad_() for x in inputs))
    return output.detach(), recorder.results


def replaying(attend: Callable[..., Tensor], results: Results, *inputs: Tensor) -> Tensor:
    """Returns ``attend(*inputs)``, whose kernels return ``results``."""
    with _Player(results):
        return attend(*inputs)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.results: Results = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in KERNELS:  # autograd writes its graph into the tensors that it gets
            self.results.append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Player(TorchDispatchMode):
    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results = iter(results)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return next(self.results) if func in KERNELS else func(*args, **(kwargs or {}))
