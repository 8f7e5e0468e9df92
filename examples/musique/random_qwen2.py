"""A folder to start from on a small machine: Qwen2's shape, vocabulary and tokenizer, narrow layers, no weights.

The vocabulary has the 151,936 rows of Qwen2's small models, so that log-probs cost what they cost in a real model;
``--random-init`` makes the weights. Its responses mean nothing: it is for trying out a set-up on real text.

    python examples/musique/random_qwen2.py --tokenizer FOLDER_WITH_QWEN2_TOKENIZER_JSON --output runs/musique/start
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.errors import UserError

CHAT_TEMPLATE = Path(__file__).resolve().parents[1] / "chat_templates" / "chatml.jinja"
VOCABULARY = 151_936
"""Rows of the embedding of Qwen2 up to 3B; its tokenizer uses 151,665 of them."""


def write_folder(
    tokenizer: str | Path, output: str | Path, hidden: int, layers: int, heads: int, kv_heads: int, reach: int
) -> None:
    """Writes config.json, tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        tokenizer: a folder with Qwen2's tokenizer.json.
        hidden: width of the layers; the feed-forward layers are 4 times as wide.
        reach: the longest sequence, tokens.

    Raises:
        UserError: no tokenizer.json, or numbers of heads that do not divide.
    """
    source, folder = Path(tokenizer) / "tokenizer.json", Path(output)
    if not source.is_file():
        raise UserError("file-missing", f"--tokenizer {tokenizer}: no tokenizer.json there; use a folder with Qwen2's")
    if min(hidden, layers, heads, kv_heads, reach) < 1 or hidden % (2 * heads) or heads % kv_heads:
        raise UserError(
            "option-value",
            f"--hidden {hidden} --heads {heads} --kv-heads {kv_heads}: set positive numbers, hidden divisible by "
            "twice the heads, and heads by kv-heads",
        )
    ids = {token["content"]: token["id"] for token in json.loads(source.read_text(encoding="utf-8"))["added_tokens"]}
    missing = [token for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>") if token not in ids]
    if missing:
        raise UserError("token-missing", f"{source}: has no token {missing[0]}; use Qwen2's tokenizer.json")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": reach,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "transformers_version": version(
            "transformers"
        ),  # without it transformers treats the tokenizer as an old Mistral's
    }
    names = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(source, folder / "tokenizer.json")
    shutil.copyfile(CHAT_TEMPLATE, folder / "chat_template.jinja")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with Qwen2's tokenizer.json")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    for flag, default, text in (
        ("hidden", 128, "width of the layers"),
        ("layers", 2, "layers"),
        ("heads", 4, "attention heads"),
        ("kv-heads", 2, "heads of keys and values"),
        ("reach", 16_384, "the longest sequence, tokens"),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    options = parser.parse_args(argv)
    write_folder(
        options.tokenizer,
        options.output,
        options.hidden,
        options.layers,
        options.heads,
        options.kv_heads,
        options.reach,
    )
    print(
        f"wrote {options.output}: Qwen2, {options.layers} layers of {options.hidden}, {VOCABULARY:,} tokens, no weights"
    )
    return 0


if __name__ == "__main__":
    from megatron_solopo.cli import run

    sys.exit(run(main))
