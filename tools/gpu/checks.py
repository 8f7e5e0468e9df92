"""Figures against float64: losses and gradients of inputs steps, and attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpu.record import Recorder, milliseconds

BOUNDS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 5e-2}
"""Relative error of a loss and of each tensor's gradient."""

ATTENTION_BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""bfloat16 keeps 8 bits."""


def oracle(out: Recorder) -> None:
    """Loss and gradient of a step for each method, model, layout and precision against the prepared answers."""
    from launches import World, gradient_cases, token_examples
    from methods import METHODS, method_roles
    from worker import gradient_case

    from gpu import answers
    from gpu.machine import start_platform
    from megatron_solopo import config_load
    from megatron_solopo.model.hf_config import read_hf_config
    from megatron_solopo.training.engine import build_engine, initialize_parallel

    prepared = torch.load(answers.FILE, weights_only=True)
    same = answers.write_models(out.work) == prepared["weights"] and answers.tokens_digest() == prepared["tokens"]
    out.require("weights_and_tokens_are_those_of_the_answers", same)
    platform, world = start_platform(out), World(out.work)
    plans = [
        (dtype, method, model, layout, answers.BATCH)
        for dtype in BOUNDS
        for model in answers.MODELS
        for layout in ("by-two", "separate")
        for method in answers.METHODS
        if dtype != "float64" or f"{method} {model}" == answers.EXACT
    ]
    for roles in {method_roles(METHODS[method]) for method in answers.METHODS}:
        world.examples(roles).write_text(json.dumps(token_examples(roles)))
    engines: dict[Any, Any] = {}
    for plan, case in zip(plans, gradient_cases(world, prepared["reference"], out.work, plans), strict=True):
        dtype, method, model, layout, _ = plan
        key = f"{method} {model} {'separate' if layout == 'separate' else 'shared'} {dtype}"
        with out.part(key):
            config, _ = config_load.load(case["argv"])
            if not engines:
                initialize_parallel(config)
            if (model, dtype) not in engines:
                hf_config = read_hf_config(config.model.hf_path)
                engines[model, dtype] = build_engine(platform, hf_config, config, getattr(torch, dtype))
            values, gradients = gradient_case(engines[model, dtype], case, config)
            expected = prepared["cases"][f"{method} {model}"]
            loss = abs(values["means"]["loss"] - expected["loss"]) / max(1, abs(expected["loss"]))
            errors = {
                name: ((answers.sampled(gradients[name]) - tensor).norm() / tensor.norm()).item()
                for name, tensor in expected["gradient"].items()
            }
            out.check(f"{key}/loss", loss, BOUNDS[dtype])
            out.check(f"{key}/gradient", max(errors.values()), BOUNDS[dtype])


def attention_shape(out: Recorder) -> tuple[int, int, int, torch.dtype]:
    """Heads, key-value heads, head_dim and dtype."""
    return (4, 2, 32, torch.float32) if out.dry else (28, 4, 128, torch.bfloat16)


def attention_layouts(out: Recorder) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns what makes the layout of prompts apart from responses, and that of sequences; the CPU has one."""
    from megatron_solopo.parallel.cpu_attention import cpu_layout
    from megatron_solopo.parallel.sequences import prompt_layout, sequence_layout

    if out.device == "cpu":
        return cpu_layout, cpu_layout
    return partial(prompt_layout, cudnn_only=False), sequence_layout


def packed(out: Recorder) -> None:
    """Packed attention with shared prompts, and with a prompt for each response, against float64 attention over each
    sequence alone."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformers import LlamaConfig

    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
    from megatron_solopo.model.attention import PackedAttention, pack_layout
    from megatron_solopo.model.rope import RotaryFrequencies, rotate
    from megatron_solopo.pack import Context, Side
    from megatron_solopo.parallel.context.none import CUDNN_LENGTHS
    from megatron_solopo.parallel.device_pack import on_device

    heads, kv_heads, size, dtype = attention_shape(out)
    short, long, answer = (60, 500, 10) if out.dry else (1000, 8100, 100)
    completions = Completion(Side.CHOSEN, [0] * answer), Completion(Side.REJECTED, [0] * 7)
    prompts = (
        Prompt(Context.SHORT, [0] * short, completions),
        Prompt(Context.LONG, [0] * long, completions),
    )
    group = TokenGroup("g", prompts)
    device = torch.device(out.device)
    rope = RotaryFrequencies(LlamaConfig(hidden_size=heads * size, num_attention_heads=heads)).to(device)
    settings = TransformerConfig(num_layers=1, hidden_size=heads * size, num_attention_heads=heads)
    attention = PackedAttention(settings, 1, None, "self", softmax_scale=size**-0.5)
    generator = torch.Generator().manual_seed(0)
    prompts, sequences = attention_layouts(out)
    times = {}
    kinds = {"shared": True, "separate": False, "shared_flash": True}
    for name, share in kinds.items():
        pack = build_pack([group], [0], share, prompt_multiple_of=CUDNN_LENGTHS).to(device)
        tokens = pack.tokens.numel()

        def draw(count: int, rows: int = tokens) -> torch.Tensor:
            return torch.randn(rows, count, size, generator=generator).to(device, dtype).requires_grad_()

        q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
        pieces = pack.pieces
        kernels = (sequences if name.endswith("flash") else prompts)(pieces)
        layout = pack_layout(on_device(kernels, device), pack.positions, rope, dtype)

        def step(q: Any = q, k: Any = k, v: Any = v, layout: Any = layout) -> torch.Tensor:
            for tensor in (q, k, v):
                tensor.grad = None
            result = attention(q, k, v, None, packed_seq_params=layout)
            result.float().square().mean().backward()
            return result.detach()

        result = step()
        worst = 0.0
        cos, sin = (t.double() for t in (layout.cos, layout.sin))
        for piece in pack.pieces:
            rows = torch.arange(piece.start, piece.start + piece.length, device=device)
            seen = rows
            if piece.prompt is not None:
                first = pack.pieces[piece.prompt]
                seen = torch.cat((torch.arange(first.start, first.start + first.length, device=device), rows))
            last = rows[-min(64, piece.length) :]  # the hardest rows: they see the most
            query, key = rotate(q.detach().double(), cos, sin)[last], rotate(k.detach().double(), cos, sin)[seen]
            expected = exact_attention(query, key, v.detach().double()[seen])
            actual = result.view(tokens, heads, size)[last].double()
            worst = max(worst, ((actual - expected).norm() / expected.norm()).item())
        out.value(f"packed/{name}/tokens", tokens)
        out.check(f"packed/{name}/error", worst, ATTENTION_BOUNDS[dtype])
        times[name] = milliseconds(step, out.device)
        out.value(f"packed/{name}/time", times[name], "ms forward and backward")
    out.value("packed/shared_over_separate_time", times["shared"] / times["separate"])


def exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns [rows, heads, head_dim]: the last ``rows`` queries of a causal sequence of [length, kv_heads,
    head_dim]."""
    rows, length = query.shape[0], key.shape[0]
    places = torch.arange(length, device=query.device)
    mask = places[None] <= places[length - rows :, None]
    copies = query.shape[1] // key.shape[1]
    key, value = (x.transpose(0, 1).repeat_interleave(copies, 0) for x in (key, value))
    return F.scaled_dot_product_attention(query.transpose(0, 1), key, value, attn_mask=mask).transpose(0, 1)


def context(out: Recorder) -> None:
    """Each rank's part of context-parallel attention, output and gradients, against the inputs pack's attention."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformers import LlamaConfig

    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
    from megatron_solopo.model.attention import PackedAttention, pack_layout
    from megatron_solopo.model.rope import RotaryFrequencies, rotate
    from megatron_solopo.pack import Context, Side
    from megatron_solopo.parallel.device_pack import on_device
    from megatron_solopo.parallel.zigzag import rows_of

    ranks, device = 2, torch.device(out.device)
    heads, kv_heads, size, dtype = attention_shape(out)
    completions = (Completion(Side.CHOSEN, [0] * 100), Completion(Side.REJECTED, [0] * 7))
    prompt = Prompt(Context.LONG, [0] * (511 if out.dry else 8191), completions)
    pack = build_pack([TokenGroup("g", (prompt,))], [0], True, 2 * ranks, 2 * ranks).to(device)
    rope = RotaryFrequencies(LlamaConfig(hidden_size=heads * size, num_attention_heads=heads))
    prompts, sequences = attention_layouts(out)
    layout = pack_layout(on_device(prompts(pack.pieces), device), pack.positions, rope, dtype)
    settings = TransformerConfig(num_layers=1, hidden_size=heads * size, num_attention_heads=heads)
    attention = PackedAttention(settings, 1, None, "self", softmax_scale=size**-0.5)
    generator = torch.Generator().manual_seed(0)
    shapes = ((pack.tokens.numel(), count, size) for count in (heads, kv_heads, kv_heads))
    inputs = [torch.randn(*s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    parts = [x.detach().clone().requires_grad_() for x in inputs]
    expected = attention(*inputs, None, packed_seq_params=layout)
    expected.float().square().sum().backward()
    each = [torch.from_numpy(rows_of(pack.pieces, rank, ranks)).to(device) for rank in range(ranks)]
    order = torch.cat(each)  # in which ranks gather keys and values
    output = torch.zeros_like(expected)
    for rank, rows in enumerate(each):
        query, key = (rotate(x, layout.cos, layout.sin) for x in parts[:2])
        of_rank = on_device(sequences(pack.pieces, rank, ranks), device)
        result = of_rank.attend(query[rows], key[order], parts[2][order], attention.softmax_scale).flatten(1)
        result.float().square().sum().backward()
        output[rows] = result.detach()
    pairs = [
        (output, expected.detach()),
        *((ours.grad, theirs.grad) for ours, theirs in zip(parts, inputs, strict=True)),
    ]
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5  # both sides round to 8 bits
    for name, (ours, theirs) in zip(("output", "query", "key", "value"), pairs, strict=True):
        error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        out.check(f"context_parallel/{name}_error", error, bound)
