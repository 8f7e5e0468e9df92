#!/usr/bin/env python3
"""Time and memory of the log-prob head against other ways to the same DPO loss of pairs, on one CPU thread.

    python examples/benchmarks/head.py [--pairs 1] [--tokens 128] [--hidden 512] [--vocabulary 32000] [--dtype float32]

Ways: this package's head with what forward may keep and without (--logprob-chunk-size below the number of tokens), all
logits at once, Cut Cross Entropy's scheme in torch (blocks of the vocabulary, no logits kept, nothing skipped), and
Liger's chunked DPO loss where liger-kernel is installed. They run in turn; of each the fastest of --repeats counts,
forward and backward, in CPU seconds. Peak memory is that of the tensors that operators make beside the inputs.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_solopo.model.log_probs import response_log_probs

BETA = 0.1
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of [2 pairs, tokens, hidden] states, chosen before rejected, the [V, H] weight and [2 pairs, tokens] targets."""


def dpo(sums: Tensor) -> Tensor:
    """The loss of [2 pairs] log-probs, whose reference has 0."""
    chosen, rejected = sums.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def ours(chunk: int) -> Loss:
    def loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        flat = response_log_probs(states.flatten(0, 1), weight, targets.flatten(), len(weight), chunk)
        return dpo(flat.view(targets.shape).sum(1))

    return loss


def whole(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return dpo((states @ weight.t()).float().log_softmax(-1).gather(2, targets[..., None])[..., 0].sum(1))


class CutCrossEntropy(torch.autograd.Function):
    """log softmax(hidden @ weight^T)[target] by blocks of the vocabulary (arXiv 2411.09009, algorithms 1 to 4)."""

    BLOCK = 4096

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        blocks = [(hidden @ part.t()).float().logsumexp(1) for part in weight.split(CutCrossEntropy.BLOCK)]
        log_sums = torch.stack(blocks).logsumexp(0)
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        return (hidden * weight[targets]).float().sum(1) - log_sums

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets, log_sums = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.empty_like(weight)
        for begin in range(0, len(weight), CutCrossEntropy.BLOCK):
            part = weight[begin : begin + CutCrossEntropy.BLOCK]
            rows = (hidden @ part.t()).float().sub_(log_sums[:, None]).exp_().neg_()
            here = (targets >= begin) & (targets < begin + len(part))
            rows.scatter_add_(1, (targets - begin).clamp(0, len(part) - 1)[:, None], here.float()[:, None])
            rows = rows.mul_(grad[:, None]).to(hidden.dtype)
            grad_hidden += rows @ part
            torch.mm(rows.t(), hidden, out=grad_weight[begin : begin + len(part)])
        return grad_hidden, grad_weight, None


def cut(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_probs = CutCrossEntropy.apply(states.flatten(0, 1), weight, targets.flatten())
    assert isinstance(log_probs, Tensor)
    return dpo(log_probs.view(targets.shape).sum(1))


def liger() -> dict[str, Loss]:
    try:
        function = import_module("liger_kernel.chunked_loss.dpo_loss").LigerFusedLinearDPOFunction
    except ImportError:
        return {}

    def loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # ref_input, ref_weight, bias and ref_bias are None; compute_nll_loss, compiled and use_ref_model are off
        options = (None, None, None, None, -100, BETA, False, False, False)
        result = function.apply(states, weight, targets, *options)
        return result[0]

    return {"Liger's chunked DPO loss, a pair at a time": loss}


def drawn(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    shape = 2 * options.pairs, options.tokens
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    states = torch.randn(*shape, options.hidden, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(options.vocabulary, options.hidden, generator=generator) * 0.05).to(dtype).requires_grad_()
    return states, weight, torch.randint(0, options.vocabulary, shape, generator=generator)


def seconds(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    inputs[0].grad = inputs[1].grad = None
    start = time.process_time()
    loss(*inputs).backward()
    return time.process_time() - start


class Peak(TorchDispatchMode):
    """Bytes of the storages that operators made, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen[storage._cdata] = storage.nbytes()
                self.held += storage.nbytes()
                self.most = max(self.most, self.held)
                weakref.finalize(storage, self._free, storage._cdata).atexit = False
        return result

    def _free(self, key: int) -> None:
        self.held -= self.seen.pop(key)


def peak(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> int:
    """Bytes beside the inputs."""
    inputs[0].grad = inputs[1].grad = None
    with torch.autograd.set_multithreading_enabled(False), Peak() as watched:
        watched.seen |= {tensor.untyped_storage()._cdata: 0 for tensor in inputs}
        loss(*inputs).backward()
    return watched.most


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("pairs", 1), ("tokens", 128), ("hidden", 512), ("vocabulary", 32_000), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens = 2 * options.pairs * options.tokens
    ways: dict[str, Loss] = {
        "the head, which keeps what forward computed": ours(tokens),
        "the head, in four chunks that are computed again": ours(tokens // 4),
        "all logits at once": whole,
        "Cut Cross Entropy's scheme": cut,
    } | liger()
    inputs = drawn(options)
    times: dict[str, float] = {}
    for _ in range(options.repeats):
        for name, loss in ways.items():
            times[name] = min(times.get(name, float("inf")), seconds(loss, inputs))
    print(f"{tokens} response tokens, hidden size {options.hidden}, {options.vocabulary:,} rows, {options.dtype}")
    print(f"{'':<50} {'seconds':>8} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}")
    base = next(iter(ways))
    peaks = {name: peak(loss, inputs) for name, loss in ways.items()}
    for name in ways:
        ratios = times[name] / times[base], peaks[name] / peaks[base]
        print(f"{name:<50} {times[name]:>8.3f} {ratios[0]:>6.2f} {peaks[name] / 2**20:>9.1f} {ratios[1]:>6.2f}")


if __name__ == "__main__":
    main()
