"""Rows of tokens -> one batch padded on the left, as a call's `padding` and `return_tensors` ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of one call become a batch.

    Args:
        padding: As in a tokenizer. `None`: to the longest, where tensors need it.
        max_length: The width under `padding="max_length"`.
        pad_to_multiple_of: Round widths up to a multiple, where there is padding at all.
        return_tensors: `"pt"`, or `None` for lists.

    Raises:
        ValueError: For an unknown value, or `"max_length"` without one.
    """

    padding: bool | str | None = None
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
        """Refuse receiver rows that make no batch: none, an empty one, or unequal ones without padding."""
        if not rows:
            raise ValueError("There is nothing to process: give at least one text or conversation.")
        for index, ids in enumerate(rows):
            if not ids:
                raise ValueError(f"Text {index} gives the receiver no token: give a text that is not empty.")
        lengths = sorted({len(ids) for ids in rows})
        if not self.pads and len(lengths) > 1:
            raise ValueError(f"`padding={self.padding!r}` with rows of {lengths} tokens: pass `padding=True`.")

    def width(self, longest: int) -> int:
        """Return the width of a batch whose longest row has `longest` tokens."""
        # An empty sharer row still needs a column: no model takes a batch of none.
        longest = max(longest, 1)
        if self.padding == "max_length" and self.max_length is not None:
            longest = max(longest, self.max_length)
        multiple = self.pad_to_multiple_of if self.pads and self.pad_to_multiple_of else 1
        return -(-longest // multiple) * multiple

    def pad(self, rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
        """Pad rows into ids and mask, both `(batch_size, seq_len)`."""
        lengths = np.array([len(row) for row in rows])
        width = self.width(int(lengths.max()))
        # The mask decides; any id serves where there is no padding token.
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        ids = np.full((len(rows), width), pad, dtype=np.int64)
        for padded, row in zip(ids, rows, strict=True):
            padded[width - len(row) :] = row
        mask = (np.arange(width) >= width - lengths[:, None]).astype(np.int64)
        return [torch.from_numpy(ids), torch.from_numpy(mask)]

    def widen(
        self, ids: torch.Tensor, mask: torch.Tensor, alignment: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Widen a sharer's finished batch; the positions that the receiver reads move along."""
        more = self.width(ids.shape[1]) - ids.shape[1]
        ids, mask = (torch.nn.functional.pad(tensor, (more, 0)) for tensor in (ids, mask))
        return ids, mask, torch.where(alignment < 0, -1, alignment + more)

    def finish(self, value: torch.Tensor | list[torch.Tensor], single: bool) -> Any:
        """Return tensors, or lists where the caller asked for them; one text's are not nested in a batch."""
        if self.return_tensors == "pt":
            return value
        if isinstance(value, list):
            return [self.finish(item, single) for item in value]
        return value[0].tolist() if single else value.tolist()
