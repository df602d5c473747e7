"""Contexts that the sharers have prefilled, kept for later requests."""

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

from transformers import BatchFeature, DynamicCache

from .._compat import CACHE_ARGUMENT
from ..inference.cache import C2CCache
from ..inference.inputs import tensor_per_sharer
from ..inference.probe import check_length
from ..inference.sharer_cache import SharerCache
from ..modeling_c2c import C2CForCausalLM


@dataclass(frozen=True)
class SharerContext:
    """A text that only the sharers see, and their caches of it.

    Attributes:
        id: A random name.
        text: The text.
        caches: One per sharer, of one row.
    """

    id: str
    text: str
    caches: list[SharerCache]

    @property
    def num_tokens(self) -> list[int]:
        """Per sharer the number of cached tokens."""
        return [cache.input_ids.shape[1] for cache in self.caches]

    @property
    def num_bytes(self) -> int:
        """Size of all key/value states."""
        return sum(states.nbytes for cache in self.caches for states in cache.entries())

    def generate_arguments(self, model: C2CForCausalLM) -> dict[str, Any]:
        """Return the arguments of `generate` by which the sharers need not prefill the context again.

        In memory mode the sharers see the context alone. In fusion mode the question follows it: each sharer's cache
        is continued from where the texts differ.

        Args:
            model: The model that prefilled it.
        """
        if model.config.mode == "memory":
            return {"sharer_caches": self.caches}
        cache = C2CCache(DynamicCache(config=model.receiver.config.get_text_config()))
        cache.sharer_caches = [sharer_cache.copy() for sharer_cache in self.caches]
        return {CACHE_ARGUMENT: cache}


def prefill_context(model: C2CForCausalLM, inputs: BatchFeature, text: str) -> SharerContext:
    """Prefill every sharer with a context.

    Args:
        model: The model.
        inputs: Of its processor, for the context in front of any question.
        text: The context.

    Raises:
        ValueError: It is longer than a sharer's context.
    """
    model.check_processor(inputs["sharer_settings"])
    ids = tensor_per_sharer(model.config, "sharer_input_ids", inputs["sharer_input_ids"])
    masks = tensor_per_sharer(model.config, "sharer_attention_mask", inputs["sharer_attention_mask"])
    caches = []
    for sharer, sharer_ids, mask in zip(model.sharers, ids, masks, strict=True):
        check_length("sharers", sharer, sharer_ids.shape[1])
        caches.append(SharerCache.prefill(sharer, sharer_ids, mask))
    return SharerContext(f"ctx-{secrets.token_hex(12)}", text, caches)


class ContextStore:
    """Prefilled contexts up to a size in bytes; the one whose last use is longest ago goes first.

    Args:
        max_bytes: Largest size of all key/value states together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._contexts: OrderedDict[str, SharerContext] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def num_bytes(self) -> int:
        """Size of all key/value states."""
        with self._lock:
            return sum(context.num_bytes for context in self._contexts.values())

    def add(self, context: SharerContext) -> None:
        """Keep a context, and drop others until all fit.

        Raises:
            ValueError: It does not fit by itself.
        """
        size = context.num_bytes
        if size > self.max_bytes:
            raise ValueError(
                f"The context takes {size / 2**20:.1f} MiB of key/value states, but {self.max_bytes / 2**20:.1f} MiB "
                "may be kept; shorten it."
            )
        with self._lock:
            total = size + sum(other.num_bytes for other in self._contexts.values())
            while total > self.max_bytes:
                total -= self._contexts.popitem(last=False)[1].num_bytes
            self._contexts[context.id] = context

    def get(self, context_id: str) -> SharerContext | None:
        """Return a context, which is then the last one to go; `None`: there is none of this name any more."""
        with self._lock:
            if context_id in self._contexts:
                self._contexts.move_to_end(context_id)
            return self._contexts.get(context_id)

    def remove(self, context_id: str) -> bool:
        """Drop a context; returns whether there was one."""
        with self._lock:
            return self._contexts.pop(context_id, None) is not None
