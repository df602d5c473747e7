"""Caches of the receiver: [`C2CCache`], and a temporary copy that records the states of one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache

from .._compat import CACHE_ARGUMENT, copy_cache, empty_dynamic_layers
from .prefill import LayerStates, full_length_cache
from .sharer_cache import SharerCache


@dataclass
class CachedText:
    """The receiver's cached tokens, and which of them hold states of the sharers.

    Attributes:
        input_ids: `(batch_size, seq_len)`.
        is_real: `(batch_size, seq_len)`, bool: no padding.
        alignments: Per sharer `(batch_size, seq_len)`: its position whose state was fused into each token, or fills
            the slot; -1: none. Empty: nothing was fused.
    """

    input_ids: torch.Tensor
    is_real: torch.Tensor
    alignments: list[torch.Tensor] = field(default_factory=list)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "CachedText":
        """Return the text with all tensors changed in the same way."""
        return CachedText(change(self.input_ids), change(self.is_real), [change(each) for each in self.alignments])

    @classmethod
    def join(cls, parts: Sequence["CachedText"]) -> "CachedText":
        """Return parts of one text, one after the other, as one."""
        num_sharers, device = max(len(part.alignments) for part in parts), parts[0].input_ids.device
        aligned = [part.alignments or [torch.full_like(part.input_ids, -1)] * num_sharers for part in parts]
        return cls(
            torch.cat([part.input_ids.to(device) for part in parts], 1),
            torch.cat([part.is_real.to(device) for part in parts], 1),
            [torch.cat([each[index].to(device) for each in aligned], 1) for index in range(num_sharers)],
        )


class C2CCache(Cache):
    """A receiver's cache with fused states, around any cache of transformers.

    The layers are those of the wrapped cache, so its length, mask, reorder and crop methods act on them, and every
    state enters through the wrapped cache's own `update`. In addition it keeps the sharers' caches, which a later turn
    continues, with `fuse_response` the receiver's own unfused states, and the text that is cached: `generate` keeps
    what its prompt has in common with it, memory slots included, and drops the rest.

    Args:
        cache: The cache to wrap: dynamic, static, quantized or offloaded. `None`: a new dynamic one.

    Example:
        ```python
        cache = C2CCache()
        out = model.generate(**first_turn, cache=cache)
        out = model.generate(**both_turns, cache=cache)  # prefills and fuses the new turn only
        out = model.generate(**another_question, cache=cache)  # keeps the common beginning
        ```
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self.receiver_cache = DynamicCache() if cache is None else cache
        super().__init__(layers=self.receiver_cache.layers)
        self.sharer_caches: list[SharerCache | None] = []
        self.unfused_cache: Cache | None = None
        #: The cached text in parts; one part per forward pass, put together where it is asked for.
        self._parts: list[CachedText] = []
        # Unknown once tokens were cached that nobody recorded: embeddings, or what is in the wrapped cache already.
        self._is_text_known = int(self.receiver_cache.get_seq_length()) == 0
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

    @property
    def text(self) -> CachedText | None:
        """The receiver's cached text; `None`: unknown, or empty."""
        if not self._is_text_known or not self._parts:
            return None
        if len(self._parts) > 1:
            self._parts = [CachedText.join(self._parts)]
        # After a forward pass that failed, or one that was compiled, it is not the whole.
        return self._parts[0] if self._parts[0].input_ids.shape[1] == int(self.get_seq_length()) else None

    @property
    def input_ids(self) -> torch.Tensor | None:
        """The receiver's cached tokens, `(batch_size, length)`; `None`: unknown, or none."""
        return None if self.text is None else self.text.input_ids

    def record_tokens(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: object = None,
        alignments: Sequence[torch.Tensor] = (),
    ) -> None:
        """Record the tokens of a forward pass that has filled the cache.

        Args:
            input_ids: `(batch_size, seq_len)`, the new tokens; `None`: they are unknown.
            attention_mask: `(batch_size, past_len + seq_len)`; `None`, or of another form: no padding.
            alignments: Per sharer `(batch_size, seq_len)`, see [`CachedText`]; none where nothing was fused.
        """
        if torch.compiler.is_compiling():
            # A graph would be compiled anew for every length of the list; `generate` completes it afterwards.
            return
        if input_ids is None:
            self._is_text_known = False
            return
        is_real = torch.ones_like(input_ids, dtype=torch.bool)
        # For static caches `generate` makes masks of another form, when the prompt is cached.
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            is_real = attention_mask[:, -input_ids.shape[1] :] != 0
        self._parts.append(CachedText(input_ids, is_real, list(alignments)))

    def complete_text(self, sequences: torch.Tensor) -> None:
        """Record the last tokens, which compiled forward passes have cached.

        Args:
            sequences: `(batch_size, length)`, the whole text.
        """
        start = sum(part.input_ids.shape[1] for part in self._parts)
        missing = sequences[:, start : int(self.get_seq_length())]
        if missing.shape[1] > 0:
            self.record_tokens(missing)

    def crop_to_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        alignments: Sequence[torch.Tensor] | None = None,
        sharer_texts: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        has_slots: bool = False,
    ) -> None:
        """Drop what is cached of another text than the given one, from the first token on that differs.

        In a chat, an answer may be tokenized otherwise in the next turn than it was generated; several questions about
        one document have a beginning in common. Memory slots are kept all together or not at all: what a slot holds
        depends on the document behind it, too. Layers that cannot be cropped are emptied.

        Args:
            input_ids: `(batch_size, seq_len)`, the whole text.
            attention_mask: `(batch_size, seq_len)`.
            alignments: Per sharer `(batch_size, seq_len)`: the sharer position that is to be fused into each token, or
                fills a slot, or -1. `None`: not compared.
            sharer_texts: Per sharer its ids and mask, `(batch_size, sharer_len)` each. `None`: not compared.
            has_slots: Whether the alignments are those of memory slots.

        Raises:
            ValueError: The texts have another number of rows, or the cached text is unknown and not shorter than the
                given one.
        """
        length, seq_len = int(self.get_seq_length()), input_ids.shape[1]
        cached = self.text
        if length == 0 or (cached is None and seq_len > length):
            return
        if cached is None or len(input_ids) != len(cached.input_ids):
            held = "an unknown text" if cached is None else f"a text of {len(cached.input_ids)} rows"
            raise ValueError(
                f"`{CACHE_ARGUMENT}`: the cache holds {length} tokens of {held}, but `input_ids`, the whole text, has "
                f"shape {tuple(input_ids.shape)}; continue the cached text, or start with an empty cache."
            )
        width = min(length, seq_len)
        new = CachedText(input_ids, attention_mask != 0, list(alignments or [])).map(
            lambda each: each[:, :width].to(cached.input_ids.device)
        )
        old = cached.map(lambda each: each[:, :width])
        if self.hidden_positions is not None:
            # Slots that are masked while fusion is off.
            hidden = self.hidden_positions[:, :width].to(old.is_real.device)
            old.is_real = old.is_real | torch.nn.functional.pad(hidden, (0, width - hidden.shape[1]))
        differs = (new.is_real != old.is_real) | (new.is_real & (new.input_ids != old.input_ids))
        for index, alignment in enumerate(new.alignments):
            differs |= self._differing_states(index, old, alignment, sharer_texts, has_slots)
        columns = differs.any(0).nonzero()
        # The last token is computed in any case, for its logits.
        kept = min(int(columns[0]) if len(columns) else width, seq_len - 1)
        if kept == length:
            return
        if has_slots and any(bool((alignment[:, kept:] >= 0).any()) for alignment in alignments or []):
            # All slots are filled in one pass, before which nothing but the tokens in front of them is cached.
            kept = 0
        if kept > 0 and self.is_croppable:
            try:
                self.crop(kept - length)
            except (RuntimeError, ValueError):
                # Layers with a sliding window, which have dropped what would be needed.
                kept = 0
        else:
            kept = 0
        if kept == 0:
            self._empty()

    def _differing_states(
        self,
        index: int,
        cached: CachedText,
        alignment: torch.Tensor,
        sharer_texts: Sequence[tuple[torch.Tensor, torch.Tensor]] | None,
        has_slots: bool,
    ) -> torch.Tensor:
        """Return where a sharer's states in the cache are not those that are wanted, `(batch_size, seq_len)`, bool."""
        before = cached.alignments[index] if cached.alignments else torch.full_like(alignment, -1)
        fused = before >= 0
        # Without slots, a generated answer is aligned once it is part of the prompt; it stays as it was generated.
        differs = before != alignment if has_slots else fused & (before != alignment)
        sharer_cache = self.sharer_caches[index] if self.sharer_caches else None
        if sharer_texts is not None and sharer_cache is not None:
            ids, mask = (each.to(sharer_cache.input_ids.device) for each in sharer_texts[index])
            differs |= fused & (before >= sharer_cache.common_prefix(ids, mask))
        return differs

    def reset(self) -> None:
        """Empty the cache and drop the sharers' caches."""
        self._empty()
        self.sharer_caches = []

    def _empty(self) -> None:
        super().reset()
        empty_dynamic_layers(self)
        self.unfused_cache = self.hidden_positions = None
        self._parts, self._is_text_known = [], True

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
        length = int(self.get_seq_length())
        super().crop(tokens_to_remove)
        self._crop_text(length)
        if self.unfused_cache is None:
            # Without response fusion a sharer's cache holds its own tokens; the next turn crops it to the common
            # prefix.
            return
        removed = length - int(self.get_seq_length())
        self.unfused_cache.crop(-removed)
        for sharer_cache in self.sharer_caches:
            if sharer_cache is not None:
                sharer_cache.crop(sharer_cache.input_ids.shape[1] - removed)

    def _crop_text(self, old_length: int) -> None:
        """Shorten the text as the layers were, which held `old_length` tokens before."""
        length, num_recorded = int(self.get_seq_length()), sum(part.input_ids.shape[1] for part in self._parts)
        if length == 0:
            self._parts, self._is_text_known = [], True
        elif num_recorded != old_length:
            self._is_text_known = False
        elif length < old_length:
            self._parts = [CachedText.join(self._parts).map(lambda each: each[:, :length])]
        if self.hidden_positions is not None:
            self.hidden_positions = self.hidden_positions[:, :length]

    def _select_texts(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._parts:
            self._parts = [CachedText.join(self._parts).map(select)]
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
