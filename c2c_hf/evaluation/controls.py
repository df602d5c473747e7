"""Controls: what the receiver gets in place of the right sharer cache, to tell what of a gain is the sharer's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..inference.prefill import SharerCache
from ..modeling_c2c import C2CForCausalLM
from .answering import Inputs


class Control:
    """Leaves everything as it is; the others change one thing."""

    #: Whether it needs another question's inputs.
    needs_donors = False
    #: Whether the sharers read at all.
    reads_sharers = True

    def change_inputs(self, inputs: Inputs, donors: Inputs | None, seeds: Sequence[int]) -> Inputs:
        """Change what the sharers read, or who reads whom.

        Args:
            inputs: `input_ids` and `attention_mask`, `(batch_size, seq_len)`, and lists of one tensor per sharer:
                `sharer_input_ids`, `sharer_attention_mask`, `(batch_size, sharer_len)`, and `sharer_alignment`,
                `(batch_size, seq_len)`.
            donors: The same of another question per row, or `None` where `needs_donors` is off.
            seeds: One per row, so that a row's change does not depend on its batch.
        """
        return inputs

    def choose_positions(self, model: C2CForCausalLM, inputs: Inputs) -> Inputs:
        """Let fewer positions read, as the model itself would have it.

        Args:
            model: The pair.
            inputs: As above, without padding on the right.
        """
        return inputs

    def change_state(self, state: SharerCache, seeds: Sequence[int]) -> None:
        """Change in place what one sharer has read, before it is fused."""

    @property
    def changes_states(self) -> bool:
        """Whether it changes what the sharers have read."""
        return type(self).change_state is not Control.change_state

    @contextmanager
    def around(self, model: C2CForCausalLM) -> Iterator[None]:
        """Hold for as long as the model answers."""
        yield


class Alone(Control):
    """Fusion is off."""

    reads_sharers = False

    @contextmanager
    def around(self, model: C2CForCausalLM) -> Iterator[None]:
        """Switch fusion off."""
        with model.disable_fusion():
            yield


class GatesOff(Control):
    """Every gate is closed: the whole path runs and must change nothing."""

    @contextmanager
    def around(self, model: C2CForCausalLM) -> Iterator[None]:
        """Close the gates, and give them their logits back."""
        logits = [parameter for name, parameter in model.named_parameters() if "gate_logit" in name]
        learned = [parameter.detach().clone() for parameter in logits]
        with torch.no_grad():
            for parameter in logits:
                parameter.fill_(-1.0)
            try:
                yield
            finally:
                for parameter, values in zip(logits, learned, strict=True):
                    parameter.copy_(values)


class Mismatched(Control):
    """The sharers read another question, first position for first and last for last: the prompt's frame still fits."""

    needs_donors = True

    def change_inputs(self, inputs: Inputs, donors: Inputs | None, seeds: Sequence[int]) -> Inputs:
        """Take the donors' sharer inputs, the alignment stretched to their length."""
        if donors is None:
            raise ValueError("`donors` must hold another question for each row, but got None.")
        alignments = []
        for alignment, mask, other in zip(
            inputs["sharer_alignment"], inputs["sharer_attention_mask"], donors["sharer_attention_mask"], strict=True
        ):
            # Padding is on the left.
            start, other_start = (m.shape[1] - m.sum(1, keepdim=True) for m in (mask, other))
            scale = (other.sum(1, keepdim=True) - 1) / (mask.sum(1, keepdim=True) - 1).clamp_min(1)
            stretched = other_start + ((alignment - start) * scale).round().long()
            alignments.append(torch.where(alignment < 0, -1, stretched))
        names = ("sharer_input_ids", "sharer_attention_mask")
        return {**inputs, **{name: donors[name] for name in names}, "sharer_alignment": alignments}


class Shuffled(Control):
    """The right cache, its positions handed out in random order."""

    def change_inputs(self, inputs: Inputs, donors: Inputs | None, seeds: Sequence[int]) -> Inputs:
        """Permute each row's sharer positions among the positions that read."""
        alignments = []
        for alignment in inputs["sharer_alignment"]:
            alignment = alignment.clone()
            for row, seed in zip(alignment, seeds, strict=True):
                read = row[row >= 0]
                order = torch.randperm(len(read), generator=torch.Generator().manual_seed(seed))
                row[row >= 0] = read[order.to(read.device)]
            alignments.append(alignment)
        return {**inputs, "sharer_alignment": alignments}


class Zero(Control):
    """The sharers' states are all zero."""

    def change_state(self, state: SharerCache, seeds: Sequence[int]) -> None:
        """Fill all keys and values with zeros."""
        for entry in state.entries():
            entry.zero_()


class Noise(Control):
    """Random directions, each with the norm of the state that it replaces."""

    def change_state(self, state: SharerCache, seeds: Sequence[int]) -> None:
        """Replace keys and values, per layer, head and real token."""
        for row, seed in enumerate(seeds):
            real = state.attention_mask[row].bool()
            generator = torch.Generator().manual_seed(seed)
            for entry in state.entries():
                states = entry[row][:, real]
                noise = torch.randn(states.shape, generator=generator).to(states.device)
                norms = states.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
                entry[row][:, real] = (noise * norms).to(states.dtype)


CONTROLS: dict[str, Control] = {
    "c2c": Control(),
    "mismatched": Mismatched(),
    "shuffled": Shuffled(),
    "zero": Zero(),
    "noise": Noise(),
    "gates_off": GatesOff(),
    "alone": Alone(),
}
