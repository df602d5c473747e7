"""Memory mode: what sharers have read takes positions of its own in the receiver's cache.

The prompt holds a *slot*, a position that the receiver never computes, for every sharer token to be remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..fusers.memory import MemoryFuser
from .fusion import aligned_tokens
from .prefill import LayerStates, SharerCache, cached_states, full_length_cache, prefill
from .rotary import Rotation
from .token_states import TokenStates

#: Per token its batch row, its position in the receiver's text, and its position in the sharer's.
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class MemoryPlan:
    """Where the slots of a prompt are, and from which column on the receiver computes.

    Attributes:
        slots: `(batch_size, seq_len)`, bool.
        given: `(batch_size, seq_len)`, bool: slots, and tokens in front of the tail that are computed apart.
        heads: `(batch_size, num_head_tokens)`: columns of the latter, a row's first column where it has fewer.
        is_head: `(batch_size, num_head_tokens)`, bool.
        tail_start: The receiver computes the columns from here on; given states in them are put in their place.
        tokens: Per sharer what it gives to which slot.
        sharer_lengths: Per sharer, how much of its text is needed.
    """

    slots: torch.Tensor
    given: torch.Tensor
    heads: torch.Tensor
    is_head: torch.Tensor
    tail_start: int
    tokens: list[Tokens]
    sharer_lengths: list[int]


def plan_memory(
    alignments: Sequence[torch.Tensor], real: torch.Tensor, sharer_lengths: Sequence[int], num_kept: int, past: bool
) -> MemoryPlan | None:
    """Plan a prompt with slots; `None` where there are none.

    Args:
        alignments: Per sharer `(batch_size, seq_len)`: the sharer position that fills a slot, -1 elsewhere.
        real: `(batch_size, seq_len)`, bool: no padding.
        sharer_lengths: Length of every sharer's text.
        num_kept: Number of last columns whose logits are wanted.
        past: Whether the cache holds something already.

    Raises:
        ValueError: A slot is out of range, claimed by two sharers, or the last token of a prompt.
    """
    host = [alignment.cpu() for alignment in alignments]
    real = real.cpu()
    for alignment, length in zip(host, sharer_lengths, strict=True):
        if int(alignment.max()) >= length or int(alignment.min()) < -1:
            raise ValueError(
                f"`sharer_alignment` must hold positions below {length}, the length of the sharer's text, or -1, but "
                f"holds values from {int(alignment.min())} to {int(alignment.max())}."
            )
    claims = torch.stack([alignment >= 0 for alignment in host]).sum(0)
    slots = (claims > 0) & real
    if not bool(slots.any()):
        return None
    columns = torch.arange(slots.shape[1])
    last_slots = torch.where(slots, columns, -1).amax(1)
    last_tokens = torch.where(real, columns, -1).amax(1)
    if int(claims.max()) > 1:
        raise ValueError("`sharer_alignment`: two sharers fill the same slot; give each its own.")
    if bool((last_slots == last_tokens).any()):
        raise ValueError("`sharer_alignment`: the last token of a prompt is a slot, but the receiver must read it.")
    # A row without slots is computed from its first token on.
    firsts = torch.where(real, columns, slots.shape[1]).amin(1)
    tail_start = min(int(torch.where(last_slots >= 0, last_slots + 1, firsts).min()), slots.shape[1] - num_kept)
    before = columns < tail_start
    is_head = real & ~slots & before
    first_slots = torch.where(slots, columns, slots.shape[1]).amin(1, keepdim=True)
    if past or bool((is_head & (columns > first_slots)).any()):
        # Such a token attends to the past or to a slot: all columns are computed in order.
        tail_start, is_head = 0, torch.zeros_like(is_head)
    count = int(is_head.sum(1).max())
    # The head tokens of each row first, in order.
    order = torch.where(is_head, columns, columns + slots.shape[1]).argsort(1)[:, :count]
    return MemoryPlan(
        slots=slots,
        given=slots | is_head,
        heads=order,
        is_head=is_head.gather(1, order),
        tail_start=tail_start,
        tokens=[aligned_tokens(alignment.masked_fill(~slots, -1)) for alignment in host],
        sharer_lengths=[int(alignment.max()) + 1 for alignment in host],
    )


def hide_slots(attention_mask: torch.Tensor, alignments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mask the slots of a prompt, so that it is as if they were not there.

    Args:
        attention_mask: `(batch_size, seq_len)`.
        alignments: Per sharer `(batch_size, seq_len)`, or shorter.
    """
    hidden = attention_mask.clone()
    for alignment in alignments:
        width = min(alignment.shape[1], hidden.shape[1])
        hidden[:, :width][(alignment[:, :width] >= 0).to(hidden.device)] = 0
    return hidden


def remember(
    plan: MemoryPlan,
    fusers: Sequence[MemoryFuser],
    sharer_caches: Sequence[SharerCache | None],
    sharer_positions: Sequence[torch.Tensor],
    sharer_rotations: Sequence[Sequence[Rotation]],
    receiver_rotations: Sequence[Rotation],
    position_ids: torch.Tensor,
) -> LayerStates:
    """Make the receiver's states at the slots.

    Args:
        plan: Where they are.
        fusers: One per sharer.
        sharer_caches: What each sharer has read; `None` for one whose tokens fill no slot.
        sharer_positions: Per sharer `(batch_size, sharer_len)`: at which positions.
        sharer_rotations: Per sharer how each of its layers' keys turn.
        receiver_rotations: How each receiver layer's keys turn.
        position_ids: `(batch_size, seq_len)`, the receiver's.

    Returns:
        Per receiver layer keys and values `(batch_size, num_key_value_heads, seq_len, head_dim)`, 0 but at slots.
    """
    batch_size, seq_len = plan.slots.shape
    layers: list[list[torch.Tensor]] = []
    for index, (fuser, state, (rows, columns, positions)) in enumerate(
        zip(fusers, sharer_caches, plan.tokens, strict=True)
    ):
        if state is None or len(rows) == 0:
            continue
        entries = position_free_tokens(state, sharer_rotations[index], sharer_positions[index], rows, positions)
        device = next(fuser.parameters()).device
        made = fuser([entry.to(device) for entry in entries])
        slots = position_ids[rows.to(position_ids.device), columns.to(position_ids.device)]
        for layer_idx, (keys, values) in enumerate(made):
            keys = receiver_rotations[layer_idx].apply(keys, slots)
            if len(layers) <= layer_idx:
                shape = (batch_size, seq_len, keys.shape[1])
                layers.append([states.new_zeros(*shape, states.shape[2]) for states in (keys, values)])
            where = (rows.to(device), columns.to(device))
            for states, new in zip(layers[layer_idx], (keys, values), strict=True):
                states.index_put_(where, new)
    return [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in layers]


def position_free_tokens(
    state: SharerCache,
    rotations: Sequence[Rotation],
    position_ids: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> list[torch.Tensor]:
    """Pick tokens out of what a sharer has read, and take the rotary positions out of their keys.

    Args:
        state: What it has read.
        rotations: How each of its layers' keys turn.
        position_ids: `(batch_size, sharer_len)`, at which positions it has read.
        rows: `(num_tokens,)`, batch rows.
        positions: `(num_tokens,)`, columns of its text.

    Returns:
        `(num_tokens, heads * head_dim)` per entry: every layer's keys, then every layer's values.
    """
    entries = state.entries()
    tokens = list(TokenStates(entries, rows, positions))
    places = position_ids[rows.to(position_ids.device), positions.to(position_ids.device)]
    for layer_idx, rotation in enumerate(rotations):
        keys = tokens[layer_idx].unflatten(-1, (entries[layer_idx].shape[1], -1))
        tokens[layer_idx] = rotation.remove(keys, places).flatten(1)
    return tokens


def read_heads(
    plan: MemoryPlan, receiver: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, learns: bool
) -> LayerStates:
    """Let the receiver read the tokens in front of its slots, apart from everything else.

    Returns:
        Per layer keys and values `(batch_size, num_key_value_heads, num_head_tokens, head_dim)`.
    """
    heads, mask = plan.heads.to(input_ids.device), plan.is_head.to(input_ids.device)
    cache = full_length_cache()
    inputs: dict[str, Any] = {"position_ids": position_ids.gather(1, heads), "with_gradient": learns}
    prefill(receiver, cache, input_ids.gather(1, heads), mask.long(), **inputs)
    return cached_states(cache)


def place_heads(plan: MemoryPlan, states: LayerStates, heads: LayerStates) -> None:
    """Put the states of head tokens where they belong, in place."""
    rows, index = plan.is_head.nonzero(as_tuple=True)
    columns = plan.heads[rows, index]
    for pair, own in zip(states, heads, strict=True):
        for whole, part in zip(pair, own, strict=True):
            tokens = part.transpose(1, 2)[rows.to(part.device), index.to(part.device)]
            target = (rows.to(whole.device), columns.to(whole.device))
            whole.transpose(1, 2).index_put_(target, tokens.to(whole))
