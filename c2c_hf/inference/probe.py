"""What a base model does with a plain key/value cache, positions and padding, found by running it on a few tokens.

Class flags, configurations and signatures do not say it: models of one class cache keys and values or recurrent
states, depending on their layers; some count positions from another number than 0; some take `position_ids` that their
signature does not name.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from .._compat import CACHE_ARGUMENT, accepts_argument, accepts_keywords
from ..configuration_c2c import C2CConfig, LayerShape
from .prefill import (
    LayerStates,
    cached_states,
    full_length_cache,
    input_device,
    position_ids_from_mask,
    prefill,
    register_keyword_positions,
    takes_position_ids,
)

#: Length of the probed text, how many tokens its first chunk has, and the padding of the shorter row.
_LENGTH, _FIRST_CHUNK, _PADDING = 6, 4, 2
#: Mean relative error up to which states are equal, in float32, and where rounding depends more on the batch shape.
_TOLERANCE, _ROUNDED_TOLERANCE = 3e-4, 0.15


@dataclass(frozen=True)
class ModelProbe:
    """What was found.

    Attributes:
        states: Of the probed text, `(1, num_key_value_heads, seq_len, head_dim)` each per layer.
        first_position: Position id of a text's first token, 0 for nearly all models.
        handles_padding: Whether a row with padding on the left has the states that it has alone.
    """

    states: LayerStates
    first_position: int = 0
    handles_padding: bool = True

    @property
    def layer_shapes(self) -> list[LayerShape]:
        """`(num_key_value_heads, key head_dim, value head_dim)` per cached layer."""
        return [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in self.states]


#: One run per model; a model that is copied or loaded again is run again.
_probes: WeakKeyDictionary[PreTrainedModel, ModelProbe] = WeakKeyDictionary()


def probe_model(model: PreTrainedModel, role: str) -> ModelProbe:
    """Run a model on a few tokens at once, and in two chunks in a padded batch, and compare.

    Args:
        model: Any causal language model, on any device.
        role: `"receiver"` or `"sharers"`, for the error.

    Raises:
        ValueError: The model keeps no plain key/value cache (recurrent, encoder-decoder), or two chunks do not give
            what one gives.
    """
    if model not in _probes:
        found = _probe(model)
        if isinstance(found, str):
            raise _refusal(model, role, found)
        _probes[model] = found
    return _probes[model]


def probe_layer_shapes(model: PreTrainedModel, role: str) -> list[LayerShape]:
    """Measure what a model puts into its cache.

    Args:
        model: Any causal language model, on any device.
        role: `"receiver"` or `"sharers"`, for the error.

    Returns:
        `(num_key_value_heads, key head_dim, value head_dim)` per cached layer.

    Raises:
        ValueError: The model keeps no plain key/value cache; or it is the receiver, and the cache that transformers
            makes for it has fewer layers than it fills.
    """
    shapes = probe_model(model, role).layer_shapes
    num_layers = len(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)
    # Fused states are written into the cache before the model runs, which would add the missing layers.
    if role == "receiver" and 0 < num_layers < len(shapes):
        raise ValueError(
            f"`receiver`: {type(model).__name__} fills {len(shapes)} layers of a cache that transformers makes with "
            f"{num_layers}, so that states cannot be written before it runs; use it as a sharer."
        )
    return shapes


def first_position(model: PreTrainedModel, role: str) -> int:
    """Return the position id of a text's first token; RoBERTa and its kin count from `padding_idx + 1`."""
    return probe_model(model, role).first_position


def model_position_ids(model: PreTrainedModel, attention_mask: torch.Tensor) -> torch.Tensor | None:
    """Return the position ids that a model takes for a batch; `None` if it takes none.

    Args:
        model: A base model, or a `C2CForCausalLM`, which takes those of its receiver.
        attention_mask: `(batch_size, seq_len)`, 0 at padding.

    Returns:
        `(batch_size, seq_len)`, int64, or `None`.
    """
    model = _receiver_of(model)
    if not takes_position_ids(model):
        return None
    return position_ids_from_mask(attention_mask) + first_position(model, "receiver")


def check_padding(role: str, model: PreTrainedModel, attention_mask: torch.Tensor | None) -> None:
    """Refuse padding in front of a row's text where the model cannot compute such a row as it computes it alone.

    Args:
        role: `"receiver"` or `"sharers"`, for the error.
        model: The model.
        attention_mask: `(batch_size, seq_len)`, or `None` without padding.

    Raises:
        ValueError: There is such padding.
    """
    if attention_mask is None or probe_model(model, role).handles_padding:
        return
    if bool((attention_mask[:, 1:].long() > attention_mask[:, :-1].long()).any()):
        raise ValueError(
            f"`{role}`: {type(model).__name__} computes a row with padding or masked tokens before its text otherwise "
            "than the row alone, in transformers itself as well, since it does not take positions from outside; give "
            "rows of equal length, or one at a time."
        )


def context_length(role: str, model: PreTrainedModel) -> int | None:
    """Return the number of tokens of a model's context; `None` where the configuration names no limit.

    Args:
        role: Names the model in errors.
        model: A base model, or a `C2CForCausalLM`, whose receiver has the limit.
    """
    model = _receiver_of(model)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit - first_position(model, role) if isinstance(limit, int) and limit > 0 else None


def check_length(role: str, model: PreTrainedModel, length: int) -> None:
    """Refuse a text that is longer than a model's context.

    Args:
        role: Names the model in the error.
        model: A base model, or a `C2CForCausalLM`, whose receiver has the limit.
        length: Number of tokens.

    Raises:
        ValueError: It is.
    """
    limit = context_length(role, model)
    if limit is not None and length > limit:
        model, reason = _receiver_of(model), ""
        if "dynamic" in _rope_types(model):
            reason = " (its rotary frequencies change with longer texts, so that a prompt has no cache of its own)"
        raise ValueError(
            f"`{role}`: the text has {length} tokens, but the context of {type(model).__name__} is {limit}{reason}; "
            "shorten it or truncate in the processor."
        )


def probe_tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Return ids without a special meaning, `(count,)`, all different where the vocabulary is large enough."""
    special = set(_special_ids(model.config.to_dict()))
    size = model.get_input_embeddings().weight.shape[0]
    ordinary = [token for token in range(min(size, count + len(special) + 1)) if token not in special] or [0]
    return torch.tensor([ordinary[index % len(ordinary)] for index in range(count)], device=input_device(model))


def _receiver_of(model: PreTrainedModel) -> PreTrainedModel:
    return model.receiver if isinstance(model.config, C2CConfig) else model


def _special_ids(config: dict[Any, Any]) -> Iterator[int]:
    """Yield every token id that a configuration names."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


def _refusal(model: PreTrainedModel, role: str, reason: str) -> ValueError:
    return ValueError(
        f"`{role}`: {type(model).__name__} has no plain key/value cache per layer, which C2C needs ({reason}); use a "
        "decoder whose layers are all attention."
    )


@torch.no_grad()
def _probe(model: PreTrainedModel) -> ModelProbe | str:
    """Return what was found, or why the model cannot serve."""
    if model.config.is_encoder_decoder:
        # Its decoder does not prefill `input_ids`.
        return "it is an encoder-decoder"
    cache = full_length_cache()
    try:
        # Whatever a model raises that is not made for this is the reason why it cannot serve.
        ids = probe_tokens(model, _LENGTH).unsqueeze(0)
        logits = model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache}).logits
    except Exception as error:
        return _describe_own_cache(model) or _describe_error("running it on a plain cache", error)
    problem = _describe_states(cache)
    if problem is not None:
        return _describe_own_cache(model) or problem
    states = cached_states(cache)
    if logits.is_meta:
        return ModelProbe(states)
    register_keyword_positions(type(model), _takes_keyword_positions(model, ids))
    starts = _possible_first_positions(model)
    try:
        chunked, chunked_logits = _run_in_chunks(model, ids, starts)
    except Exception as error:
        return _describe_error("prefilling two chunks", error)
    tail = logits[:, _FIRST_CHUNK:]
    padded_tail = logits[:, _FIRST_CHUNK - _PADDING : _LENGTH - _PADDING]
    errors, padded_errors = [], []
    for index in range(len(starts)):
        row, padded = 2 * index, 2 * index + 1
        pairs = [(found[row], own[0]) for found, own in zip(_flat(chunked), _flat(states), strict=True)]
        errors.append(_mean_error([*pairs, (chunked_logits[row], tail[0])]))
        pairs = [
            (found[padded][:, _PADDING:], own[0][:, : _LENGTH - _PADDING])
            for found, own in zip(_flat(chunked), _flat(states), strict=True)
        ]
        padded_errors.append(_mean_error([*pairs, (chunked_logits[padded], padded_tail[0])]))
    tolerance = _ROUNDED_TOLERANCE if _is_rounded(model, [logits, *_flat(states)]) else _TOLERANCE
    best = min(range(len(starts)), key=errors.__getitem__)
    if not errors[best] <= tolerance:
        return "a text in two chunks gets other states than in one"
    return ModelProbe(states, starts[best], padded_errors[best] <= tolerance)


def _run_in_chunks(model: PreTrainedModel, ids: torch.Tensor, starts: list[int]) -> tuple[LayerStates, torch.Tensor]:
    """Prefill a text in two chunks, as a prompt is fused: per first position one whole row, and one padded and cut."""
    whole = torch.ones_like(ids)
    padded_ids = torch.cat([ids[:, :_PADDING], ids[:, : _LENGTH - _PADDING]], 1)
    padded = torch.cat([torch.zeros_like(ids[:, :_PADDING]), whole[:, _PADDING:]], 1)
    rows = torch.cat([ids, padded_ids]).repeat(len(starts), 1)
    mask = torch.cat([whole, padded]).repeat(len(starts), 1)
    positions = position_ids_from_mask(mask) + torch.tensor(starts, device=ids.device).repeat_interleave(2)[:, None]
    cache, first = full_length_cache(), _FIRST_CHUNK
    prefill(model, cache, rows[:, :first], mask[:, :first], positions[:, :first])
    logits = prefill(model, cache, rows[:, first:], mask, positions[:, first:], logits_to_keep=_LENGTH - first)
    assert logits is not None
    return cached_states(cache), logits


def _possible_first_positions(model: PreTrainedModel) -> list[int]:
    """Return 0, and the number after the padding index of every embedding but that of the tokens."""
    found = {0}
    if takes_position_ids(model):
        tokens = model.get_input_embeddings()
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module is not tokens and module.padding_idx is not None:
                if module.num_embeddings > module.padding_idx + _LENGTH:
                    found.add(module.padding_idx + 1)
    return sorted(found)


def _takes_keyword_positions(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Say whether a model whose `forward` names no `position_ids` takes them among its other keyword arguments."""
    if accepts_argument(model, "position_ids") or not accepts_keywords(model):
        return False
    cache = full_length_cache()
    positions = torch.arange(_LENGTH, device=ids.device) + torch.tensor([[0], [3]], device=ids.device)
    try:
        model(input_ids=ids.repeat(2, 1), position_ids=positions, use_cache=True, **{CACHE_ARGUMENT: cache})
    except Exception:
        return False
    return any(not torch.equal(states[0], states[1]) for states in _flat(cached_states(cache)))


def _is_rounded(model: PreTrainedModel, tensors: Sequence[torch.Tensor]) -> bool:
    """Say whether a model computes in less than float32."""
    return (
        getattr(model, "hf_quantizer", None) is not None
        or _rounds_float32()
        or any(tensor.dtype not in (torch.float32, torch.float64) for tensor in tensors)
    )


def _rounds_float32() -> bool:
    """Say whether products of float32 matrices may be computed in less, on any device."""
    # From torch 2.9 on there is one setting per backend, with which `get_float32_matmul_precision` may raise.
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    settings = [getattr(backend.matmul, "fp32_precision", None) for backend in backends]
    if None in settings:
        return torch.get_float32_matmul_precision() != "highest"
    return any(setting not in ("none", "ieee") for setting in settings)


def _flat(states: LayerStates) -> list[torch.Tensor]:
    return [tensor for pair in states for tensor in pair]


def _mean_error(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the mean over pairs of the relative error; numbers that are not finite are left out."""
    errors = []
    for found, expected in pairs:
        found, expected = (tensor.float().nan_to_num(0.0, 0.0, 0.0) for tensor in (found, expected))
        errors.append(float((found - expected).norm() / expected.norm().clamp_min(1e-6)))
    return sum(errors) / len(errors)


def _describe_states(cache: Cache) -> str | None:
    """Return what is wrong with a cache after the probed text; `None` if it holds keys and values of every token."""
    if not cache.layers:
        return "it leaves the cache empty"
    for index, layer in enumerate(cache.layers):
        for states in (layer.keys, layer.values):
            if not isinstance(states, torch.Tensor) or states.dim() != 4:
                return f"layer {index} of the cache holds no keys and values"
            if states.shape[2] != _LENGTH:
                return f"for {_LENGTH} tokens layer {index} of the cache holds {states.shape[2]} positions"
    return None


def _describe_own_cache(model: PreTrainedModel) -> str | None:
    """Return what the cache that a model makes for itself holds beside keys and values; `None` if nothing."""
    try:
        cache = model(input_ids=probe_tokens(model, _LENGTH).unsqueeze(0), use_cache=True).get(CACHE_ARGUMENT)
    except Exception:
        return None
    for index, layer in enumerate(getattr(cache, "layers", [])):
        others = [name for name, value in vars(layer).items() if name not in ("keys", "values") and _is_state(value)]
        if others:
            return f"layer {index} of its cache holds {' and '.join(sorted(others))}"
    return None


def _is_state(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(item, torch.Tensor) and item.dim() > 1 for item in values)


def _describe_error(action: str, error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    return f"{action} raises {type(error).__name__}{': ' if first_line else ''}{first_line}"


def _rope_types(model: PreTrainedModel) -> set[str]:
    """Return the kinds of rotary embedding in a model."""
    types: set[str] = set()
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
        types.update(kind for kind in kinds if isinstance(kind, str))
    return types
