"""Caches for a single forward pass, around one that holds the states: one records, one stops the pass."""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .._compat import copy_cache


class RecordingCache(Cache):
    """Continues a cache without changing it, and keeps the states that come in."""

    def __init__(self, cache: Cache) -> None:
        self._copied = copy_cache(cache)
        super().__init__(layers=self._copied.layers)
        #: Key and value states of every cached layer.
        self.recorded: list[tuple[torch.Tensor, torch.Tensor]] = []

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


class StatesComplete(Exception):
    """Every layer's states are cached."""


class StoppingCache(Cache):
    """Passes states on to a cache, and ends the model's forward pass when the last layer's are in."""

    def __init__(self, cache: Cache, num_layers: int) -> None:
        super().__init__(layers=cache.layers)
        self._cache, self._last = cache, num_layers - 1

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache new states and return all states of the layer, unless it is the last one."""
        states = self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._last:
            raise StatesComplete
        return states


def is_untouched(model: PreTrainedModel) -> bool:
    """Say whether nothing is hooked on a model, patched or compiled: how and where it runs is nobody's business.

    Its head is left out, which does not run where only states are wanted.
    """
    head = model.get_output_embeddings()
    return not torch.compiler.is_compiling() and not any(
        module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl or "forward" in vars(module)
        for module in model.modules()
        if module is not head
    )
