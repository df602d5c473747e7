"""Controls: what replaces the right sharer cache, to tell which part of a gain comes from the sharer.

The mismatched-sharer control is [`MismatchedSharer`]; with it the pairing gain is measured.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ...inference.inputs import rescale_alignment
from ...inference.sharer_cache import SharerCache
from ...modeling_c2c import C2CForCausalLM
from .answerer import PromptBatch


class Control:
    """C2C as it is; each subclass changes one thing."""

    #: Whether it needs another question's inputs.
    needs_mismatched = False
    #: Whether the sharers run at all.
    uses_sharers = True

    def change_inputs(self, batch: PromptBatch, mismatched: PromptBatch | None, seeds: Sequence[int]) -> PromptBatch:
        """Change the sharers' tokens or the alignment.

        Args:
            batch: The prompts.
            mismatched: Another question for each row; `None` where `needs_mismatched` is off.
            seeds: One per row, so that the change of a row does not depend on its batch.
        """
        return batch

    def select_positions(self, model: C2CForCausalLM, batch: PromptBatch) -> PromptBatch:
        """Reduce the fused positions, with the model at hand.

        Args:
            model: The C2C model.
            batch: The prompts, after `change_inputs`.
        """
        return batch

    def change_states(self, sharer_cache: SharerCache, seeds: Sequence[int]) -> None:
        """Change one sharer's key/value states in place, before they are fused.

        Args:
            sharer_cache: The sharer's cache of the prompts.
            seeds: One per row.
        """

    @property
    def changes_states(self) -> bool:
        """Whether the control overrides `change_states`."""
        return type(self).change_states is not Control.change_states

    @contextmanager
    def applied(self, model: C2CForCausalLM) -> Iterator[None]:
        """Change the model for the time that it runs."""
        yield


class FusionOff(Control):
    """Fusion is switched off, see [`C2CForCausalLM.disable_fusion`]."""

    uses_sharers = False

    @contextmanager
    def applied(self, model: C2CForCausalLM) -> Iterator[None]:
        """Switch fusion off for the time that the model runs."""
        with model.disable_fusion():
            yield


class ClosedGates(Control):
    """All gates are closed: the fusion path runs, and must change nothing."""

    @contextmanager
    def applied(self, model: C2CForCausalLM) -> Iterator[None]:
        """Close the gates, and restore their logits afterwards."""
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


class MismatchedSharer(Control):
    """The sharers prefill another question, or the same question with another one's context.

    The alignment is scaled from the right text's length to the other's: first position to first, last to last, so that
    the parts that all prompts share stay aligned.
    """

    needs_mismatched = True

    def change_inputs(self, batch: PromptBatch, mismatched: PromptBatch | None, seeds: Sequence[int]) -> PromptBatch:
        """Take the other question's sharer inputs, the alignment scaled to their length.

        Args:
            batch: The prompts.
            mismatched: Another question for each row.
            seeds: Not used.

        Raises:
            ValueError: There is no other question.
        """
        if mismatched is None:
            raise ValueError("`mismatched` must hold another question for each row, but got None.")
        masks = zip(batch.sharer_attention_mask, mismatched.sharer_attention_mask, strict=True)
        alignments = [
            rescale_alignment(alignment, *both) for alignment, both in zip(batch.sharer_alignment, masks, strict=True)
        ]
        return replace(
            batch,
            sharer_input_ids=mismatched.sharer_input_ids,
            sharer_attention_mask=mismatched.sharer_attention_mask,
            sharer_alignment=alignments,
        )


class ShuffledPositions(Control):
    """The right sharer cache, its positions assigned to the fused positions in random order."""

    def change_inputs(self, batch: PromptBatch, mismatched: PromptBatch | None, seeds: Sequence[int]) -> PromptBatch:
        """Permute each row's sharer positions among the aligned positions.

        Args:
            batch: The prompts.
            mismatched: Not used.
            seeds: One per row.
        """
        alignments = []
        for alignment in batch.sharer_alignment:
            alignment = alignment.clone()
            for row, seed in zip(alignment, seeds, strict=True):
                aligned = row[row >= 0]
                order = torch.randperm(len(aligned), generator=torch.Generator().manual_seed(seed))
                row[row >= 0] = aligned[order.to(aligned.device)]
            alignments.append(alignment)
        return replace(batch, sharer_alignment=alignments)


class ZeroStates(Control):
    """All key and value states of the sharers are zero."""

    def change_states(self, sharer_cache: SharerCache, seeds: Sequence[int]) -> None:
        """Fill all key and value states with zeros.

        Args:
            sharer_cache: The sharer's cache of the prompts.
            seeds: Not used.
        """
        for states in sharer_cache.entries():
            states.zero_()


class NoiseStates(Control):
    """Random directions in place of the sharers' key and value states, of the same norms."""

    def change_states(self, sharer_cache: SharerCache, seeds: Sequence[int]) -> None:
        """Replace the states of every layer, head and real token.

        Args:
            sharer_cache: The sharer's cache of the prompts.
            seeds: One per row.
        """
        for row, seed in enumerate(seeds):
            real = sharer_cache.attention_mask[row].bool()
            generator = torch.Generator().manual_seed(seed)
            for entry in sharer_cache.entries():
                states = entry[row][:, real]
                noise = torch.randn(states.shape, generator=generator).to(states.device)
                norms = states.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
                entry[row][:, real] = (noise * norms).to(states.dtype)


CONTROLS: dict[str, Control] = {
    "c2c": Control(),
    "mismatched": MismatchedSharer(),
    "shuffled": ShuffledPositions(),
    "zero": ZeroStates(),
    "noise": NoiseStates(),
    "closed_gates": ClosedGates(),
    "fusion_off": FusionOff(),
}
