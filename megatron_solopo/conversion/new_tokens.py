"""--add-special-tokens: rows of the vocabulary matrices for tokens that a folder's model does not know yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_solopo.data.text.tokenizer import add_special_tokens, read_tokenizer

ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class NewRows:
    """The rows of new tokens.

    Attributes:
        before: rows of the folder's vocabulary matrices, which may be more than its tokenizer has ids.
        known: ids that the tokenizer had; the rows behind them mean nothing.
        ids: of the new tokens.
    """

    before: int
    known: int
    ids: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Of the matrices with the new tokens."""
        return max(self.before, max(self.ids) + 1)

    def grown(self, matrix: Tensor) -> Tensor:
        """[rows, H]: the matrix, and the mean of its known rows for each new token.

        The mean is taken in float64. A matrix of other than `before` rows is returned as it is: it does not fit.
        """
        if matrix.shape[0] != self.before:
            return matrix
        known = matrix[: self.known]
        total = sum(part.double().sum(0) for part in known.split(ROWS_AT_A_TIME))
        result = matrix.new_zeros(self.rows, *matrix.shape[1:])
        result[: self.before] = matrix
        result[list(self.ids)] = (total / known.shape[0]).to(matrix.dtype)
        return result


def new_rows(folder: str | Path, vocab_size: int, tokens: str) -> NewRows:
    """What --add-special-tokens does to a folder's model.

    Args:
        vocab_size: of its config.json.

    Raises:
        UserError: see `add_special_tokens` and `read_tokenizer`.
    """
    tokenizer = read_tokenizer(folder)
    known = max(tokenizer.get_vocab().values()) + 1
    return NewRows(vocab_size, min(known, vocab_size), tuple(add_special_tokens(tokenizer, tokens, folder)))
