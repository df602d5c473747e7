"""Oracle of memory mode: slots that hold the receiver's own states of the context show what a map of them loses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...fusers.memory import MemoryFuser
from ...inference.fusion import KeyPositions, TokenStates, aligned_tokens
from ...inference.prefill import position_ids_from_mask
from ...inference.sharer_cache import prefill_sharer
from ...modeling_c2c import C2CForCausalLM
from .answerer import PromptBatch
from .controls import Control, check_layers

LayerTokens = list[tuple[torch.Tensor, torch.Tensor]]


class OwnStates(Control):
    """Slots hold what the receiver caches when it prefills the context itself, in place of the fuser's states.

    Slots with both keys and values of all layers equal prefilling the context.

    Args:
        keys: Whether keys are the receiver's own.
        values: Whether values are.
        layers: Receiver layers where they are; `None`: all.
    """

    def __init__(self, keys: bool = True, values: bool = True, layers: Sequence[int] | None = None) -> None:
        self.keys, self.values = keys, values
        self.layers = None if layers is None else sorted(set(layers))

    def check(self, name: str, model: C2CForCausalLM) -> None:
        """Refuse fusers whose slots are not tokens of the receiver.

        Raises:
            ValueError: Fusion mode, slots on the sharer's tokens, several sharers, or a layer that is not there.
        """
        config = model.config
        if config.mode != "memory" or config.memory_grid != "receiver" or config.num_sharers > 1:
            raise ValueError(
                f"`methods`: {name!r} needs a memory fuser of one sharer with `memory_grid='receiver'`, whose slots "
                "are tokens that the receiver can prefill."
            )
        if self.layers is not None:
            check_layers(name, self.layers, model)

    @contextmanager
    def applied(self, model: C2CForCausalLM, batch: PromptBatch) -> Iterator[None]:
        """Replace the fuser's result for the time that the model runs."""
        own = _slot_states(model, batch)

        def replace_states(fuser: nn.Module, inputs: Any, states: LayerTokens) -> LayerTokens:
            replaced = list(states)
            for layer in range(len(states)) if self.layers is None else self.layers:
                keys = (own if self.keys else states)[layer][0]
                values = (own if self.values else states)[layer][1]
                replaced[layer] = (keys, values)
            return replaced

        (fuser,) = (fuser for fuser in model.fuser if isinstance(fuser, MemoryFuser))
        hook = fuser.register_forward_hook(replace_states)
        try:
            yield
        finally:
            hook.remove()


def _slot_states(model: C2CForCausalLM, batch: PromptBatch) -> LayerTokens:
    """Let the receiver prefill a prompt with its context, and return its states at the slots as the fuser does.

    Returns:
        Per layer keys, free of rotary position, and values: `(num_slots, num_key_value_heads, head_dim)`.
    """
    entries = prefill_sharer(model.receiver, batch.input_ids, batch.attention_mask).entries()
    positions = KeyPositions(model.rotations()[0], position_ids_from_mask(batch.attention_mask))
    rows, columns, _ = aligned_tokens(batch.sharer_alignment[0])
    tokens = TokenStates(entries, rows.cpu(), columns.cpu(), key_positions=positions).all_entries()
    states = [own.unflatten(-1, (entry.shape[1], -1)) for own, entry in zip(tokens, entries, strict=True)]
    num_layers = len(states) // 2
    return list(zip(states[:num_layers], states[num_layers:], strict=True))
