"""Fusion mode: which positions are fused, and the fusing itself (arXiv 2510.03215).

The processor aligns the tokens and leaves the last prompt token out (`C2CProcessor`); without a given alignment,
[`default_alignment`] decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..fusers.c2c import C2CFuser
from .prefill import LayerStates
from .rotary import Rotation
from .sharer_cache import SharerCache

#: Per token its batch row, its position in the receiver's text and its position in the sharer's, `(num_tokens,)` each.
AlignedTokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class FusionPlan:
    """Which of the new tokens are fused, and from where on the receiver runs over its fused cache.

    Attributes:
        seq_len: Number of new tokens.
        row_starts: `(batch_size,)`, int64 on the CPU: first position of each row that is computed on its fused cache;
            the positions before it are computed by the receiver without fusion.
        tail_start: The minimum of `row_starts`. The positions from here on are the *tail*, which the receiver runs
            over last; those before it enter the cache as one block.
        end: One more than the last position that is fused in any row.
        tokens: Per sharer the fused tokens, on the CPU.
        sharer_lengths: Per sharer how many of its tokens are needed. With response fusion all are prefilled.
    """

    seq_len: int
    row_starts: torch.Tensor
    tail_start: int
    end: int
    tokens: list[AlignedTokens]
    sharer_lengths: list[int]

    def tail_mask(self) -> torch.Tensor | None:
        """Return where fused states replace those that the receiver computes in the tail; `None` if nowhere.

        The fused regions of a batch may end at different positions. The tail starts at the earliest end; the fused
        states of rows whose region is longer are put in place inside the cache.

        Returns:
            `(batch_size, seq_len - tail_start)`, bool, or `None`.
        """
        if self.end <= self.tail_start:
            return None
        mask = torch.zeros((len(self.row_starts), self.seq_len), dtype=torch.bool)
        for rows, positions, _ in self.tokens:
            mask[rows, positions] = True
        # Unaligned positions before a row's own start are the receiver's without fusion, too.
        mask |= torch.arange(self.seq_len) < self.row_starts.unsqueeze(1)
        return mask[:, self.tail_start :]

    def join_logits(self, unfused: torch.Tensor, tail: torch.Tensor, first_kept: int) -> torch.Tensor:
        """Take each row's logits from the unfused pass up to its own start and from the tail after it.

        Args:
            unfused: `(batch_size, end - first_kept, vocab_size)`, of the unfused pass.
            tail: `(batch_size, num_tail_logits, vocab_size)`, of the last positions.
            first_kept: First position whose logits are wanted.

        Returns:
            `(batch_size, seq_len - first_kept, vocab_size)`.
        """
        tail_first = self.seq_len - tail.shape[1]
        start, overlap = unfused[:, : tail_first - first_kept], unfused[:, tail_first - first_kept :]
        columns = torch.arange(tail_first, self.end)
        from_unfused = (columns < self.row_starts.unsqueeze(1)).to(tail.device).unsqueeze(-1)
        joined = torch.where(from_unfused, overlap, tail[:, : self.end - tail_first])
        return torch.cat([start, joined, tail[:, self.end - tail_first :]], dim=1)


def plan_fusion(
    alignments: Sequence[torch.Tensor], sharer_lengths: Sequence[int], row_starts: torch.Tensor | None = None
) -> FusionPlan | None:
    """Turn alignments into a plan.

    Args:
        alignments: Per sharer `(batch_size, seq_len)`: the sharer position aligned with each new receiver position, or
            -1.
        sharer_lengths: Number of tokens of each sharer.
        row_starts: `(batch_size,)`: where each row's tail starts, for response fusion. `None`: after the row's last
            fused position.

    Returns:
        The plan, or `None` where nothing is fused.

    Raises:
        ValueError: A sharer position is out of range.
    """
    # The only device synchronization; done before any kernel is queued.
    host = torch.stack([alignment.cpu() for alignment in alignments])
    fused = (host >= 0).any(0)
    if not fused.any():
        return None
    for index, length in enumerate(sharer_lengths):
        low, high = int(host[index].min()), int(host[index].max())
        if low < -1 or high >= length:
            raise ValueError(
                f"`sharer_alignment` must hold sharer positions from 0 to {length - 1} or -1 for none, but that of "
                f"sharer {index} holds values from {low} to {high}."
            )
    positions = torch.arange(fused.shape[1])
    ends = torch.where(fused, positions + 1, 0).amax(1)
    # Behind the last fused position there is nothing to fuse, whatever the tokens.
    starts = ends if row_starts is None else torch.minimum(ends, row_starts.cpu())
    return FusionPlan(
        seq_len=fused.shape[1],
        row_starts=starts,
        tail_start=int(starts.min()),
        end=int(ends.max()),
        tokens=[aligned_tokens(alignment) for alignment in host],
        sharer_lengths=[int(alignment.max()) + 1 for alignment in host],
    )


def last_prompt_positions(
    attention_mask: torch.Tensor | None, labels: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """Return per row the position that predicts the first answer token.

    Args:
        attention_mask: `(batch_size, past_len + seq_len)`, or `None`.
        labels: `(batch_size, seq_len)`, -100 where there is no loss, or `None`.
        tokens: `(batch_size, seq_len, ...)`, the new tokens or their embeddings.

    Returns:
        `(batch_size,)`: the position before the first label, else the last real one.
    """
    batch_size, seq_len = tokens.shape[:2]
    columns = torch.arange(seq_len, device=tokens.device)
    real = columns.expand(batch_size, seq_len)
    if attention_mask is not None:
        real = real.masked_fill(attention_mask[:, -seq_len:] == 0, -1)
    last = real.amax(1)
    if labels is not None:
        first_label = torch.where(labels != -100, columns, seq_len).amin(1)
        last = torch.minimum(last, (first_label - 1).clamp_min(0))
    return last


def default_alignment(
    alignment: torch.Tensor,
    attention_mask: torch.Tensor | None,
    ends: torch.Tensor | None,
    past_length: int,
    seq_len: int,
) -> torch.Tensor:
    """Restrict a token-by-token alignment to the new tokens that are fused: no padding, nothing from a row's end on.

    Args:
        alignment: `(batch_size, past_length + seq_len)`.
        attention_mask: `(batch_size, past_length + seq_len)`, or `None`.
        ends: `(batch_size,)`: the first new position of each row that is not fused, or `None`.
        past_length: Number of tokens in the cache.
        seq_len: Number of new tokens.

    Raises:
        ValueError: The sharer's tokens are not the receiver's one by one.
    """
    if alignment.shape[1] != past_length + seq_len:
        raise ValueError(
            "`sharer_alignment` must be given where a sharer's tokens are not the receiver's one by one: the sharer "
            f"has {alignment.shape[1]} tokens, the receiver {past_length + seq_len}; use `C2CProcessor`."
        )
    alignment = alignment[:, past_length:]
    if attention_mask is not None:
        alignment = alignment.masked_fill((attention_mask[:, -seq_len:] == 0).to(alignment.device), -1)
    if ends is not None:
        columns = torch.arange(seq_len, device=alignment.device)
        alignment = alignment.masked_fill(columns >= ends.to(alignment.device).unsqueeze(1), -1)
    return alignment


def aligned_tokens(alignment: torch.Tensor) -> AlignedTokens:
    """List the aligned tokens of an alignment `(batch_size, seq_len)`."""
    rows, columns = (alignment >= 0).nonzero(as_tuple=True)
    return rows, columns, alignment[rows, columns]


def pick_tokens(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the values of chosen tokens, `(num_tokens, ...)`.

    Args:
        values: `(batch_size, seq_len, ...)`.
        rows: `(num_tokens,)`, batch rows, on any device.
        columns: `(num_tokens,)`, positions, likewise.
    """
    return values[rows.to(values.device), columns.to(values.device)]


@dataclass
class KeyPositions:
    """What makes cached keys free of rotary position.

    Attributes:
        rotations: The rotary embedding of each layer's keys.
        position_ids: `(batch_size, seq_len)`, of the tokens whose states are cached.
    """

    rotations: Sequence[Rotation]
    position_ids: torch.Tensor

    def of_tokens(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return the positions of chosen tokens, `(num_tokens,)`."""
        return pick_tokens(self.position_ids, rows, columns)


def fuse_states(
    fusers: Sequence[C2CFuser],
    sharer_caches: Sequence[SharerCache | None],
    receiver_states: LayerStates,
    tokens: Sequence[AlignedTokens],
    fusion_mode: str,
    receiver_positions: KeyPositions | None = None,
    sharer_positions: Sequence[KeyPositions] | None = None,
) -> None:
    """Fuse the receiver's states in place.

    Args:
        fusers: One per sharer.
        sharer_caches: The cache of each sharer; `None` for one without aligned tokens.
        receiver_states: The receiver's own states; fused ones afterwards.
        tokens: Per sharer the fused tokens.
        fusion_mode: `"parallel"`: all fusers take the receiver's own states and their changes are summed;
            `"sequential"`: each takes the states as the fuser before it left them.
        receiver_positions: For fusers that take keys free of rotary position; `None`: they take keys as cached.
        sharer_positions: The same of each sharer.
    """
    receiver_entries = [keys for keys, _ in receiver_states] + [values for _, values in receiver_states]
    pairs = []
    all_positions: Sequence[KeyPositions | None] = sharer_positions or [None] * len(fusers)
    for fuser, sharer_cache, (rows, columns, sharer_columns), own_positions in zip(
        fusers, sharer_caches, tokens, all_positions, strict=True
    ):
        if sharer_cache is not None and len(rows) > 0:
            device = fuser.gate_temperature.device
            sharer_tokens = TokenStates(sharer_cache.entries(), rows, sharer_columns, device, own_positions)
            receiver_tokens = TokenStates(receiver_entries, rows, columns, device, receiver_positions)
            pairs.append((fuser, sharer_tokens, receiver_tokens))
    # With a single fuser each part is added immediately, which saves memory.
    at_once = fusion_mode == "parallel" and len(pairs) > 1
    pending: list[tuple[TokenStates, list[int], torch.Tensor]] = []
    for fuser, sharer_tokens, receiver_tokens in pairs:
        dtype = receiver_entries[0].dtype
        parts = fuser.parts(len(receiver_tokens), dtype)
        source_states = fuser.source_states(sharer_tokens, dtype) if parts else sharer_tokens
        for part in parts:
            change = fuser(part, source_states.gather_joined(part.sources), receiver_tokens.gather(part.entries))
            if at_once:
                pending.append((receiver_tokens, part.entries, change))
            else:
                receiver_tokens.add(part.entries, change)
    for receiver_tokens, entries, change in pending:
        receiver_tokens.add(entries, change)


class TokenStates:
    """Chosen tokens of cached key/value states; nothing is gathered before it is asked for.

    Args:
        entries: Tensors `(batch_size, num_heads, seq_len, head_dim)`, every layer's keys, then every layer's values;
            possibly on several devices.
        rows: `(num_tokens,)` on the CPU, the tokens' batch rows.
        positions: `(num_tokens,)` on the CPU, their positions in the sequence.
        device: Where gathered states are wanted. `None`: where their entries are.
        key_positions: Gathered keys are free of rotary position, and what is added is rotated to their positions.
            `None`: both are as cached.
    """

    def __init__(
        self,
        entries: Sequence[torch.Tensor],
        rows: torch.Tensor,
        positions: torch.Tensor,
        device: torch.device | None = None,
        key_positions: KeyPositions | None = None,
    ) -> None:
        self._entries, self._device = entries, device
        self._rotations: Sequence[Rotation] = ()
        if key_positions is not None:
            self._rotations = key_positions.rotations
            self._positions = key_positions.of_tokens(rows, positions)
        self._index = (rows, positions)
        self._columns = _common_columns(rows, positions, entries[0].shape[0])

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._index[0])

    def entry(self, index: int) -> torch.Tensor:
        """Return one entry's tokens, heads side by side: `(num_tokens, num_heads * head_dim)`.

        It may share memory with the cached states.
        """
        states = self._entries[index].transpose(1, 2)
        if self._columns is None:
            heads = states[self._index_on(states.device)]
        else:
            heads = states[:, self._columns].flatten(0, 1)
        if index < len(self._rotations):
            heads = self._rotations[index].remove(heads, self._positions)
        tokens = heads.flatten(1)
        return tokens if self._device is None else tokens.to(self._device)

    def all_entries(self) -> list[torch.Tensor]:
        """Return the tokens of every entry, see [`TokenStates.entry`]."""
        return [self.entry(index) for index in range(len(self._entries))]

    def gather(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the tokens of several entries of equal width, `(num_entries, num_tokens, num_heads * head_dim)`."""
        return torch.stack([self.entry(index) for index in indices])

    def gather_joined(self, indices: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the same with several entries side by side, `(len(indices), num_tokens, their width together)`."""
        return torch.stack([torch.cat([self.entry(index) for index in joined], dim=-1) for joined in indices])

    def add(self, indices: Sequence[int], change: torch.Tensor) -> None:
        """Add to the tokens of several entries, in place.

        Args:
            indices: Of the entries.
            change: `(num_entries, num_tokens, num_heads * head_dim)`, on any device.
        """
        for index, entry_change in zip(indices, change.unbind(0), strict=True):
            states = self._entries[index].transpose(1, 2)
            # Under autocast a float32 model has keys in float32, because of their rotation, beside values in bfloat16.
            added = entry_change.to(states).unflatten(-1, states.shape[2:])
            if index < len(self._rotations):
                added = self._rotations[index].apply(added, self._positions)
            where: tuple[torch.Tensor | slice, ...]
            if self._columns is None:
                where = self._index_on(states.device)
            else:
                where, added = (slice(None), self._columns), added.unflatten(0, (states.shape[0], -1))
            # Autograd takes an assignment where it would not take a sum in place.
            states[where] = states[where] + added

    def _index_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        rows, positions = self._index
        # Moved once, not for every entry.
        self._index = (rows.to(device), positions.to(device))
        return self._index


def _common_columns(rows: torch.Tensor, positions: torch.Tensor, batch_size: int) -> slice | None:
    """Return the consecutive positions that are chosen in every row, or `None` where rows differ.

    One slice is much cheaper than an index: nothing moves to a device, and states are gathered in order.
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
