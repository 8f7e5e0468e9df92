"""``--mock-data``: a configuration on one CPU process, with generated examples and a model cut to two narrow layers.

It shows within a minute that the options belong together and that a run starts, steps and saves; it says nothing about
memory or quality, for which there is ``solopo plan``.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_solopo.config import Config, DataConfig, OutputConfig, ParallelConfig
from megatron_solopo.data.files.records import write_jsonl
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import loads
from megatron_solopo.model.hf_config import check_lengths, read_hf_config
from megatron_solopo.parallel.topology import world_size

WORDS = [f"w{number}" for number in range(200)]
SPECIAL = ["<pad>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<assistant> ' + m.content + ' <end> ' if m.role == 'assistant' else '<user> ' + m.content + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)

LONGEST = 512
"""Tokens that --seq-length is scaled down to."""

PARAGRAPH = 32
"""Words of a paragraph of the examples."""

LAYERS, HIDDEN, HEAD, FFN, EXPERTS = 2, 64, 16, 128, 4
EXAMPLES, STEPS = 8, 2


@contextmanager
def mocked(config: Config) -> Iterator[Config]:
    """The configuration in small; its model, examples and run folder are gone at the end of the block.

    The layout, Transformer Engine, a chat template, resuming, exports and loggers are left out; method, precision,
    recomputation, batches and optimizer are those of the run.

    Raises:
        UserError: there are several processes, or the folder of the model has no config.json, or its model does not
            reach --seq-length or --stretch-positions.
    """
    if world_size() > 1:
        raise UserError("option-conflict", f"--mock-data runs one process, and {world_size()} were started; start one")
    check_lengths(read_hf_config(config.model.hf_path, config.model.rope_scaling), config.data)
    with tempfile.TemporaryDirectory(prefix="solopo-mock-") as folder:
        place = Path(folder)
        _write_model(Path(config.model.hf_path) / "config.json", place / "model")
        seq_length = min(config.data.seq_length, LONGEST)
        write_jsonl(place / "train.jsonl", _examples(config, seq_length))
        layers = min(LAYERS, config.model.recompute_num_layers)
        model = replace(
            config.model,
            hf_path=str(place / "model"),
            random_init=True,
            transformer_impl="portable",
            fp8_format=None,
            recompute_num_layers=layers,
            **dict.fromkeys(
                ("chat_template", "chat_template_kwargs", "chat_template_date", "eos_token", "add_special_tokens")
            ),
        )
        training = replace(
            config.training,
            train_iters=STEPS,
            train_epochs=None,
            max_tokens_per_rank=None,
            global_batch_size=min(config.training.global_batch_size, EXAMPLES // STEPS),
        )
        yield Config(
            model=model,
            data=DataConfig(
                train_data=str(place / "train.jsonl"),
                seq_length=seq_length,
                data_cache=str(place / "cache"),
                share_prompts=config.data.share_prompts,
                stretch_positions=config.data.stretch_positions and max(config.data.stretch_positions, seq_length),
                stretch_fraction=config.data.stretch_fraction,
            ),
            method=replace(config.method, reference_cache=None),
            parallel=ParallelConfig(device="cpu"),
            training=training,
            output=OutputConfig(save=str(place / "run"), log_interval=1),
        )


def _write_model(config_file: Path, folder: Path) -> None:
    """A folder with the config of the same family, cut to size, and a tokenizer of words."""
    fields: dict[str, Any] = loads(config_file.read_text(encoding="utf-8-sig"))
    heads = fields["num_attention_heads"]
    groups = max(1, heads // (fields.get("num_key_value_heads") or heads))
    fields |= dict(num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=FFN, vocab_size=len(SPECIAL + WORDS))
    fields |= dict(num_attention_heads=2 * groups, num_key_value_heads=2, head_dim=HEAD, max_window_layers=LAYERS)
    experts = {name: EXPERTS for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    ones = dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1)
    for name, most in (experts | ones | {"num_experts_per_tok": 2}).items():
        if fields.get(name):
            fields[name] = min(fields[name], most)
    if fields.get("moe_intermediate_size"):
        fields["moe_intermediate_size"] = FFN // 2
    if "kv_lora_rank" in fields:
        fields |= dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), HEAD)
        fields |= {name: HEAD for name in ("kv_lora_rank", "q_lora_rank") if fields.get(name)}
    if "linear_num_key_heads" in fields:
        repeats = max(1, fields["linear_num_value_heads"] // fields["linear_num_key_heads"])
        fields |= dict(linear_num_key_heads=2, linear_num_value_heads=2 * repeats)
        fields |= dict(linear_key_head_dim=HEAD, linear_value_head_dim=HEAD, full_attention_interval=LAYERS)
    if fields.keys() & {"global_head_dim", "per_layer_config"}:
        fields |= dict(global_head_dim=2 * HEAD, num_global_key_value_heads=2)
    if "shared_expert_intermediate_size" in fields:
        fields["shared_expert_intermediate_size"] = FFN // 2
    unfit = ("layer_types", "mlp_layer_types", "per_layer_config", "qk_head_dim")
    for name in (*unfit, "bos_token_id", "eos_token_id", "pad_token_id"):
        fields.pop(name, None)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of `WORDS`, a token each; its chat template adds two to a prompt, and one to a response."""
    ids = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", additional_special_tokens=SPECIAL[1:3]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def _examples(config: Config, seq_length: int) -> Iterator[dict[str, Any]]:
    """Examples whose longest prompts, with their responses, take ``seq_length`` tokens; short ones an eighth."""
    sft, short = config.method.objective == "sft", max(1, seq_length // 8 - 16)
    return examples(sft, seq_length - 16, short, 8, EXAMPLES, config.training.seed)


def examples(
    sft: bool, long: int, short: int, response: int, count: int, seed: int, chosen: int = 1, rejected: int = 1
) -> Iterator[dict[str, Any]]:
    """Yields conversations on a long context, or preference groups of so many responses; lengths are in words."""
    draw = random.Random(seed)

    def words(count: int) -> str:
        drawn = draw.choices(WORDS, k=count)
        return "\n\n".join(" ".join(paragraph) for paragraph in itertools.batched(drawn, PARAGRAPH))

    for number in range(count):
        question = [{"role": "user", "content": words(long)}]
        if sft:
            yield {"id": str(number), "messages": [*question, {"role": "assistant", "content": words(response)}]}
            continue
        brief = [{"role": "user", "content": words(short)}]
        yield {
            "id": str(number),
            "short_messages": brief,
            "long_messages": question,
            "chosen": [words(response) for _ in range(chosen)],
            "rejected": [words(response) for _ in range(rejected)],
        }
