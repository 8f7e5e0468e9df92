#!/usr/bin/env python3
"""Operations of a step against the number of responses of a group, for the shape of a model.

    python examples/benchmarks/responses.py --model examples/recipes/models/Qwen2.5-7B-Instruct

Each row is one group with shared prompts: what forward and backward of the model need (`benchmark/flops.py`), beside
those of one chosen and one rejected response.
"""

from __future__ import annotations

import argparse

import pandas
from transformers import AutoConfig

from megatron_solopo.benchmark.flops import flops_of_packs
from megatron_solopo.config import MethodConfig
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.evaluation.tables import markdown_table
from megatron_solopo.planning.rehearse import example

COUNTS = ((1, 1), (2, 2), (1, 7), (4, 4), (4, 8))
"""(chosen, rejected) responses of a group."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with config.json")
    parser.add_argument("--long", type=int, default=32768, help="tokens of the long prompt")
    parser.add_argument("--short", type=int, default=4096, help="tokens of the short prompt")
    parser.add_argument("--response", type=int, default=256, help="tokens of each response")
    options = parser.parse_args()
    hf_config, rows = AutoConfig.from_pretrained(options.model), []
    for mode in ("long", "solo"):
        method = MethodConfig(context_mode=mode)
        one = None
        for chosen, rejected in COUNTS:
            group = example(method, options.short, options.long, options.response, chosen, rejected)
            pack = build_pack([group], [0])
            flops = flops_of_packs(hf_config, [pack])
            one = one or flops.total
            rows.append(
                {
                    "mode": mode,
                    "chosen x rejected": f"{chosen} x {rejected}",
                    "tokens": f"{len(pack.tokens):,}",
                    "FLOPs (10^15)": f"{flops.total / 1e15:.3f}",
                    "of attention": f"{flops.attention / flops.total:.0%}",
                    "of 1 x 1": f"{flops.total / one:.3f}",
                }
            )
    print(markdown_table(pandas.DataFrame(rows), text_columns=2))


if __name__ == "__main__":
    main()
