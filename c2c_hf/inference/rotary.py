"""Rotary positions of cached keys: removed, and applied at another position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .prefill import LayerStates, cached_states, full_length_cache, prefill, takes_position_ids
from .probe import probe_model, probe_tokens

#: Positions at which a model's keys are compared. The last one distinguishes slow frequencies.
_PROBED_POSITIONS = (0, 1, 7, 61)
#: In place of a context's length that a configuration does not name.
_UNLIMITED = 1 << 30
#: Largest relative error of a recognized rotation: the rounding of keys in bfloat16.
_TOLERANCE = 0.03


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of one layer's keys.

    Attributes:
        inv_freq: `(num_pairs,)`, angle per position of each pair of dimensions, negative where a model rotates the
            other way; empty for keys without rotary position. Dimensions after the pairs stay as they are.
        scaling: Factor on the rotated dimensions.
        interleaved: Pairs are neighbours (0, 1), (2, 3), ...; else the first half goes with the second.
    """

    inv_freq: torch.Tensor
    scaling: float = 1.0
    interleaved: bool = False

    def apply(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate keys that are free of position.

        Args:
            keys: `(num_tokens, num_heads, head_dim)`.
            positions: `(num_tokens,)`.

        Returns:
            Of the shape and dtype of `keys`.
        """
        return self._rotate(keys, positions, 1.0, self.scaling)

    def remove(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Undo [`Rotation.apply`]: make keys as cached at these positions free of position."""
        return self._rotate(keys, positions, -1.0, 1.0 / self.scaling)

    def _rotate(self, keys: torch.Tensor, positions: torch.Tensor, sign: float, scaling: float) -> torch.Tensor:
        num_pairs = len(self.inv_freq)
        if num_pairs == 0:
            return keys
        angles = sign * positions.to(keys.device).float()[:, None] * self.inv_freq.to(keys.device).float()
        cos, sin = (angles.cos() * scaling).unsqueeze(1), (angles.sin() * scaling).unsqueeze(1)
        first, second = self._halves(keys)
        # In place: memory traffic over the keys dominates.
        rotated = keys.to(torch.float32, copy=True)
        into_first, into_second = self._halves(rotated)
        into_first.mul_(cos).addcmul_(second.float(), sin, value=-1)
        into_second.mul_(cos).addcmul_(first.float(), sin)
        return rotated.to(keys.dtype)

    def _halves(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the first and the second dimension of all pairs."""
        num_pairs = len(self.inv_freq)
        if self.interleaved:
            return keys[..., 0 : 2 * num_pairs : 2], keys[..., 1 : 2 * num_pairs : 2]
        return keys[..., :num_pairs], keys[..., num_pairs : 2 * num_pairs]


@torch.no_grad()
def layer_rotations(model: PreTrainedModel, role: str) -> list[Rotation]:
    """Measure the rotary embedding of each cached layer's keys on the model itself.

    A single token attends to itself alone, so that its keys at two positions differ by the rotation alone.

    Args:
        model: The base model.
        role: `"receiver"` or `"sharers"`, for the error.

    Raises:
        ValueError: Keys are rotated in an unknown way, or in one that depends on the length of the text; or the model
            keeps no plain key/value cache.
    """
    probe_model(model, role)
    unrotated = Rotation(torch.empty(0))
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or _UNLIMITED
    positions = [position for position in _PROBED_POSITIONS if position < limit]
    probes = [_probe(model, position) for position in positions] if takes_position_ids(model) else []
    candidates = [unrotated, *_candidates(model)]
    rotations = []
    for layer_idx in range(len(probes[0]) if probes else len(_probe(model, None))):
        layer = [probe[layer_idx] for probe in probes]
        if not layer or not _close([values for _, values in layer], [layer[0][1]] * len(layer)):
            # No positions, or learned ones, which change the values, too.
            rotations.append(unrotated)
            continue
        keys = [keys for keys, _ in layer]
        errors = [_error(candidate, keys, positions) for candidate in candidates]
        if min(errors) > _TOLERANCE:
            raise ValueError(
                f"`{role}`: the keys of {type(model).__name__} have a rotary position that `mode='memory'` and "
                "`unrotate_keys=True` do not know; use `mode='fusion'` without the latter."
            )
        rotations.append(candidates[errors.index(min(errors))])
    return rotations


def describe_rotations(rotations: Sequence[Rotation]) -> dict[str, Any]:
    """Encode rotations for JSON: `kinds`, the different ones, and `layers`, the index of each layer's kind."""
    kinds: list[dict[str, Any]] = []
    layers = []
    for rotation in rotations:
        kind = {
            "inv_freq": rotation.inv_freq.tolist(),
            "scaling": rotation.scaling,
            "interleaved": rotation.interleaved,
        }
        if kind not in kinds:
            kinds.append(kind)
        layers.append(kinds.index(kind))
    return {"kinds": kinds, "layers": layers}


def read_rotations(description: dict[str, Any]) -> list[Rotation]:
    """Decode the output of [`describe_rotations`].

    Raises:
        ValueError: It has another format.
    """
    try:
        kinds = [
            Rotation(
                torch.tensor(kind["inv_freq"], dtype=torch.float32), float(kind["scaling"]), bool(kind["interleaved"])
            )
            for kind in description["kinds"]
        ]
        return [kinds[index] for index in description["layers"]]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"`rotations` of a sharer in the configuration is damaged ({error!r}).") from error


def _probe(model: PreTrainedModel, position: int | None) -> LayerStates:
    """Return every layer's states of single tokens at a position, `(num_tokens, num_heads, 1, head_dim)` each."""
    tokens = probe_tokens(model, 8).unsqueeze(1)
    positions = None if position is None else torch.full_like(tokens, position)
    cache = full_length_cache()
    prefill(model, cache, tokens, position_ids=positions)
    return [(keys.float(), values.float()) for keys, values in cached_states(cache)]


def _candidates(model: PreTrainedModel) -> list[Rotation]:
    """Return the rotations of a model's rotary embedding modules, in both layouts and both directions."""
    found: list[tuple[torch.Tensor, float]] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                scaling = float(getattr(module, name.removesuffix("inv_freq") + "attention_scaling", 1.0))
                found.append((buffer.detach().float().cpu(), scaling))
            elif _is_sinusoidal_table(buffer):
                sine, cosine = buffer[1].detach().float().cpu().chunk(2)
                found.append((torch.atan2(sine, cosine), 1.0))
    different: list[tuple[torch.Tensor, float]] = []
    for frequencies, scaling in found:
        # Some models have a table in every layer.
        if not any(scaling == other and torch.equal(frequencies, known) for known, other in different):
            different.append((frequencies, scaling))
    return [
        Rotation(sign * frequencies, scaling, interleaved)
        for sign in (1, -1)
        for frequencies, scaling in different
        for interleaved in (False, True)
    ]


def _is_sinusoidal_table(buffer: torch.Tensor) -> bool:
    """Say whether a buffer holds, per position, the sines of all angles and then their cosines."""
    if buffer.dim() != 2 or buffer.shape[0] < 2 or buffer.shape[1] % 2 or not buffer.is_floating_point():
        return False
    rows = buffer[:2].detach().float().cpu()
    sine, cosine = rows.chunk(2, dim=1)
    at_start = torch.equal(sine[0], torch.zeros_like(sine[0])) and torch.equal(cosine[0], torch.ones_like(cosine[0]))
    return at_start and bool(((sine**2 + cosine**2 - 1).abs() < 0.01).all())


def _error(rotation: Rotation, keys: Sequence[torch.Tensor], positions: Sequence[int]) -> float:
    """Return the largest relative error of predicting keys at all positions from those at position 0."""
    if 2 * len(rotation.inv_freq) > keys[0].shape[-1]:
        return float("inf")
    start = keys[0].squeeze(2)
    free = rotation.remove(start, torch.zeros(len(start)))
    worst = 0.0
    for position, found in zip(positions, keys, strict=True):
        expected = rotation.apply(free, torch.full((len(start),), position))
        worst = max(worst, float((expected - found.squeeze(2)).norm() / found.norm().clamp_min(1e-9)))
    return worst


def _close(values: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    pairs = zip(values, expected, strict=True)
    return all(bool((value - other).norm() <= _TOLERANCE * other.norm()) for value, other in pairs)
