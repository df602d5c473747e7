"""The receiver's cache, whose layers hold fused key/value states."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache

from .prefill import LayerStates, SharerCache, full_length_cache


class C2CCache(Cache):
    """A receiver's cache that fuses, around any cache of transformers.

    The layers are those of the wrapped cache, so its length, mask, reorder and crop methods act on them as ever, and
    every state enters through the wrapped cache's own `update`. In addition it keeps what a plain cache cannot hold:
    what the sharers have read, so that a later turn reads on from there, and, with `fuse_response`, the receiver's own
    unfused states.

    Args:
        cache: The cache to wrap: dynamic, static, quantized or offloaded. `None`: a new dynamic one.

    Example:
        ```python
        cache = C2CCache()
        out = model.generate(**first_turn, cache=cache)
        out = model.generate(**both_turns, cache=cache)  # reads and fuses the new turn only
        ```
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self.receiver_cache = DynamicCache() if cache is None else cache
        super().__init__(layers=self.receiver_cache.layers)
        self.sharer_caches: list[SharerCache | None] = []
        self.clean_cache: Cache | None = None
        self._substitute: tuple[LayerStates, torch.Tensor] | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache new states, fused ones in place of the receiver's own where [`C2CCache.substituting`] says so.

        Args:
            key_states: `(batch_size, num_key_value_heads, seq_len, head_dim)`.
            value_states: The same shape, or with the values' own head_dim.
            layer_idx: Index of the layer.
            *args: Passed on to the wrapped cache.
            **kwargs: Passed on to the wrapped cache.

        Returns:
            All key and value states of the layer.
        """
        if self._substitute is not None:
            fused, positions = self._substitute
            mask = positions.to(key_states.device)[:, None, :, None]
            key_states = torch.where(mask, fused[layer_idx][0], key_states)
            value_states = torch.where(mask, fused[layer_idx][1], value_states)
        return self.receiver_cache.update(key_states, value_states, layer_idx, *args, **kwargs)

    @contextmanager
    def substituting(self, fused: LayerStates, positions: torch.Tensor) -> Iterator[None]:
        """Put fused states in place of those that the receiver computes, inside `update`.

        Args:
            fused: States of the tokens that the receiver is about to read.
            positions: `(batch_size, seq_len)`, bool: where they replace the receiver's own.
        """
        self._substitute = (fused, positions)
        try:
            yield
        finally:
            self._substitute = None

    def keep_clean(self) -> Cache:
        """Return the cache of the receiver's own, unfused states, which is kept beside the fused one from now on."""
        if self.clean_cache is None:
            self.clean_cache = full_length_cache()
        return self.clean_cache

    def reset(self) -> None:
        """Empty the cache and forget what was read."""
        super().reset()
        self.sharer_caches, self.clean_cache = [], None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.clean_cache is not None:
            self.clean_cache.batch_repeat_interleave(repeats)
        for state in self.sharer_caches:
            if state is not None:
                state.select_rows(torch.arange(len(state.input_ids)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, as assisted decoding does with rejected ones."""
        length = self.get_seq_length()
        super().crop(tokens_to_remove)
        if self.clean_cache is None:
            # Without response fusion sharers read texts, not the receiver's tokens: a later turn compares what they
            # read.
            return
        removed = length - self.get_seq_length()
        self.clean_cache.crop(-removed)
        for state in self.sharer_caches:
            if state is not None:
                state.crop(state.input_ids.shape[1] - removed)

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.clean_cache is not None:
            self.clean_cache.batch_select_indices(rows)
        for state in self.sharer_caches:
            if state is not None:
                state.select_rows(rows)
