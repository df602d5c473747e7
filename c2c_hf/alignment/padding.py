"""Rows of token ids -> one batch, truncated and padded on the left as the arguments of a call say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills padding: the pad token's, else the EOS token's, else 0."""
    # Padding is masked, so any id serves where the tokenizer has no pad token.
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of one call become a batch.

    Args:
        padding: As in a tokenizer. `None`: to the longest row, where tensors need it.
        truncation: Whether rows are cut to `max_length`.
        max_length: Largest number of tokens under `truncation` (`None`: the tokenizer's `model_max_length`), and the
            width under `padding="max_length"`.
        pad_to_multiple_of: Round widths up to a multiple, where rows are padded at all.
        return_tensors: `"pt"`, or `None` for lists.

    Raises:
        ValueError: For an unknown value, or `padding="max_length"` without `max_length`.
    """

    padding: bool | str | None = None
    truncation: bool = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = "pt"

    def __post_init__(self) -> None:
        if self.return_tensors not in ("pt", None):
            raise ValueError(f"`return_tensors` must be 'pt' or None, got {self.return_tensors!r}.")
        if self.padding not in (None, True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(
                f"`padding` must be a bool, 'longest', 'max_length' or 'do_not_pad', got {self.padding!r}."
            )
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("`padding='max_length'` needs `max_length`.")
        multiple = self.pad_to_multiple_of
        if multiple is not None and not (isinstance(multiple, int) and multiple > 0):
            raise ValueError(f"`pad_to_multiple_of` must be a positive integer or None, got {multiple!r}.")

    @property
    def pads(self) -> bool:
        """Whether the caller allows padding."""
        return self.padding not in (False, "do_not_pad")

    def check_rows(self, rows: Sequence[Sequence[int]]) -> None:
        """Check that the receiver's rows of token ids can form a batch.

        Raises:
            ValueError: There is no row, a row is empty, or their lengths differ and `padding` is off.
        """
        if not rows:
            raise ValueError("There is nothing to process: give at least one text or conversation.")
        for index, ids in enumerate(rows):
            if not ids:
                raise ValueError(f"Text {index} gives the receiver no token: give a text that is not empty.")
        lengths = sorted({len(ids) for ids in rows})
        if not self.pads and len(lengths) > 1:
            raise ValueError(f"`padding={self.padding!r}` with rows of {lengths} tokens: pass `padding=True`.")

    def kept_positions(self, special_tokens_mask: Sequence[int], model_max_length: int, side: str) -> list[int]:
        """Return the positions of one row's tokens that truncation keeps.

        Special tokens at either end (BOS, EOS) are kept, as a tokenizer's own truncation does.

        Args:
            special_tokens_mask: 1 at tokens that the tokenizer added, `(num_tokens,)`.
            model_max_length: Of the tokenizer, used where `max_length` is `None`.
            side: `"right"` or `"left"`: where tokens are removed.
        """
        length = len(special_tokens_mask)
        max_length = model_max_length if self.max_length is None else self.max_length
        if not self.truncation or length <= max_length:
            return list(range(length))
        num_first = len(list(takewhile(bool, special_tokens_mask)))
        num_last = len(list(takewhile(bool, reversed(special_tokens_mask[num_first:]))))
        content = range(num_first, length - num_last)
        num_removed = min(length - max_length, len(content))
        content = content[num_removed:] if side == "left" else content[: len(content) - num_removed]
        return [*range(num_first), *content, *range(length - num_last, length)]

    def width(self, longest: int) -> int:
        """Return the width of a batch whose longest row has `longest` tokens."""
        # A batch of empty sharer rows still needs a column: models refuse a sequence length of 0.
        longest = max(longest, 1)
        if self.padding == "max_length" and self.max_length is not None:
            longest = max(longest, self.max_length)
        multiple = self.pad_to_multiple_of if self.pads and self.pad_to_multiple_of else 1
        return -(-longest // multiple) * multiple

    def pad(self, rows: Sequence[Sequence[int] | np.ndarray], value: int) -> torch.Tensor:
        """Pad rows on the left with `value`: `(batch_size, width)`, int64."""
        width = self.width(max(map(len, rows)))
        padded = np.full((len(rows), width), value, dtype=np.int64)
        for target, row in zip(padded, rows, strict=True):
            target[width - len(row) :] = row
        return torch.from_numpy(padded)

    def output(self, tensor: torch.Tensor, single: bool) -> torch.Tensor | list[int] | list[list[int]]:
        """Return a `(batch_size, width)` tensor as `return_tensors` asks; as a list, a single row is not nested."""
        if self.return_tensors == "pt":
            return tensor
        rows: list[list[int]] = tensor.tolist()
        return rows[0] if single else rows
