"""`C2CForCausalLM`: a receiver that answers from its own cache, fused with what frozen sharers have read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ._compat import CACHE_ARGUMENT, accepts_argument, pop_cache
from .alignment import apply_token_table
from .cache import C2CCache
from .fusion import FusionPlan, fuse_states, plan_fusion
from .prefill import (
    LayerStates,
    RecordingCache,
    SharerState,
    cached_states,
    full_length_cache,
    position_ids_from_mask,
    prefill,
    read_text,
)
from .pretrained_c2c import C2CPreTrainedModel

#: A tensor where there is one sharer, else one per sharer.
PerSharer = torch.Tensor | Sequence[torch.Tensor]

SHARER_ARGUMENTS = ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment", "sharer_position_ids")


@dataclass
class _SharerText:
    """What a sharer reads, `(batch_size, sharer_len)` each, and which of it the new receiver tokens read."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    alignment: torch.Tensor
    position_ids: torch.Tensor | None = None


class C2CForCausalLM(C2CPreTrainedModel, GenerationMixin):
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
        **kwargs: Any,  # noqa: ANN401
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
            sharer_input_ids: `(batch_size, sharer_len)`, the sharer's tokens of the whole text, earlier turns included;
                with several sharers a list. `None`: made from `input_ids` where the alignment goes token by token; on a
                cache that holds something the new tokens are then decoded without fusion.
            sharer_attention_mask: `(batch_size, sharer_len)`. `None`: no padding.
            sharer_alignment: `(batch_size, seq_len)`, or for the whole text: the sharer position that each receiver
                position reads, or -1. Exactly the positions that hold one fuse. `None`: all but the last prompt
                position, each reading its own.
            sharer_position_ids: `(batch_size, sharer_len)`. `None`: counted from the mask.
            past_key_values: The name of `cache` before transformers 5.24.
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
        receiver_inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        plan, texts = None, []
        if self.fusion_enabled:
            sharer_inputs = (sharer_input_ids, sharer_attention_mask, sharer_alignment, sharer_position_ids)
            texts = self._sharer_texts(input_ids, attention_mask, position_ids, labels, cache, sharer_inputs, tokens)
            if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
                position_ids = position_ids_from_mask(attention_mask)[:, -tokens.shape[1] :]
        receiver_inputs["position_ids"] = position_ids
        if texts:
            starts = None
            if self.config.fuse_response:
                # Logits that are asked for must come from the fused stream, also those of an assistant's candidates.
                starts = self._last_prompt_positions(attention_mask, labels, tokens)
                if isinstance(logits_to_keep, int) and logits_to_keep:
                    starts = starts.clamp_max(max(0, tokens.shape[1] - logits_to_keep))
            plan = plan_fusion([t.alignment for t in texts], [t.input_ids.shape[1] for t in texts], starts)
        if plan is None:
            return self._receive_alone(receiver_inputs, cache, labels, use_cache, logits_to_keep, kwargs)
        return self._receive_fused(plan, texts, receiver_inputs, cache, labels, use_cache, logits_to_keep, kwargs)

    def _receive_alone(
        self,
        receiver_inputs: dict[str, Any],
        cache: Cache | None,
        labels: torch.Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | torch.Tensor,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """Let the receiver work by itself: fusion is off, nothing is aligned, or the answer is decoded."""
        inputs = {**kwargs, **receiver_inputs, "labels": labels, "use_cache": use_cache, CACHE_ARGUMENT: cache}
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
            inputs["logits_to_keep"] = logits_to_keep
        optional = ("inputs_embeds", "position_ids", "labels")
        inputs = {name: value for name, value in inputs.items() if name not in optional or value is not None}
        for name in ("position_ids", "logits_to_keep"):
            if not accepts_argument(self.receiver, name):
                inputs.pop(name, None)
        return self.receiver(**inputs)

    def _receive_fused(
        self,
        plan: FusionPlan,
        texts: list[_SharerText],
        receiver_inputs: dict[str, Any],
        cache: Cache | None,
        labels: torch.Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | torch.Tensor,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """Prefill all models, fuse, and let the receiver go on over the fused cache (design: one forward)."""
        seq_len = _seq_len(receiver_inputs)
        keep = seq_len if isinstance(logits_to_keep, torch.Tensor) or not logits_to_keep else logits_to_keep
        first_kept = max(0, seq_len - keep)
        own_cache = cache if cache is not None else DynamicCache(config=self.receiver.config.get_text_config())
        if self.config.fuse_response and not isinstance(own_cache, C2CCache):
            own_cache = C2CCache(own_cache)

        sharer_states = self._read_texts(plan, texts, own_cache)
        states, clean_logits = self._clean_states(plan, receiver_inputs, own_cache, first_kept)
        fuse_states(self.fuser, sharer_states, states, plan.tokens, self.config.fusion_mode)

        tail_length = seq_len - plan.tail_start
        substituted = plan.substituted(seq_len)
        # Cut out what the tail needs before the block's states go, layer by layer, into the cache.
        tail_states = [_tail(pair, plan.tail_start, tail_length) for pair in states] if substituted is not None else []
        if plan.tail_start > 0:
            for layer_idx in range(len(states)):
                keys, values = states[layer_idx]
                states[layer_idx] = (None, None)  # type: ignore[call-overload]
                own_cache.update(keys[:, :, : plan.tail_start], values[:, :, : plan.tail_start], layer_idx)
        del states

        outputs = None
        if tail_length > 0:
            tail_inputs = {**kwargs, **_slice_inputs(receiver_inputs, plan.tail_start, seq_len)}
            tail_keep = min(keep, tail_length)
            if substituted is None:
                outputs = self._receive_alone(tail_inputs, own_cache, None, True, tail_keep, {})
            else:
                fusing = own_cache if isinstance(own_cache, C2CCache) else C2CCache(own_cache)
                with fusing.substituting(tail_states, substituted):
                    outputs = self._receive_alone(tail_inputs, fusing, None, True, tail_keep, {})
        tail_logits = None if outputs is None else outputs.logits[:, -min(keep, tail_length) :]
        logits = _join_logits(clean_logits, tail_logits, plan, first_kept, seq_len)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels[:, first_kept:].to(logits.device), vocab_size=logits.shape[-1], **kwargs
            )
        if isinstance(logits_to_keep, torch.Tensor):
            logits = logits[:, logits_to_keep]
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=None if outputs is None else outputs.get("hidden_states"),
            attentions=None if outputs is None else outputs.get("attentions"),
            **{CACHE_ARGUMENT: None if use_cache is False else own_cache},
        )

    def _read_texts(
        self, plan: FusionPlan, texts: list[_SharerText], cache: Cache
    ) -> list[SharerState | None]:
        """Let every sharer read as far as the receiver draws on it; a [`C2CCache`] remembers what it read."""
        known: list[SharerState | None] = [None] * len(texts)
        if isinstance(cache, C2CCache) and cache.sharer_states:
            known = cache.sharer_states
        states: list[SharerState | None] = []
        for sharer, text, length, state in zip(self.sharers, texts, plan.sharer_lengths, known, strict=True):
            if self.config.fuse_response:
                length = text.input_ids.shape[1]
            if length > 0:
                _check_length("sharers", sharer, length)
                position_ids = None if text.position_ids is None else text.position_ids[:, :length]
                state = read_text(
                    sharer, text.input_ids[:, :length], text.attention_mask[:, :length], position_ids, known=state
                )
            states.append(state)
        if isinstance(cache, C2CCache):
            cache.sharer_states = states
        return states

    def _clean_states(
        self, plan: FusionPlan, receiver_inputs: dict[str, Any], cache: Cache, first_kept: int
    ) -> tuple[LayerStates, torch.Tensor | None]:
        """Run the receiver over the region that fuses, and return its own states there and the logits wanted of it.

        The caller's cache stays as it is. The states are the caller's to change.
        """
        needed = int(plan.row_starts.max()) > first_kept
        inputs = _slice_inputs(receiver_inputs, 0, plan.end)
        if inputs["attention_mask"] is not None:
            seq_len = _seq_len(receiver_inputs)
            total = inputs["attention_mask"].shape[1]
            inputs["attention_mask"] = inputs["attention_mask"][:, : total - seq_len + plan.end]
        past_length = int(cache.get_seq_length())
        _check_length("receiver", self.receiver, past_length + plan.end)
        if inputs["inputs_embeds"] is None:
            del inputs["inputs_embeds"]
        keep = plan.end - first_kept if needed else 0
        if self.config.fuse_response and isinstance(cache, C2CCache):
            if past_length > 0 and cache.clean_cache is None:
                raise ValueError(
                    "`cache`: with `fuse_response=True` a cache can only be continued if it was filled with response fusion "
                    "from the start, but this one was not; start with an empty one."
                )
            logits = prefill(self.receiver, cache.keep_clean(), logits_to_keep=keep, **inputs)
            states = cached_states(cache.keep_clean())
            return [(k[:, :, past_length:].clone(), v[:, :, past_length:].clone()) for k, v in states], logits
        if past_length == 0:
            scratch = full_length_cache()
            logits = prefill(self.receiver, scratch, logits_to_keep=keep, **inputs)
            return cached_states(scratch), logits
        recording = RecordingCache(cache.receiver_cache if isinstance(cache, C2CCache) else cache)
        logits = prefill(self.receiver, recording, logits_to_keep=keep, **inputs)
        return recording.recorded, logits

    def _sharer_texts(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        cache: Cache | None,
        sharer_inputs: tuple[PerSharer | None, PerSharer | None, PerSharer | None, PerSharer | None],
        tokens: torch.Tensor,
    ) -> list[_SharerText]:
        """Collect what each sharer reads; an empty list where the receiver works alone."""
        batch_size, seq_len = tokens.shape[:2]
        given_ids, given_masks, given_alignments, given_positions = sharer_inputs
        streaming = self.config.fuse_response and isinstance(cache, C2CCache) and cache.clean_cache is not None
        if given_ids is None:
            if streaming and input_ids is not None:
                return self._continued_texts(input_ids, attention_mask, cache)
            if seq_len <= 1 and not self.config.fuse_response:
                return []
            if cache is not None and int(cache.get_seq_length()) > 0:
                return []
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"`attention_mask` must be of shape (batch_size, length), but got {tuple(attention_mask.shape)}.")
        past_length = 0 if cache is None else int(cache.get_seq_length())
        if given_ids is None or self.config.fuse_response:
            # Response fusion goes on token by token, so that the sharers' texts are made token by token throughout.
            texts = self._texts_from_tokens(input_ids, attention_mask, position_ids)
        else:
            texts = self._texts_as_given(given_ids, given_masks, given_positions, batch_size)
        ends = self._last_prompt_positions(attention_mask, labels, tokens).unsqueeze(1)
        columns = torch.arange(seq_len, device=tokens.device)
        if given_alignments is None:
            left_out = torch.zeros((batch_size, seq_len), dtype=torch.bool, device=tokens.device)
            if attention_mask is not None:
                left_out |= attention_mask[:, -seq_len:] == 0
            if not self.config.fuse_response:
                left_out |= columns >= ends
            for text in texts:
                _check_one_by_one(text.alignment, past_length + seq_len)
                text.alignment = text.alignment[:, past_length:].masked_fill(left_out.to(text.alignment.device), -1)
            return texts
        for text, alignment in zip(texts, self._as_list("sharer_alignment", given_alignments), strict=True):
            alignment = _new_positions(alignment, batch_size, seq_len, past_length)
            if self.config.fuse_response:
                # The caller says which prompt positions fuse; from the last one on all do.
                left_out = (alignment < 0) & (columns < ends).to(alignment.device)
                alignment = text.alignment.masked_fill(left_out.to(text.alignment.device), -1)
            text.alignment = alignment
        return texts

    def _texts_from_tokens(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
    ) -> list[_SharerText]:
        """Make each sharer's text from the receiver's tokens, one by one."""
        if input_ids is None:
            raise ValueError("`sharer_input_ids` must be given beside `inputs_embeds`, since sharers read tokens.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        texts = []
        for index, alignment in enumerate(self.config.token_alignments):
            if alignment == "span":
                raise ValueError(
                    "`sharer_input_ids` must be given with `token_alignment='span'`, since the sharer has a tokenization of "
                    "its own; use `C2CProcessor` to make all inputs."
                )
            if alignment == "identity":
                columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
                texts.append(_SharerText(input_ids, attention_mask, columns, position_ids))
                continue
            table, bos_token_id = self._token_table(index)
            texts.append(_SharerText(*apply_token_table(table.to(input_ids.device), input_ids, attention_mask, bos_token_id)))
        return texts

    def _token_table(self, index: int) -> tuple[torch.Tensor, int | None]:
        table: torch.Tensor = getattr(self, f"token_table_{index}")
        return table, self.config.sharer_bos_token_ids[index]

    def _texts_as_given(
        self, input_ids: PerSharer, attention_masks: PerSharer | None, position_ids: PerSharer | None, batch_size: int
    ) -> list[_SharerText]:
        ids = self._as_list("sharer_input_ids", input_ids)
        masks = [torch.ones_like(i) for i in ids]
        if attention_masks is not None:
            masks = self._as_list("sharer_attention_mask", attention_masks)
        positions = [None] * len(ids) if position_ids is None else self._as_list("sharer_position_ids", position_ids)
        texts = []
        for sharer_ids, mask, sharer_positions in zip(ids, masks, positions, strict=True):
            if sharer_ids.dim() != 2 or sharer_ids.shape[0] != batch_size:
                raise ValueError(
                    f"`sharer_input_ids` must be of shape (batch_size={batch_size}, sharer_len) like `input_ids`, but got "
                    f"{tuple(sharer_ids.shape)}."
                )
            if mask.shape != sharer_ids.shape:
                raise ValueError(
                    f"`sharer_attention_mask` must have the shape of `sharer_input_ids`, {tuple(sharer_ids.shape)}, but got "
                    f"{tuple(mask.shape)}."
                )
            columns = torch.arange(sharer_ids.shape[1], device=sharer_ids.device).expand(sharer_ids.shape)
            texts.append(_SharerText(sharer_ids, mask, columns.masked_fill(mask == 0, -1), sharer_positions))
        return texts

    def _continued_texts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: C2CCache
    ) -> list[_SharerText]:
        """Append answer tokens to what each sharer has read, for response fusion."""
        new_mask = torch.ones_like(input_ids)
        if attention_mask is not None and attention_mask.dim() == 2:
            new_mask = attention_mask[:, -input_ids.shape[1] :]
        texts = []
        for index, state in enumerate(cache.sharer_states):
            ids, mask = input_ids, new_mask
            if self.config.token_alignments[index] != "identity":
                table, _ = self._token_table(index)
                ids, mask, _ = apply_token_table(table.to(input_ids.device), input_ids, new_mask, None)
            known_ids = ids[:, :0] if state is None else state.input_ids.to(ids.device)
            known_mask = mask[:, :0] if state is None else state.attention_mask.to(mask.device)
            columns = known_ids.shape[1] + torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            texts.append(
                _SharerText(
                    torch.cat([known_ids, ids], 1),
                    torch.cat([known_mask, mask.to(known_mask.dtype)], 1),
                    columns.masked_fill(mask == 0, -1),
                )
            )
        return texts

    def _as_list(self, name: str, value: PerSharer) -> list[torch.Tensor]:
        values = [value] if isinstance(value, torch.Tensor) else list(value)
        if len(values) != self.config.num_sharers:
            raise ValueError(
                f"`{name}` must hold one tensor per sharer ({self.config.num_sharers}), but got {len(values)}."
            )
        return values

    def _last_prompt_positions(
        self, attention_mask: torch.Tensor | None, labels: torch.Tensor | None, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return per row the position that predicts the first answer token, `(batch_size,)`."""
        batch_size, seq_len = tokens.shape[:2]
        columns = torch.arange(seq_len, device=tokens.device)
        real = columns.expand(batch_size, seq_len)
        if attention_mask is not None:
            real = real.masked_fill(attention_mask[:, -seq_len:] == 0, -1)
        last = real.amax(1)
        if labels is not None:
            first_label = torch.where(labels != -100, columns, seq_len).amin(1)
            last = torch.minimum(last, (first_label - 1).clamp_min(0))
        return last

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """Prepare one step of `generate` the receiver's own way; sharer inputs go into the prefill only."""
        sharer_inputs = {name: kwargs.pop(name) for name in SHARER_ARGUMENTS if name in kwargs}
        reads_prompt = is_first_iteration or not kwargs.get("use_cache", True)
        fuses = self.fusion_enabled and (reads_prompt or self.config.fuse_response)
        # Without the cache in sight, the receiver leaves the mask two-dimensional, which the prefills need.
        cache = pop_cache(kwargs) if fuses else None
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        inputs = self.receiver.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if fuses:
            inputs[CACHE_ARGUMENT] = cache
            if reads_prompt:
                inputs.update(sharer_inputs)
        return inputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Generate as transformers does, with every mode and argument that it has.

        Sharer inputs may be left out where the alignment goes token by token (`"identity"`, `"first"`, `"longest"`).

        Raises:
            ValueError: With `prefill_chunk_size`: a chunk would be read over the fused states of the one before it.
        """
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.generation_config
        chunk_size = kwargs.get("prefill_chunk_size", config.prefill_chunk_size)
        if self.fusion_enabled and chunk_size is not None:
            raise ValueError(
                f"`prefill_chunk_size` must be None, but got {chunk_size}: fusion needs the prompt read as a whole."
            )
        return super().generate(*args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        # The first hook that sees both ids and mask: from here on the prompt's end must be known, because assisted
        # decoding appends its candidates before the prefill.
        if self.fusion_enabled and input_ids is not None:
            self._complete_sharer_inputs(input_ids, model_kwargs)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        for name in SHARER_ARGUMENTS:
            if isinstance(model_kwargs.get(name), list | tuple):
                model_kwargs[name] = [value.repeat_interleave(expand_size, dim=0) for value in model_kwargs[name]]
        return input_ids, model_kwargs

    def _complete_sharer_inputs(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Write the sharer inputs that the caller left out into `model_kwargs`."""
        ids, masks, given_alignment, positions = (model_kwargs.get(name) for name in SHARER_ARGUMENTS)
        if self.config.fuse_response or (ids is not None and given_alignment is not None):
            return
        mask = model_kwargs.get("attention_mask")
        if ids is None:
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError("`sharer_input_ids` must be given beside `inputs_embeds`, since sharers read tokens.")
            texts = self._texts_from_tokens(input_ids, mask, model_kwargs.get("position_ids"))
            model_kwargs["sharer_input_ids"] = [text.input_ids for text in texts]
            model_kwargs["sharer_attention_mask"] = [text.attention_mask for text in texts]
            if all(text.position_ids is not None for text in texts):
                model_kwargs["sharer_position_ids"] = [text.position_ids for text in texts]
        else:
            texts = self._texts_as_given(ids, masks, positions, input_ids.shape[0])
        if given_alignment is None:
            ends = self._last_prompt_positions(mask, None, input_ids).unsqueeze(1)
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            for text in texts:
                _check_one_by_one(text.alignment, input_ids.shape[1])
            left_out = columns >= ends
            if mask is not None:
                left_out |= mask == 0
            model_kwargs["sharer_alignment"] = [
                text.alignment.masked_fill(left_out.to(text.alignment.device), -1) for text in texts
            ]

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401
        # The assistant is a plain model, which does not know sharer inputs.
        plain = {name: value for name, value in model_kwargs.items() if name not in SHARER_ARGUMENTS}
        return super()._get_candidate_generator(*args, model_kwargs=plain, **kwargs)


def _seq_len(receiver_inputs: dict[str, Any]) -> int:
    tokens = receiver_inputs["input_ids"]
    return (receiver_inputs["inputs_embeds"] if tokens is None else tokens).shape[1]


def _slice_inputs(receiver_inputs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """Cut new tokens and their positions; the mask covers the past as well and stays."""
    sliced = dict(receiver_inputs)
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if sliced[name] is not None:
            sliced[name] = sliced[name][:, start:end]
    return sliced


def _tail(states: tuple[torch.Tensor, torch.Tensor], start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states from `start` on, filled up to `length` positions."""
    keys, values = (state[:, :, start:] for state in states)
    padding = (0, 0, 0, length - keys.shape[2])
    return torch.nn.functional.pad(keys, padding), torch.nn.functional.pad(values, padding)


def _join_logits(
    clean: torch.Tensor | None, tail: torch.Tensor | None, plan: FusionPlan, first_kept: int, seq_len: int
) -> torch.Tensor:
    """Take each row's logits from the clean pass up to its own start and from the tail behind it."""
    if clean is None:
        return tail
    if tail is None:
        return clean
    tail_first = seq_len - tail.shape[1]
    overlap_end = min(plan.end, seq_len)
    head, overlap = clean[:, : tail_first - first_kept], clean[:, tail_first - first_kept :]
    columns = torch.arange(tail_first, overlap_end)
    from_clean = (columns < plan.row_starts.unsqueeze(1)).to(tail.device).unsqueeze(-1)
    joined = torch.where(from_clean, overlap, tail[:, : overlap_end - tail_first])
    return torch.cat([head, joined, tail[:, overlap_end - tail_first :]], dim=1)


def _check_one_by_one(alignment: torch.Tensor, length: int) -> None:
    if alignment.shape[1] != length:
        raise ValueError(
            "`sharer_alignment` must be given where a sharer's tokens are not the receiver's one by one: the sharer reads "
            f"{alignment.shape[1]} tokens, the receiver {length}; use `C2CProcessor` to make all inputs."
        )


def _new_positions(alignment: torch.Tensor, batch_size: int, seq_len: int, past_length: int) -> torch.Tensor:
    """Cut the new tokens out of an alignment of the whole text; tokens behind its end read nothing."""
    if alignment.dim() != 2 or alignment.shape[0] != batch_size:
        raise ValueError(
            f"`sharer_alignment` must be of shape (batch_size={batch_size}, length), but got {tuple(alignment.shape)}."
        )
    if alignment.is_floating_point():
        raise ValueError(f"`sharer_alignment` must hold integers, but got {alignment.dtype}.")
    length = alignment.shape[1]
    if length > seq_len:
        if length < past_length + seq_len:
            raise ValueError(
                f"`sharer_alignment` must cover the {seq_len} new tokens or the whole text of {past_length + seq_len}, but "
                f"its length is {length}."
            )
        return alignment[:, past_length : past_length + seq_len]
    return torch.nn.functional.pad(alignment, (0, seq_len - length), value=-1)


def _check_length(role: str, model: torch.nn.Module, length: int) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit > 0:
        raise ValueError(
            f"`{role}`: the text has {length} tokens, but {type(model).__name__} reads at most {limit}; shorten it or "
            "truncate in the processor."
        )
