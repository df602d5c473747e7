"""What differs between the supported transformers releases, in one place. Each entry says when it can go."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renames the cache argument of models, outputs and `generate` from `past_key_values` to `cache`.
# Goes when 5.24 is the oldest supported release.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"


def pop_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Take the cache out of keyword arguments, under whichever name it came."""
    cache = kwargs.pop("cache", None)
    legacy = kwargs.pop("past_key_values", None)
    return legacy if cache is None else cache


def accepts_argument(model: PreTrainedModel, name: str) -> bool:
    """Say whether a model's `forward` names an argument."""
    return name in _arguments(type(model).forward)


def accepts_keywords(model: PreTrainedModel) -> bool:
    """Say whether a model's `forward` takes keyword arguments that it does not name."""
    return _takes_keywords(type(model).forward)


@functools.cache
def _arguments(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _takes_keywords(function: Callable) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def empty_dynamic_layers(cache: Cache) -> None:
    """Let the layers of a cache that was reset grow anew from nothing.

    Goes when 5.24 is the oldest supported release, whose `reset` does that; earlier ones fill them with zeros.
    """
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            layer.keys = layer.values = None
            layer.is_initialized = False


def copy_cache(cache: Cache) -> Cache:
    """Copy a cache so that updating the copy leaves the original as it is.

    Dynamic and quantized layers replace their tensors when they grow, so copies of the layer objects suffice. Static
    layers write in place, hence their tensors are copied too. Copies share the offloading stream, which has no copy.
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        if isinstance(layer, StaticLayer):
            tensors = {name: value.clone() for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
            vars(layer).update(tensors)
    return copied
