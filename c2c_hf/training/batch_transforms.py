"""Changes of a training batch: fuse a random span of each row, or give rows the sharers' inputs of another row."""

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


def draw_rows(is_candidate: torch.Tensor, rate: float) -> torch.Tensor:
    """Draw each candidate with the probability `rate`; at least one row of a batch is not drawn.

    Args:
        is_candidate: `(batch_size,)`, bool.
        rate: Between 0 and 1.

    Returns:
        `(batch_size,)`, bool, on the CPU.
    """
    # Drawn on the CPU, whose generator state every checkpoint holds.
    values = torch.rand(len(is_candidate))
    drawn = is_candidate.cpu() & (values < rate)
    if bool(drawn.all()):
        drawn[values.argmax()] = False
    return drawn


def mismatch_sharers(batch: TrainingBatch, rows: torch.Tensor, memory: bool) -> TrainingBatch:
    """Give rows the sharers' inputs of the row behind each in the batch, behind the last one the first.

    Args:
        batch: Of at least two rows.
        rows: `(num_rows,)`, which rows.
        memory: Whether the model is in memory mode. There a prompt gets all slots of the other row in place of its
            own. Else the k-th fused position is aligned with the sharer position of the other row's k-th, counted from
            the start again where the other row has fewer.

    Returns:
        These rows alone.
    """
    own, other = batch.select_rows(rows), batch.select_rows((rows + 1) % len(batch.labels))
    if memory:
        return _replace_slots(own, other)
    alignments = []
    for own_alignment, other_alignment in zip(own.sharer_alignment, other.sharer_alignment, strict=True):
        mismatched = torch.full_like(own_alignment, -1)
        for row, other_row, result in zip(own_alignment, other_alignment, mismatched, strict=True):
            fused, sharer_positions = (row >= 0).nonzero().flatten(), other_row[other_row >= 0]
            if len(sharer_positions):
                order = torch.arange(len(fused), device=fused.device) % len(sharer_positions)
                result[fused] = sharer_positions[order]
        alignments.append(mismatched)
    return replace(
        own,
        sharer_input_ids=other.sharer_input_ids,
        sharer_attention_mask=other.sharer_attention_mask,
        sharer_alignment=alignments,
        sharer_caches=other.sharer_caches,
    )


def _replace_slots(own: TrainingBatch, other: TrainingBatch) -> TrainingBatch:
    """Replace the slots of every row by those of the same row of another batch of the same width, sharers included."""
    width = own.input_ids.shape[1]
    length = width - own.logits_to_keep + 1
    slots = [torch.stack([alignment >= 0 for alignment in part.sharer_alignment]).any(0) for part in (own, other)]
    # Columns of `own`, and `width` more than those of `other`.
    columns = []
    for row, (own_slots, other_slots) in enumerate(zip(slots[0].cpu(), slots[1].cpu(), strict=True)):
        real = own.attention_mask[row, :length].cpu().nonzero().flatten()
        places = own_slots.nonzero().flatten()
        if len(places):
            before, behind = real[real < places[0]], real[real > places[-1]]
            real = torch.cat([before, other_slots.nonzero().flatten() + width, behind])
        columns.append(real)
    prompt_length = max(map(len, columns))
    pads = [prompt_length - len(row) for row in columns]
    order = torch.stack([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(columns, pads, strict=True)])
    is_pad = torch.arange(prompt_length) < torch.tensor(pads)[:, None]

    def rebuild(own_values: torch.Tensor, other_values: torch.Tensor, pad_value: int | None) -> torch.Tensor:
        prompts = torch.cat([own_values, other_values], dim=1).gather(1, order.to(own_values.device))
        if pad_value is not None:
            prompts = prompts.masked_fill(is_pad.to(prompts.device), pad_value)
        return torch.cat([prompts, own_values[:, length:]], dim=1)

    no_labels = torch.full_like(own.labels, -100)
    return replace(
        own,
        # What stands at padding makes no difference.
        input_ids=rebuild(own.input_ids, other.input_ids, None),
        attention_mask=rebuild(own.attention_mask, other.attention_mask, 0),
        labels=rebuild(own.labels, no_labels, -100),
        sharer_input_ids=other.sharer_input_ids,
        sharer_attention_mask=other.sharer_attention_mask,
        sharer_alignment=[
            rebuild(*pair, -1) for pair in zip(own.sharer_alignment, other.sharer_alignment, strict=True)
        ],
        sharer_caches=other.sharer_caches,
    )
