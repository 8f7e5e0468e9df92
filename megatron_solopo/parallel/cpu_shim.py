"""Patches with which megatron-core 0.19 runs on CPU and gloo: the only file that patches other packages' modules.

Megatron Core asks `torch.cuda` for its device, streams and random state, and writes ``device="cuda"`` in optimizer and
schedule code. `install()` makes these return the CPU. Nothing is patched on import; `install()` returns a function
that removes all patches. On CUDA, `mend_on_cuda` patches the optimizer without Transformer Engine, and hides a
Transformer Engine that cannot be imported.

Each patch names the place in megatron-core (0.19.2) that needs it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, SupportsIndex
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from megatron_solopo.parallel import products

CPU = torch.device("cpu")

KERNELS = ("fused", "foreach", "capturable")
"""Fields of torch's AdamW that choose its kernel and do not change the result."""


def _on_cpu[T](device: T) -> T | torch.device:
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


class _CudaDevicesAreCpu(TorchFunctionMode):
    """Replaces CUDA devices in torch calls; other arguments are unchanged."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs:
            if kwargs.get("device") is not None:
                kwargs["device"] = _on_cpu(kwargs["device"])
            if kwargs.get("pin_memory"):  # optimizer/cpu_offloading and dist_checkpointing pin host memory
                kwargs["pin_memory"] = False
        else:
            kwargs = {}
        if func is torch.Tensor.cuda:  # tensor_parallel/layers.py: weights are built, then moved
            return args[0]
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], *(_on_cpu(a) if isinstance(a, str | torch.device) else a for a in args[1:]))
        elif func is torch.Tensor.type and len(args) == 1:
            # optimizer/distrib_optimizer.py compares with 'torch.cuda.FloatTensor' and friends
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _Event:
    """A CUDA event on a device whose calls are synchronous."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, *args: object) -> None:
        pass

    def wait(self, *args: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream:
    """A CUDA stream on a device that has one stream."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, *args: object) -> None:
        pass

    def wait_event(self, *args: object) -> None:
        pass

    def record_event(self, *args: object) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _CpuGenerators(list):
    """`torch.cuda.default_generators[i]`: tensor_parallel/random.py reads its state."""

    def __getitem__(self, index: SupportsIndex) -> torch.Generator:  # pyright: ignore[reportIncompatibleMethodOverride]  # of no slice
        return torch.default_generator


def _hide_transformer_engine(stack: contextlib.ExitStack) -> None:
    """Makes the import of TE fail with an ImportError: it imports without a GPU, and mcore would use its GPU kernels.

    Raises:
        RuntimeError: megatron.core was imported first and has already bound TE's modules.
    """
    bound = sys.modules.get("megatron.core.extensions.transformer_engine")
    if bound is not None and getattr(bound, "HAVE_TE", False):
        raise RuntimeError(
            "the CPU platform must be installed before megatron.core is imported: Transformer Engine is already in use"
        )
    # Not mock.patch.dict: undoing it would remove every module that was imported meanwhile. A failed import leaves
    # modules behind, and a loaded module is imported without its parent.
    loaded = {name for name in sys.modules if name.partition(".")[0] == "transformer_engine"}
    names = loaded | {"transformer_engine", "transformer_engine.pytorch"}
    before = {name: sys.modules[name] for name in names if name in sys.modules}

    def show_again() -> None:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)

    hidden: dict[str, Any] = dict.fromkeys(names)  # None: its import fails
    sys.modules.update(hidden)
    stack.callback(show_again)


def _split_sizes_as_numbers[T](tensor: T, as_numpy: bool = False, record_stream: bool = False) -> T | np.ndarray:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_unequal(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps ``gather``, which needs equal parts: parts of different lengths are padded to the longest, then cut."""

    def gather_parts(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        *options: object,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, *options)
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = gather(padded, group, None).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return gather_parts


def _scatter_unequal(scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps ``scatter``, which needs equal parts: for other parts every rank computes the total sum and keeps its
    part."""

    def scatter_parts(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        *options: object,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, None, *options)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    return scatter_parts


def _among_others(collective: Callable[..., object]) -> Callable[..., object]:
    """Wraps a collective between DDP's buffer and this process's part of it: of a process alone that is the whole."""

    def unless_alone(result: torch.Tensor, part: torch.Tensor, group: Any, **options: object) -> object:
        return collective(result, part, group=group, **options) if group.size() > 1 else None

    return unless_alone


def install(device: torch.device = CPU) -> Callable[[], None]:
    """Makes megatron-core run on the CPU in this process; returns the function that undoes it.

    Args:
        device: what megatron-core is to take for its device; another than the CPU only without a GPU, for fake tensors
            (planning/fake.py).

    Raises:
        RuntimeError: if Transformer Engine was already bound by megatron-core.
    """
    with contextlib.ExitStack() as stack:
        _hide_transformer_engine(stack)

        def patch(module: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        cuda = torch.cuda
        current = CPU if device.type == "cpu" else device.index
        patch(cuda, "current_device", lambda: current)  # everywhere in mcore
        patch(cuda, "set_device", lambda *args: None)  # parallel_state.py
        patch(cuda, "synchronize", lambda *args: None)  # schedules.py, timers.py
        patch(cuda, "empty_cache", lambda: None)  # dist_checkpointing
        patch(cuda, "Event", _Event)  # param_and_grad_buffer.py
        patch(cuda, "Stream", _Stream)  # distributed_data_parallel.py
        patch(cuda, "current_stream", lambda *args: _Stream())
        patch(cuda, "stream", lambda stream: contextlib.nullcontext())
        patch(cuda, "_lazy_init", lambda: None)  # tensor_parallel/random.py
        patch(cuda, "default_generators", _CpuGenerators())
        for random in (cuda, cuda.random):
            patch(random, "get_rng_state", lambda *args: torch.get_rng_state())
            patch(random, "set_rng_state", lambda state, *args: torch.set_rng_state(state))
        patch(cuda, "manual_seed", lambda seed: torch.manual_seed(seed))
        patch(cuda, "memory_allocated", lambda *args: 0)
        patch(cuda, "max_memory_allocated", lambda *args: 0)
        patch(cuda, "get_device_capability", lambda *args: (0, 0))  # dist_checkpointing, fp8 checks

        import megatron.core.tensor_parallel.random as tensor_parallel_random  # only now: these look for TE
        from megatron.core.distributed import param_and_grad_buffer as ddp
        from megatron.core.tensor_parallel import mappings
        from megatron.core.transformer.moe import token_dispatcher

        patch(tensor_parallel_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
        patch(tensor_parallel_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
        # moe/token_dispatcher.py:930: split sizes leave the device as numbers on CUDA, and stay tensors on the CPU
        patch(token_dispatcher, "maybe_move_tensor_to_cpu", _split_sizes_as_numbers)
        # distributed/param_and_grad_buffer.py:515, 712: gloo copies what a process sends and receives, itself included
        for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
            patch(ddp, name, _among_others(getattr(ddp, name)))
        # tensor_parallel/mappings.py:154, 197: gloo gathers and scatters equal parts only
        patch(mappings, "_gather_along_first_dim", _gather_unequal(mappings._gather_along_first_dim))
        patch(mappings, "_reduce_scatter_along_first_dim", _scatter_unequal(mappings._reduce_scatter_along_first_dim))
        _store_optimizer_in_shards(patch)
        _mend_optimizer_loading(patch)
        _add_weight_gradients(stack, device.type == "cuda")
        if device.type == "cpu":
            stack.enter_context(_CudaDevicesAreCpu())
        undo = stack.pop_all()
    return undo.close


@contextlib.contextmanager
def results_queue(queue: object) -> Iterator[None]:
    """Makes a planned checkpoint report to ``queue`` (put, get_nowait) inside the block, on both platforms.

    dist_checkpointing/strategies/filesystem_async.py:45 starts a manager process for its queue, which keeps running,
    with its memory, when the training process is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async  # `install` comes before megatron.core

    with mock.patch.object(filesystem_async, "_results_queue", queue):
        yield


@contextlib.contextmanager
def adam_class(adam: Callable[..., Any] | None) -> Iterator[None]:
    """Makes megatron-core build ``adam``, if any, inside the block, with the arguments that FusedAdam takes.

    Without Transformer Engine it would build torch's AdamW with them (optimizer/__init__.py:555), and with it ask for
    its version.
    """
    from megatron.core import optimizer  # as above

    if adam is None:
        yield
        return
    settings = {"USING_PYTORCH_OPTIMIZER": False, "is_te_min_version": lambda version: False}
    with mock.patch.multiple(optimizer, Adam=adam, **settings):
        yield


def mend_on_cuda(broken_transformer_engine: bool) -> Callable[[], None]:
    """Installs the patches that CUDA needs too; returns the function that removes them.

    Args:
        broken_transformer_engine: whether an installed Transformer Engine cannot be imported. mcore
            (optimizer/__init__.py:13 and others) imports an installed one and catches ImportError only: a library that
            is missing or of another build raises other errors and would end portable runs too.
    """
    with contextlib.ExitStack() as stack:
        if broken_transformer_engine:
            _hide_transformer_engine(stack)

        def patch(module: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        _store_optimizer_in_shards(patch)
        _mend_optimizer_loading(patch)
        _add_weight_gradients(stack, True)
        undo = stack.pop_all()
    return undo.close


def _store_optimizer_in_shards(patch: Callable[[object, str, object], object]) -> None:
    """Replaces the format of the distributed optimizer's state that any layout can read: see `optimizer_shards`."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # as below

    from megatron_solopo.parallel import optimizer_shards

    patch(DistributedOptimizer, "sharded_param_state_fully_reshardable", optimizer_shards.sharded_param_state)
    patch(DistributedOptimizer, "load_parameter_state_from_fully_reshardable", optimizer_shards.load_param_state)


def _add_weight_gradients(stack: contextlib.ExitStack, on_cuda: bool) -> None:
    """Lets matrices add their gradients to float32 sums (tensor_parallel/layers.py:49) without Apex, on CUDA only."""
    from megatron.core.tensor_parallel import layers

    # Apex's extension would be taken on the CPU too.
    stack.enter_context(mock.patch.object(layers, "_grad_accum_fusion_available", on_cuda))
    if on_cuda and not hasattr(layers, "fused_weight_gradient_mlp_cuda"):
        stack.enter_context(
            mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", products.WeightGradients, create=True)
        )


def _mend_optimizer_loading(patch: Callable[[object, str, object], object]) -> None:
    """Lets the distributed optimizer load a checkpoint into torch's AdamW.

    torch's AdamW keeps a `step` tensor for each parameter and has no state before its first step; the distributed
    optimizer expects neither.

    Without Transformer Engine or Apex, loading a checkpoint fails with an AssertionError where the optimizer has not
    stepped yet (distrib_optimizer.py:839), then with KeyError: 'step' (:1222), and afterwards all parameters share
    one `step` tensor (:1032), which advances once for every parameter. With this patch the optimizer starts with a
    state of zeros, and the loaded state keeps its `step`, one copy for each parameter. The choice of kernels is not
    part of a run and is not loaded from a checkpoint.
    """
    # Not at the top: this file is imported before Transformer Engine is hidden, and these modules import it.
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

    if HAVE_APEX_OR_TE:
        return
    state_dict = DistributedOptimizer.state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict

    def state_dict_with_state(self):
        if not self.optimizer.state:
            for param in (param for group in self.optimizer.param_groups for param in group["params"]):
                self.optimizer.state[param] = {
                    "step": torch.zeros((), device=param.device),
                    **{key: torch.zeros_like(param) for key in self.optimizer_state_keys},
                }
        return state_dict(self)

    def set_states_with_step(self, model_param, tensors):
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[main_param]
        if "step" in state:
            tensors = dict(tensors, step=state["step"])
        return set_states(self, model_param, tensors)

    def load_with_steps(self, state_dict):
        kernels = [{name: group.get(name) for name in KERNELS} for group in self.optimizer.param_groups]
        result = load(self, state_dict)
        for group, kernel in zip(self.optimizer.param_groups, kernels, strict=True):
            group |= kernel
        for param, state in self.optimizer.state.items():
            if "step" in state:
                state["step"] = state["step"].to(param.device, copy=True)
        return result

    patch(DistributedOptimizer, "state_dict", state_dict_with_state)
    patch(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states_with_step)
    patch(DistributedOptimizer, "load_state_dict", load_with_steps)
