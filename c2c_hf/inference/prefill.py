"""Run a frozen base model over a text and hand out its key/value states."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .._compat import CACHE_ARGUMENT, accepts_argument, copy_cache
from ..configuration_c2c import LayerShape
from .fingerprints import SharerSource, fingerprint, tokenizer_hash
from .passing_caches import StatesComplete, StoppingCache, is_untouched
from .state_file import StateContent, decode_states, encode_states, write_whole

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


def prefill(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    logits_to_keep: int = 0,
    with_gradient: bool = False,
    num_layers: int | None = None,
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
        num_layers: How many layers the model caches. Where neither logits nor gradients are wanted, it stops as soon
            as the last of them has cached its states: attention and MLP of that layer are wanted by nobody. `None`: it
            runs to its end, as it does where something is hooked on it or compiled.
        **kwargs: Passed on to the model.

    Returns:
        `(batch_size, logits_to_keep, vocab_size)`, or `None` for 0.
    """
    if position_ids is not None and accepts_argument(model, "position_ids"):
        kwargs["position_ids"] = position_ids
    if logits_to_keep and accepts_argument(model, "logits_to_keep"):
        kwargs["logits_to_keep"] = logits_to_keep
    body = model if logits_to_keep else model.base_model
    if num_layers and not logits_to_keep and not with_gradient and is_untouched(model):
        cache = StoppingCache(cache, num_layers)
    with torch.set_grad_enabled(with_gradient), suppress(StatesComplete):
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
class SharerCache:
    """What one sharer has read: its tokens and their key/value states.

    Attributes:
        input_ids: `(batch_size, seq_len)`, the sharer's tokens.
        attention_mask: `(batch_size, seq_len)`, 0 at padding and at tokens that the sharer does not see.
        cache: Its full-length cache.
        source: Which sharer has read, where states come from elsewhere.

    Example:
        ```python
        # Where the sharer is:
        state = SharerCache.prefill(sharer, inputs["sharer_input_ids"], inputs["sharer_attention_mask"])
        message = state.to_safetensors(int8=True)
        # Where the receiver is, without the sharer:
        model = C2CForCausalLM.from_pretrained("me/fuser", load_sharers=False)
        out = model.generate(**inputs, sharer_caches=SharerCache.from_safetensors(message))
        ```
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    cache: Cache
    source: SharerSource | None = None

    @classmethod
    def prefill(
        cls,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
    ) -> "SharerCache":
        """Let a sharer read texts, for a receiver elsewhere.

        Args:
            model: The sharer.
            input_ids: `(batch_size, seq_len)`, its tokens, as the receiver will name them (`sharer_input_ids`).
            attention_mask: `(batch_size, seq_len)`. `None`: no padding.
            tokenizer: The sharer's; with it the receiver's side compares the vocabulary too.
            revision: The commit from which the model was loaded, to be compared as well. `None`: what it knows itself.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        state = read_text(model, input_ids, attention_mask)
        vocabulary = None if tokenizer is None else tokenizer_hash(tokenizer)
        revision = revision or getattr(model.config, "_commit_hash", None)
        state.source = SharerSource(fingerprint(model), revision, vocabulary)
        return state

    def to_safetensors(self, path: str | Path | None = None, int8: bool = False) -> bytes:
        """Write the text, the states and which sharer has read them, as a message or a file.

        Args:
            path: Of a file to write as well. `None`: none.
            int8: Round the states to 8 bits, see [`~state_file.encode_states`].

        Returns:
            The message.
        """
        layers = cached_states(self.cache)
        data = encode_states(
            StateContent(self.input_ids, self.attention_mask, layers, self.source or SharerSource()), int8
        )
        if path is not None:
            write_whole(Path(path), data)
        return data

    @classmethod
    def from_safetensors(cls, data: bytes | str | Path) -> "SharerCache":
        """Read what [`SharerCache.to_safetensors`] wrote.

        Args:
            data: The message, or the path of a file.

        Raises:
            ValueError: It is damaged, or no message of this kind.
            OSError: There is no such file.
        """
        content = decode_states(data)
        cache = full_length_cache()
        for layer_idx, pair in enumerate(content.layers):
            cache.update(*pair, layer_idx)
        return cls(content.input_ids, content.attention_mask, cache, content.source)

    def repeat_interleave(self, repeats: int, dim: int = 0) -> "SharerCache":
        """Return a state in which every row stands `repeats` times; this one stays as it is."""
        copied = replace(self, cache=copy_cache(self.cache))
        if repeats > 1:
            copied.select_rows(torch.arange(len(self.input_ids)).repeat_interleave(repeats, dim))
        return copied

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
    known: SharerCache | None = None,
    num_layers: int | None = None,
) -> SharerCache:
    """Let a sharer read a text, continuing from the part that it has read before.

    Args:
        model: The sharer.
        input_ids: `(batch_size, seq_len)`, the whole text.
        attention_mask: `(batch_size, seq_len)`.
        position_ids: `(batch_size, seq_len)`, or `None`: counted from the mask.
        known: What it has read before, or `None`. From where the texts differ, it reads again.
        num_layers: See [`prefill`].

    Returns:
        The state of the whole text; `known` itself, grown, where there is a common beginning.
    """
    device = input_device(model)
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    position_ids = position_ids_from_mask(attention_mask) if position_ids is None else position_ids.to(device)
    start = 0 if known is None else known.common_prefix(input_ids, attention_mask)
    if known is None or start == 0:
        known = SharerCache(input_ids, attention_mask, full_length_cache())
    else:
        known.crop(start)
        known.input_ids, known.attention_mask = input_ids, attention_mask
    if start < input_ids.shape[1]:
        new = (input_ids[:, start:], attention_mask, position_ids[:, start:])
        prefill(model, known.cache, *new, num_layers=num_layers)
    return known
