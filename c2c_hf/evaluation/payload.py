"""Controls that send less: fewer positions, or states of fewer bits."""

from collections.abc import Sequence

import torch

from .._compat import CACHE_ARGUMENT
from ..inference.prefill import SharerCache, cached_states, full_length_cache
from ..modeling_c2c import C2CForCausalLM
from .answering import Inputs
from .controls import Control


class Part(Control):
    """Only a share of each row's fused positions fuses: the first ones, the last ones, or where most changes.

    Args:
        which: `"first"`, `"last"`, or `"top"`: those whose values change most in norm, over all layers.
        share: In (0, 1].
    """

    def __init__(self, which: str, share: float) -> None:
        self.which, self.share = which, share

    def choose_positions(self, model: C2CForCausalLM, inputs: Inputs) -> Inputs:
        """Let the other positions read nothing."""
        changes = _value_changes(model, inputs) if self.which == "top" else None
        alignments = []
        for alignment in inputs["sharer_alignment"]:
            alignment = alignment.clone()
            for row, read in enumerate(alignment >= 0):
                columns = read.nonzero().flatten()
                if changes is not None:
                    columns = columns[changes[row, columns].argsort(stable=True)]
                count = max(1, round(self.share * len(columns)))
                left_out = columns[count:] if self.which == "first" else columns[: len(columns) - count]
                alignment[row, left_out] = -1
            alignments.append(alignment)
        return {**inputs, "sharer_alignment": alignments}


class Rounded(Control):
    """The sharers' states are rounded to a few bits, each head's state of a token with a scale of its own.

    Args:
        bits: Per number, with the sign.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def change_state(self, state: SharerCache, seeds: Sequence[int]) -> None:
        """Round in place."""
        largest = 2 ** (self.bits - 1) - 1
        for entry in state.entries():
            scale = entry.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
            entry.copy_(((entry.float() / scale).round() * scale).to(entry.dtype))


@torch.no_grad()
def _value_changes(model: C2CForCausalLM, inputs: Inputs) -> torch.Tensor:
    """Return by how much fusion changes the values of each position, `(batch_size, seq_len)`, summed over layers."""
    names = ("input_ids", "attention_mask", "sharer_input_ids", "sharer_attention_mask", "sharer_alignment")
    fused, clean = full_length_cache(), full_length_cache()
    model(**{name: inputs[name] for name in names}, **{CACHE_ARGUMENT: fused}, logits_to_keep=1)
    with model.disable_fusion():
        model(**{name: inputs[name] for name in names[:2]}, **{CACHE_ARGUMENT: clean}, logits_to_keep=1)
    pairs = zip(cached_states(fused), cached_states(clean), strict=True)
    changes = [(values - own).float().square().sum((1, 3)) for (_, values), (_, own) in pairs]
    return torch.stack([change.to(changes[0].device) for change in changes]).sum(0)


#: Shares of positions, for a curve from none (`alone`) to all (`c2c`).
_SHARES = {"quarter": 0.25, "half": 0.5}
PAYLOADS: dict[str, Control] = {
    **{f"{which}_{name}": Part(which, share) for which in ("first", "last", "top") for name, share in _SHARES.items()},
    "int8": Rounded(8),
    "int4": Rounded(4),
}
