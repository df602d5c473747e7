"""Controls: what replaces the right sharer cache, to tell which part of a gain comes from the sharer.

The mismatched-sharer control is [`MismatchedSharer`]; with it the pairing gain is measured.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ...fusers.c2c import C2CFuser
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
    #: Whether it changes the fuser of fusion mode, which memory mode does not have.
    needs_fusion_mode = False

    def check(self, name: str, model: C2CForCausalLM) -> None:
        """Refuse a model that it cannot be applied to.

        Args:
            name: Of the method, for the error.
            model: The C2C model.

        Raises:
            ValueError: The control needs gates, and the model has none.
        """
        if self.needs_fusion_mode and model.config.mode == "memory":
            raise ValueError(f"`methods`: {name!r} needs gates, which a memory fuser does not have.")

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
    def applied(self, model: C2CForCausalLM, batch: PromptBatch) -> Iterator[None]:
        """Change the model for the time that it runs.

        Args:
            model: The C2C model.
            batch: The prompts that it is given, after `select_positions`.
        """
        yield


class FusionOff(Control):
    """Fusion is switched off, see [`C2CForCausalLM.disable_fusion`]."""

    uses_sharers = False

    @contextmanager
    def applied(self, model: C2CForCausalLM, batch: PromptBatch) -> Iterator[None]:
        """Switch fusion off for the time that the model runs."""
        with model.disable_fusion():
            yield


def check_layers(name: str, layers: Sequence[int], model: C2CForCausalLM) -> None:
    """Refuse layers that the receiver does not have, or none at all.

    Args:
        name: Of the method, for the error.
        layers: Indices.
        model: The C2C model.

    Raises:
        ValueError: There is one.
    """
    num_layers = len(model.config.receiver_layer_shapes or [])
    if not layers or min(layers) < 0 or max(layers) >= num_layers:
        raise ValueError(f"`methods`: {name!r} must name receiver layers from 0 to {num_layers - 1}.")


def _gated_fusers(model: C2CForCausalLM) -> list[C2CFuser]:
    return [fuser for fuser in model.fuser if isinstance(fuser, C2CFuser)]


class ChangedGates(Control):
    """The gates' logits are others for the time that the model runs."""

    needs_fusion_mode = True

    def change_gates(self, layers: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits of some gates.

        Args:
            layers: `(num_gates,)`, the receiver layer of each.
            logits: `(num_gates,)`, the learned ones.
        """
        raise NotImplementedError

    @contextmanager
    def applied(self, model: C2CForCausalLM, batch: PromptBatch) -> Iterator[None]:
        """Change the gates, and restore their logits afterwards."""
        learned: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            for fuser in _gated_fusers(model):
                for group in fuser.groups:
                    logits: torch.Tensor = group.gate.gate_logit
                    learned.append((logits, logits.clone()))
                    layers = torch.tensor(group.entries, device=logits.device) % fuser.num_layers
                    logits.copy_(self.change_gates(layers, logits))
            try:
                yield
            finally:
                for logits, values in learned:
                    logits.copy_(values)


class ClosedGates(ChangedGates):
    """All gates are closed: the fusion path runs, and must change nothing."""

    def change_gates(self, layers: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return -1 for every gate."""
        return torch.full_like(logits, -1.0)


class OpenGates(ChangedGates):
    """All gates are open, also those that training has closed."""

    def change_gates(self, layers: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return 1 for every gate."""
        return torch.ones_like(logits)


class LayerSubset(ChangedGates):
    """Only some receiver layers are fused; their gates are as learned.

    Args:
        layers: Indices of the receiver's layers.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = sorted(set(layers))

    def check(self, name: str, model: C2CForCausalLM) -> None:
        """Refuse layers that the receiver does not have.

        Raises:
            ValueError: There is one.
        """
        super().check(name, model)
        check_layers(name, self.layers, model)

    def change_gates(self, layers: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return -1 for the gates of other layers."""
        kept = torch.isin(layers, torch.tensor(self.layers, device=layers.device))
        return torch.where(kept, logits, -1.0)


class FuseOnly(OpenGates):
    """The projection is added as it is: no dynamic weights, all gates open (arXiv 2510.03215, table 8)."""

    @contextmanager
    def applied(self, model: C2CForCausalLM, batch: PromptBatch) -> Iterator[None]:
        """Set the dynamic weights to 1 for the time that the model runs."""
        modules = {group.projector for fuser in _gated_fusers(model) for group in fuser.groups}
        hooks = [
            # The sigmoid of infinity is 1.
            projector.weight_proj.register_forward_hook(lambda _, inputs, logits: torch.full_like(logits, torch.inf))
            for projector in modules
        ]
        hooks += [projector.register_forward_hook(self._change) for projector in modules]
        try:
            with super().applied(model, batch):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _change(
        self, projector: torch.nn.Module, inputs: tuple[torch.Tensor, ...], projection: torch.Tensor
    ) -> torch.Tensor:
        """Return the change of the receiver's states for a projection."""
        return projection


class ProjectOnly(FuseOnly):
    """The projection replaces the receiver's states: no residual, no gates (arXiv 2510.03215, table 8)."""

    def check(self, name: str, model: C2CForCausalLM) -> None:
        """Refuse several sharers, of which each would replace the states.

        Raises:
            ValueError: There are several.
        """
        super().check(name, model)
        if model.config.num_sharers > 1:
            raise ValueError(f"`methods`: {name!r} needs a single sharer, whose projection replaces the states.")

    def _change(
        self, projector: torch.nn.Module, inputs: tuple[torch.Tensor, ...], projection: torch.Tensor
    ) -> torch.Tensor:
        return projection - inputs[1]


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
    "all_gates_open": OpenGates(),
    "fuse_only": FuseOnly(),
    "project_only": ProjectOnly(),
    "fusion_off": FusionOff(),
}
