"""Kernels: those that run today, and candidates to replace them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import checks
from gpu.record import Recorder, Skipped, brief, host_milliseconds, milliseconds, synchronize

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(out: Recorder) -> None:
    with out.part("packed"):
        checks.packed(out)
    with out.part("context_parallel"):
        checks.context(out)
    for length in (64, 512) if out.dry else (1024, 8192):
        kernels_at(out, length)
    with out.part("plans"):
        plans(out)
    with out.part("repeats"):
        repeats(out)
    with out.part("deterministic"):
        deterministic(out)


def draw(out: Recorder, length: int) -> list[Tensor]:
    """Query, key and value, [length, heads, head_dim], as the packed attention gets them."""
    heads, kv_heads, size, dtype = checks.attention_shape(out)
    generator = torch.Generator().manual_seed(length)
    shapes = ((length, count, size) for count in (heads, kv_heads, kv_heads))
    return [torch.randn(*s, generator=generator).to(out.device, dtype).requires_grad_() for s in shapes]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns what model/attention.py calls for a prompt."""
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)[0]


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the flash kernel for packed sequences, with one sequence."""
    ends = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
    lengths = (ends, ends, q.shape[0], k.shape[0])
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False)[0]


def kernels_at(out: Recorder, length: int) -> None:
    """Each kernel of torch at one length: relative error of its last rows, time forward and of both passes."""
    q, k, v = draw(out, length)
    with torch.no_grad():
        expected = checks.exact_attention(q.double()[-64:], k.double(), v.double())
    chosen = torch._fused_sdp_choice(*(x[None].transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    out.value(f"{length}/default/is", SDPBackend(chosen).name)

    def through(backend: SDPBackend) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return causal(*tensors)

        return call

    calls = {"default": causal, **{name: through(backend) for name, backend in BACKENDS.items()}, "varlen": varlen}
    for name, call in calls.items():
        key = f"{length}/{name}"
        try:
            actual = call(q, k, v)
        except RuntimeError as error:  # this kernel does not support these tensors, which is a figure and no failure
            out.value(f"{key}/refused", brief(error))
            continue
        with out.part(key):
            error = ((actual[-64:].double() - expected).norm() / expected.norm()).item()
            out.check(f"{key}/error", error, checks.ATTENTION_BOUNDS[q.dtype])

            def both(call: Any = call) -> None:
                for tensor in (q, k, v):
                    tensor.grad = None
                call(q, k, v).sum().backward()

            with torch.no_grad():
                out.value(f"{key}/forward", milliseconds(lambda call=call: call(q, k, v), out.device), "ms")
            out.value(f"{key}/forward_and_backward", milliseconds(both, out.device), "ms")


def plans(out: Recorder) -> None:
    """Time of a length's first call, unchanged and rounded up to a length that was planned before."""
    from megatron_solopo.parallel.context.none import CUDNN_LENGTHS

    base = 256 if out.dry else 4096
    first, again, rounded = [], [], []

    def both(tensors: list[Tensor]) -> Callable[[], None]:
        return lambda: causal(*tensors).sum().backward()

    both(draw(out, base))()  # the very first call costs more than a plan
    both(draw(out, base + CUDNN_LENGTHS))()
    for number in range(1, 6):
        new = draw(out, base + 17 * number)
        synchronize(out.device)
        first.append(host_milliseconds(both(new), out.device))
        again.append(host_milliseconds(both(new), out.device))
        planned = draw(out, base + CUDNN_LENGTHS)
        synchronize(out.device)
        rounded.append(host_milliseconds(both(planned), out.device))
    for name, values in (("first_time", first), ("second_time", again), ("rounded", rounded)):
        out.value(f"plans/{name}", statistics.median(values), "ms forward and backward")


def repeats(out: Recorder) -> None:
    """Whether two equal calls compute the same bits."""
    tensors = draw(out, 512 if out.dry else 4096)

    def gradients() -> list[Tensor]:
        for tensor in tensors:
            tensor.grad = None
        result = causal(*tensors)
        result.float().square().sum().backward()
        return [result.detach(), *(tensor.grad for tensor in tensors)]

    for key, (one, other) in zip(
        ("output", "query", "key", "value"), zip(gradients(), gradients(), strict=True), strict=True
    ):
        out.value(f"repeats/attention_{key}", torch.equal(one, other))
    values = torch.randn(10000, generator=torch.Generator().manual_seed(0)).to(out.device)
    places = torch.randint(0, 8, (10000,), generator=torch.Generator().manual_seed(1)).to(out.device)
    sums = [torch.zeros(8, device=out.device).index_add(0, places, values) for _ in range(2)]
    out.value("repeats/sums_of_segments", torch.equal(*sums))


def deterministic(out: Recorder) -> None:
    """Whether --deterministic-mode computes the same bits twice, and its time over that without: responses of a prompt
    in one flash call, whose gradients of keys and values are sums over sequences, and sums of segments."""
    from megatron_solopo.model.log_probs import segment_sums
    from megatron_solopo.pack import Piece
    from megatron_solopo.parallel.deterministic import fixed_order
    from megatron_solopo.parallel.device_pack import on_device

    prompt, answers = (256, 40) if out.dry else (4096, 200)
    pieces = [Piece(0, prompt), *(Piece(prompt + n * answers, answers, 0) for n in range(4))]
    layout = on_device(checks.attention_layouts(out)[1](pieces), torch.device(out.device))
    tensors = draw(out, prompt + 4 * answers)
    segments = torch.arange(8, device=out.device).repeat_interleave(1250)
    values = torch.randn(10000, generator=torch.Generator().manual_seed(0)).to(out.device)

    def results() -> list[Tensor]:
        for tensor in tensors:
            tensor.grad = None
        result = layout.attend(*tensors, None)
        result.float().square().sum().backward()
        return [result.detach(), *(tensor.grad for tensor in tensors), segment_sums(values, segments, 8)]

    plain = milliseconds(results, out.device)
    with fixed_order():
        for key, one, other in zip(("output", "query", "key", "value", "sums"), results(), results(), strict=True):
            out.check(f"deterministic/{key}_differs", float(not torch.equal(one, other)), 0.0)
        out.value("deterministic/over_plain_time", milliseconds(results, out.device) / plain)


def candidates(out: Recorder) -> None:
    """The kernel that runs today against a candidate to replace it: time, and the error of both where they round."""
    tokens, width, inner = (64, 64, 96) if out.dry else (9984, 3584, 18944)
    dtype, device = torch.bfloat16, torch.device(out.device)
    torch.manual_seed(0)
    with out.part("norm"):
        norm(out, torch.randn(tokens, width, device=device, dtype=dtype))
    with out.part("swiglu"):
        swiglu(out, torch.randn(tokens, 2 * inner, device=device, dtype=dtype))
    with out.part("logits"):
        logits(out, width)
    with out.part("weight_gradient"):
        weight_gradient(out, tokens, 768 if not out.dry else 16, width)
    with out.part("experts"):
        experts(out, tokens, 16 if out.dry else 128)
    with out.part("adam"):
        adam(out, 10**5 if out.dry else 10**9)
    with out.part("adam_on_cpu"):
        adam_on_cpu(out, 10**9)


def _passes(out: Recorder, key: str, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    def both() -> None:
        leaf = x.detach().requires_grad_()
        call(leaf).sum().backward()

    out.value(f"{key}/forward_and_backward", milliseconds(both, out.device), "ms")


def norm(out: Recorder, x: Tensor) -> None:
    from types import SimpleNamespace

    from megatron_solopo.model.norm import RMSNorm

    settings = SimpleNamespace(sequence_parallel=False, params_dtype=x.dtype, layernorm_zero_centered_gamma=False)
    ours = RMSNorm(settings, x.shape[-1], 1e-6).to(x.device, x.dtype)
    weight = ours.weight
    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()

    def steps(x: Tensor) -> Tensor:
        high = x.float()
        return weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    for key, call in (("today", ours), ("steps", steps)):
        with torch.no_grad():
            out.check(f"norm/{key}/error", ((call(x).double() - expected).norm() / expected.norm()).item(), 1e-2)
        _passes(out, f"norm/{key}", call, x)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * (up + 0.0)  # as megatron-core's mlp.py:323-333


def swiglu(out: Recorder, x: Tensor) -> None:
    from types import SimpleNamespace

    from megatron_solopo.model.swiglu import SwiGLU

    settings = SimpleNamespace(activation_func=F.silu, activation_func_clamp_value=None, glu_linear_offset=0.0)
    _passes(out, "swiglu/today", SwiGLU(settings), x)
    _passes(out, "swiglu/steps", _swiglu, x)
    with out.part("swiglu/compiled"):
        out.need_size()
        compiled = torch.compile(_swiglu)
        took = host_milliseconds(lambda: compiled(x.detach().requires_grad_()).sum().backward(), out.device)
        out.value("swiglu/compiled/compile", took / 1000, "s")
        _passes(out, "swiglu/compiled", compiled, x)


def logits(out: Recorder, width: int) -> None:
    """Logits of 256 tokens in float32, as the log-prob head computes them, and rounded to 16 bits first."""
    from megatron_solopo.model.log_probs import logits_of

    vocabulary = 512 if out.dry else 152064
    hidden, weight = (torch.randn(n, width, device=out.device).to(torch.bfloat16) for n in (256, vocabulary))
    weight.mul_(width**-0.5)
    expected = hidden.double() @ weight[:2048].double().t()
    for key, call in (
        ("", lambda: logits_of(hidden, weight, torch.float32)),
        ("rounded_", lambda: (hidden @ weight.t()).float()),
    ):
        error = (call()[:, :2048].double() - expected).norm() / expected.norm()
        out.check(f"logits/{key}error", error.item(), 1e-2 if key or out.dry else 1e-5)
        out.value(f"logits/{key}time", milliseconds(call, out.device), "ms")


def weight_gradient(out: Recorder, tokens: int, responses: int, width: int) -> None:
    """Adds the gradient of a matrix to a float32 sum: a product in bfloat16 and a sum, and as the model does."""
    from megatron_solopo.parallel.products import add_product

    rows, columns = (96, width) if out.dry else (18944, width)
    grad, x = (torch.randn(tokens, n, device=out.device, dtype=torch.bfloat16) for n in (rows, columns))
    total = torch.zeros(rows, columns, device=out.device)
    out.value("weight_gradient/steps", milliseconds(lambda: total.add_(grad.t() @ x), out.device), "ms")
    total.zero_()
    add_product(total, grad.t(), x)
    expected = grad.t().float() @ x.float()
    out.check("weight_gradient/today/error", ((total - expected).norm() / expected.norm()).item(), 1e-2)
    out.value("weight_gradient/today", milliseconds(lambda: add_product(total, grad.t(), x), out.device), "ms")


def experts(out: Recorder, tokens: int, count: int) -> None:
    """Products of each expert's tokens with its matrix: one after another as today, and in one call, which may want the
    experts' numbers of tokens to be multiples."""
    width, inner = (32, 48) if out.dry else (2048, 1536)
    generator = torch.Generator().manual_seed(0)
    for key, multiple in (("any", 1), ("multiples_of_8", 8)):
        chosen = torch.randint(0, count, (tokens // multiple,), generator=generator)
        counts = chosen.bincount(minlength=count) * multiple
        ends = counts.cumsum(0).to(out.device, torch.int32)
        x = torch.randn(int(counts.sum()), width, generator=generator).to(out.device, torch.bfloat16).requires_grad_()
        weight = torch.randn(count, inner, width, device=out.device).to(torch.bfloat16).requires_grad_()

        def one_by_one(x: Tensor = x, weight: Tensor = weight, counts: Tensor = counts) -> Tensor:
            parts = zip(x.split(counts.tolist()), weight.unbind(), strict=True)
            return torch.cat([part @ matrix.t() for part, matrix in parts])

        def grouped(x: Tensor = x, weight: Tensor = weight, ends: Tensor = ends) -> Tensor:
            return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)

        def gradients(call: Callable[[], Tensor], x: Tensor = x, weight: Tensor = weight) -> list[Tensor]:
            result = call()
            return [result.detach(), *torch.autograd.grad(result, (x, weight), torch.ones_like(result))]

        expected = gradients(one_by_one)
        out.value(f"experts/{key}/today", milliseconds(lambda: gradients(one_by_one), out.device), "ms")
        with out.part(f"experts/{key}/grouped"):
            for name, ours, theirs in zip(("output", "x", "weight"), gradients(grouped), expected, strict=True):
                error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
                out.check(f"experts/{key}/grouped_{name}_error", error.item(), 1e-2)
            out.value(f"experts/{key}/grouped", milliseconds(lambda: gradients(grouped), out.device), "ms")


def adam(out: Recorder, count: int) -> None:
    """A step of torch's AdamW over float32 parameters, by passes over temporaries and by one kernel."""
    for key, flags in (("foreach", {"foreach": True}), ("fused", {"fused": True})):
        with out.part(f"adam/{key}"):
            parameters = [torch.nn.Parameter(torch.zeros(count // 8, device=out.device)) for _ in range(8)]
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer = torch.optim.AdamW(parameters, **flags)
            optimizer.step()
            if out.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            out.value(f"adam/{key}/step", milliseconds(optimizer.step, out.device), "ms")
            if out.device == "cuda":
                out.value(f"adam/{key}/temporaries", (torch.cuda.max_memory_allocated() - before) / 2**30, "GiB")
            del parameters, optimizer
            if out.device == "cuda":
                torch.cuda.empty_cache()


def adam_on_cpu(out: Recorder, count: int) -> None:
    """megatron-core's optimizer whose state is in host memory."""
    if out.device != "cuda":
        raise Skipped("needs CUDA")
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    parameters = [torch.nn.Parameter(torch.zeros(count // 8, device="cuda", dtype=torch.bfloat16)) for _ in range(8)]
    optimizer = HybridDeviceOptimizer(
        parameters,
        offload_fraction=1.0,
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        overlap_cpu_optimizer_d2h_h2d=True,
        lr=1e-6,
    )
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    out.value("adam_on_cpu/step", host_milliseconds(optimizer.step, "cuda"), "ms")
