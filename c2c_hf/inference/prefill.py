"""Prefill of frozen models: a forward pass that fills a key/value cache."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeAlias, TypeVar

import torch
from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from .._compat import CACHE_ARGUMENT, accepts_argument

#: Key and value states of every cached layer, `(batch_size, num_key_value_heads, seq_len, head_dim)` each.
LayerStates: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]

First = TypeVar("First")
Other = TypeVar("Other")

#: Prefills of more tokens keep all cores busy by themselves. Both prefills of the demo pair at once take 0.6 of their
#: time in turn for 64 to 512 tokens, 0.7 for 1,024 and 0.9 for 2,048 (bfloat16, two cores; float32: 0.9 to 0.95).
MAX_CONCURRENT_TOKENS = 1024

#: Found by running the models, see `probe.py`.
_takes_keyword_positions: dict[type[PreTrainedModel], bool] = {}


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count real tokens only, so that a padded row gets the positions that it has without padding.

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


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model expects its ids, also when its layers are spread over several."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if has_offloaded_params(embedding):
        # accelerate brings the weight there for the call alone.
        return torch.device(embedding._hf_hook.execution_device)
    return embedding.weight.device


def register_keyword_positions(model_class: type[PreTrainedModel], takes: bool) -> None:
    """Record whether a class takes `position_ids` without naming them, which its signature does not say."""
    _takes_keyword_positions[model_class] = takes


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Say whether a model's `forward` takes position ids (ALiBi models do not)."""
    return accepts_argument(model, "position_ids") or _takes_keyword_positions.get(type(model), False)


def prefill(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    logits_to_keep: int = 0,
    with_gradient: bool = False,
    model_inputs: Mapping[str, Any] | None = None,
) -> torch.Tensor | None:
    """Run a model over tokens; their key/value states go into `cache`.

    Args:
        model: The frozen causal language model.
        cache: Grows by the new tokens.
        input_ids: `(batch_size, seq_len)`, or `None` with `inputs_embeds`.
        attention_mask: `(batch_size, past_len + seq_len)`, or `None` without padding.
        position_ids: `(batch_size, seq_len)`, or `None`: left to the model.
        inputs_embeds: `(batch_size, seq_len, hidden_size)`, or `None`.
        logits_to_keep: Number of last positions whose logits are returned. 0: none, and the head does not run.
        with_gradient: Whether gradients may flow, as an adapter in training needs.
        model_inputs: Further arguments of the model, such as `pixel_values`, which replace the others.

    Returns:
        `(batch_size, logits_to_keep, vocab_size)`, or `None` for 0.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    if position_ids is not None and takes_position_ids(model):
        inputs["position_ids"] = position_ids
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if logits_to_keep and tokens is not None and accepts_argument(model, "logits_to_keep"):
        inputs["logits_to_keep"] = last_positions(tokens, logits_to_keep)
    body = model if logits_to_keep else model.base_model
    with torch.set_grad_enabled(with_gradient):
        inputs |= {"attention_mask": attention_mask, "use_cache": True, CACHE_ARGUMENT: cache, **(model_inputs or {})}
        outputs = body(**inputs)
    return outputs.logits[:, -logits_to_keep:] if logits_to_keep else None


def last_positions(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Return the last `count` positions of `tokens`, `(batch_size, seq_len, ...)`, as `logits_to_keep` takes them.

    Models index hidden states by them, which makes a copy. A number makes a slice, whose product with the head is 200
    times slower in bfloat16 on the CPU: 1.2 s in place of 0.006 (torch 2.13, two cores, 16 rows, 49,152 tokens).
    """
    seq_len = tokens.shape[1]
    return torch.arange(max(0, seq_len - count), seq_len, device=tokens.device)


def run_concurrently(
    first: Callable[[], First], others: Sequence[Callable[[], Other]], models: Sequence[nn.Module], num_tokens: int
) -> tuple[First, list[Other]]:
    """Call functions that run one model each, at the same time where that is faster, else in turn.

    It is faster on the CPU, where one model leaves cores idle between its many small operations. Work on other devices
    is queued, and overlaps without threads.

    Args:
        first: Runs in the calling thread and may build an autograd graph there.
        others: The other calls.
        models: The model that each call runs, that of `first` first.
        num_tokens: Number of tokens of each call, of all rows together.

    Returns:
        The results.
    """
    # A user who sets the number of threads to one gets one, and a compiler cannot trace threads.
    if (
        not others
        or num_tokens > MAX_CONCURRENT_TOKENS
        or torch.get_num_threads() == 1
        or torch.compiler.is_compiling()
        or len({id(model) for model in models}) < len(models)
        or any(input_device(model).type != "cpu" for model in models)
    ):
        return first(), [call() for call in others]
    # A pool of its own for each call: threads that outlive the call would be missing in a forked process.
    with ThreadPoolExecutor(len(others)) as pool:
        futures = [pool.submit(copy_context().run, _with_current_modes(call)) for call in others]
        return first(), [future.result() for future in futures]


def _with_current_modes(call: Callable[[], Other]) -> Callable[[], Other]:
    """Let a call in another thread run in the modes of autograd and autocast of this one."""
    needs_grad, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run() -> Other:
        autocast = torch.autocast("cpu", dtype, casts)
        with torch.inference_mode(is_inference), torch.set_grad_enabled(needs_grad), autocast:
            return call()

    return run
