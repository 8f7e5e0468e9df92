"""config.json of a tiny Llama beside the demo's tokenizer; two layers look a fact up: one marks, one finds.

python examples/quickstart/initial_model.py --tokenizer runs/demo/data/tokenizer --output runs/demo/initial
"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer, LlamaConfig

from megatron_solopo.arguments import Parser
from megatron_solopo.cli import run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder that facts.py wrote")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.01,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
