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
    if hasattr(part, "sharer_network"):
        sharer = small_network(part.sharer_network, row, sharer)
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


def small_network(part: torch.nn.Module, row: int, x: torch.Tensor) -> torch.Tensor:
    """Three linear layers with GELU between them."""
    for layer in (part.in_proj, part.hidden_proj):
        x = gelu(linear(x, layer.weight[row], layer.bias[row]))
    return linear(x, part.out_proj.weight[row], part.out_proj.bias[row])


def turned(model: torch.nn.Module, heads: torch.Tensor, angle: int) -> torch.Tensor:
    """Keys `(num_heads, head_dim)` turned by a number of positions, first half with second half, as Llama does."""
    config = model.config
    half = heads.shape[-1] // 2
    frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)
    first, second = heads[:, :half], heads[:, half:]
    cos, sin = (angle * frequencies).cos(), (angle * frequencies).sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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
                free = model.config.unrotate_keys and kind == 0
                before = own[0, :, past_length + t].clone()
                if free:
                    before = turned(model.receiver, before, -(past_length + t))
                before = before.flatten()
                now = before.clone()
                for fuser, sharer, sharer_cache, alignment in zip(
                    model.fuser, model.sharers, sharer_caches, alignments, strict=True
                ):
                    if alignment[t] < 0:
                        continue
                    parts, encoder = [], getattr(fuser, "encoder", None)
                    sources = fuser.sources[entry]
                    if encoder is not None:
                        (latent,) = sources
                        sources = encoder.sources[latent]
                    for source in sources:
                        source_kind, source_layer = divmod(source, len(sharer_cache.layers))
                        shared_layer = sharer_cache.layers[source_layer]
                        part = (shared_layer.keys, shared_layer.values)[source_kind][0, :, alignment[t]]
                        if model.config.unrotate_keys and source_kind == 0:
                            part = turned(sharer, part, -int(alignment[t]))
                        parts.append(part.flatten())
                    shared = torch.cat(parts)
                    if encoder is not None:
                        number, members = next(
                            (i, members) for i, members in enumerate(encoder.members) if latent in members
                        )
                        shared = small_network(encoder.networks[number], members.index(latent), shared)
                    seen = now if model.config.fusion_mode == "sequential" else before
                    now = now + naive_change(fuser, entry, shared, seen)
                now = now.view(own.shape[1], -1)
                own[0, :, past_length + t] = turned(model.receiver, now, past_length + t) if free else now
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
