"""The receiver's own part of a forward pass, whatever stands in its cache."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ._compat import CACHE_ARGUMENT, accepts_argument
from .inference.cache import C2CCache
from .inference.output_head import contiguous_head
from .inference.passes import fill_cache, new_length, slice_inputs, states_from
from .inference.prefill import LayerStates


class ReceivingMixin:
    """Lets the receiver work by itself, or go on behind states that it was given."""

    receiver: PreTrainedModel
    loss_function: Any

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
        keeps_some = isinstance(logits_to_keep, torch.Tensor) or logits_to_keep
        if keeps_some and accepts_argument(self.receiver, "logits_to_keep"):
            inputs["logits_to_keep"] = logits_to_keep
            if labels is not None:
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                inputs["labels"] = labels[:, kept]
        optional = ("inputs_embeds", "position_ids", "labels")
        inputs = {name: value for name, value in inputs.items() if name not in optional or value is not None}
        if not accepts_argument(self.receiver, "position_ids"):
            inputs.pop("position_ids", None)
        return self.receiver(**inputs)

    def _own_cache(self, cache: Cache | None) -> Cache:
        return DynamicCache(config=self.receiver.config.get_text_config()) if cache is None else cache

    def _receive_tail(
        self,
        states: LayerStates,
        tail_start: int,
        substituted: torch.Tensor | None,
        receiver_inputs: dict[str, Any],
        cache: Cache,
        keep: int,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast | None:
        """Put given states into the cache up to the tail, and let the receiver go on; `None` where no tail is left.

        Where `substituted` says so, `(batch_size, tail length)`, given states take the place of the tail's own.
        """
        seq_len = new_length(receiver_inputs)
        tail_length = seq_len - tail_start
        # Cut out what the tail needs before the block's states go, layer by layer, into the cache.
        tail_states = (
            [states_from(pair, tail_start, tail_length) for pair in states] if substituted is not None else []
        )
        if tail_start > 0:
            fill_cache(cache, states, tail_start)
        if tail_length == 0:
            return None
        inputs, keep = {**kwargs, **slice_inputs(receiver_inputs, tail_start, seq_len)}, min(keep, tail_length)
        with contiguous_head(self.receiver):
            if substituted is None:
                return self._receive_alone(inputs, cache, None, True, keep, {})
            fusing = cache if isinstance(cache, C2CCache) else C2CCache(cache)
            with fusing.substituting(tail_states, substituted):
                return self._receive_alone(inputs, fusing, None, True, keep, {})

    def _output(
        self,
        logits: torch.Tensor,
        outputs: CausalLMOutputWithPast | None,
        cache: Cache | None,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """Return logits of the last columns with their loss, and the rest as the tail's `outputs` have it."""
        loss = None
        if labels is not None:
            labels = labels[:, labels.shape[1] - logits.shape[1] :].to(logits.device)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits[:, logits_to_keep] if isinstance(logits_to_keep, torch.Tensor) else logits,
            hidden_states=None if outputs is None else outputs.get("hidden_states"),
            attentions=None if outputs is None else outputs.get("attentions"),
            **{CACHE_ARGUMENT: cache},
        )
