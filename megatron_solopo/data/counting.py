"""Token counts at the speed of the tokenizers library."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from megatron_solopo.data.chat import render_prompt
from megatron_solopo.data.schema import Message


class TokenCounter:
    """Counts what `chat.prompt_ids` and `chat.encode` would return, without making the lists.

    The Rust tokenizer is called directly: transformers builds ids, masks and offsets as Python objects for every
    text, which takes longer than the tokenisation. A batch runs on all cores (RAYON_NUM_THREADS sets how many).
    Tokenizers without a Rust backend are called through transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if not hasattr(self._backend, "encode_batch_fast"):
            self._backend = None
        else:
            # A tokenizer.json may carry both; transformers switches them off on each call.
            self._backend.no_truncation()
            self._backend.no_padding()

    def texts(self, texts: list[str]) -> list[int]:
        """Tokens of each text, no special tokens added."""
        if self._backend is None:
            return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]
        return [len(encoding) for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def chat(self, messages: list[Message]) -> int:
        """Tokens of a prompt, chat template included."""
        return self.texts([render_prompt(self._tokenizer, messages)])[0]
