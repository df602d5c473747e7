"""Caches of the receiver: [`C2CCache`], and a temporary copy that records the states of one forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache

from .._compat import CACHE_ARGUMENT, copy_cache
from .prefill import LayerStates, full_length_cache
from .sharer_cache import SharerCache


class C2CCache(Cache):
    """A receiver's cache with fused states, around any cache of transformers.

    The layers are those of the wrapped cache, so its length, mask, reorder and crop methods act on them, and every
    state enters through the wrapped cache's own `update`. In addition it keeps the sharers' caches, which a later turn
    continues, with `fuse_response` the receiver's own unfused states, and after `generate` the text that is cached.

    Args:
        cache: The cache to wrap: dynamic, static, quantized or offloaded. `None`: a new dynamic one.

    Example:
        ```python
        cache = C2CCache()
        out = model.generate(**first_turn, cache=cache)
        out = model.generate(**both_turns, cache=cache)  # prefills and fuses the new turn only
        ```
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self.receiver_cache = DynamicCache() if cache is None else cache
        super().__init__(layers=self.receiver_cache.layers)
        self.sharer_caches: list[SharerCache | None] = []
        self.unfused_cache: Cache | None = None
        #: The receiver's cached text, `(batch_size, length)`, as `generate` left it; `None`: unknown.
        self.input_ids: torch.Tensor | None = None
        #: `(batch_size, length)`, bool: slots that were cached while fusion was off, which hold no state to attend to.
        self.hidden_positions: torch.Tensor | None = None
        self._fused: tuple[LayerStates, torch.Tensor] | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache new states, fused ones in place of the receiver's own within [`C2CCache.replacing_states`].

        Args:
            key_states: `(batch_size, num_key_value_heads, seq_len, head_dim)`.
            value_states: The same shape, or with the values' own head_dim.
            layer_idx: Index of the layer.
            *args: Passed on to the wrapped cache.
            **kwargs: Passed on to the wrapped cache.

        Returns:
            All key and value states of the layer.
        """
        if self._fused is not None:
            fused, fused_mask = self._fused
            mask = fused_mask.to(key_states.device)[:, None, :, None]
            key_states = torch.where(mask, fused[layer_idx][0], key_states)
            value_states = torch.where(mask, fused[layer_idx][1], value_states)
        return self.receiver_cache.update(key_states, value_states, layer_idx, *args, **kwargs)

    @contextmanager
    def replacing_states(self, fused: LayerStates, fused_mask: torch.Tensor) -> Iterator[None]:
        """Put fused states in place of those that the receiver computes, inside `update`.

        Args:
            fused: States of the tokens of the receiver's next forward pass.
            fused_mask: `(batch_size, seq_len)`, bool: where they replace the receiver's own.
        """
        self._fused = (fused, fused_mask)
        try:
            yield
        finally:
            self._fused = None

    def keep_unfused(self) -> Cache:
        """Return the cache of the receiver's own, unfused states, which is kept next to the fused one from now on."""
        if self.unfused_cache is None:
            self.unfused_cache = full_length_cache()
        return self.unfused_cache

    def hide(self, positions: torch.Tensor) -> None:
        """Leave positions out of what later tokens attend to.

        Args:
            positions: `(batch_size, length)`, bool, counted from the first cached one.
        """
        if self.hidden_positions is not None:
            missing = positions.shape[1] - self.hidden_positions.shape[1]
            positions = positions | torch.nn.functional.pad(self.hidden_positions, (0, max(0, missing)))
        self.hidden_positions = positions

    def masked(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return an attention mask `(batch_size, length)` with the hidden positions masked."""
        if self.hidden_positions is None:
            return attention_mask
        missing = attention_mask.shape[1] - self.hidden_positions.shape[1]
        hidden = torch.nn.functional.pad(self.hidden_positions, (0, missing))
        return attention_mask.masked_fill(hidden.to(attention_mask.device), 0)

    def crop_to_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Drop what is cached of another text than the given one, from the first token on that differs.

        In a chat, an answer may be tokenized otherwise in the next turn than it was generated.

        Args:
            input_ids: `(batch_size, seq_len)`, the whole text.
            attention_mask: `(batch_size, seq_len)`, or `None`.

        Raises:
            ValueError: The texts have another number of rows, nothing in common, or layers that cannot be cropped.
        """
        length = min(self.get_seq_length(), 0 if self.input_ids is None else self.input_ids.shape[1])
        if self.input_ids is None or length == 0 or input_ids.shape[1] <= length:
            return
        num_same, reason = 0, "begins with"
        if len(input_ids) == len(self.input_ids):
            differs = input_ids[:, :length] != self.input_ids[:, :length].to(input_ids.device)
            if attention_mask is not None:
                differs &= attention_mask[:, :length].to(differs.device) != 0
            columns = differs.any(0).nonzero()
            if len(columns) == 0:
                return
            num_same = int(columns[0])
        if num_same > 0:
            try:
                self.crop(num_same - self.get_seq_length())
                return
            except (ValueError, NotImplementedError, AttributeError) as error:
                reason = f"begins with, and cannot be cropped ({error})"
        raise ValueError(
            f"`{CACHE_ARGUMENT}`: the cache holds {length} tokens of another text than `input_ids` {reason}; continue "
            "the cached text, or start with an empty cache."
        )

    def reset(self) -> None:
        """Empty the cache and drop the sharers' caches."""
        super().reset()
        self.sharer_caches, self.unfused_cache = [], None
        self.input_ids = self.hidden_positions = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._select_texts(lambda rows: rows.repeat_interleave(repeats, 0))
        if self.unfused_cache is not None:
            self.unfused_cache.batch_repeat_interleave(repeats)
        for sharer_cache in self.sharer_caches:
            if sharer_cache is not None:
                sharer_cache.select_rows(torch.arange(len(sharer_cache.input_ids)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as assisted decoding does with rejected ones.

        Args:
            tokens_to_remove: Their number, negative as in transformers.
        """
        length = self.get_seq_length()
        super().crop(tokens_to_remove)
        if self.unfused_cache is None:
            # Without response fusion a sharer's cache holds its own tokens; the next turn crops it to the common
            # prefix.
            return
        removed = length - self.get_seq_length()
        self.unfused_cache.crop(-removed)
        for sharer_cache in self.sharer_caches:
            if sharer_cache is not None:
                sharer_cache.crop(sharer_cache.input_ids.shape[1] - removed)

    def _select_texts(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.input_ids is not None:
            self.input_ids = select(self.input_ids)
        if self.hidden_positions is not None:
            self.hidden_positions = select(self.hidden_positions)

    def _select_rows(self, rows: torch.Tensor) -> None:
        self._select_texts(lambda texts: texts[rows.to(texts.device)])
        if self.unfused_cache is not None:
            self.unfused_cache.batch_select_indices(rows)
        for sharer_cache in self.sharer_caches:
            if sharer_cache is not None:
                sharer_cache.select_rows(rows)


class RecordingCache(Cache):
    """A copy of a cache that records the new states; the original stays as it is."""

    def __init__(self, cache: Cache) -> None:
        self._copied = copy_cache(cache)
        super().__init__(layers=self._copied.layers)
        #: Key and value states of every cached layer.
        self.recorded: LayerStates = []

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Record the states of this call and return all states of the layer."""
        # Fusion changes them in place, and values may be views that autograd would not let it change.
        self.recorded.append((key_states.clone(), value_states.clone()))
        return self._copied.update(key_states, value_states, layer_idx, *args, **kwargs)
