"""What each sharer reads, and which of it the receiver's new tokens read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..alignment.token_table import apply_token_table
from ..configuration_c2c import C2CConfig
from .cache import C2CCache
from .prefill import SharerCache, read_text

#: A tensor where there is one sharer, else one per sharer.
PerSharer = torch.Tensor | Sequence[torch.Tensor]


@dataclass
class SharerText:
    """One sharer's side of a forward pass.

    Attributes:
        input_ids: `(batch_size, sharer_len)`, its tokens of the whole text.
        attention_mask: `(batch_size, sharer_len)`, 0 at padding and at tokens that it does not see.
        alignment: `(batch_size, seq_len)`: the position of its text that each new receiver token reads, or -1.
        position_ids: `(batch_size, sharer_len)`, or `None`: counted from the mask.
        state: What the sharer has read of it, here or elsewhere; `None` before it reads.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    alignment: torch.Tensor
    position_ids: torch.Tensor | None = None
    state: SharerCache | None = None

    def read(self, sharer: PreTrainedModel, length: int, num_layers: int) -> None:
        """Let the sharer read the first `length` positions, on from what `state` holds, see [`~prefill.read_text`]."""
        position_ids = None if self.position_ids is None else self.position_ids[:, :length]
        ids, mask = self.input_ids[:, :length], self.attention_mask[:, :length]
        self.state = read_text(sharer, ids, mask, position_ids, known=self.state, num_layers=num_layers)


def texts_from_tokens(
    config: C2CConfig,
    token_tables: Sequence[torch.Tensor | None],
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
) -> list[SharerText]:
    """Make each sharer's text from the receiver's tokens, one by one.

    Args:
        config: Names each sharer's alignment.
        token_tables: Per sharer the lookup table of `"first"` and `"longest"`, else `None`.
        input_ids: `(batch_size, length)`, the receiver's whole text.
        attention_mask: `(batch_size, length)`, or `None` without padding.
        position_ids: `(batch_size, length)`, or `None`: where `identity` sharers read too.

    Raises:
        ValueError: There are no tokens, or an alignment does not go token by token.
    """
    if input_ids is None:
        raise ValueError("`sharer_input_ids` must be given beside `inputs_embeds`, since sharers read tokens.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    texts = []
    for index, (alignment, table) in enumerate(zip(config.token_alignments, token_tables, strict=True)):
        if alignment == "span":
            raise ValueError(
                "`sharer_input_ids` must be given with `token_alignment='span'`, since the sharer has a tokenization "
                "of its own; use `C2CProcessor` to make all inputs."
            )
        if table is None:
            columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
            texts.append(SharerText(input_ids, attention_mask, columns, position_ids))
        else:
            bos_token_id = config.sharers[index].bos_token_id
            mapped = apply_token_table(table.to(input_ids.device), input_ids, attention_mask, bos_token_id)
            texts.append(SharerText(*mapped))
    return texts


def texts_as_given(
    config: C2CConfig,
    input_ids: PerSharer,
    attention_masks: PerSharer | None,
    position_ids: PerSharer | None,
    batch_size: int,
) -> list[SharerText]:
    """Check sharer inputs that the caller made; each position is aligned to itself where the sharer sees it.

    Raises:
        ValueError: They do not fit the receiver's batch or one another.
    """
    ids = per_sharer(config, "sharer_input_ids", input_ids)
    masks = [torch.ones_like(sharer_ids) for sharer_ids in ids]
    if attention_masks is not None:
        masks = per_sharer(config, "sharer_attention_mask", attention_masks)
    positions: list[torch.Tensor | None] = [None] * len(ids)
    if position_ids is not None:
        positions = list(per_sharer(config, "sharer_position_ids", position_ids))
    texts = []
    for sharer_ids, mask, sharer_positions in zip(ids, masks, positions, strict=True):
        if sharer_ids.dim() != 2 or sharer_ids.shape[0] != batch_size:
            raise ValueError(
                f"`sharer_input_ids` must be of shape (batch_size={batch_size}, sharer_len) like `input_ids`, but got "
                f"{tuple(sharer_ids.shape)}."
            )
        if mask.shape != sharer_ids.shape:
            raise ValueError(
                f"`sharer_attention_mask` must have the shape of `sharer_input_ids`, {tuple(sharer_ids.shape)}, but "
                f"got {tuple(mask.shape)}."
            )
        columns = torch.arange(sharer_ids.shape[1], device=sharer_ids.device).expand(sharer_ids.shape)
        texts.append(SharerText(sharer_ids, mask, columns.masked_fill(mask == 0, -1), sharer_positions))
    return texts


def continued_texts(
    config: C2CConfig,
    token_tables: Sequence[torch.Tensor | None],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: C2CCache,
) -> list[SharerText]:
    """Append the receiver's new tokens to what each sharer has read, for response fusion.

    Args:
        config: Names each sharer's alignment.
        token_tables: Per sharer its lookup table, or `None`.
        input_ids: `(batch_size, seq_len)`, the new tokens.
        attention_mask: `(batch_size, past_len + seq_len)`, or `None`.
        cache: Knows what was read.
    """
    new_mask = torch.ones_like(input_ids)
    if attention_mask is not None and attention_mask.dim() == 2:
        new_mask = attention_mask[:, -input_ids.shape[1] :]
    texts = []
    for table, state in zip(token_tables, cache.sharer_caches, strict=True):
        ids, mask = input_ids, new_mask
        if table is not None:
            ids, mask, _ = apply_token_table(table.to(input_ids.device), input_ids, new_mask, None)
        known_ids = ids[:, :0] if state is None else state.input_ids.to(ids.device)
        known_mask = mask[:, :0] if state is None else state.attention_mask.to(mask.device)
        columns = known_ids.shape[1] + torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        texts.append(
            SharerText(
                torch.cat([known_ids, ids], 1),
                torch.cat([known_mask, mask.to(known_mask.dtype)], 1),
                columns.masked_fill(mask == 0, -1),
            )
        )
    return texts


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


def leave_out(
    alignment: torch.Tensor,
    attention_mask: torch.Tensor | None,
    ends: torch.Tensor | None,
    past_length: int,
    seq_len: int,
) -> torch.Tensor:
    """Cut a default alignment down to the new tokens; padding and everything from a row's end on read nothing.

    Args:
        alignment: `(batch_size, past_length + seq_len)`.
        attention_mask: `(batch_size, past_length + seq_len)`, or `None`.
        ends: `(batch_size,)`: the first new position of each row that does not fuse, or `None`.
        past_length: Number of tokens in the cache.
        seq_len: Number of new tokens.

    Raises:
        ValueError: The sharer's tokens are not the receiver's one by one.
    """
    if alignment.shape[1] != past_length + seq_len:
        raise ValueError(
            "`sharer_alignment` must be given where a sharer's tokens are not the receiver's one by one: the sharer "
            f"reads {alignment.shape[1]} tokens, the receiver {past_length + seq_len}; use `C2CProcessor`."
        )
    alignment = alignment[:, past_length:]
    if attention_mask is not None:
        alignment = alignment.masked_fill((attention_mask[:, -seq_len:] == 0).to(alignment.device), -1)
    if ends is not None:
        columns = torch.arange(seq_len, device=alignment.device)
        alignment = alignment.masked_fill(columns >= ends.to(alignment.device).unsqueeze(1), -1)
    return alignment


def new_positions(alignment: torch.Tensor, batch_size: int, seq_len: int, past_length: int) -> torch.Tensor:
    """Cut the new tokens out of an alignment of the whole text; tokens behind its end read nothing."""
    if alignment.dim() != 2 or alignment.shape[0] != batch_size:
        raise ValueError(
            f"`sharer_alignment` must be of shape (batch_size={batch_size}, length), but got {tuple(alignment.shape)}."
        )
    if alignment.is_floating_point():
        raise ValueError(f"`sharer_alignment` must hold integers, but got {alignment.dtype}.")
    length = alignment.shape[1]
    if length > seq_len:
        if length < past_length + seq_len:
            raise ValueError(
                f"`sharer_alignment` must cover the {seq_len} new tokens or the whole text of "
                f"{past_length + seq_len}, but its length is {length}."
            )
        return alignment[:, past_length : past_length + seq_len]
    return torch.nn.functional.pad(alignment, (0, seq_len - length), value=-1)


def per_sharer(config: C2CConfig, name: str, value: PerSharer) -> list[torch.Tensor]:
    """Return one tensor per sharer; a single tensor is that of the only one."""
    values = [value] if isinstance(value, torch.Tensor) else list(value)
    if len(values) != config.num_sharers:
        raise ValueError(f"`{name}` must hold one tensor per sharer ({config.num_sharers}), but got {len(values)}.")
    return values
