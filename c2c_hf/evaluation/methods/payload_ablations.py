"""Payload ablations: less of the sharer cache is sent, in fewer positions or with fewer bits per number."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from ..._compat import CACHE_ARGUMENT
from ...inference.prefill import full_length_cache
from ...inference.sharer_cache import SharerCache, round_states
from ...modeling_c2c import C2CForCausalLM
from .answerer import PromptBatch
from .controls import Control


class PositionSubset(Control):
    """A share of each row's aligned positions is fused.

    Args:
        which: The first ones, the last ones, or those whose values fusion changes most, in norm over all layers.
        share: In (0, 1].

    Raises:
        ValueError: `share` is out of range.
    """

    def __init__(self, which: Literal["first", "last", "most_changed"], share: float) -> None:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"`share` must be in (0, 1], but got {share!r}")
        self.which, self.share = which, share

    def select_positions(self, model: C2CForCausalLM, batch: PromptBatch) -> PromptBatch:
        """Remove the other positions from the alignment.

        Args:
            model: The C2C model.
            batch: The prompts.
        """
        changes = _value_changes(model, batch) if self.which == "most_changed" else None
        alignments = []
        for alignment in batch.sharer_alignment:
            alignment = alignment.clone()
            for row, aligned in enumerate(alignment >= 0):
                columns = aligned.nonzero().flatten()
                if changes is not None:
                    columns = columns[changes[row, columns].argsort(stable=True)]
                count = max(1, round(self.share * len(columns)))
                left_out = columns[count:] if self.which == "first" else columns[: len(columns) - count]
                alignment[row, left_out] = -1
            alignments.append(alignment)
        return replace(batch, sharer_alignment=alignments)


class QuantizedStates(Control):
    """The sharers' states are rounded to a few bits, with one scale per head and token.

    Args:
        bits: Per number, including the sign.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def change_states(self, sharer_cache: SharerCache, seeds: Sequence[int]) -> None:
        """Round the states.

        Args:
            sharer_cache: The sharer's cache of the prompts.
            seeds: Not used.
        """
        for states in sharer_cache.entries():
            states.copy_(round_states(states, self.bits))


@torch.no_grad()
def _value_changes(model: C2CForCausalLM, batch: PromptBatch) -> torch.Tensor:
    """Return the squared change of each position's values by fusion, `(batch_size, seq_len)`, summed over layers."""
    fused, clean = full_length_cache(), full_length_cache()
    model(**batch.fusion_inputs(), **{CACHE_ARGUMENT: fused})
    with model.disable_fusion():
        model(**batch.inputs_for(model), **{CACHE_ARGUMENT: clean})
    pairs = zip(fused.layers, clean.layers, strict=True)
    changes = [(layer.values - own.values).float().square().sum((1, 3)) for layer, own in pairs]
    return torch.stack([change.to(changes[0].device) for change in changes]).sum(0)


#: For a curve over the number of fused positions, from none (`fusion_off`) to all (`c2c`).
PAYLOAD_ABLATIONS: dict[str, Control] = {
    "first_quarter": PositionSubset("first", 0.25),
    "first_half": PositionSubset("first", 0.5),
    "last_quarter": PositionSubset("last", 0.25),
    "last_half": PositionSubset("last", 0.5),
    "most_changed_quarter": PositionSubset("most_changed", 0.25),
    "most_changed_half": PositionSubset("most_changed", 0.5),
    "int8_states": QuantizedStates(8),
    "int4_states": QuantizedStates(4),
}
