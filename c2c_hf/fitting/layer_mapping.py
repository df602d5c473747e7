"""`fit_layer_mapping`: which sharer layers a receiver layer is fused with, chosen by how well they predict it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..fusers import build_fusers
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .ridge import AlignedStates, batched_texts, cut_text, first_states, prefill_aligned
from .solver import choose_source_layers, mean_and_scale, score_source_layers


@dataclass
class LayerMappingReport:
    """How well single sharer layers predict the receiver's states, on held-out tokens.

    Attributes:
        num_tokens: Number of tokens, of which the last quarter is held out.
        scores: Per receiver layer, for each sharer layer the share of the variance of its keys and values that is
            explained, the mean over dimensions.
        source_layers: Per receiver layer the sharer layers chosen, in ascending order.
    """

    num_tokens: int
    scores: list[list[float]]
    source_layers: list[list[int]]


@torch.no_grad()
def fit_layer_mapping(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    texts: Iterable[str],
    sharer_index: int = 0,
    num_tokens: int = 8192,
    batch_size: int = 8,
    max_length: int = 512,
    progress: bool = True,
) -> LayerMappingReport:
    """Choose the sharer layers of every receiver layer for `layer_alignment="learned"`, before training.

    Each receiver layer takes the `fusion_source_layers` sharer layers which alone, by ridge regression, predict its
    keys and values best at the aligned positions of texts that both models prefill. They are recorded in the
    configuration and saved with it.

    Args:
        model: A pair with `layer_alignment="learned"`; its fuser for this sharer is replaced by an untrained one.
        processor: The pair's.
        texts: Plain texts; each becomes a user message where the receiver has a chat template.
        sharer_index: Which sharer.
        num_tokens: Number of aligned tokens after which no further text is taken. They are held in memory.
        batch_size: Texts per batch.
        max_length: Receiver tokens after which a text is cut.
        progress: Show a progress bar.

    Returns:
        The scores of all layers, and the chosen ones.

    Raises:
        ValueError: Another `layer_alignment`, or too few texts.
    """
    config = model.config
    if config.mode != "fusion" or config.layer_alignment != "learned":
        raise ValueError(
            "`fit_layer_mapping` needs `mode='fusion'` and `layer_alignment='learned'`, but the model has "
            f"{config.mode!r} and {config.layer_alignment!r}."
        )
    batches = batched_texts(texts, batch_size, progress)
    states = (_aligned_states(model, processor, batch, sharer_index, max_length) for batch in batches)
    first = first_states(states, num_tokens)
    whole = AlignedStates.join(first) if first else None
    if whole is None or len(whole) < 8:
        raise ValueError("`texts` must hold at least 8 aligned tokens, of which a part is held out; give more texts.")
    sharer_entries, receiver_entries = whole.sharer, whole.receiver
    features = (_layer(sharer_entries, layer) for layer in range(len(sharer_entries) // 2))
    targets = [_layer(receiver_entries, layer) for layer in range(len(receiver_entries) // 2)]
    scores = score_source_layers(features, targets)
    sources = choose_source_layers(scores, config.fusion_source_layers)
    config.sharers[sharer_index].fusion_source_layers = sources
    old = model.fuser[sharer_index]
    device = next(old.parameters()).device
    model.fuser[sharer_index] = build_fusers(config)[sharer_index].to(device).train(old.training)
    return LayerMappingReport(len(whole), scores.T.tolist(), sources)


def _aligned_states(
    model: C2CForCausalLM, processor: C2CProcessor, texts: Sequence[str], sharer_index: int, max_length: int
) -> AlignedStates:
    """Prefill both models with texts and return the states of the positions that are fused."""
    texts = [cut_text(processor.tokenizer, text, max_length) for text in texts]
    if processor.chat_template is None:
        batch = processor(texts)
    else:
        batch = processor.apply_chat_template([[{"role": "user", "content": text}] for text in texts])
    own = {
        name: value[sharer_index] if isinstance(value, list) else value
        for name, value in batch.items()
        if name != "sharer_settings"
    }
    return prefill_aligned(model, own, sharer_index)


def _layer(entries: Sequence[torch.Tensor], layer_idx: int) -> torch.Tensor:
    """Return a layer's keys and values side by side, standardized."""
    states = torch.cat([entries[layer_idx], entries[len(entries) // 2 + layer_idx]], dim=-1).float()
    mean, scale = mean_and_scale(states)
    return (states - mean) / scale
