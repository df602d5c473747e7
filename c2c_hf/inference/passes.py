"""The pieces of a forward pass in two: inputs cut, caches filled, logits joined."""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .fusion import FusionPlan
from .prefill import LayerStates


def new_length(receiver_inputs: dict[str, Any]) -> int:
    """Return the number of new tokens, given as ids or as embeddings."""
    tokens = receiver_inputs["input_ids"]
    return (receiver_inputs["inputs_embeds"] if tokens is None else tokens).shape[1]


def kept_columns(logits_to_keep: int | torch.Tensor, seq_len: int) -> int:
    """Return of how many last columns logits are wanted; named positions may be any."""
    return seq_len if isinstance(logits_to_keep, torch.Tensor) or not logits_to_keep else logits_to_keep


def slice_inputs(receiver_inputs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """Cut new tokens and their positions; the mask covers the past as well and stays."""
    sliced = dict(receiver_inputs)
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if sliced[name] is not None:
            sliced[name] = sliced[name][:, start:end]
    return sliced


def states_from(
    states: tuple[torch.Tensor, torch.Tensor], start: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states from `start` on, filled up to `length` positions."""
    keys, values = (state[:, :, start:] for state in states)
    padding = (0, 0, 0, length - keys.shape[2])
    return torch.nn.functional.pad(keys, padding), torch.nn.functional.pad(values, padding)


def fill_cache(cache: Cache, states: LayerStates, length: int) -> None:
    """Put the first positions into a cache, letting go of each layer's states as soon as they are in."""
    states.reverse()
    for layer_idx in range(len(states)):
        keys, values = states.pop()
        cache.update(keys[:, :, :length], values[:, :, :length], layer_idx)


def join_logits(
    clean: torch.Tensor | None, tail: torch.Tensor | None, plan: FusionPlan, first_kept: int, seq_len: int
) -> torch.Tensor:
    """Take each row's logits from the clean pass up to its own start and from the tail behind it."""
    if clean is None or tail is None:
        (only,) = (logits for logits in (clean, tail) if logits is not None)
        return only
    tail_first = seq_len - tail.shape[1]
    head, overlap = clean[:, : tail_first - first_kept], clean[:, tail_first - first_kept :]
    columns = torch.arange(tail_first, plan.end)
    from_clean = (columns < plan.row_starts.unsqueeze(1)).to(tail.device).unsqueeze(-1)
    joined = torch.where(from_clean, overlap, tail[:, : plan.end - tail_first])
    return torch.cat([head, joined, tail[:, plan.end - tail_first :]], dim=1)


def check_length(role: str, model: PreTrainedModel, length: int) -> None:
    """Refuse a text that is longer than a model's context.

    Raises:
        ValueError: It is.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit > 0:
        raise ValueError(
            f"`{role}`: the text has {length} tokens, but {type(model).__name__} reads at most {limit}; shorten it or "
            "truncate in the processor."
        )
