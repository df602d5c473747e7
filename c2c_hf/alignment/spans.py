"""Character spans of two tokenizations -> the sharer position that each receiver token is aligned with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

#: A run of characters that is in both texts: its start in the receiver's, its start in the sharer's, its length.
Segment = tuple[int, int, int]


def align_spans(
    receiver_offsets: Sequence[tuple[int, int]],
    sharer_offsets: Sequence[tuple[int, int]],
    segments: Sequence[Segment],
) -> np.ndarray:
    """Align each receiver token with the last sharer token that covers its last character.

    Args:
        receiver_offsets: Character spans `(start, end)` of the receiver's tokens in its text, empty for special
            tokens.
        sharer_offsets: The same for the sharer in its own text.
        segments: Runs of characters that both texts share.

    Returns:
        Sharer positions, `(num_receiver_tokens,)`, int64; -1 where there is none: outside every segment, an empty
        span, or a character that no sharer token covers.
    """
    # `fromiter` converts a long list of pairs several times faster than `asarray`.
    receiver, sharer = (
        np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
        for offsets in (receiver_offsets, sharer_offsets)
    )
    runs = np.asarray(sorted(s for s in segments if s[2] > 0), dtype=np.int64).reshape(-1, 3)
    result = np.full(len(receiver), -1, dtype=np.int64)
    if not len(receiver) or not len(sharer) or not len(runs):
        return result
    # Every sharer character is mapped to its last token: byte tokens share one character, and normalizers may reorder.
    widths = np.maximum(sharer[:, 1] - sharer[:, 0], 0)
    tokens = np.repeat(np.arange(len(sharer)), widths)
    characters = np.repeat(sharer[:, 0] - np.cumsum(widths) + widths, widths) + np.arange(widths.sum())
    last_token = np.full(int(max(sharer[:, 1].max(), (runs[:, 1] + runs[:, 2]).max())), -1, dtype=np.int64)
    np.maximum.at(last_token, characters, tokens)

    end = receiver[:, 1] - 1
    run = np.searchsorted(runs[:, 0], end, side="right") - 1
    start, sharer_start, length = runs[np.maximum(run, 0)].T
    inside = (run >= 0) & (end - start < length) & (receiver[:, 1] > receiver[:, 0])
    result[inside] = last_token[(end - start + sharer_start)[inside]]
    return result


def align_slots(receiver_offsets: Sequence[tuple[int, int]], sharer_offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Align each receiver token of a text with the first sharer token that ends at or after its last character.

    Such a token, unlike those before it, depends on all characters of the receiver's. Where several tokens end at the
    same character, as the bytes of one do, the last of one side goes with the last of the other, and so on backwards.

    Args:
        receiver_offsets: Character spans `(start, end)` of the receiver's tokens.
        sharer_offsets: The same for the sharer in the same text, empty for special tokens.

    Returns:
        Sharer positions, `(num_receiver_tokens,)`, int64; -1 where the sharer's tokens, cut by truncation, end before
        or begin after the receiver's.
    """
    result = np.full(len(receiver_offsets), -1, dtype=np.int64)
    receiver, sharer = (
        np.asarray(offsets, dtype=np.int64).reshape(-1, 2) for offsets in (receiver_offsets, sharer_offsets)
    )
    positions = np.flatnonzero(sharer[:, 1] > sharer[:, 0])
    if not len(positions):
        return result
    ends = np.maximum.accumulate(sharer[positions, 1])
    firsts = np.searchsorted(ends, receiver[:, 1])
    covered = (firsts < len(ends)) & (receiver[:, 1] > sharer[positions[0], 0])
    firsts, own_ends = firsts[covered], receiver[covered, 1]
    lasts = np.searchsorted(ends, ends[firsts], side="right") - 1
    # How many of the receiver's tokens follow that end at the same character.
    num_later = np.searchsorted(own_ends, own_ends, side="right") - 1 - np.arange(len(own_ends))
    result[covered] = positions[np.maximum(lasts - num_later, firsts)]
    return result
