"""Cache fusion as slow and plain as it can be written: one row, one layer, one head at a time.

Takes weights from a model and nothing else of the package's computation.
"""

import torch
from torch.nn.functional import gelu, linear
from transformers import DynamicCache

from c2c_hf import C2CForCausalLM
from c2c_hf._compat import CACHE_ARGUMENT


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def feed_forward(x: torch.Tensor, part: torch.nn.Module, row: int) -> torch.Tensor:
    hidden = gelu(linear(rms_norm(x, part.norm.weight[row]), part.up_proj.weight[row]))
    return x + linear(hidden, part.down_proj.weight[row])


def hidden_and_weight(
    fuser: torch.nn.Module, entry: int, sharer: torch.Tensor, receiver: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What feeds the last layers of an entry's projector, and each head's weight, 0 behind a shut gate."""
    group, row = fuser.locate(entry)
    part = group.projector
    x = linear(torch.cat([sharer, receiver]), part.in_proj.weight[row], part.in_proj.bias[row])
    x = feed_forward(x, part.shared_ffn, row)
    weight = linear(feed_forward(x, part.weight_ffn, row), part.weight_proj.weight[row], part.weight_proj.bias[row])
    return x, torch.sigmoid(weight) * (group.gate.gate_logit[row] > 0)


def naive_change(fuser: torch.nn.Module, entry: int, sharer: torch.Tensor, receiver: torch.Tensor) -> torch.Tensor:
    """The change of one token's states of one layer, keys or values: two flat vectors in, one out."""
    group, row = fuser.locate(entry)
    part = group.projector
    x, weight = hidden_and_weight(fuser, entry, sharer, receiver)
    for block in part.feature_ffns:
        x = feed_forward(x, block, row)
    projection = linear(x, part.out_proj.weight[row], part.out_proj.bias[row])
    heads = projection.view(len(weight), -1)
    return torch.cat([w * head for w, head in zip(weight, heads, strict=True)])


def read(model: torch.nn.Module, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Feed ids `(length,)`; returns logits `(length, vocab_size)`."""
    return model(input_ids=ids[None], use_cache=True, **{CACHE_ARGUMENT: cache}).logits[0]


@torch.no_grad()
def naive_prefill(
    model: C2CForCausalLM,
    ids: torch.Tensor,
    sharer_ids: list[torch.Tensor],
    alignments: list[torch.Tensor],
    cache: DynamicCache | None = None,
) -> tuple[torch.Tensor, DynamicCache]:
    """Read one unpadded row over a cache; the alignments are those of its tokens.

    Returns logits `(length, vocab_size)` (the receiver's own up to the last fused position) and the fused cache.
    """
    past = [] if cache is None else [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    past_length = past[0][0].shape[2] if past else 0
    fused_positions = [t for t in range(len(ids)) if any(alignment[t] >= 0 for alignment in alignments)]
    end = fused_positions[-1] + 1 if fused_positions else 0

    clean = DynamicCache()
    for layer_idx, (keys, values) in enumerate(past):
        clean.update(keys, values, layer_idx)
    logits = [read(model.receiver, ids[:end], clean)] if end else []

    sharer_caches = []
    for sharer, own_ids in zip(model.sharers, sharer_ids, strict=True):
        sharer_caches.append(DynamicCache())
        if len(own_ids):
            read(sharer, own_ids, sharer_caches[-1])

    fused = DynamicCache()
    for layer_idx, layer in enumerate(clean.layers if end else []):
        states = []
        for kind, own in enumerate((layer.keys, layer.values)):
            own = own.clone()
            entry = kind * len(clean.layers) + layer_idx
            for t in fused_positions:
                before = own[0, :, past_length + t].flatten().clone()
                now = before.clone()
                for fuser, sharer_cache, alignment in zip(model.fuser, sharer_caches, alignments, strict=True):
                    if alignment[t] < 0:
                        continue
                    shared_layer = sharer_cache.layers[fuser.sources[entry] % len(sharer_cache.layers)]
                    shared = (shared_layer.keys, shared_layer.values)[kind][0, :, alignment[t]].flatten()
                    seen = now if model.config.fusion_mode == "sequential" else before
                    now = now + naive_change(fuser, entry, shared, seen)
                own[0, :, past_length + t] = now.view(own.shape[1], -1)
            states.append(own)
        fused.update(*states, layer_idx)
    if not end:
        for layer_idx, (keys, values) in enumerate(past):
            fused.update(keys, values, layer_idx)
    if end < len(ids):
        logits.append(read(model.receiver, ids[end:], fused))
    return torch.cat(logits), fused


@torch.no_grad()
def naive_greedy(
    model: C2CForCausalLM,
    ids: torch.Tensor,
    sharer_ids: list[torch.Tensor],
    alignments: list[torch.Tensor],
    new_tokens: int,
) -> torch.Tensor:
    """Return the answer's ids `(new_tokens,)`."""
    logits, cache = naive_prefill(model, ids, sharer_ids, alignments)
    answer = [logits[-1].argmax()]
    while len(answer) < new_tokens:
        answer.append(read(model.receiver, answer[-1][None], cache)[-1].argmax())
    return torch.stack(answer)


def own_positions(length: int, num_sharers: int = 1) -> list[torch.Tensor]:
    """The default alignment: every position but the last reads its own."""
    alignment = torch.arange(length)
    alignment[-1] = -1
    return [alignment] * num_sharers
