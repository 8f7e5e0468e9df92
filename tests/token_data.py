"""Data files as token ids: through a store, as training has them, and example by example, to compare with."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.options import TokenizerOptions
from megatron_solopo.data.schema import read_conversations, read_groups
from megatron_solopo.data.text.text_facts import text_facts
from megatron_solopo.data.tokenized.encoder import Encoder
from megatron_solopo.data.tokenized.make_store import Job, cached_store
from megatron_solopo.data.tokenized.token_store import StoredTokens, open_tokens
from megatron_solopo.data.tokenized.tokens import CONVERSATION, TokenGroup
from megatron_solopo.pack import Scored


def tokenize(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, scored: Scored, seq_length: int, overlong: str = "refuse"
) -> StoredTokens:
    """What training opens of a data file."""
    folder = str(tokenizer.name_or_path)
    job = Job(str(path), TokenizerOptions(folder), "sft" if scored == CONVERSATION else "preference")
    if overlong == "cut":
        job = Job(job.source, job.tokenizer, job.objective, seq_length, "cut", scored)
    store, _ = cached_store(job, tokenizer, Path(os.environ["SOLOPO_CACHE"]), 1)
    return open_tokens(store, text_facts(folder, tokenizer), scored, seq_length, overlong, path)


def encoded(
    path: Path, tokenizer: PreTrainedTokenizerBase, scored: Scored, seq_length: int | None = None
) -> list[TokenGroup]:
    """The examples of a file by the encoder alone; what is longer is left out."""
    encoder = Encoder(tokenizer, seq_length, "drop")
    read = read_conversations if scored == CONVERSATION else read_groups
    return [group for record in read(path) if (group := encoder.encode(record, scored)) is not None]
