"""Changes of a training batch: fuse a random span of each row, or take the sharers' inputs of another row."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .collator import TrainingBatch


def keep_random_spans(alignment: Sequence[torch.Tensor], min_fraction: float) -> list[torch.Tensor]:
    """Keep one random contiguous span of each row's fused positions.

    Args:
        alignment: Per sharer `(batch_size, seq_len)`, the aligned sharer position or -1. All sharers keep the same
            positions.
        min_fraction: The share of the positions to keep is drawn between this and 1; of a row that fuses, at least one
            position is kept.

    Returns:
        The same, with -1 at all other positions.
    """
    fused = torch.stack([positions >= 0 for positions in alignment]).any(0)
    counts = fused.sum(1)
    # Drawn on the CPU, whose generator state every checkpoint holds.
    fractions, offsets = torch.rand(2, len(counts)).to(counts.device)
    kept = (counts * (min_fraction + (1 - min_fraction) * fractions)).round().long().clamp_min(1)
    starts = ((counts - kept + 1).clamp_min(0) * offsets).long()
    ranks = fused.cumsum(1) - 1
    inside = (ranks >= starts.unsqueeze(1)) & (ranks < (starts + kept).unsqueeze(1))
    return [positions.masked_fill(~inside, -1) for positions in alignment]


def mismatch_sharers(batch: TrainingBatch, mode: str = "fusion") -> TrainingBatch:
    """Give every row the sharers' inputs of the next row, the last row those of the first.

    The k-th fused position is aligned with the sharer position of the other row's k-th, counted from the start again
    where the other row has fewer. Where the other row has none at all, the row is that of the receiver alone.

    Args:
        batch: Of at least two rows.
        mode: Of the model. In memory mode aligned positions are slots, which hold no token of the receiver's: those
            that lose their sharer position are masked.
    """
    alignments = []
    for alignment in batch.sharer_alignment:
        mismatched = torch.full_like(alignment, -1)
        for row, other_row, result in zip(alignment, alignment.roll(-1, 0), mismatched, strict=True):
            fused, sharer_positions = (row >= 0).nonzero().flatten(), other_row[other_row >= 0]
            if len(sharer_positions):
                order = torch.arange(len(fused), device=fused.device) % len(sharer_positions)
                result[fused] = sharer_positions[order]
        alignments.append(mismatched)
    sharer_caches = None
    if batch.sharer_caches is not None:
        # Copies: the originals are used once more.
        sharer_caches = [cache.copy() for cache in batch.sharer_caches]
        for cache in sharer_caches:
            cache.select_rows(torch.arange(len(cache.input_ids)).roll(-1))
    attention_mask = batch.attention_mask
    if mode == "memory":
        for before, after in zip(batch.sharer_alignment, alignments, strict=True):
            attention_mask = attention_mask.masked_fill((before >= 0) & (after < 0), 0)
    return replace(
        batch,
        attention_mask=attention_mask,
        sharer_input_ids=[ids.roll(-1, 0) for ids in batch.sharer_input_ids],
        sharer_attention_mask=[mask.roll(-1, 0) for mask in batch.sharer_attention_mask],
        sharer_alignment=alignments,
        sharer_caches=sharer_caches,
    )
