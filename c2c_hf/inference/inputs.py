"""Inputs of one forward pass: the receiver's, and those of every sharer with their token alignment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ..alignment.token_table import apply_token_table
from ..configuration_c2c import C2CConfig
from .cache import C2CCache
from .fusion import default_alignment, last_prompt_positions
from .prefill import cached_states, position_ids_from_mask
from .probe import check_length
from .sharer_cache import SharerCache, prefill_sharer

#: A tensor where there is one sharer, else one per sharer.
PerSharer: TypeAlias = torch.Tensor | Sequence[torch.Tensor]
#: Arguments of a sharer's own, such as `pixel_values`, where there is one sharer; else one or `None` per sharer.
ModelInputs: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any] | None]
#: A cache where there is one sharer, else one or `None` per sharer.
GivenCaches: TypeAlias = SharerCache | Sequence[SharerCache | None]


@dataclass
class ReceiverInputs:
    """The receiver's new tokens.

    Attributes:
        input_ids: `(batch_size, seq_len)`, or `None` with `inputs_embeds`.
        inputs_embeds: `(batch_size, seq_len, hidden_size)`, or `None` with `input_ids`.
        attention_mask: `(batch_size, past_len + seq_len)`, 0 at padding on either side. `None`: no padding.
        position_ids: `(batch_size, seq_len)`. `None`: left to the model.
        first_position: Position id of a text's first token, from which positions are counted.
    """

    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    first_position: int = 0

    @property
    def tokens(self) -> torch.Tensor:
        """The new tokens as ids or embeddings, `(batch_size, seq_len, ...)`.

        Raises:
            ValueError: There are neither.
        """
        tokens = self.input_ids if self.input_ids is not None else self.inputs_embeds
        if tokens is None:
            raise ValueError("Either `input_ids` or `inputs_embeds` must be given, but got neither.")
        return tokens

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        """Number of new tokens."""
        return self.tokens.shape[1]

    def whole_mask(self, past_length: int = 0) -> torch.Tensor:
        """Return the attention mask, ones where there is none, `(batch_size, past_length + seq_len)`."""
        if self.attention_mask is not None:
            return self.attention_mask
        return torch.ones(self.batch_size, past_length + self.seq_len, dtype=torch.long, device=self.tokens.device)

    def new_mask(self) -> torch.Tensor:
        """Return the attention mask of the new tokens, `(batch_size, seq_len)`."""
        return self.whole_mask()[:, -self.seq_len :]

    def positions(self, past_length: int = 0) -> torch.Tensor:
        """Return the position ids, `(batch_size, seq_len)`, counted from the mask where there are none."""
        if self.position_ids is not None:
            return self.position_ids
        return position_ids_from_mask(self.whole_mask(past_length))[:, -self.seq_len :] + self.first_position

    def with_positions(self, past_length: int = 0) -> "ReceiverInputs":
        """Return the inputs with position ids, see [`ReceiverInputs.positions`]."""
        return replace(self, position_ids=self.positions(past_length))

    def columns(self, start: int, end: int) -> "ReceiverInputs":
        """Return the new tokens from `start` to `end`; the mask covers the past and everything before `end`."""
        mask = self.attention_mask
        if mask is not None:
            mask = mask[:, : mask.shape[1] - self.seq_len + end]
        ids, embeds, positions = (
            None if value is None else value[:, start:end]
            for value in (self.input_ids, self.inputs_embeds, self.position_ids)
        )
        return ReceiverInputs(ids, embeds, mask, positions, self.first_position)


@dataclass
class SharerInputs:
    """One sharer's part of a forward pass.

    Attributes:
        input_ids: `(batch_size, sharer_len)`, its tokens of the whole text.
        attention_mask: `(batch_size, sharer_len)`, 0 at padding and at tokens that it does not see.
        alignment: `(batch_size, seq_len)`: the sharer position aligned with each new receiver token, or -1. In memory
            mode the sharer position that fills each slot, or -1.
        position_ids: `(batch_size, sharer_len)`, counted from 0, or `None`: counted from the mask.
        cache: The sharer's cache of the text, computed elsewhere; `None`: computed in this pass.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    alignment: torch.Tensor
    position_ids: torch.Tensor | None = None
    cache: SharerCache | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.input_ids.shape[1]

    def positions(self) -> torch.Tensor:
        """Return the positions counted from 0, `(batch_size, sharer_len)`."""
        return position_ids_from_mask(self.attention_mask) if self.position_ids is None else self.position_ids


@dataclass
class GivenSharerInputs:
    """Sharer inputs as the caller gave them; see [`C2CForCausalLM.forward`]."""

    input_ids: PerSharer | None = None
    attention_mask: PerSharer | None = None
    alignment: PerSharer | None = None
    position_ids: PerSharer | None = None
    caches: GivenCaches | None = None


def collect_fusion_inputs(
    config: C2CConfig,
    token_tables: Sequence[torch.Tensor | None],
    receiver: ReceiverInputs,
    given: GivenSharerInputs,
    labels: torch.Tensor | None,
    cache: Cache | None,
) -> list[SharerInputs]:
    """Collect the inputs of every sharer with `mode="fusion"`.

    Args:
        config: Names each sharer's alignment.
        token_tables: Per sharer the lookup table of `"first"` and `"longest"`, else `None`.
        receiver: The receiver's inputs.
        given: What the caller gave. Without ids, they are made from the receiver's tokens.
        labels: `(batch_size, seq_len)`, or `None`.
        cache: The receiver's cache, or `None`.

    Returns:
        One per sharer; an empty list where the receiver runs without fusion.

    Raises:
        ValueError: Inputs are missing or do not fit.
    """
    if given.input_ids is None:
        if config.fuse_response and isinstance(cache, C2CCache) and cache.unfused_cache is not None:
            if receiver.input_ids is not None:
                return _continued_inputs(token_tables, receiver, cache)
        # Reading the length of a static cache synchronizes the device, so one-token inputs are recognized first.
        if (receiver.seq_len <= 1 and not config.fuse_response) or cached_length(cache) > 0:
            return []
    mask = receiver.attention_mask
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"`attention_mask` must be of shape (batch_size, length), but got {tuple(mask.shape)}.")
    if given.input_ids is None or config.fuse_response:
        # Response fusion continues token by token, so the sharers' inputs are made token by token from the start.
        sharers = sharer_inputs_from_tokens(config, token_tables, receiver)
    else:
        sharers = sharer_inputs_from_caller(config, given, receiver.batch_size)
    past_length, ends = cached_length(cache), last_prompt_positions(mask, labels, receiver.tokens)
    if given.alignment is None:
        for sharer in sharers:
            default_ends = None if config.fuse_response else ends
            sharer.alignment = default_alignment(sharer.alignment, mask, default_ends, past_length, receiver.seq_len)
    else:
        alignments = tensor_per_sharer(config, "sharer_alignment", given.alignment)
        for sharer, alignment in zip(sharers, alignments, strict=True):
            alignment = new_alignment(
                alignment, receiver.batch_size, receiver.seq_len, past_length, receiver.new_mask()
            )
            if config.fuse_response:
                # The caller decides which prompt positions are fused; from the last one on all are.
                columns = torch.arange(receiver.seq_len, device=ends.device)
                left_out = (alignment < 0) & (columns < ends.unsqueeze(1)).to(alignment.device)
                alignment = sharer.alignment.masked_fill(left_out.to(sharer.alignment.device), -1)
            sharer.alignment = alignment
    return attach_caches(config, sharers, given.caches)


def collect_memory_inputs(
    config: C2CConfig, receiver: ReceiverInputs, given: GivenSharerInputs, cache: Cache | None
) -> list[SharerInputs]:
    """Collect the inputs of every sharer with `mode="memory"`; an empty list where the caller gave none.

    Args:
        config: Of the model.
        receiver: The receiver's inputs.
        given: What the caller gave.
        cache: The receiver's cache, or `None`.

    Raises:
        ValueError: The alignment is missing, or inputs do not fit.
    """
    if given.input_ids is None:
        return []
    if given.alignment is None:
        raise ValueError(
            "`sharer_alignment` must be given with `mode='memory'`: it says which positions of the prompt are slots; "
            "use `C2CProcessor` to make all inputs."
        )
    sharers = sharer_inputs_from_caller(config, given, receiver.batch_size)
    alignments = tensor_per_sharer(config, "sharer_alignment", given.alignment)
    for sharer, alignment in zip(sharers, alignments, strict=True):
        sharer.alignment = new_alignment(
            alignment, receiver.batch_size, receiver.seq_len, cached_length(cache), receiver.new_mask()
        )
    return attach_caches(config, sharers, given.caches)


def cached_length(cache: Cache | None) -> int:
    """Return the number of tokens in a cache, 0 for `None`."""
    return 0 if cache is None else int(cache.get_seq_length())


def sharer_inputs_from_tokens(
    config: C2CConfig, token_tables: Sequence[torch.Tensor | None], receiver: ReceiverInputs
) -> list[SharerInputs]:
    """Make each sharer's tokens from the receiver's, one by one.

    Args:
        config: Names each sharer's alignment.
        token_tables: Per sharer the lookup table of `"first"` and `"longest"`, else `None`.
        receiver: The receiver's whole text. Under `"identity"` its positions are the sharer's as well.

    Raises:
        ValueError: There are no tokens, or an alignment does not map token by token.
    """
    ids, mask = receiver.input_ids, receiver.attention_mask
    if ids is None:
        raise ValueError("`sharer_input_ids` must be given beside `inputs_embeds`, since sharers prefill tokens.")
    mask = torch.ones_like(ids) if mask is None else mask
    sharers = []
    for sharer, table in zip(config.sharers, token_tables, strict=True):
        if sharer.token_alignment == "span":
            raise ValueError(
                "`sharer_input_ids` must be given with `token_alignment='span'`, since the sharer has a tokenization "
                "of its own; use `C2CProcessor` to make all inputs. As `assistant_model`, which gets none, pass the "
                "receiver alone."
            )
        if table is None:
            columns = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            sharers.append(SharerInputs(ids, mask, columns, receiver.position_ids))
        else:
            sharers.append(SharerInputs(*apply_token_table(table.to(ids.device), ids, mask, sharer.bos_token_id)))
    return sharers


def sharer_inputs_from_caller(config: C2CConfig, given: GivenSharerInputs, batch_size: int) -> list[SharerInputs]:
    """Check sharer inputs that the caller made; initially each position that the sharer sees is aligned with itself.

    Args:
        config: Of the model.
        given: What the caller gave, ids included.
        batch_size: Of the receiver.

    Raises:
        ValueError: They do not fit the receiver's batch or one another.
    """
    ids = tensor_per_sharer(config, "sharer_input_ids", given.input_ids)
    masks = [torch.ones_like(sharer_ids) for sharer_ids in ids]
    if given.attention_mask is not None:
        masks = tensor_per_sharer(config, "sharer_attention_mask", given.attention_mask)
    positions: list[torch.Tensor | None] = [None] * len(ids)
    if given.position_ids is not None:
        positions = [*tensor_per_sharer(config, "sharer_position_ids", given.position_ids)]
    sharers = []
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
        sharers.append(SharerInputs(sharer_ids, mask, columns.masked_fill(mask == 0, -1), sharer_positions))
    return sharers


def _continued_inputs(
    token_tables: Sequence[torch.Tensor | None], receiver: ReceiverInputs, cache: C2CCache
) -> list[SharerInputs]:
    """Append the receiver's new tokens to each sharer's cached text, for response fusion."""
    new_ids, new_mask = receiver.tokens, torch.ones_like(receiver.tokens)
    if receiver.attention_mask is not None and receiver.attention_mask.dim() == 2:
        new_mask = receiver.new_mask()
    sharers = []
    # None was prefilled where the prompt has no token of theirs.
    caches = cache.sharer_caches or [None] * len(token_tables)
    for table, cached in zip(token_tables, caches, strict=True):
        ids, mask = new_ids, new_mask
        if table is not None:
            ids, mask, _ = apply_token_table(table.to(ids.device), new_ids, new_mask, None)
        past_ids = ids[:, :0] if cached is None else cached.input_ids.to(ids.device)
        past_mask = mask[:, :0] if cached is None else cached.attention_mask.to(mask.device)
        columns = past_ids.shape[1] + torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        sharers.append(
            SharerInputs(
                torch.cat([past_ids, ids], 1),
                torch.cat([past_mask, mask.to(past_mask.dtype)], 1),
                columns.masked_fill(mask == 0, -1),
            )
        )
    return sharers


def new_alignment(
    alignment: torch.Tensor, batch_size: int, seq_len: int, past_length: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the new tokens' part of an alignment of these or of the whole text.

    Args:
        alignment: `(batch_size, length)`.
        batch_size: Number of rows.
        seq_len: Number of new tokens.
        past_length: Number of cached tokens.
        mask: `(batch_size, seq_len)`, of the new tokens: a shorter alignment is that of their beginning, as where an
            answer is appended, and must name no padding. `None`: a shorter one is refused.

    Raises:
        ValueError: It has the wrong shape, holds no integers, or aligns padding that was added to the ids alone.
    """
    if alignment.dim() != 2 or alignment.shape[0] != batch_size:
        raise ValueError(
            f"`sharer_alignment` must be of shape (batch_size={batch_size}, length), but got {tuple(alignment.shape)}."
        )
    if alignment.is_floating_point():
        raise ValueError(f"`sharer_alignment` must hold integers, but got {alignment.dtype}.")
    length = alignment.shape[1]
    if mask is not None and length < seq_len:
        beginning = mask[:, :length].to(alignment.device)
        if not bool(((alignment >= 0) & (beginning == 0)).any()):
            return torch.nn.functional.pad(alignment, (0, seq_len - length), value=-1)
    if length not in (seq_len, past_length + seq_len):
        whole = f" or the whole text of {past_length + seq_len}" if past_length else ""
        raise ValueError(
            f"`sharer_alignment` must cover the {seq_len} new tokens{whole}, but its length is {length}; pad it with "
            "-1 where `input_ids` is padded, on the same side."
        )
    return alignment[:, length - seq_len :]


def tensor_per_sharer(config: C2CConfig, name: str, value: PerSharer | None) -> list[torch.Tensor]:
    """Return one tensor per sharer; a single tensor is that of the only one.

    Raises:
        ValueError: Their number is wrong.
    """
    values = [value] if isinstance(value, torch.Tensor) else list(value or [])
    num_sharers = len(config.sharers)
    if len(values) != num_sharers:
        raise ValueError(f"`{name}` must hold one tensor per sharer ({num_sharers}), but got {len(values)}.")
    return values


def cache_per_sharer(caches: GivenCaches | None, num_sharers: int) -> list[SharerCache | None]:
    """Return one cache or `None` per sharer.

    Raises:
        ValueError: Their number is wrong.
        TypeError: They are something else.
    """
    if caches is None:
        return [None] * num_sharers
    values: list[SharerCache | None] = [caches] if isinstance(caches, SharerCache) else list(caches)
    if len(values) != num_sharers:
        raise ValueError(f"`sharer_caches` must hold one cache per sharer ({num_sharers}), but got {len(values)}.")
    for value in values:
        if value is not None and not isinstance(value, SharerCache):
            raise TypeError(f"`sharer_caches` must hold `SharerCache`, but got {type(value).__name__}.")
    return values


def rescale_alignment(alignment: torch.Tensor, mask: torch.Tensor, other_mask: torch.Tensor) -> torch.Tensor:
    """Stretch an alignment to another text of the sharer, as the mismatched-sharer control needs it.

    Args:
        alignment: `(batch_size, seq_len)`, sharer positions or -1.
        mask: `(batch_size, sharer_len)`, the attention mask of the sharer's text, padded left.
        other_mask: `(batch_size, other_len)`, that of the other text, likewise.

    Returns:
        `(batch_size, seq_len)`, positions of the other text or -1.
    """
    start, other_start = (m.shape[1] - m.sum(1, keepdim=True) for m in (mask, other_mask))
    scale = (other_mask.sum(1, keepdim=True) - 1) / (mask.sum(1, keepdim=True) - 1).clamp_min(1)
    scaled = other_start + ((alignment - start) * scale).round().long()
    return torch.where(alignment < 0, -1, scaled)


def prefill_given_inputs(
    config: C2CConfig,
    sharers: Sequence[nn.Module],
    given: GivenSharerInputs,
    inputs_embeds: torch.Tensor | Sequence[torch.Tensor | None] | None,
    model_inputs: ModelInputs | None,
) -> GivenSharerInputs:
    """Prefill the sharers whose inputs are more than tokens, so that they do not run again.

    Args:
        config: Of the model.
        sharers: The sharers.
        given: The other inputs. Ids that a sharer with embeddings lacks become -1.
        inputs_embeds: `(batch_size, sharer_len, hidden_size)`; with several sharers a list, `None` for those without.
        model_inputs: Further arguments, likewise.

    Raises:
        ValueError: Numbers differ, or a sharer has such inputs beside a cache.
    """
    num_sharers = len(config.sharers)
    ids: list[torch.Tensor | None]
    masks: list[torch.Tensor | None]
    positions: list[torch.Tensor | None]
    ids, masks, positions, embeds = (
        _optional_per_sharer(name, value, torch.Tensor, num_sharers)
        for name, value in (
            ("sharer_input_ids", given.input_ids),
            ("sharer_attention_mask", given.attention_mask),
            ("sharer_position_ids", given.position_ids),
            ("sharer_inputs_embeds", inputs_embeds),
        )
    )
    extras = _optional_per_sharer("sharer_model_inputs", model_inputs, Mapping, num_sharers)
    caches = cache_per_sharer(given.caches, num_sharers)
    for index, (own_embeds, own_inputs) in enumerate(zip(embeds, extras, strict=True)):
        if own_embeds is None and not own_inputs:
            continue
        if caches[index] is not None:
            raise ValueError(f"`sharer_caches` must be None for sharer {index}, whose inputs are given.")
        own_ids = ids[index]
        if own_ids is None:
            if own_embeds is None:
                raise ValueError("`sharer_input_ids` must be given beside `sharer_model_inputs`.")
            own_ids = torch.full(own_embeds.shape[:2], -1, device=own_embeds.device)
        mask = masks[index]
        mask = torch.ones_like(own_ids) if mask is None else mask
        sharer = cast(PreTrainedModel, sharers[index])
        check_length("sharers", sharer, own_ids.shape[1])
        caches[index] = prefill_sharer(
            sharer, own_ids, mask, positions[index], inputs_embeds=own_embeds, model_inputs=own_inputs
        )
        ids[index], masks[index] = own_ids, mask
    missing = [index for index, own in enumerate(ids) if own is None]
    if missing:
        raise ValueError(f"`sharer_input_ids` must be given for the sharers {missing}.")
    complete = cast(list[torch.Tensor], ids)
    all_masks = [torch.ones_like(own) if mask is None else mask for own, mask in zip(complete, masks, strict=True)]
    return replace(given, input_ids=complete, attention_mask=all_masks, caches=caches)


def _optional_per_sharer(name: str, value: Any, single: type, num_sharers: int) -> list[Any]:
    """Return one value or `None` per sharer; a single value is that of the only one.

    Raises:
        ValueError: Their number is wrong.
    """
    values = [value] if isinstance(value, single) else list(value or [None] * num_sharers)
    if len(values) != num_sharers:
        raise ValueError(f"`{name}` must hold one entry per sharer ({num_sharers}), but got {len(values)}.")
    return values


def attach_caches(config: C2CConfig, sharers: list[SharerInputs], caches: GivenCaches | None) -> list[SharerInputs]:
    """Attach caches that were computed elsewhere, so that these sharers do not run.

    Args:
        config: Records which sharers the fuser was made for.
        sharers: Their inputs.
        caches: One or `None` per sharer, or a single one.

    Returns:
        `sharers`.

    Raises:
        ValueError: A cache is that of another sharer or another text, or response fusion is on.
    """
    if not sharers:
        return sharers
    for index, (sharer, given) in enumerate(zip(sharers, cache_per_sharer(caches, len(sharers)), strict=True)):
        if given is None:
            continue
        if config.fuse_response:
            raise ValueError(
                "`sharer_caches` must be None with `fuse_response=True`, where sharers prefill the answer too."
            )
        _check_source(config, index, given)
        # A copy: this pass may modify the cache.
        cache, batch_size = given.copy(), sharer.input_ids.shape[0]
        if given.input_ids.shape[0] == 1 < batch_size:
            # One text, a document that many questions are asked about, serves the whole batch.
            cache.select_rows(torch.zeros(batch_size, dtype=torch.long))
        _check_text(index, sharer, cache)
        sharer.cache = cache
    return sharers


def _check_source(config: C2CConfig, index: int, given: SharerCache) -> None:
    recorded, source = config.sharers[index], given.source
    if source is not None:
        for field, expected, found in (
            ("weights' fingerprint", recorded.fingerprint, source.fingerprint),
            ("revision", recorded.revision, source.revision),
            ("vocabulary hash", recorded.tokenizer_hash, source.tokenizer_hash),
        ):
            if expected is not None and found is not None and expected != found:
                raise ValueError(
                    f"`sharer_caches`: sharer {index} of this fuser has {field} {expected}, but the cache comes from "
                    f"one with {found}; prefill the sharer that the fuser was trained with."
                )
    shapes = [[keys.shape[1], keys.shape[3], values.shape[3]] for keys, values in cached_states(given.cache)]
    expected_shapes = [list(shape) for shape in recorded.layer_shapes or shapes]
    if shapes != expected_shapes:
        raise ValueError(
            f"`sharer_caches`: the cache of sharer {index} has layers of shapes {shapes}, but the fuser takes "
            f"{expected_shapes}; prefill the sharer that the fuser was trained with."
        )


def _check_text(index: int, sharer: SharerInputs, given: SharerCache) -> None:
    # Positions after the last aligned one make no difference.
    length = int(sharer.alignment.max()) + 1
    device = given.input_ids.device
    ids, mask = sharer.input_ids[:, :length].to(device), sharer.attention_mask[:, :length].to(device)
    if given.common_prefix(ids, mask) < length:
        raise ValueError(
            f"`sharer_caches`: the cache of sharer {index} is that of another text, or another batch of texts, than "
            "`sharer_input_ids` and `sharer_attention_mask`; prefill these."
        )
