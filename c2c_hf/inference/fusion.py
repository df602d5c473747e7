"""Which positions of a forward pass fuse, what is computed before and after, and the fusing itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..fusers.c2c import C2CFuser
from .prefill import LayerStates, SharerCache
from .token_states import TokenStates


@dataclass
class FusionPlan:
    """What a forward pass over `seq_len` new tokens has to do.

    Attributes:
        row_starts: `(batch_size,)`, int64 on the CPU: from this position on a row is computed over its fused cache;
            the positions before it are computed by the receiver as if it were alone.
        tail_start: The smallest of them. Positions before it enter the cache as one block.
        end: One more than the last position that some row fuses.
        tokens: Per sharer three CPU tensors `(num_tokens,)`: batch row, receiver position, sharer position.
        sharer_lengths: How far each sharer has to read.
    """

    row_starts: torch.Tensor
    tail_start: int
    end: int
    tokens: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    sharer_lengths: list[int]

    def substituted(self, seq_len: int) -> torch.Tensor | None:
        """Return where the tail takes given states in place of its own, `(batch_size, tail length)`, or `None`.

        Rows of a batch may end their fused region at different positions. The tail starts at the earliest; rows that
        fuse beyond it get those states put in place inside the cache.
        """
        if self.end <= self.tail_start:
            return None
        mask = torch.zeros((len(self.row_starts), seq_len), dtype=torch.bool)
        for rows, positions, _ in self.tokens:
            mask[rows, positions] = True
        # Unaligned positions before a row's own start are the receiver's alone, too.
        mask |= torch.arange(seq_len) < self.row_starts.unsqueeze(1)
        return mask[:, self.tail_start :]


def plan_fusion(
    alignments: Sequence[torch.Tensor], sharer_lengths: Sequence[int], row_starts: torch.Tensor | None = None
) -> FusionPlan | None:
    """Turn alignments into a plan.

    Args:
        alignments: Per sharer `(batch_size, seq_len)`: the sharer position that each new receiver position reads, or
            -1.
        sharer_lengths: Number of tokens of each sharer.
        row_starts: `(batch_size,)`: where each row's tail starts, for response fusion. `None`: behind the row's last
            fused position.

    Returns:
        The plan, or `None` where nothing fuses.

    Raises:
        ValueError: A sharer position is out of range.
    """
    # The one wait for the device, before any work is queued on it.
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
    starts = ends if row_starts is None else row_starts.cpu()
    return FusionPlan(
        row_starts=starts,
        tail_start=int(starts.min()),
        end=int(ends.max()),
        tokens=[aligned_tokens(alignment) for alignment in host],
        sharer_lengths=[int(alignment.max()) + 1 for alignment in host],
    )


def aligned_tokens(alignment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """List what an alignment `(batch_size, seq_len)` says: batch row, receiver position and sharer position."""
    rows, columns = (alignment >= 0).nonzero(as_tuple=True)
    return rows, columns, alignment[rows, columns]


def fuse_states(
    fusers: Sequence[C2CFuser],
    sharer_caches: Sequence[SharerCache | None],
    receiver_states: LayerStates,
    tokens: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    fusion_mode: str,
) -> None:
    """Fuse the receiver's states in place (arXiv 2510.03215).

    Args:
        fusers: One per sharer.
        sharer_caches: What each sharer has read; `None` for one whose tokens are not read.
        receiver_states: The receiver's own states; fused ones stand there afterwards.
        tokens: Per sharer the batch rows, receiver positions and sharer positions that fuse.
        fusion_mode: `"parallel"`: all fusers see the receiver's own states and their changes are summed;
            `"sequential"`: each sees what the one before it made.
    """
    entries = [keys for keys, _ in receiver_states] + [values for _, values in receiver_states]
    reading = [
        (
            fuser,
            TokenStates(state.entries(), rows, sharer_positions, fuser.gate_temperature.device),
            TokenStates(entries, rows, positions, fuser.gate_temperature.device),
        )
        for fuser, state, (rows, positions, sharer_positions) in zip(fusers, sharer_caches, tokens, strict=True)
        if state is not None and len(rows) > 0
    ]
    if fusion_mode == "sequential" or len(reading) == 1:
        for fuser, sharer_tokens, receiver_tokens in reading:
            fuser(sharer_tokens, receiver_tokens, receiver_tokens.add)
        return
    changes = [fuser(sharer_tokens, receiver_tokens) for fuser, sharer_tokens, receiver_tokens in reading]
    for (_, _, receiver_tokens), changed in zip(reading, changes, strict=True):
        for entry, change in enumerate(changed):
            if change is not None:
                receiver_tokens.add(entry, change)
