"""--add-special-tokens: rows of the vocabulary matrices for new tokens."""

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
        before: rows of the folder's vocabulary matrices, which may exceed the ids of its tokenizer.
        used: ids of the folder's tokenizer; the rows after them are unused.
        ids: of the new tokens.
    """

    before: int
    used: int
    ids: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the matrices with the new tokens."""
        return max(self.before, max(self.ids) + 1)

    def grown(self, matrix: Tensor) -> Tensor:
        """Returns [rows, H]: the matrix, and the mean of its used rows for each new token.

        The mean is computed in float64. A matrix that does not have `before` rows is returned unchanged.
        """
        if matrix.shape[0] != self.before:
            return matrix
        used = matrix[: self.used]
        total = sum(part.double().sum(0) for part in used.split(ROWS_AT_A_TIME))
        result = matrix.new_zeros(self.rows, *matrix.shape[1:])
        result[: self.before] = matrix
        result[list(self.ids)] = (total / used.shape[0]).to(matrix.dtype)
        return result


def new_rows(folder: str | Path, vocab_size: int, tokens: str) -> NewRows:
    """Returns the rows that --add-special-tokens adds to a folder's model.

    Args:
        vocab_size: of its config.json.

    Raises:
        UserError: see `add_special_tokens` and `read_tokenizer`.
    """
    tokenizer = read_tokenizer(folder)
    used = max(tokenizer.get_vocab().values()) + 1
    return NewRows(vocab_size, min(used, vocab_size), tuple(add_special_tokens(tokenizer, tokens, folder)))
