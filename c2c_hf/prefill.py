"""Run a frozen base model over a text and hand out its key/value states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from ._compat import CACHE_ARGUMENT, accepts_argument, copy_cache
from .configuration_c2c import LayerShape

#: Key and value states of every cached layer, `(batch_size, num_key_value_heads, seq_len, head_dim)` each.
LayerStates = list[tuple[torch.Tensor, torch.Tensor]]


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count real tokens only, so that a padded row gets the positions that it has alone.

    Args:
        attention_mask: `(batch_size, seq_len)`, 0 at padding.

    Returns:
        `(batch_size, seq_len)`, int64; 0 at leading padding.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def full_length_cache() -> DynamicCache:
    """Return a cache that keeps every position, also for layers with a sliding window.

    Without a configuration all its layers are full ones; the model's masks still limit what attends to what.
    """
    return DynamicCache()


def cached_states(cache: Cache) -> LayerStates:
    """Return the key and value states that a full-length cache holds."""
    return [(layer.keys, layer.values) for layer in cache.layers]


class RecordingCache(Cache):
    """Continues a cache without changing it, and keeps the states that come in."""

    def __init__(self, cache: Cache) -> None:
        self._copied = copy_cache(cache)
        super().__init__(layers=self._copied.layers)
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
        # Fusing changes them in place later, and values may be views that autograd would not let it change.
        self.recorded.append((key_states.clone(), value_states.clone()))
        return self._copied.update(key_states, value_states, layer_idx, *args, **kwargs)


def prefill(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    logits_to_keep: int = 0,
    with_gradient: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Read a text; its key/value states go into `cache`.

    Args:
        model: The frozen causal language model.
        cache: Grows by the new tokens.
        input_ids: `(batch_size, seq_len)`, or `None` where `inputs_embeds` come among the keyword arguments.
        attention_mask: `(batch_size, past_len + seq_len)`, or `None` without padding.
        position_ids: `(batch_size, seq_len)`, or `None`: left to the model.
        logits_to_keep: Number of last positions whose logits are wanted. 0: none, and the head does not run.
        with_gradient: Whether gradients may flow, which an adapter in training asks for.
        **kwargs: Passed on to the model.

    Returns:
        `(batch_size, logits_to_keep, vocab_size)`, or `None` for 0.
    """
    if position_ids is not None and accepts_argument(model, "position_ids"):
        kwargs["position_ids"] = position_ids
    if logits_to_keep and accepts_argument(model, "logits_to_keep"):
        kwargs["logits_to_keep"] = logits_to_keep
    body = model if logits_to_keep else model.base_model
    with torch.set_grad_enabled(with_gradient):
        outputs = body(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **{CACHE_ARGUMENT: cache}, **kwargs
        )
    return outputs.logits[:, -logits_to_keep:] if logits_to_keep else None


def probe_layer_shapes(model: PreTrainedModel, role: str) -> list[LayerShape]:
    """Read off what a model puts into its cache, by running it on one token.

    Args:
        model: Any causal language model, on any device.
        role: `"receiver"` or `"sharers"`, for the error.

    Returns:
        `(num_key_value_heads, key head_dim, value head_dim)` per cached layer.

    Raises:
        ValueError: The model keeps no plain key/value cache (recurrent, encoder-decoder, latent attention).
    """
    problem = (
        f"`{role}`: {type(model).__name__} has no plain key/value cache per layer, which C2C needs; use a decoder "
        "whose layers are all attention."
    )
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        raise ValueError(problem)
    cache = full_length_cache()
    token = torch.zeros((1, 1), dtype=torch.long, device=input_device(model))
    try:
        prefill(model, cache, token)
        states = cached_states(cache)
        shapes = [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in states]
        lengths = {states.shape[2] for pair in states for states in pair}
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(problem) from error
    if lengths != {1}:
        raise ValueError(problem)
    return shapes


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model expects its ids, also when its layers are spread over several."""
    return model.get_input_embeddings().weight.device


@dataclass
class SharerState:
    """What one sharer has read: its tokens and their key/value states.

    Attributes:
        input_ids: `(batch_size, seq_len)`, the sharer's tokens.
        attention_mask: `(batch_size, seq_len)`, 0 at padding and at tokens that the sharer does not see.
        cache: Its full-length cache.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    cache: Cache

    def entries(self) -> list[torch.Tensor]:
        """Return every layer's keys, then every layer's values, `(batch_size, num_heads, seq_len, head_dim)` each."""
        states = cached_states(self.cache)
        return [keys for keys, _ in states] + [values for _, values in states]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the given batch rows, as beam search reorders or repeats them."""
        rows = rows.to(self.input_ids.device)
        self.input_ids, self.attention_mask = self.input_ids[rows], self.attention_mask[rows]
        self.cache.batch_select_indices(rows)

    def crop(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.cache.crop(length - self.input_ids.shape[1])
        self.input_ids, self.attention_mask = self.input_ids[:, :length], self.attention_mask[:, :length]

    def common_prefix(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
        """Return how many leading columns of a text are already read, alike in every row."""
        if input_ids.shape[0] != self.input_ids.shape[0]:
            return 0
        length = min(self.input_ids.shape[1], input_ids.shape[1])
        same = self.attention_mask[:, :length] == attention_mask[:, :length]
        # What stands at padding makes no difference.
        same &= (self.input_ids[:, :length] == input_ids[:, :length]) | (attention_mask[:, :length] == 0)
        return int(same.all(0).long().cumprod(0).sum())


def read_text(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    known: SharerState | None = None,
) -> SharerState:
    """Let a sharer read a text, continuing from the part that it has read before.

    Args:
        model: The sharer.
        input_ids: `(batch_size, seq_len)`, the whole text.
        attention_mask: `(batch_size, seq_len)`.
        position_ids: `(batch_size, seq_len)`, or `None`: counted from the mask.
        known: What it has read before, or `None`. From where the texts differ, it reads again.

    Returns:
        The state of the whole text; `known` itself, grown, where there is a common beginning.
    """
    device = input_device(model)
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    position_ids = position_ids_from_mask(attention_mask) if position_ids is None else position_ids.to(device)
    start = 0 if known is None else known.common_prefix(input_ids, attention_mask)
    if known is None or start == 0:
        known = SharerState(input_ids, attention_mask, full_length_cache())
    else:
        known.crop(start)
        known.input_ids, known.attention_mask = input_ids, attention_mask
    if start < input_ids.shape[1]:
        prefill(model, known.cache, input_ids[:, start:], attention_mask, position_ids[:, start:])
    return known


def gather_tokens(states: Sequence[torch.Tensor], rows: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """Pick tokens out of cached states and flatten their heads.

    Args:
        states: Tensors `(batch_size, num_heads, seq_len, head_dim)`, possibly on several devices.
        rows: `(num_tokens,)`, batch rows.
        positions: `(num_tokens,)`, positions in the sequence.

    Returns:
        Tensors `(num_tokens, num_heads * head_dim)`.
    """
    return [state.transpose(1, 2)[rows.to(state.device), positions.to(state.device)].flatten(1) for state in states]
