"""How much the sharers change what the receiver caches of a prompt, by word and by layer, and which gates are open."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase

from .._compat import CACHE_ARGUMENT
from ..fusers.c2c import C2CFuser
from ..inference.cache import C2CCache
from ..inference.inputs import tensor_per_sharer
from ..inference.prefill import LayerStates, cached_states, full_length_cache
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor


@dataclass
class StateChanges:
    """Changes of the receiver's states, each the norm of the change over the norm of the receiver's own state.

    Attributes:
        words: The prompt's words, with the largest change of their tokens' value states, mean over the layers.
        layers: `"keys"` and `"values"` -> one change per layer, mean over the prompt. In memory mode values alone,
            since keys are rotated to other positions.
        open_gates: The same names -> per layer whether the gate of any sharer is open; `None` in memory mode.
    """

    words: list[tuple[str, float]]
    layers: dict[str, list[float]]
    open_gates: dict[str, list[bool]] | None


@torch.no_grad()
def measure_state_changes(model: C2CForCausalLM, processor: C2CProcessor, inputs: BatchFeature) -> StateChanges:
    """Prefill a prompt with fusion and without, and compare what the receiver has cached.

    Args:
        model: The pair.
        processor: Its processor.
        inputs: Of the processor, one row, on the model's device. Memory slots are left out.
    """
    fused = _prefill(model, inputs)
    with model.disable_fusion():
        own = _prefill(model, inputs)
    shown = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    is_memory = model.config.mode == "memory"
    if is_memory:
        for alignment in tensor_per_sharer(model.config, "sharer_alignment", inputs["sharer_alignment"]):
            shown &= alignment[0].cpu() < 0
    keys, values = (
        torch.stack([_relative_change(a[index], b[index])[shown] for a, b in zip(fused, own, strict=True)])
        for index in (0, 1)
    )
    ids = inputs["input_ids"][0].cpu()[shown].tolist()
    words = list(_words(processor.tokenizer, ids, values.mean(0).tolist()))
    layers = {"values": values.mean(1).tolist()}
    if not is_memory:
        layers = {"keys": keys.mean(1).tolist(), **layers}
    return StateChanges(words, layers, None if is_memory else _open_gates(model))


def _prefill(model: C2CForCausalLM, inputs: BatchFeature) -> LayerStates:
    cache = C2CCache(full_length_cache())
    model(**inputs, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    return cached_states(cache.receiver_cache)


def _relative_change(fused: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Compare states of one layer, `(1, num_heads, seq_len, head_dim)`; returns `(seq_len,)` in float32 on the CPU."""
    change, size = (torch.linalg.vector_norm(states.float(), dim=(0, 1, 3)) for states in (fused - own, own))
    return (change / size.clamp_min(1e-9)).cpu()


def _words(tokenizer: PreTrainedTokenizerBase, ids: list[int], changes: list[float]) -> Iterator[tuple[str, float]]:
    """Join tokens to words; a character whose bytes are several tokens stays whole."""
    word, largest, start = "", 0.0, 0
    for end in range(1, len(ids) + 1):
        # Some tokenizers decode the space in front of a token only behind another one.
        before = tokenizer.decode(ids[:start])
        piece = tokenizer.decode(ids[:end])[len(before) :]
        if piece.endswith("\ufffd") and end < len(ids):
            continue
        change, start = max(changes[start:end]), end
        if word and (piece[:1].isspace() or word[-1:].isspace()):
            yield word, largest
            word, largest = "", 0.0
        word, largest = word + piece, max(largest, change)
    if word:
        yield word, largest


def _open_gates(model: C2CForCausalLM) -> dict[str, list[bool]]:
    fusers = cast(list[C2CFuser], list(model.fuser))
    num_layers = fusers[0].num_layers
    opened = [False] * (2 * num_layers)
    for fuser in fusers:
        for group in fuser.groups:
            for index in group.gate.open_entries():
                opened[group.entries[index]] = True
    return {"keys": opened[:num_layers], "values": opened[num_layers:]}
