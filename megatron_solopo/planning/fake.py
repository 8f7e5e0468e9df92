"""One process of any layout, without its devices and without the other processes: the only file that patches for it.

Under `rehearsal` torch's FakeTensorMode gives every device tensor a shape and no memory, and torch's fake process group
takes part in every collective without anybody at the other end. Engine, optimizer, schedule and step are the product's
own. What they ask of a device, or read out of a tensor, is answered here; each patch names who asks (megatron-core
0.19.2, torch 2.11).

A host tensor stays real, since plans, layouts and pairs are made of its values; `device_pack.on_device` is the door
through which it becomes a fake one. Any other operation that mixes both is an error, as it would be on a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_solopo.parallel import cpu_shim
from megatron_solopo.parallel.kernels import is_wide
from megatron_solopo.parallel.platform import Platform, end_model_parallel

IS_CUDA: Any = vars(torch._C.TensorBase)["is_cuda"].__get__

Patch = Callable[[object, str, object], object]


@dataclass
class Stage:
    """What the processes at the other end would send.

    Attributes:
        hidden: shape of the states that pipeline stages exchange, (tokens of a process, 1, hidden size).
    """

    hidden: tuple[int, ...] = ()


@dataclass
class Repeats:
    """How often the run calls an operator that is rehearsed now; see `Counts`."""

    times: int = 1


@dataclass(frozen=True)
class Rehearsal:
    """A process that computes with fake tensors; see `rehearsal`."""

    platform: Platform
    mode: FakeTensorMode
    stage: Stage = field(default_factory=Stage)
    repeats: Repeats = field(default_factory=Repeats)


@contextlib.contextmanager
def rehearsal(device: str, rank: int, world: int) -> Iterator[Rehearsal]:
    """Makes this process rank ``rank`` of ``world`` processes that do not exist.

    Args:
        device: ``cuda`` or ``cpu``, whose code path is taken; no GPU is needed.

    Raises:
        RuntimeError: a process group exists here already, or megatron-core has bound Transformer Engine.
    """
    if dist.is_initialized():
        raise RuntimeError("a rehearsal needs a process without a process group")
    torch_device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    mode = _Mode(torch_device)  # before the patches: its first use imports modules that look at what is patched
    with contextlib.ExitStack() as stack:

        def patch(module: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        # training code asks the environment where it is (`topology.world_size`)
        stack.enter_context(mock.patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0"))
        stack.callback(cpu_shim.install(torch_device))
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        stack.callback(end_model_parallel)
        rehearsed = Rehearsal(Platform(device, torch_device, "fake", lambda: None), mode)
        _answer_megatron(patch, rehearsed.stage)
        door = _Door(mode, torch_device)
        _answer_torch(patch, door)
        _answer_product(patch, door, rehearsed.repeats)
        # Fake tensors have no device threads; and dispatch modes act in the thread that entered them.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(door)
        yield rehearsed


def _answer_torch(patch: Patch, door: _Door) -> None:
    make = Tensor._make_subclass

    def make_without_device(cls: type, data: Tensor, require_grad: bool = False, **settings: Any) -> Tensor:
        # autograd's engine asks the CUDA driver about the device of each tensor (GraphTask::stash_current_streams).
        # A FakeTensor's own `device` is Python's and stays; C++ then sees the meta tensor behind it.
        if issubclass(cls, FakeTensor):
            settings["dispatch_device"] = settings["device_for_backend_keys"].type == "cpu"
        return make(cls, data, require_grad, **settings)

    patch(Tensor, "_make_subclass", staticmethod(make_without_device))
    patch(fake_tensor, "init_gpu_context", lambda device: None)  # starts CUDA before the first fake tensor on it
    # optim/adam.py: the number of the step, read for the bias correction where it is computed on the host
    patch(import_module("torch.optim.adam"), "_get_value", lambda value: 1.0 if isinstance(value, Tensor) else value)

    run_backward = torch.autograd.graph._engine_run_backward

    def run_backward_with_door(*args: Any, **kwargs: Any) -> Any:
        with door:  # which is left for the time of the call, as `backward` is a function of tensors itself
            return run_backward(*args, **kwargs)

    patch(torch.autograd, "_engine_run_backward", run_backward_with_door)

    def cuda(self: torch.nn.Module, device: Any = None) -> torch.nn.Module:
        # nn/modules/module.py:991: `Module._apply` swaps fake parameters in place, which it refuses for those that a
        # weak reference follows
        moved: dict[Tensor, torch.nn.Parameter] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and (there := parameter.detach().cuda()).device != parameter.device:
                    new = moved.setdefault(parameter, torch.nn.Parameter(there, parameter.requires_grad))
                    vars(new).update({key: value for key, value in vars(parameter).items() if key not in vars(new)})
                    module._parameters[name] = new
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.cuda()
        return self

    patch(torch.nn.Module, "cuda", cuda)

    def gather_object(results: list[Any], value: Any, group: Any = None) -> None:
        results[:] = [value] * len(results)

    patch(dist, "all_gather_object", gather_object)  # pickles travel as tensors whose bytes are read
    patch(dist.distributed_c10d, "all_gather_object", gather_object)


class _Mode(FakeTensorMode):
    """Operators that C++ composes make their intermediates where it believes their operands are: on meta."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (device := kwargs.get("device")) is not None and device.type == "meta":
            kwargs = kwargs | {"device": self.device}
        if func is torch.ops.aten.addmm.dtype_out:  # its fake kernel passes the dtype as beta (decompositions.py:1531)
            return kwargs["out"]
        return super().dispatch(func, types, args, kwargs)


class _Nothing:
    """A collective that nobody waits for."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def _not_coalesced(*args: Any, **kwargs: Any) -> Iterator[_Nothing]:
    yield _Nothing()


def _answer_megatron(patch: Patch, stage: Stage) -> None:
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.moe.token_dispatcher import (
        MoEAllGatherTokenDispatcher,
        MoEAlltoAllTokenDispatcher,
    )

    # param_and_grad_buffer.py:504: the fake group has no coalesced collectives; each then goes out alone
    patch(param_and_grad_buffer, "_coalescing_manager", _not_coalesced)
    # tensor_parallel/random.py: states of generators are real tensors; nothing is drawn without dropout
    patch(random, "_get_cuda_rng_state", lambda *args, **kwargs: None)
    patch(random, "_set_cuda_rng_state", lambda *args, **kwargs: None)
    patch(random.CudaRNGStatesTracker, "fork", lambda self, *name: contextlib.nullcontext())
    patch(random, "_get_all_rng_states", lambda: (None, None, None))
    patch(random, "_set_all_rng_states", lambda *states: None)

    def shapes(self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> tuple[Any, Any]:
        # p2p_communication.py:186: a stage reads the shape of what it will receive from the wire
        return stage.hidden if recv_prev else None, stage.hidden if recv_next else None

    patch(P2PCommunicator, "_communicate_shapes", shapes)
    # moe_utils.py: a tensor of the class, which would outlive this rehearsal's fake mode
    patch(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    begin, preprocess = MoEAlltoAllTokenDispatcher.__init__, MoEAlltoAllTokenDispatcher.preprocess

    def begin_on_host(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # token_dispatcher.py:440: orders of chunks, made on the CPU and read there
            begin(self, *args, **kwargs)

    def preprocess_balanced(self: Any, routing_map: Tensor) -> Any:
        """token_dispatcher.py:505: how many tokens go to which expert is in the router's choice. Here to each alike."""
        preprocess(self, routing_map)
        chosen = routing_map.shape[0] * self.config.moe_router_topk
        with _disable_current_modes():
            each = torch.tensor(_shares(chosen, self.num_experts))
            per_rank = each.view(self.ep_size, self.num_local_experts)
            rank_tokens = per_rank[torch.distributed.get_rank(self.ep_group)]
            if self.ep_size > 1 or self.tp_size > 1:
                self.input_splits = per_rank.sum(1).numpy()
                self.output_splits = rank_tokens.sum().repeat(self.ep_size).numpy()
                self.output_splits_tp = (rank_tokens.sum() * self.ep_size).repeat(self.tp_size).numpy()
            self.num_global_tokens_per_local_expert = rank_tokens.repeat(self.tp_size * self.ep_size, 1).numpy()
            return (rank_tokens * self.tp_size * self.ep_size).numpy()

    patch(MoEAlltoAllTokenDispatcher, "__init__", begin_on_host)
    patch(MoEAlltoAllTokenDispatcher, "preprocess", preprocess_balanced)

    def postprocess_balanced(self: Any, hidden_states: Tensor, probs: Tensor) -> Any:
        """token_dispatcher.py:303: the same of --moe-token-dispatcher-type allgather, whose method reads the counts."""
        experts = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        self.hidden_shape_before_permute = hidden_states.shape
        self.local_map = self.routing_map[:, experts].contiguous()
        each = _shares(hidden_states.shape[0] * self.router_topk, self.config.num_moe_experts)[experts]
        permuted, _, self.reversed_local_input_permutation_mapping, *_ = token_dispatcher.permute(
            hidden_states, self.local_map, num_out_tokens=sum(each), fused=self.config.moe_permute_fusion
        )
        with _Selected(sum(each)):
            self.local_probs = probs[:, experts].T.contiguous().masked_select(self.local_map.T.contiguous())
        self.routing_map = None
        return permuted, np.array(each), self.local_probs

    patch(MoEAllGatherTokenDispatcher, "dispatch_postprocess", postprocess_balanced)
    patch(token_dispatcher, "maybe_move_tensor_to_cpu", lambda value, *args, **kwargs: value)  # is there already
    permute = moe_utils.permute

    def permute_all(tokens: Tensor, routing_map: Tensor, **settings: Any) -> Any:
        # moe_utils.py:460: as many rows as the mask has ones, which `masked_select` counts on the device
        with _Selected(settings["num_out_tokens"]):
            return permute(tokens, routing_map, **settings)

    patch(moe_utils, "permute", permute_all)
    patch(token_dispatcher, "permute", permute_all)


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (place < total % parts) for place in range(parts)]


class _Selected(TorchDispatchMode):
    """`masked_select` whose mask holds ``count`` ones."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.masked_select.default:
            return torch.ops.aten.new_empty.default(args[0], [self.count])
        return func(*args, **(kwargs or {}))


def _answer_product(patch: Patch, door: _Door, repeats: Repeats) -> None:
    from megatron_solopo.model import delta_rule, experts, forward
    from megatron_solopo.parallel import device_pack, layout
    from megatron_solopo.training import engine, objective, resident, step

    send = door.on_device(device_pack.on_device)
    for module in (experts, forward, objective, resident):
        patch(module, "on_device", send)

    # weights have no values here, and drawing real ones takes minutes for a large model
    patch(engine, "draw_start", lambda *args: None)
    patch(engine, "load_start", lambda *args: None)
    patch(engine, "start_adapters", lambda *args: None)

    def finite(scalars: dict[str, Tensor], numbers: dict[str, float], device: torch.device) -> dict[str, Any]:
        return {name: (1.0,) * dist.get_world_size() for name in (*scalars, *numbers)}

    lower_right = layout.causal_lower_right

    def lower_right_on_host(*sizes: int) -> Tensor:
        with _disable_current_modes():  # nn/attention/bias.py: a tensor without numbers that names a mask
            return lower_right(*sizes)

    patch(layout, "causal_lower_right", lower_right_on_host)
    patch(step, "gather_from_all_ranks", finite)  # the one read of the device in a step
    steps_of = delta_rule._steps

    def alike(steps: Sequence[int], backwards: bool = False) -> Iterator[tuple[slice, int]]:
        # The chunks of a long prompt follow each other by the thousand; those of as many sequences are computed alike.
        each = list(steps_of(steps, backwards))
        counts = Counter((chunks.stop - chunks.start, following) for chunks, following in each)
        for chunks, following in each:
            if times := counts.pop((chunks.stop - chunks.start, following), 0):
                repeats.times = times
                yield chunks, following
        repeats.times = 1

    patch(delta_rule, "_steps", alike)


class _Door(TorchFunctionMode):
    """Host tensors that `on_device` sends become fake ones, and what C++ says of a fake tensor's device, which is that
    of the meta tensor behind it, is said right."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        super().__init__()
        self.mode, self.device, self.open = mode, device, False

    def on_device(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """`device_pack.on_device` with the door open."""

        def through(value: Any, device: torch.device) -> Any:
            self.open = True
            try:
                return send(value, device)
            finally:
                self.open = False

        return through

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:  # there is no device to pin it for
            return args[0]
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], self.device)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if self.device.type == "cuda" and args and isinstance(args[0], FakeTensor):
            if func is Tensor.type and len(args) == 1:  # optimizer/distrib_optimizer.py compares with these names
                return func(*args).replace("torch.meta.", "torch.cuda.")
            if func is F.scaled_dot_product_attention:
                return _attention(*args, **kwargs)
            if func == IS_CUDA:
                return args[0].device.type == "cuda"
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = args[0].device, args[0].dtype, *args[1:]
        device = kwargs.pop("device", None)
        if args and (args[0] is None or isinstance(args[0], str | int | torch.device)):
            device, args = args[0], args[1:]
            if args and args[0] is None:  # no dtype
                kwargs |= dict(zip(("non_blocking", "copy"), args[1:], strict=False))
                args = ()
        if device is not None:
            device = torch.device(device)
            if device.type == self.device.type:
                device = self.device
            if self.open and not isinstance(tensor, FakeTensor):
                sent: Any = Tensor.to(self.mode.from_tensor(tensor), device, *args, **kwargs)
                sent.host_values = tensor  # read by `operators`, for sequences whose lengths are on the device
                return sent
            if tensor.device != device:
                return Tensor.to(tensor, device, *args, **kwargs)
            # C++ would take it for a move, and copy
        return Tensor.to(tensor, *args, **kwargs) if args or kwargs.keys() - {"non_blocking"} else tensor


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that `F.scaled_dot_product_attention` and `CausalBias` take on a GPU of compute capability 8 or more,
    whose properties C++ would ask: flash attention (cuDNN's holds as much) for 16 bits, the memory-efficient one for
    float32 and wide heads."""
    operators = torch.ops.aten
    causal = is_causal or attn_mask is not None
    if query.dtype in (torch.bfloat16, torch.float16) and not is_wide(query.shape[-1]):
        return operators._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[0]
    assert query.shape[1] == key.shape[1], "with fewer heads of keys torch would hold the scores of all with all"
    return operators._scaled_dot_product_efficient_attention(
        query, key, value, None, query.requires_grad, 0.0, causal, scale=scale
    )[0]


def fakes(values: Sequence[Any]) -> Iterator[FakeTensor]:
    """Yields the fake tensors in dataclasses, lists and tuples of them."""
    for value in values:
        if isinstance(value, FakeTensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from fakes(value)
        elif hasattr(value, "__dataclass_fields__"):
            yield from fakes(list(vars(value).values()))
