"""Token counts at the speed of the tokenizers library."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.schema import Message
from megatron_solopo.data.text.chat import prompt_length
from megatron_solopo.data.text.tokenizer import encode_batch


class TokenCounter:
    """Counts the tokens of `chat.prompt_ids` and `tokenizer.encode` without making the lists."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def texts(self, texts: list[str]) -> list[int]:
        """Returns the number of tokens of each text; no special tokens are added."""
        return [len(tokens) for tokens in encode_batch(self._tokenizer, texts)]

    def chat(self, messages: list[Message]) -> int:
        """Returns the number of tokens of a prompt, chat template included."""
        return prompt_length(self._tokenizer, messages)
