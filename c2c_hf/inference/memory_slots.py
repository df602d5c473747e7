"""Memory mode: states of a sharer-only context take positions of their own in the receiver's cache.

The prompt holds *slots*: positions that the receiver attends to but never computes. The fuser fills them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..fusers.memory import MemoryFuser
from .fusion import AlignedTokens, KeyPositions, TokenStates, aligned_tokens, pick_tokens
from .inputs import ReceiverInputs, SharerInputs
from .prefill import LayerStates, cached_states, full_length_cache, prefill
from .rotary import Rotation
from .sharer_cache import SharerCache


@dataclass
class MemoryPlan:
    """Where the slots of a prompt are, and from which column on the receiver computes.

    Attributes:
        slots: `(batch_size, seq_len)`, bool.
        given: `(batch_size, seq_len)`, bool: slots, and the leading tokens before them, which are prefilled apart.
        leading: `(batch_size, num_leading_tokens)`: columns of the latter; arbitrary ones where a row has fewer.
        is_leading: `(batch_size, num_leading_tokens)`, bool: which of them count.
        tail_start: First column that the receiver runs over; `given` states there replace its own.
        tokens: Per sharer which of its tokens fills which slot, on the CPU.
        sharer_lengths: Per sharer how many of its tokens are prefilled.
    """

    slots: torch.Tensor
    given: torch.Tensor
    leading: torch.Tensor
    is_leading: torch.Tensor
    tail_start: int
    tokens: list[AlignedTokens]
    sharer_lengths: list[int]

    def tail_mask(self) -> torch.Tensor | None:
        """Return where `given` states replace those that the receiver computes; `None` if nowhere.

        Returns:
            `(batch_size, seq_len - tail_start)`, bool, or `None`.
        """
        given = self.given[:, self.tail_start :]
        return given if bool(given.any()) else None


def plan_memory_slots(
    alignments: Sequence[torch.Tensor], real: torch.Tensor, sharer_lengths: Sequence[int], num_kept: int, past: bool
) -> MemoryPlan | None:
    """Plan a prompt with slots; `None` where there are none.

    Args:
        alignments: Per sharer `(batch_size, seq_len)`: the sharer position that fills a slot, -1 elsewhere.
        real: `(batch_size, seq_len)`, bool: no padding.
        sharer_lengths: Number of tokens of each sharer.
        num_kept: Number of last columns whose logits are wanted.
        past: Whether the cache holds something already.

    Raises:
        ValueError: A slot is out of range, filled by two sharers, or the last token of a prompt.
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
        raise ValueError("`sharer_alignment`: the last token of a prompt is a slot, but the receiver must compute it.")
    # A row without slots is computed from its first token on.
    firsts = torch.where(real, columns, slots.shape[1]).amin(1)
    tail_start = min(int(torch.where(last_slots >= 0, last_slots + 1, firsts).min()), slots.shape[1] - num_kept)
    before = columns < tail_start
    is_leading = real & ~slots & before
    first_slots = torch.where(slots, columns, slots.shape[1]).amin(1, keepdim=True)
    if past or bool((is_leading & (columns > first_slots)).any()):
        # Such a token attends to the past or to a slot: all columns are computed in order.
        tail_start, is_leading = 0, torch.zeros_like(is_leading)
    count = int(is_leading.sum(1).max())
    # The leading tokens of each row first, in order.
    order = torch.where(is_leading, columns, columns + slots.shape[1]).argsort(1)[:, :count]
    return MemoryPlan(
        slots=slots,
        given=slots | is_leading,
        leading=order,
        is_leading=is_leading.gather(1, order),
        tail_start=tail_start,
        tokens=[aligned_tokens(alignment.masked_fill(~slots, -1)) for alignment in host],
        sharer_lengths=[int(alignment.max()) + 1 for alignment in host],
    )


def slot_positions(alignments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return where the slots of a prompt are, `(batch_size, seq_len)`, bool.

    Args:
        alignments: Per sharer `(batch_size, seq_len)`: the sharer position that fills a slot, -1 elsewhere.
    """
    return torch.stack([alignment >= 0 for alignment in alignments]).any(0)


def prefill_leading_tokens(
    plan: MemoryPlan, receiver: PreTrainedModel, inputs: ReceiverInputs, with_gradient: bool
) -> LayerStates:
    """Prefill the receiver's tokens before its slots, apart from everything else.

    Args:
        plan: Which tokens these are.
        receiver: The receiver.
        inputs: Its tokens with position ids.
        with_gradient: Whether gradients may flow.

    Returns:
        Per layer keys and values `(batch_size, num_key_value_heads, num_leading_tokens, head_dim)`; an empty list if
        there is no such token.
    """
    if plan.leading.shape[1] == 0:
        return []
    leading, mask = plan.leading.to(inputs.tokens.device), plan.is_leading.to(inputs.tokens.device)
    rows = torch.arange(len(leading), device=leading.device).unsqueeze(1)
    input_ids, inputs_embeds = (
        None if tokens is None else tokens[rows, leading] for tokens in (inputs.input_ids, inputs.inputs_embeds)
    )
    position_ids, cache = inputs.positions().gather(1, leading), full_length_cache()
    prefill(
        receiver, cache, input_ids, mask.long(), position_ids, inputs_embeds=inputs_embeds, with_gradient=with_gradient
    )
    return cached_states(cache)


def fill_memory_slots(
    plan: MemoryPlan,
    fusers: Sequence[MemoryFuser],
    sharer_caches: Sequence[SharerCache | None],
    sharers: Sequence[SharerInputs],
    rotations: Sequence[Sequence[Rotation]],
    inputs: ReceiverInputs,
    token_embeddings: nn.Module,
    leading_states: LayerStates,
    dtype: torch.dtype,
) -> LayerStates:
    """Compute the receiver's states at the slots, and insert those of the tokens before the slots.

    Args:
        plan: Where the slots are.
        fusers: One per sharer.
        sharer_caches: The cache of each sharer; `None` for one whose tokens fill no slot.
        sharers: The sharers' inputs.
        rotations: The rotary embedding of each receiver layer, then per sharer those of its layers.
        inputs: The receiver's inputs with position ids.
        token_embeddings: The receiver's input embeddings, for fusers with `memory_token_embeddings`.
        leading_states: From [`prefill_leading_tokens`].
        dtype: Of the receiver.

    Returns:
        Per receiver layer keys and values `(batch_size, num_key_value_heads, seq_len, head_dim)`, 0 elsewhere.
    """
    receiver_rotations, *sharer_rotations = rotations
    layers: list[list[torch.Tensor]] = []
    for index, (fuser, sharer_cache, (rows, columns, positions)) in enumerate(
        zip(fusers, sharer_caches, plan.tokens, strict=True)
    ):
        if sharer_cache is None or len(rows) == 0:
            continue
        key_positions = KeyPositions(sharer_rotations[index], sharers[index].positions())
        tokens = TokenStates(sharer_cache.entries(), rows, positions, key_positions=key_positions).all_entries()
        device = next(fuser.parameters()).device
        slots = pick_tokens(inputs.positions(), rows, columns)
        where = (rows.to(device), columns.to(device))
        embeddings = None
        if fuser.num_token_embeddings:
            count = fuser.num_token_embeddings
            embeddings = slot_embeddings(inputs, token_embeddings, rows, columns, count).to(device)
        slot_states = fuser([token_states.to(device) for token_states in tokens], embeddings)
        for layer_idx, (keys, values) in enumerate(slot_states):
            keys = receiver_rotations[layer_idx].apply(keys, slots)
            if len(layers) <= layer_idx:
                shape = (*plan.slots.shape, keys.shape[1])
                layers.append([states.new_zeros(*shape, states.shape[2]) for states in (keys, values)])
            for states, new in zip(layers[layer_idx], (keys, values), strict=True):
                states.index_put_(where, new)
    filled = [(keys.transpose(1, 2).to(dtype), values.transpose(1, 2).to(dtype)) for keys, values in layers]
    if leading_states:
        _place_leading_states(plan, filled, leading_states)
    return filled


def slot_embeddings(
    inputs: ReceiverInputs, token_embeddings: nn.Module, rows: torch.Tensor, columns: torch.Tensor, count: int
) -> torch.Tensor:
    """Return the receiver's embeddings of the slots' tokens and of those before them.

    Args:
        inputs: The receiver's inputs.
        token_embeddings: The receiver's input embeddings.
        rows: `(num_tokens,)`, batch rows of the slots.
        columns: `(num_tokens,)`, their columns.
        count: Number of tokens per slot: its own, the one before it, and so on.

    Returns:
        `(num_tokens, count * embedding_size)`, that of the slot's own token first; 0 where no token is before it.
    """
    is_token, parts = inputs.new_mask().bool(), []
    for distance in range(count):
        places = (columns - distance).clamp_min(0)
        if inputs.inputs_embeds is not None:
            part = pick_tokens(inputs.inputs_embeds, rows, places)
        else:
            part = token_embeddings(pick_tokens(inputs.tokens, rows, places))
        exists = pick_tokens(is_token, rows, places) & (columns >= distance).to(is_token.device)
        parts.append(part * exists.unsqueeze(-1).to(part))
    return torch.cat(parts, dim=-1)


def _place_leading_states(plan: MemoryPlan, states: LayerStates, leading_states: LayerStates) -> None:
    """Put the states of leading tokens at their columns, in place."""
    rows, index = plan.is_leading.nonzero(as_tuple=True)
    columns = plan.leading[rows, index]
    for pair, own in zip(states, leading_states, strict=True):
        for whole, part in zip(pair, own, strict=True):
            tokens = part.transpose(1, 2)[rows.to(part.device), index.to(part.device)]
            target = (rows.to(whole.device), columns.to(whole.device))
            whole.transpose(1, 2).index_put_(target, tokens.to(whole))
