"""AdamW whose state takes fewer bytes, or is on the host: --use-precision-aware-optimizer, --optimizer-cpu-offload.

Both take the place of Transformer Engine's FusedAdam under megatron-core's DistributedOptimizer, which makes no float32
copies of the weights for it (megatron-core 0.19.2, distrib_optimizer.py, `use_precision_aware_optimizer`). Where
Transformer Engine is installed, its kernel computes the steps of a state on the device. megatron-core's
HybridDeviceOptimizer is not used: it takes a step on random gradients while it loads a checkpoint, its pinned copies of
all gradients are rounded up to powers of two, it copies weights back in float32, and it does not run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from megatron.core.optimizer.distrib_optimizer import USING_TE_OPTIMIZER
from torch import Tensor

from megatron_solopo.config import TrainingConfig

PIECE = 2**24
"""Elements that are computed at one time: temporaries take at most 16 bytes for each."""


def pieces(size: int) -> Iterator[slice]:
    """Returns slices of at most `PIECE` elements that cover a tensor."""
    return (slice(begin, min(begin + PIECE, size)) for begin in range(0, size, PIECE))


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """Returns [N] float32: the main parameters of [N] bfloat16 weights and their int16 remainders.

    A weight is the upper half of its main parameter's bits, rounded to the nearest, and away from 0 where two are as
    near; the remainder is the lower half. A negative remainder says that the weight was rounded up (Transformer
    Engine's multi_tensor_adam_param_remainder).
    """
    main = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    low, high = main.view(torch.int16).view(-1, 2).unbind(1)  # little-endian
    low.copy_(remainder)
    high.copy_(weight.view(torch.int16) + (remainder >> 15))
    return main


def split(main: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Writes [N] float32 main parameters as bfloat16 weights and int16 remainders, see `joined`."""
    low, high = main.view(torch.int16).view(-1, 2).unbind(1)
    remainder.copy_(low)
    weight.view(torch.int16).copy_(high - (low >> 15))


class StateInPlace(torch.optim.Optimizer):
    """An optimizer whose state is stored and loaded where it is, in the format that every optimizer here has.

    FusedAdam's own methods make float32 copies of all moments, twice the state. A stored main parameter is in float32,
    so that a run may resume with or without remainders, and with its state on the device or on the host.
    """

    def has_remainders(self, param: Tensor) -> bool:
        return self.state[param]["master_param"].dtype == torch.int16

    def make_states(self) -> None:
        """Makes the states that are not there yet, of main parameters that are the weights and moments of 0."""
        adam = cast(Any, self)
        for group in self.param_groups:
            group.setdefault("step", 0)
            for param in group["params"]:
                if not self.state[param]:
                    adam.initialize_state(param, adam.store_param_remainders)  # FusedAdam has it too

    def state_dict(self) -> dict[str, Any]:
        """Returns groups and states, each with the number of steps: megatron-core reads it from the groups with
        Transformer Engine, and from the states without (distrib_optimizer.py:837)."""
        self.make_states()
        packed = torch.optim.Optimizer.state_dict(self)
        step = torch.tensor(float(next((group["step"] for group in self.param_groups), 0)))
        return packed | {"state": {index: {**state, "step": step} for index, state in packed["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the groups; the states follow by `set_stored_state`."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
            group["step"] = int(group["step"])

    def stored_state(self, param: Tensor) -> dict[str, Tensor]:
        """Returns what a checkpoint stores of a shard: ``param`` in float32 and the moments."""
        state = {name: self.state[param][name] for name in ("exp_avg", "exp_avg_sq")}
        main = self.state[param]["master_param"]
        if self.has_remainders(param):
            remainder, main = main, torch.empty(param.shape, dtype=torch.float32, device="cpu")
            for piece in pieces(param.numel()):
                main[piece].copy_(joined(param[piece], remainder[piece]))
        return {"param": main, **state}

    def set_stored_state(self, param: Tensor, values: dict[str, Tensor]) -> None:
        """Loads what `stored_state` returned; weights of remainders follow the main parameters."""
        state = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].copy_(values[name])
        if self.has_remainders(param):
            for piece in pieces(param.numel()):
                main = values["param"][piece].to(param.device, torch.float32).contiguous()
                split(main, param[piece], state["master_param"][piece])
        else:
            state["master_param"].copy_(values["param"])


class Staging:
    """Two pairs of pinned buffers between device and host: a gradient comes, the updated weight goes.

    Args:
        device: of the gradients; on the CPU the copies are plain.
        overlap: while the host computes a piece, the next one comes and the one before goes.
    """

    def __init__(self, device: torch.device, overlap: bool) -> None:
        self.device, self.overlap = device, overlap
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._down, self._up = torch.cuda.Stream(), torch.cuda.Stream()

    def update(self, work: Iterable[tuple[Tensor, Tensor, Any]]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Yields (gradient, weight, job) on the host for each (gradient, weight, job) of the device.

        What the caller writes into the host's weight before it asks for the next piece is copied to the device. The
        gradient has its dtype. Afterwards the device's stream waits for the last copy.
        """
        current = torch.cuda.current_stream()
        self._down.wait_stream(current)
        self._up.wait_stream(current)
        work = list(work)
        come: list[Any] = [self._fetch(0, work[0][0])] if work else []
        gone: list[Any] = [None] * len(work)
        for number, (gradient, weight, job) in enumerate(work):
            if number + 1 < len(work) and self.overlap:
                come.append(self._fetch(number + 1, work[number + 1][0]))
            come[number].synchronize()
            if number > 1:
                gone[number - 2].synchronize()  # it went out of the same buffer
            gradients, weights = self._buffers[number % 2]
            size = gradient.numel()
            yield gradients[:size], weights[:size], job
            gone[number] = self._send(weights[:size], weight)
            if not self.overlap:
                gone[number].synchronize()
                come += [self._fetch(number + 1, work[number + 1][0])] if number + 1 < len(work) else []
        current.wait_stream(self._up)

    def _fetch(self, number: int, gradient: Tensor) -> Any:
        if len(self._buffers) < 2:
            pinned: Any = {"pin_memory": True} if self.device.type == "cuda" else {}
            self._buffers.append(
                (
                    torch.empty(PIECE, dtype=gradient.dtype, device="cpu", **pinned),
                    torch.empty(PIECE, dtype=torch.bfloat16, device="cpu", **pinned),
                )
            )
        return self._copy(self._down, self._buffers[number % 2][0][: gradient.numel()], gradient)

    def _send(self, weights: Tensor, weight: Tensor) -> Any:
        return self._copy(self._up, weight, weights)

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> Any:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()


class PieceAdam(StateInPlace, torch.optim.AdamW):
    """AdamW of bfloat16 weights, in pieces, with torch's fused kernel; what rounds is the storing of the state alone.

    Nothing is rounded stochastically, as in FusedAdam.

    Args:
        params, lr, weight_decay, betas, eps: as of torch's AdamW.
        exp_avg_dtype, exp_avg_sq_dtype: of the moments between steps; a step computes in float32.
        store_param_remainders: keep 16 bits beside the weight instead of main parameters in float32, on the device.
        offload_fraction: which part of the elements, at least and by whole shards, has its state on the host.
        staging: the buffers for it.
        of_fused_adam: further arguments that FusedAdam takes, of which megatron-core gives one value here.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        exp_avg_dtype: torch.dtype,
        exp_avg_sq_dtype: torch.dtype,
        store_param_remainders: bool,
        offload_fraction: float = 0.0,
        staging: Staging | None = None,
        **of_fused_adam: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self.store_param_remainders = store_param_remainders
        self.offload_fraction, self.staging = offload_fraction, staging
        self.on_host: set[Tensor] = set()

    def make_states(self) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        if not self.on_host and self.offload_fraction > 0:
            wanted, held = self.offload_fraction * sum(param.numel() for param in params), 0
            for param in params:
                if held < wanted:
                    self.on_host.add(param)
                    held += param.numel()
        super().make_states()

    @torch.no_grad()
    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        device = torch.device("cpu") if param in self.on_host else param.device
        state = {name: torch.zeros(param.shape, dtype=dtype, device=device) for name, dtype in self.dtypes.items()}
        if store_param_remainders and param not in self.on_host:
            main = torch.zeros(param.shape, dtype=torch.int16, device=device)
        else:
            main = torch.empty(param.shape, dtype=torch.float32, device=device)
            for piece in pieces(param.numel()):
                main[piece].copy_(param[piece])
        self.state[param] = {"master_param": main, **state}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closure here
        """Updates the weights by their ``decoupled_grad``, which is in the dtype of DDP's sums."""
        self.make_states()
        there: list[tuple[Tensor, Tensor, Any]] = []
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                gradient = param.decoupled_grad
                for piece in pieces(param.numel()):
                    state = {name: values[piece] for name, values in self.state[param].items()}
                    if param in self.on_host:
                        there.append((gradient[piece], param[piece], (group, state)))
                    else:
                        _on_device(group, param[piece], gradient[piece], state)
        if there:
            assert self.staging is not None
            for gradient, weight, (group, state) in self.staging.update(there):
                _adamw(group, state["master_param"], gradient, state)
                weight.copy_(state["master_param"])


def _on_device(group: dict[str, Any], weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    kept = state["master_param"]
    main = kept if kept.dtype == torch.float32 else joined(weight, kept)
    _adamw(group, main, gradient, state)
    if main is kept:
        weight.copy_(main)
    else:
        split(main, weight, kept)


def _adamw(group: dict[str, Any], main: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    """AdamW's update of float32 main parameters, in place; moments of another dtype are rounded once, afterwards."""
    kept = [state[name] for name in ("exp_avg", "exp_avg_sq")]
    exp_avg, exp_avg_sq = (moment.float() for moment in kept)
    beta1, beta2 = group["betas"]
    # torch.optim.adam's own call of its fused kernel, which takes the step's number on the device
    step = torch.full((), group["step"], dtype=torch.float32, device=main.device)
    torch.ops.aten._fused_adamw_(
        [main], [gradient.float()], [exp_avg], [exp_avg_sq], [], [step],
        lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
        amsgrad=False, maximize=False,
    )  # fmt: skip
    for moment, computed in zip(kept, (exp_avg, exp_avg_sq), strict=True):
        if moment is not computed:
            moment.copy_(computed)


def adam_of(training: TrainingConfig, device: torch.device) -> Callable[..., Any]:
    """Returns what makes the optimizer of a run from the arguments that FusedAdam takes."""
    remainders = training.use_precision_aware_optimizer and training.store_param_remainders
    if training.optimizer_cpu_offload:
        staging = Staging(device, training.overlap_cpu_optimizer_d2h_h2d)
        fraction = training.optimizer_offload_fraction
        return partial(PieceAdam, store_param_remainders=remainders, offload_fraction=fraction, staging=staging)
    if not USING_TE_OPTIMIZER:
        return partial(PieceAdam, store_param_remainders=remainders)
    from transformer_engine.pytorch.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    fused: Any = type("FusedAdam", (StateInPlace, FusedAdam), {})
    return partial(fused, store_param_remainders=remainders)
