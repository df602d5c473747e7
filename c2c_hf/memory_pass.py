"""The forward pass of memory mode."""

from typing import Any

import torch
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .checkpoints.absent_sharer import AbsentSharer
from .checkpoints.receiver_adapter import trains
from .configuration_c2c import C2CConfig
from .inference.memory_slots import MemoryPlan, hide_slots, place_heads, plan_memory, read_heads, remember
from .inference.passes import check_length, kept_columns, new_length
from .inference.prefill import LayerStates, position_ids_from_mask
from .inference.rotary import Rotation, layer_rotations, read_rotations
from .inference.sharer_inputs import SharerText, new_positions, per_sharer, texts_as_given
from .receiving import ReceivingMixin


class C2CMemoryMixin(ReceivingMixin):
    """Fills the slots of a prompt with what the sharers have read, and lets the receiver read the rest."""

    config: C2CConfig
    sharers: Any
    fuser: Any
    fusion_enabled: bool
    _read_texts: Any
    _rotations: list[list[Rotation]] | None = None

    def rotations(self) -> list[list[Rotation]]:
        """Return how the keys of every layer turn with their position: the receiver's, then each sharer's.

        Found out once, on the models.

        Raises:
            ValueError: A model's keys turn in an unknown way, or a sharer is not here to be asked.
        """
        if self._rotations is None:
            recorded = [sharer.rotations for sharer in self.config.sharers]
            if any(isinstance(s, AbsentSharer) and r is None for s, r in zip(self.sharers, recorded, strict=True)):
                raise ValueError(
                    "`load_sharers=False` needs a memory fuser that records how the sharers' keys turn with their "
                    "position, which this one does not; load it with its sharers and save it again."
                )
            self._rotations = [layer_rotations(self.receiver, "receiver")]
            for index, sharer in enumerate(self.sharers):
                if isinstance(sharer, AbsentSharer):
                    self._rotations.append(read_rotations(recorded[index]))
                else:
                    self._rotations.append(layer_rotations(sharer, "sharers"))
        return self._rotations

    def _memory_texts(
        self, receiver_inputs: dict[str, Any], cache: Cache | None, sharer_inputs: Any
    ) -> list[SharerText]:
        """Collect what each sharer reads, and the slots that it fills; an empty list where nothing was given.

        With fusion off the slots are hidden from the receiver.
        """
        ids, masks, alignments, positions = sharer_inputs
        if ids is None:
            return []
        if alignments is None:
            raise ValueError(
                "`sharer_alignment` must be given with `mode='memory'`: it says which positions of the prompt "
                "are slots; use `C2CProcessor` to make all inputs."
            )
        seq_len, past_length = new_length(receiver_inputs), 0 if cache is None else int(cache.get_seq_length())
        tokens = receiver_inputs["input_ids"]
        batch_size = (receiver_inputs["inputs_embeds"] if tokens is None else tokens).shape[0]
        if not self.fusion_enabled:
            mask = receiver_inputs["attention_mask"]
            if mask is None:
                mask = torch.ones(batch_size, past_length + seq_len, dtype=torch.long)
            mask = hide_slots(mask, per_sharer(self.config, "sharer_alignment", alignments))
            receiver_inputs["attention_mask"] = mask
            receiver_inputs["position_ids"] = position_ids_from_mask(mask)[:, -seq_len:]
            return []
        texts = texts_as_given(self.config, ids, masks, positions, batch_size)
        for text, alignment in zip(texts, per_sharer(self.config, "sharer_alignment", alignments), strict=True):
            text.alignment = new_positions(alignment, batch_size, seq_len, past_length)
        return texts

    def _receive_memory(
        self,
        texts: list[SharerText],
        receiver_inputs: dict[str, Any],
        cache: Cache | None,
        labels: torch.Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | torch.Tensor,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """Read a prompt whose slots the sharers fill."""
        seq_len = new_length(receiver_inputs)
        keep = kept_columns(logits_to_keep, seq_len)
        past_length = 0 if cache is None else int(cache.get_seq_length())
        mask = receiver_inputs["attention_mask"]
        batch_size = texts[0].alignment.shape[0]
        real = torch.ones(batch_size, seq_len, dtype=torch.bool) if mask is None else mask[:, -seq_len:].bool()
        lengths = [text.input_ids.shape[1] for text in texts]
        plan = plan_memory([text.alignment for text in texts], real, lengths, min(keep, seq_len), past_length > 0)
        if plan is None:
            return self._receive_alone(receiver_inputs, cache, labels, use_cache, logits_to_keep, kwargs)
        check_length("receiver", self.receiver, past_length + seq_len)
        position_ids = receiver_inputs["position_ids"]
        if position_ids is None:
            tokens = receiver_inputs["input_ids"]
            device = (receiver_inputs["inputs_embeds"] if tokens is None else tokens).device
            whole = torch.ones(batch_size, past_length + seq_len, device=device) if mask is None else mask
            position_ids = position_ids_from_mask(whole)[:, -seq_len:]
            receiver_inputs["position_ids"] = position_ids
        own_cache = self._own_cache(cache)
        states = self._slot_states(plan, texts, receiver_inputs, own_cache)
        given = plan.given[:, plan.tail_start :]
        substituted = given if bool(given.any()) else None
        # A tail is always left: the plan ends in front of the columns whose logits are wanted.
        tail: Any = self._receive_tail(states, plan.tail_start, substituted, receiver_inputs, own_cache, keep, kwargs)
        returned = None if use_cache is False else own_cache
        return self._output(tail.logits[:, -keep:], tail, returned, labels, logits_to_keep, kwargs)

    def _slot_states(
        self, plan: MemoryPlan, texts: list[SharerText], receiver_inputs: dict[str, Any], cache: Cache
    ) -> LayerStates:
        """Return the receiver's states at slots and at the tokens in front of them, 0 elsewhere."""
        receiver_rotations, *sharer_rotations = self.rotations()
        self._read_texts(texts, plan.sharer_lengths, cache)
        sharer_caches = [text.state for text in texts]
        positions = [
            position_ids_from_mask(text.attention_mask) if text.position_ids is None else text.position_ids
            for text in texts
        ]
        position_ids = receiver_inputs["position_ids"]
        states = remember(
            plan, self.fuser, sharer_caches, positions, sharer_rotations, receiver_rotations, position_ids
        )
        dtype = self.receiver.dtype
        states = [(keys.to(dtype), values.to(dtype)) for keys, values in states]
        if plan.heads.shape[1] > 0:
            heads = read_heads(plan, self.receiver, receiver_inputs["input_ids"], position_ids, trains(self.receiver))
            place_heads(plan, states, heads)
        return states
