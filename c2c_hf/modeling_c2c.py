"""`C2CForCausalLM`: a receiver that answers from its own cache, fused with what frozen sharers have read."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .checkpoints.receiver_adapter import trains
from .generation import C2CGenerationMixin
from .inference.cache import C2CCache
from .inference.fusion import FusionPlan, fuse_states, plan_fusion
from .inference.given_states import GivenStates, give_states
from .inference.passes import check_length, join_logits, kept_columns, new_length, slice_inputs
from .inference.passing_caches import RecordingCache
from .inference.prefill import (
    LayerStates,
    SharerCache,
    cached_states,
    full_length_cache,
    position_ids_from_mask,
    prefill,
)
from .inference.sharer_inputs import (
    PerSharer,
    SharerText,
    continued_texts,
    last_prompt_positions,
    leave_out,
    new_positions,
    per_sharer,
    texts_as_given,
    texts_from_tokens,
)
from .inference.side_by_side import Reading, side_by_side
from .memory_pass import C2CMemoryMixin
from .pretrained_c2c import C2CPreTrainedModel


class C2CForCausalLM(C2CPreTrainedModel, C2CMemoryMixin, C2CGenerationMixin):
    """A receiver, its sharers and the fusers between them (Cache-to-Cache, arXiv 2510.03215).

    The prompt is read by every model; the fused states enter the receiver's cache; everything after them, the answer
    included, is the receiver's own work at its own speed.

    Example:
        ```python
        model = C2CForCausalLM.from_receiver_and_sharers("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B-Instruct")
        processor = C2CProcessor.from_receiver_and_sharers("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B-Instruct")
        inputs = processor("The capital of France is")
        out = model.generate(**inputs, max_new_tokens=8)
        ```
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        sharer_input_ids: PerSharer | None = None,
        sharer_attention_mask: PerSharer | None = None,
        sharer_alignment: PerSharer | None = None,
        sharer_position_ids: PerSharer | None = None,
        past_key_values: Cache | None = None,
        sharer_caches: GivenStates | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read a prompt with all models and fuse, or decode further tokens.

        Args:
            input_ids: `(batch_size, seq_len)`, the receiver's tokens; with a cache the new ones only.
            attention_mask: `(batch_size, past_len + seq_len)`, 0 at padding on either side. `None`: no padding.
            position_ids: `(batch_size, seq_len)`. `None`: counted from the mask. Sharers that read the receiver's own
                tokens read them at the same positions.
            cache: The receiver's cache: any of transformers', or a [`C2CCache`]. `None`: a new one.
            inputs_embeds: `(batch_size, seq_len, hidden_size)` in place of `input_ids`.
            labels: `(batch_size, seq_len)`, -100 where there is no loss. The prompt ends before the first label.
            use_cache: Whether to return the cache.
            logits_to_keep: Number of last positions to compute logits for, 0 for all; or the positions.
            sharer_input_ids: `(batch_size, sharer_len)`, the sharer's tokens of the whole text, earlier turns
                included; with several sharers a list. `None`: made from `input_ids` where the alignment goes token by
                token; on a cache that holds something the new tokens are then decoded without fusion.
            sharer_attention_mask: `(batch_size, sharer_len)`. `None`: no padding.
            sharer_alignment: `(batch_size, seq_len)`, or for the whole text: the sharer position that each receiver
                position reads, or -1. Exactly the positions that hold one fuse. `None`: all but the last prompt
                position, each reading its own.
            sharer_position_ids: `(batch_size, sharer_len)`. `None`: counted from the mask.
            past_key_values: The name of `cache` before transformers 5.24.
            sharer_caches: What the sharers have read of this very text elsewhere, in place of running them here; with
                several sharers a list, `None` for those that run here.
            **kwargs: Passed on to the receiver.

        Returns:
            Loss, logits `(batch_size, logits_to_keep or seq_len, vocab_size)` and cache. Logits of fused positions are
            the receiver's own. Hidden states and attentions, where asked for, are those of the tail behind the fused
            region.

        Raises:
            ValueError: Sharer inputs are missing, of the wrong shape or out of range, or a text is too long.
        """
        cache = past_key_values if cache is None else cache
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("Either `input_ids` or `inputs_embeds` must be given, but got neither.")
        receiver_inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        plan, texts = None, []
        sharer_inputs = (sharer_input_ids, sharer_attention_mask, sharer_alignment, sharer_position_ids)
        if self.config.mode == "memory":
            texts = self._memory_texts(receiver_inputs, cache, sharer_inputs)
            if texts:
                give_states(self.config, texts, sharer_caches)
                arguments = (receiver_inputs, cache, labels, use_cache, logits_to_keep, kwargs)
                return self._receive_memory(texts, *arguments)
        elif self.fusion_enabled:
            texts = self._sharer_texts(receiver_inputs, labels, cache, sharer_inputs)
            give_states(self.config, texts, sharer_caches if texts else None)
            if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
                receiver_inputs["position_ids"] = position_ids_from_mask(attention_mask)[:, -tokens.shape[1] :]
        if texts:
            starts = None
            if self.config.fuse_response:
                # Logits that are asked for must come from the fused stream, also those of an assistant's candidates.
                starts = last_prompt_positions(attention_mask, labels, tokens)
                if isinstance(logits_to_keep, int) and logits_to_keep:
                    starts = starts.clamp_max(max(0, tokens.shape[1] - logits_to_keep))
            plan = plan_fusion([t.alignment for t in texts], [t.input_ids.shape[1] for t in texts], starts)
        if plan is None:
            return self._receive_alone(receiver_inputs, cache, labels, use_cache, logits_to_keep, kwargs)
        return self._receive_fused(plan, texts, receiver_inputs, cache, labels, use_cache, logits_to_keep, kwargs)

    def _receive_fused(
        self,
        plan: FusionPlan,
        texts: list[SharerText],
        receiver_inputs: dict[str, Any],
        cache: Cache | None,
        labels: torch.Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | torch.Tensor,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """Prefill all models, fuse, and let the receiver go on over the fused cache."""
        seq_len = new_length(receiver_inputs)
        keep = kept_columns(logits_to_keep, seq_len)
        first_kept = max(0, seq_len - keep)
        own_cache = self._own_cache(cache)
        if self.config.fuse_response and not isinstance(own_cache, C2CCache):
            own_cache = C2CCache(own_cache)

        receiving = partial(self._clean_states, plan, receiver_inputs, own_cache, first_kept)
        states, clean_logits = self._read_texts(texts, plan.sharer_lengths, own_cache, (self.receiver, receiving))
        sharer_caches = [text.state for text in texts]
        fuse_states(self.fuser, sharer_caches, states, plan.tokens, self.config.fusion_mode)

        substituted = plan.substituted(seq_len)
        outputs = self._receive_tail(states, plan.tail_start, substituted, receiver_inputs, own_cache, keep, kwargs)
        tail_logits = None if outputs is None else outputs.logits[:, -min(keep, seq_len - plan.tail_start) :]
        logits = join_logits(clean_logits, tail_logits, plan, first_kept, seq_len)
        returned = None if use_cache is False else own_cache
        return self._output(logits, outputs, returned, labels, logits_to_keep, kwargs)

    def _read_texts(
        self, texts: list[SharerText], lengths: Sequence[int], cache: Cache, beside: Reading | None = None
    ) -> Any:
        """Let every sharer read its text as far as `lengths` says, into the text's `state`.

        A [`C2CCache`] remembers what they read. `beside`, the receiver's own reading, may go on at the same time; what
        it returns is returned.
        """
        known: list[SharerCache | None] = [None] * len(texts)
        if isinstance(cache, C2CCache) and cache.sharer_caches:
            known = cache.sharer_caches
        shapes: Any = [sharer.layer_shapes for sharer in self.config.sharers]
        readings = [] if beside is None else [beside]
        for sharer, text, length, state, layers in zip(self.sharers, texts, lengths, known, shapes, strict=True):
            if text.state is not None:
                continue
            text.state = state
            if self.config.fuse_response:
                length = text.input_ids.shape[1]
            if length > 0:
                check_length("sharers", sharer, length)
                readings.append((sharer, partial(text.read, sharer, length, len(layers))))
        results = side_by_side(readings, texts[0].alignment.numel())
        if isinstance(cache, C2CCache):
            cache.sharer_caches = [text.state for text in texts]
        return None if beside is None else results[0]

    def _clean_states(
        self, plan: FusionPlan, receiver_inputs: dict[str, Any], cache: Cache, first_kept: int
    ) -> tuple[LayerStates, torch.Tensor | None]:
        """Run the receiver over the region that fuses, and return its own states there and the logits wanted of it.

        The caller's cache stays as it is. The states are the caller's to change.
        """
        needed = int(plan.row_starts.max()) > first_kept
        inputs = slice_inputs(receiver_inputs, 0, plan.end)
        if inputs["attention_mask"] is not None:
            seq_len = new_length(receiver_inputs)
            total = inputs["attention_mask"].shape[1]
            inputs["attention_mask"] = inputs["attention_mask"][:, : total - seq_len + plan.end]
        past_length = int(cache.get_seq_length())
        check_length("receiver", self.receiver, past_length + plan.end)
        if inputs["inputs_embeds"] is None:
            del inputs["inputs_embeds"]
        learns = trains(self.receiver)
        inputs |= {
            "logits_to_keep": plan.end - first_kept if needed else 0,
            "with_gradient": learns,
            "num_layers": len(self.config.receiver_layer_shapes or ()),
        }
        if self.config.fuse_response and isinstance(cache, C2CCache):
            if past_length > 0 and cache.clean_cache is None:
                raise ValueError(
                    "`cache`: with `fuse_response=True` a cache can only be continued if it was filled with response "
                    "fusion from the start, but this one was not; start with an empty one."
                )
            logits = prefill(self.receiver, cache.keep_clean(), **inputs)
            states = cached_states(cache.keep_clean())
            return [(k[:, :, past_length:].clone(), v[:, :, past_length:].clone()) for k, v in states], logits
        if past_length == 0:
            scratch = full_length_cache()
            logits = prefill(self.receiver, scratch, **inputs)
            states = cached_states(scratch)
            # Autograd keeps what attention has read, and fusing changes it in place.
            return [(keys.clone(), values.clone()) for keys, values in states] if learns else states, logits
        recording = RecordingCache(cache.receiver_cache if isinstance(cache, C2CCache) else cache)
        logits = prefill(self.receiver, recording, **inputs)
        return recording.recorded, logits

    def _sharer_texts(
        self,
        receiver_inputs: dict[str, Any],
        labels: torch.Tensor | None,
        cache: Cache | None,
        sharer_inputs: tuple[PerSharer | None, PerSharer | None, PerSharer | None, PerSharer | None],
    ) -> list[SharerText]:
        """Collect what each sharer reads; an empty list where the receiver works alone."""
        input_ids, attention_mask = receiver_inputs["input_ids"], receiver_inputs["attention_mask"]
        tokens = receiver_inputs["inputs_embeds"] if input_ids is None else input_ids
        batch_size, seq_len = tokens.shape[:2]
        given_ids, given_masks, given_alignments, given_positions = sharer_inputs
        fuse_response = self.config.fuse_response
        if given_ids is None:
            if (
                fuse_response
                and isinstance(cache, C2CCache)
                and cache.clean_cache is not None
                and input_ids is not None
            ):
                return continued_texts(self.config, self.token_tables, input_ids, attention_mask, cache)
            # Asking a static cache for its length waits for the device, so the first answer comes without.
            if (seq_len <= 1 and not fuse_response) or (cache is not None and int(cache.get_seq_length()) > 0):
                return []
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"`attention_mask` must be of shape (batch_size, length), but got {tuple(attention_mask.shape)}."
            )
        past_length = 0 if cache is None else int(cache.get_seq_length())
        if given_ids is None or fuse_response:
            # Response fusion goes on token by token, so that the sharers' texts are made token by token throughout.
            texts = texts_from_tokens(
                self.config, self.token_tables, input_ids, attention_mask, receiver_inputs["position_ids"]
            )
        else:
            texts = texts_as_given(self.config, given_ids, given_masks, given_positions, batch_size)
        ends = last_prompt_positions(attention_mask, labels, tokens)
        if given_alignments is None:
            for text in texts:
                text.alignment = leave_out(
                    text.alignment, attention_mask, None if fuse_response else ends, past_length, seq_len
                )
            return texts
        columns = torch.arange(seq_len, device=tokens.device)
        alignments = per_sharer(self.config, "sharer_alignment", given_alignments)
        for text, alignment in zip(texts, alignments, strict=True):
            alignment = new_positions(alignment, batch_size, seq_len, past_length)
            if fuse_response:
                # The caller says which prompt positions fuse; from the last one on all do.
                left_out = (alignment < 0) & (columns < ends.unsqueeze(1)).to(alignment.device)
                alignment = text.alignment.masked_fill(left_out.to(text.alignment.device), -1)
            text.alignment = alignment
        return texts
