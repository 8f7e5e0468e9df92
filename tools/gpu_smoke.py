"""Checks a machine before a long run: platform, attention, losses and gradients, training, Transformer Engine.

    python tools/gpu_smoke.py --output gpu_smoke.json              # on a CUDA machine, under 5 minutes
    python tools/gpu_smoke.py --device cpu --output smoke.json     # what needs no GPU

Every check prints one line and goes into the JSON file with its figures; the exit status is 1 if one failed. The
comparisons are those of tests/distributed: a float64 computation in plain transformers that shares no code with the
package.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "distributed")]

from megatron_solopo.arguments import Parser  # noqa: E402
from megatron_solopo.cli import run  # noqa: E402
from megatron_solopo.data.options import check_outputs  # noqa: E402
from megatron_solopo.errors import UserError  # noqa: E402

Figures = dict[str, Any]
ORACLE_PLANS = [
    ("float32", method, "llama", "by-two", "seven") for method in ("dpo", "simpo", "orpo", "sft")
] + [("float32", "orpo", "qwen2", "by-two", "seven"), ("float64", "dpo", "llama", "by-two", "seven")]  # fmt: skip
BOUNDS = {"float32": 1e-5, "float64": 1e-10}
"""Relative error of loss and of each tensor's gradient; see docs/design.md."""


class Failed(Exception):
    """A check ran and its figures are wrong."""

    def __init__(self, message: str, figures: Figures) -> None:
        super().__init__(message)
        self.figures = figures


def require(condition: bool, message: str, figures: Figures) -> Figures:
    if not condition:
        raise Failed(message, figures)
    return figures


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The median time of ``work``, after one call to warm up."""
    times = []
    for number in range(repeats + 1):
        _synchronize(device)
        begin = time.perf_counter()
        work()
        _synchronize(device)
        if number:
            times.append(1000 * (time.perf_counter() - begin))
    return sorted(times)[repeats // 2]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def check_platform(here: Any, work: Path) -> Figures:
    """What the machine is."""
    figures = {"device": here.name, "backend": here.backend, "torch": torch.__version__}
    if here.name == "cuda":
        properties = torch.cuda.get_device_properties(here.device)
        figures |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "bf16": torch.cuda.is_bf16_supported(),
        }
    return figures


def check_attention(here: Any, work: Path) -> Figures:
    """Packed attention with shared prompts against float64 attention over each sequence alone; its time against
    laying every prompt out for each response."""
    from transformers import LlamaConfig

    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.data.tokenized.tokens import Continuation, Prompt, TokenGroup
    from megatron_solopo.model.attention import PackedAttention, layout_of
    from megatron_solopo.model.rope import RotaryFrequencies, rotate

    large = here.name == "cuda"
    heads, kv_heads, size = (28, 4, 128) if large else (4, 2, 32)
    short, long, answer = (1024, 8192, 100) if large else (64, 512, 10)
    dtype = torch.bfloat16 if large else torch.float32
    group = TokenGroup(
        "g",
        (
            Prompt([0] * short, (Continuation("short_chosen", [0] * answer), Continuation("short_rejected", [0] * 7))),
            Prompt([0] * long, (Continuation("long_chosen", [0] * answer), Continuation("long_rejected", [0] * 7))),
        ),
    )
    rope = RotaryFrequencies(LlamaConfig(hidden_size=heads * size, num_attention_heads=heads)).to(here.device)
    attention = PackedAttention(None, 1, None, "self", softmax_scale=size**-0.5)
    figures: Figures = {"dtype": str(dtype).removeprefix("torch."), "short": short, "long": long, "answer": answer}
    generator = torch.Generator().manual_seed(0)
    for name, share in (("shared", True), ("separate", False)):
        pack = build_pack([group], [0], share).to(here.device)
        tokens = pack.tokens.numel()

        def draw(count: int, rows: int = tokens) -> torch.Tensor:
            drawn = torch.randn(rows, count, size, generator=generator)
            return drawn.to(here.device, dtype).requires_grad_()

        q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
        layout = layout_of(pack, rope, dtype)

        def step(q: Any = q, k: Any = k, v: Any = v, layout: Any = layout) -> torch.Tensor:
            for tensor in (q, k, v):
                tensor.grad = None
            out = attention(q, k, v, None, packed_seq_params=layout)
            out.float().square().mean().backward()
            return out.detach()

        out = step()
        worst = 0.0
        cos, sin = (t.double() for t in (layout.cos, layout.sin))
        for piece in pack.pieces:
            rows = torch.arange(piece.start, piece.start + piece.length, device=here.device)
            seen = rows
            if piece.prompt is not None:
                first = pack.pieces[piece.prompt]
                seen = torch.cat((torch.arange(first.start, first.start + first.length, device=here.device), rows))
            last = rows[-min(64, piece.length) :]  # the hardest rows: they see the most
            query, key = rotate(q.detach().double(), cos, sin)[last], rotate(k.detach().double(), cos, sin)[seen]
            mask = (
                torch.arange(len(seen), device=here.device)[None]
                <= torch.arange(len(seen) - len(last), len(seen), device=here.device)[:, None]
            )
            expected = F.scaled_dot_product_attention(
                query.transpose(0, 1),
                key.transpose(0, 1).repeat_interleave(heads // kv_heads, 0),
                v.detach().double()[seen].transpose(0, 1).repeat_interleave(heads // kv_heads, 0),
                attn_mask=mask,
            )
            found = out.view(tokens, heads, size)[last].double()
            worst = max(worst, ((found - expected.transpose(0, 1)).norm() / expected.norm()).item())
        bound = 1e-2 if dtype == torch.bfloat16 else 1e-5  # bfloat16 keeps 8 bits
        figures |= {f"{name}_tokens": tokens, f"{name}_error": worst, f"{name}_ms": milliseconds(step, here.device)}
        require(worst <= bound, f"{name}: relative error {worst:.1e}, bound {bound:.0e}", figures)
    figures["shared_over_separate_time"] = figures["shared_ms"] / figures["separate_ms"]
    return figures


def check_context_attention(here: Any, work: Path) -> Figures:
    """Each rank's part of context-parallel attention, output and gradient, against the whole pack's attention."""
    from transformers import LlamaConfig

    from megatron_solopo.data.tokenized.packs import build_pack
    from megatron_solopo.data.tokenized.tokens import Continuation, Prompt, TokenGroup
    from megatron_solopo.model.attention import PackedAttention, layout_of
    from megatron_solopo.model.context_attention import SpanLayout, span_attention
    from megatron_solopo.model.rope import RotaryFrequencies, rotate
    from megatron_solopo.parallel.context import rows_of, spans_of

    large, ranks = here.name == "cuda", 2
    heads, kv_heads, size = (28, 4, 128) if large else (4, 2, 32)
    prompt, dtype = (8191, torch.bfloat16) if large else (511, torch.float32)
    continuations = (Continuation("long_chosen", [0] * 100), Continuation("long_rejected", [0] * 7))
    pack = build_pack([TokenGroup("g", (Prompt([0] * prompt, continuations),))], [0], True, 2 * ranks, 2 * ranks)
    pack = pack.to(here.device)
    layout = layout_of(pack, RotaryFrequencies(LlamaConfig(hidden_size=heads * size, num_attention_heads=heads)), dtype)
    attention = PackedAttention(None, 1, None, "self", softmax_scale=size**-0.5)
    generator = torch.Generator().manual_seed(0)
    shapes = ((pack.tokens.numel(), count, size) for count in (heads, kv_heads, kv_heads))
    whole = [torch.randn(*s, generator=generator).to(here.device, dtype).requires_grad_() for s in shapes]
    parts = [x.detach().clone().requires_grad_() for x in whole]
    expected = attention(*whole, None, packed_seq_params=layout)
    expected.float().square().sum().backward()
    everything = torch.arange(pack.tokens.numel(), device=here.device)
    found = torch.zeros_like(expected)
    for rank in range(ranks):
        rows = torch.from_numpy(rows_of(pack.pieces, rank, ranks)).to(here.device)
        query, key = (rotate(x, layout.cos, layout.sin) for x in parts[:2])
        spans = SpanLayout(spans_of(pack.pieces, rank, ranks), everything, everything, None)
        out = span_attention(query[rows], key, parts[2], spans, attention.softmax_scale).flatten(1)
        out.float().square().sum().backward()
        found[rows] = out.detach()
    pairs = [(found, expected.detach()), *((ours.grad, theirs.grad) for ours, theirs in zip(parts, whole, strict=True))]
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]
    figures = {"tokens": pack.tokens.numel(), "dtype": str(dtype).removeprefix("torch.")}
    figures |= dict(zip(("output_error", "query_error", "key_error", "value_error"), errors, strict=True))
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5  # both round to 8 bits
    return require(max(errors) <= bound, f"relative error {max(errors):.1e}, bound {bound:.0e}", figures)


def check_oracle(here: Any, work: Path) -> Figures:
    """Loss and gradient of one step against float64 transformers on the CPU."""
    import oracle
    from launches import BATCHES, World, case_name, gradient_cases, token_examples
    from methods import LONG, METHODS, SHORT, method_roles
    from tiny_models import SHAPE, write_model
    from transformers import LlamaConfig, Qwen2Config
    from worker import gradient_case

    from megatron_solopo import config_load
    from megatron_solopo.model.build import read_hf_config
    from megatron_solopo.training.engine import build_engine, initialize_parallel

    write_model(work / "llama", LlamaConfig(**SHAPE, tie_word_embeddings=False))
    write_model(work / "qwen2", Qwen2Config(**SHAPE, tie_word_embeddings=True), seed=2)
    write_model(work / "reference", LlamaConfig(**SHAPE, tie_word_embeddings=False), seed=3)
    world, reference = World(work), oracle.reference_table(work / "reference", token_examples(SHORT + LONG))
    for roles in {method_roles(METHODS[plan[1]]) for plan in ORACLE_PLANS}:
        world.examples(roles).write_text(json.dumps(token_examples(roles)))
    figures: Figures = {}
    engines: dict[Any, Any] = {}
    scores: dict[Any, Any] = {}
    for plan, case in zip(ORACLE_PLANS, gradient_cases(world, reference, work, ORACLE_PLANS), strict=True):
        dtype, method_name, model, _, batch = plan
        config, _ = config_load.load(case["argv"])
        if not engines:
            initialize_parallel(config)
        if (model, dtype) not in engines:
            hf_config = read_hf_config(config.model.hf_path, config.model.rope_scaling)
            engines[model, dtype] = build_engine(here, hf_config, config, getattr(torch, dtype))
        values, found = gradient_case(engines[model, dtype], case, config)
        method = METHODS[method_name]
        kind = ("response",) if method["objective"] == "sft" else SHORT + LONG
        if (model, kind) not in scores:
            scores[model, kind] = oracle.scores(work / model, token_examples(kind))
        chosen = [scores[model, kind][i] for i in BATCHES[batch]]
        losses, gradient = oracle.batch(chosen, [reference[i] for i in BATCHES[batch]], method)
        mean = sum(losses) / len(losses)
        off = abs(values["means"]["loss"] - mean) / max(1, abs(mean))
        worst = max(
            ((found[name].double().cpu() - tensor).norm() / tensor.norm()).item() for name, tensor in gradient.items()
        )
        figures[case_name(plan)] = {"loss_error": off, "gradient_error": worst}
        require(max(off, worst) <= BOUNDS[dtype], f"{case_name(plan)}: loss {off:.1e}, gradient {worst:.1e}", figures)
    return figures


def check_training(here: Any, work: Path) -> Figures:
    """Twenty bfloat16 steps of SoLo-ORPO and of supervised training through the whole trainer, and their export."""
    from tiny_models import conversations, preference_groups, write_lines, write_model
    from transformers import AutoModelForCausalLM

    from megatron_solopo import config_load
    from megatron_solopo.evaluation.results import read_run
    from megatron_solopo.parallel.platform import end_model_parallel
    from megatron_solopo.training.run import train

    write_model(work / "start")
    data = {"sft": write_lines(work / "chats.jsonl", conversations(64)),
            "preference": write_lines(work / "groups.jsonl", preference_groups(64))}  # fmt: skip
    figures: Figures = {}
    for objective, path in data.items():
        out = work / f"{objective}-run"
        flags = ["--preference-loss", "orpo"] if objective == "preference" else []
        argv = [
            "--hf-path", work / "start", "--objective", objective, *flags, "--train-data", path, "--bf16",
            "--seq-length", 128, "--train-iters", 20, "--global-batch-size", 16, "--micro-batch-size", 8,
            "--lr", 1e-2 if objective == "sft" else 2e-3, "--device", here.name,
            "--save", out, "--save-hf", work / f"{objective}-hf",
        ]  # fmt: skip
        train(here, config_load.load(list(map(str, argv)))[0])
        end_model_parallel()
        lines = read_run(str(out)).train
        first, last = (sum(line["loss"] for line in part) / len(part) for part in (lines[:3], lines[-3:]))
        figures[objective] = {
            "loss_first": first,
            "loss_last": last,
            "seconds_a_step": sorted(line["seconds"] for line in lines)[len(lines) // 2],
            "memory_gib": lines[-1]["memory_gib"],
        }
        require(last < 0.95 * first, f"{objective}: the loss went from {first:.4f} to {last:.4f}", figures)
        model = AutoModelForCausalLM.from_pretrained(work / f"{objective}-hf")
        require(
            bool(torch.isfinite(model(torch.tensor([[1, 5, 2]])).logits).all()), "the export is not finite", figures
        )
    return figures


def check_transformer_engine(here: Any, work: Path) -> Figures:
    """Transformer Engine's layers against torch's, in bfloat16 and FP8; skipped where it is not there."""
    if here.name != "cuda":
        return {"skipped": "needs a CUDA device"}
    try:
        import transformer_engine
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import DelayedScaling, Format
    except ImportError as error:
        return {"skipped": f"not importable ({error})"}
    size, rows = 4096, 8192
    torch.manual_seed(0)
    x = torch.randn(rows, size, device=here.device, dtype=torch.bfloat16)
    linear = te.Linear(size, size, bias=False, params_dtype=torch.bfloat16, device=here.device)
    norm = te.RMSNorm(size, params_dtype=torch.bfloat16, device=here.device)
    with torch.no_grad():
        exact = x.double() @ linear.weight.double().t()

        def error(found: torch.Tensor, expected: torch.Tensor = exact) -> float:
            return ((found.double() - expected).norm() / expected.norm()).item()

        normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.eps)
        figures: Figures = {
            "version": transformer_engine.__version__,
            "rmsnorm_error": error(norm(x), normed),
            "bf16_error": error(linear(x)),
            "bf16_ms": milliseconds(lambda: linear(x), here.device, 20),
        }
        recipe = DelayedScaling(fp8_format=Format.HYBRID)

        def fp8() -> torch.Tensor:
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                return linear(x)

        fp8()  # the first call measures the scales
        figures |= {"fp8_error": error(fp8()), "fp8_ms": milliseconds(fp8, here.device, 20)}
    figures["fp8_over_bf16_time"] = figures["fp8_ms"] / figures["bf16_ms"]
    # bfloat16 keeps 8 bits and FP8 (E4M3) 4, of which rounding loses half a unit.
    require(figures["bf16_error"] < 5e-3 and figures["rmsnorm_error"] < 5e-3, "bfloat16 layers are off", figures)
    return require(figures["fp8_error"] < 6e-2, "FP8 is off", figures)


CHECKS = {
    "platform": check_platform,
    "attention": check_attention,
    "context_attention": check_context_attention,
    "oracle": check_oracle,
    "training": check_training,
    "transformer_engine": check_transformer_engine,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the checks; see ``--help``."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto: cuda where there is one"
    )
    parser.add_argument("--output", default="gpu_smoke.json", metavar="FILE", help="figures (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="CHECK", help=f"some of {', '.join(CHECKS)}")
    options = parser.parse_args(argv)
    output = Path(options.output)
    check_outputs([("--output", output)], [])
    output.parent.mkdir(parents=True, exist_ok=True)
    from megatron_solopo.parallel import platform

    here = platform.start(options.device)
    results: dict[str, Figures] = {}
    begin = time.monotonic()
    for name in options.only or CHECKS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="solopo-smoke-") as work:
            try:
                figures = CHECKS[name](here, Path(work))
                status = "skipped" if "skipped" in figures else "passed"
            except Failed as failure:
                figures, status = failure.figures | {"error": str(failure)}, "failed"
            except UserError as error:
                figures, status = {"error": str(error)}, "failed"
            except Exception as error:  # whatever a machine does wrong is what this looks for
                figures, status = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}, "failed"
            platform.end_model_parallel()
        results[name] = {"status": status, "seconds": round(time.monotonic() - started, 1), **figures}
        told = figures.get("error") or figures.get("skipped") or ""
        print(f"{name:<20} {status:<8} {results[name]['seconds']:6.1f} s  {told}", flush=True)
    platform.stop(here)
    document = {"command": "tools/gpu_smoke.py", "seconds": round(time.monotonic() - begin, 1), "checks": results}
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    return int(any(result["status"] == "failed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(run(main))
