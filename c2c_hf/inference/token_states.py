"""Chosen tokens of cached key/value states, read and changed entry by entry."""

from collections.abc import Sequence
from typing import overload

import torch


class TokenStates(Sequence[torch.Tensor]):
    """Views cached states as lists of tokens; nothing is gathered before it is asked for.

    Item `i` is `(num_tokens, num_heads * head_dim)`: entry `i` at the chosen tokens, its heads side by side. It may
    share memory with the entry.

    Args:
        entries: Tensors `(batch_size, num_heads, seq_len, head_dim)`, every layer's keys, then every layer's values;
            possibly on several devices.
        rows: `(num_tokens,)` on the CPU, the tokens' batch rows.
        positions: `(num_tokens,)` on the CPU, their positions in the sequence.
        device: Where the items are wanted. `None`: where their entries are.
    """

    def __init__(
        self,
        entries: Sequence[torch.Tensor],
        rows: torch.Tensor,
        positions: torch.Tensor,
        device: torch.device | None = None,
    ) -> None:
        self._entries, self._device = entries, device
        self._index = (rows, positions)
        self._columns = _common_columns(rows, positions, entries[0].shape[0])

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        states = self._entries[index].transpose(1, 2)
        if self._columns is None:
            tokens = states[self._index_on(states.device)].flatten(1)
        else:
            tokens = states[:, self._columns].flatten(2).flatten(0, 1)
        return tokens if self._device is None else tokens.to(self._device)

    def add(self, index: int, change: torch.Tensor) -> None:
        """Add to an entry's chosen tokens, in place.

        Args:
            index: Of the entry.
            change: `(num_tokens, num_heads * head_dim)`, on any device.
        """
        states = self._entries[index].transpose(1, 2)
        change = change.to(states.device).unflatten(-1, states.shape[2:])
        where: tuple[torch.Tensor | slice, ...]
        if self._columns is None:
            where = self._index_on(states.device)
        else:
            where, change = (slice(None), self._columns), change.unflatten(0, (states.shape[0], -1))
        # Autograd takes an assignment where it would not take a sum in place.
        states[where] = states[where] + change

    def _index_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        rows, positions = self._index
        # Moved once, not for every entry.
        self._index = (rows.to(device), positions.to(device))
        return self._index


def _common_columns(rows: torch.Tensor, positions: torch.Tensor, batch_size: int) -> slice | None:
    """Return the consecutive positions that are chosen in every row, or `None` where rows differ.

    One slice is much cheaper than an index: nothing moves to a device, and states are read in order.
    """
    length, rest = divmod(len(rows), batch_size)
    if rest or not length:
        return None
    start = int(positions[0])
    columns = torch.arange(start, start + length, device=positions.device).repeat(batch_size)
    whole = torch.equal(positions, columns) and torch.equal(
        rows, torch.arange(batch_size, device=rows.device).repeat_interleave(length)
    )
    return slice(start, start + length) if whole else None
