"""A tokenizer folder whose tokens are words, with a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<text_end>", "<turn_end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <turn_end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def save_word_tokenizer(folder: Path, words: Iterable[str] = ()) -> Path:
    """The folder names <text_end> as its end of text, as base models do; its template ends a turn with <turn_end>.

    Other words count as one token, <pad>.
    """
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token="<text_end>",
        pad_token="<pad>",
        extra_special_tokens=["<turn_end>", "<user>", "<assistant>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
