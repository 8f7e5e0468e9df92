"""Peak memory of a process by context-parallel size: one training step on one long prompt, for each size.

    python examples/benchmarks/context_parallel.py --tokens 32768 --sizes 1 2 4

A random Llama of two layers, float32, on this machine's processes. The memory of a process that computes next to
nothing (a prompt of 64 tokens) is measured first and taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{number}" for number in range(500)]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<end> {% endif %}{% endfor %}"


def write_start(folder: Path, tokens: int, hidden_size: int) -> None:
    """A model's config and a word-level tokenizer; the trainer draws the weights."""
    heads = hidden_size // 64
    LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=512,
        max_position_embeddings=tokens + 64,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<end>", *WORDS])}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_group(path: Path, tokens: int) -> Path:
    """One preference group whose long prompt has so many tokens."""

    def user(count: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": " ".join(WORDS[n % 500] for n in range(count))}]

    group = {"id": "g", "short_messages": user(32), "long_messages": user(tokens), "chosen": "w1 w2", "rejected": "w3"}
    path.write_text(json.dumps(group) + "\n", encoding="utf-8")
    return path


def step(folder: Path, data: Path, size: int, tokens: int) -> dict:
    """The metrics of one step with ``size`` processes."""
    save = folder / f"{data.stem}-{size}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", size,
        ROOT / "pretrain_solopo.py", "--hf-path", folder / "start", "--random-init", "--train-data", data,
        "--preference-loss", "orpo", "--seq-length", tokens + 64, "--train-iters", 1, "--global-batch-size", 1,
        "--save", save, "--device", "cpu", *(["--context-parallel-size", size] if size > 1 else []),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    return json.loads((save / "metrics.jsonl").read_text().splitlines()[0])


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768, help="of the long prompt (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="context-parallel sizes")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the model (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_start(folder / "start", options.tokens, options.hidden_size)
        small, large = write_group(folder / "small.jsonl", 64), write_group(folder / "large.jsonl", options.tokens)
        print(f"{'cp':>3} {'idle GiB':>9} {'peak GiB':>9} {'step GiB':>9} {'seconds':>8}   loss")
        for size in options.sizes:
            idle, busy = step(folder, small, size, options.tokens), step(folder, large, size, options.tokens)
            used = busy["memory_gib"] - idle["memory_gib"]
            print(
                f"{size:>3} {idle['memory_gib']:>9.2f} {busy['memory_gib']:>9.2f} {used:>9.2f} "
                f"{busy['seconds']:>8.1f}   {busy['loss']:.6f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
