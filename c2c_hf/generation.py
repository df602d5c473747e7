"""Generation: sharer inputs through transformers' `generate`, every mode of it."""

from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from ._compat import CACHE_ARGUMENT, pop_cache
from .configuration_c2c import C2CConfig
from .inference.given_states import states_per_sharer
from .inference.memory_slots import hide_slots
from .inference.sharer_inputs import last_prompt_positions, leave_out, per_sharer, texts_as_given, texts_from_tokens

_TENSORS = ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment", "sharer_position_ids")
SHARER_ARGUMENTS = (*_TENSORS, "sharer_caches")


class C2CGenerationMixin(GenerationMixin):
    """Hands sharer inputs to the prefill and leaves every other step to the receiver."""

    config: C2CConfig
    receiver: PreTrainedModel
    fusion_enabled: bool

    @property
    def token_tables(self) -> list[torch.Tensor | None]:
        """Per sharer the lookup table of the `"first"` and `"longest"` alignments, else `None`."""
        return [getattr(self, f"token_table_{index}") for index in range(self.config.num_sharers)]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
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
        alignments = kwargs.get("sharer_alignment")
        if self.config.mode == "memory" and not self.fusion_enabled and alignments is not None:
            alignments = per_sharer(self.config, "sharer_alignment", alignments)
            mask = kwargs.get("attention_mask")
            kwargs["attention_mask"] = hide_slots(torch.ones_like(alignments[0]) if mask is None else mask, alignments)
        return super().generate(*args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        # The first hook that sees both ids and mask: from here on the prompt's end must be known, because assisted
        # decoding appends its candidates before the prefill.
        if self.fusion_enabled and self.config.mode != "memory" and input_ids is not None:
            self._complete_sharer_inputs(input_ids, model_kwargs)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if model_kwargs.get("sharer_caches") is not None:
            states = states_per_sharer(model_kwargs["sharer_caches"], self.config.num_sharers)
            model_kwargs["sharer_caches"] = states
        for name in SHARER_ARGUMENTS:
            if isinstance(model_kwargs.get(name), list | tuple):
                model_kwargs[name] = [
                    None if value is None else value.repeat_interleave(expand_size, dim=0)
                    for value in model_kwargs[name]
                ]
        return input_ids, model_kwargs

    def _complete_sharer_inputs(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Write the sharer inputs that the caller left out into `model_kwargs`."""
        ids, masks, alignment, positions = (model_kwargs.get(name) for name in _TENSORS)
        # Response fusion makes its texts token by token, the answer's too.
        if self.config.fuse_response or (ids is not None and alignment is not None):
            return
        mask = model_kwargs.get("attention_mask")
        if ids is None:
            tokens = input_ids if model_kwargs.get("inputs_embeds") is None else None
            texts = texts_from_tokens(self.config, self.token_tables, tokens, mask, model_kwargs.get("position_ids"))
            model_kwargs["sharer_input_ids"] = [text.input_ids for text in texts]
            model_kwargs["sharer_attention_mask"] = [text.attention_mask for text in texts]
            if all(text.position_ids is not None for text in texts):
                model_kwargs["sharer_position_ids"] = [text.position_ids for text in texts]
        else:
            texts = texts_as_given(self.config, ids, masks, positions, input_ids.shape[0])
        if alignment is None:
            ends = last_prompt_positions(mask, None, input_ids)
            model_kwargs["sharer_alignment"] = [
                leave_out(text.alignment, mask, ends, 0, input_ids.shape[1]) for text in texts
            ]

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # The assistant is a plain model, which does not know sharer inputs.
        plain = {name: value for name, value in model_kwargs.items() if name not in SHARER_ARGUMENTS}
        return super()._get_candidate_generator(*args, model_kwargs=plain, **kwargs)
