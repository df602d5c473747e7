"""`C2CAnswerer`: a receiver answers with its sharers' caches fused in, as they are or changed by a control."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import BatchFeature, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..._compat import CACHE_ARGUMENT
from ...fusers.c2c import C2CFuser
from ...inference.cache import C2CCache
from ...inference.sharer_cache import SharerCache, prefill_sharer
from ...modeling_c2c import C2CForCausalLM
from ...processing_c2c import C2CProcessor
from .answerer import Answerer, PromptBatch, Query, synchronized_time
from .controls import Control
from .gate_weights import record_gate_weights


class SharerPrefills:
    """The last prefilled batch of every sharer, of which later batches with the same texts take rows."""

    def __init__(self) -> None:
        self._last: dict[int, SharerCache] = {}

    def prefill(self, index: int, sharer: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> SharerCache:
        """Return a cache of its own, from the last batch if that has every row of this one.

        Args:
            index: Of the sharer.
            sharer: The sharer.
            ids: `(batch_size, sharer_len)`.
            mask: `(batch_size, sharer_len)`.
        """
        last, rows = self._last.get(index), None
        if last is not None and last.input_ids.shape[1] == ids.shape[1]:
            is_same = (ids[:, None] == last.input_ids) & (mask[:, None] == last.attention_mask)
            found = is_same.all(-1)
            rows = found.int().argmax(1) if bool(found.any(1).all()) else None
        if last is None or rows is None:
            # The old batch is freed first.
            self._last.pop(index, None)
            last, rows = prefill_sharer(sharer, ids, mask), torch.arange(len(ids), device=ids.device)
            self._last[index] = last
        taken = last.copy()
        taken.select_rows(rows)
        return taken


@dataclass
class C2CAnswerer(Answerer):
    """A receiver with its sharers, or under a control.

    Args:
        c2c_model: The C2C model.
        processor: Its processor.
        control: What is changed between the sharers and the receiver.
        prefills: Where other methods or calls prefill the same texts: what they share. `None`: every call prefills.
    """

    c2c_model: C2CForCausalLM
    processor: C2CProcessor
    control: Control = field(default_factory=Control)
    prefills: SharerPrefills | None = None

    def __post_init__(self) -> None:
        self.c2c_model.check_processor(self.processor.settings)

    @property
    def model(self) -> PreTrainedModel:
        """The C2C model."""
        return self.c2c_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The receiver's tokenizer."""
        return self.processor.tokenizer

    def tokenize(self, queries: Sequence[Query], strip: bool) -> PromptBatch:
        """Tokenize prompts for receiver and sharers, and apply the control to the sharers' inputs.

        Args:
            queries: The prompts, one batch.
            strip: Whether spaces at the end of plain prompts are removed.

        Raises:
            ValueError: The prompts are of several kinds, or the control lacks another question's prompt.
        """
        if not self.control.uses_sharers:
            queries = [replace(query, context="") for query in queries]
        if self.control.needs_mismatched and any(query.context for query in queries):
            # The receiver's question stays the same; only the sharers' context is another one's.
            return self._tokenize([replace(query, context=query.mismatched_context) for query in queries], strip)
        batch, mismatched = self._tokenize(queries, strip), None
        if self.control.needs_mismatched:
            others = [
                replace(query, prompt=query.mismatched_prompt)
                for query in queries
                if query.mismatched_prompt is not None
            ]
            if len(others) < len(queries):
                raise ValueError("`mismatched_prompt` must be given with this control: another question's prompt.")
            mismatched = self._tokenize(others, strip)
        batch = self.control.change_inputs(batch, mismatched, [query.seed for query in queries])
        return self.control.select_positions(self.c2c_model, batch)

    def _tokenize(self, queries: Sequence[Query], strip: bool) -> PromptBatch:
        kinds = {(isinstance(query.prompt, str), query.continues) for query in queries}
        if len(kinds) > 1:
            raise ValueError("`queries` of one batch must all be plain texts, or all chats that end alike.")
        options: dict[str, Any] = {"truncation": self.max_length is not None, "max_length": self.max_length}
        if any(query.context for query in queries):
            options["sharer_context"] = [query.context for query in queries]
        if self.tokenizer.chat_template and not isinstance(queries[0].prompt, str):
            chats = [query.prompt for query in queries if not isinstance(query.prompt, str)]
            options |= self._template_arguments(queries[0])
            # One of the many kinds that `apply_chat_template` may return.
            encoded = cast(BatchFeature, self.processor.apply_chat_template([list(chat) for chat in chats], **options))
        else:
            texts = [self._render(query) for query in queries]
            encoded = self.processor([text.rstrip() if strip else text for text in texts], **options)
        device = self.model.device
        sharer_inputs: dict[str, list[torch.Tensor]] = {}
        for name in ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment"):
            # The processor returns one sharer's tensors without a list.
            tensors = encoded[name] if isinstance(encoded[name], list) else [encoded[name]]
            sharer_inputs[name] = [tensor.to(device) for tensor in tensors]
        return PromptBatch(encoded["input_ids"].to(device), encoded["attention_mask"].to(device), **sharer_inputs)

    @contextmanager
    def _inference(self, batch: PromptBatch, queries: Sequence[Query]) -> Iterator[dict[str, Any]]:
        with self.control.applied(self.c2c_model, batch):
            if not self.control.uses_sharers:
                yield batch.inputs_for(self.c2c_model)
                return
            inputs = batch.fusion_inputs()
            if self._prefills_sharers_first():
                start = synchronized_time()
                inputs[CACHE_ARGUMENT] = self._prefill_sharers(batch, [query.seed for query in queries])
                self.seconds.sharer = synchronized_time() - start
            with self._fusion_timed(), self._gate_weights_recorded(batch):
                yield inputs

    def _prefills_sharers_first(self) -> bool:
        """Return whether the sharers run before the model is called, with a time of their own."""
        if self.control.changes_states or self.c2c_model.config.mode == "memory":
            return True
        # On the CPU the model runs receiver and sharers at the same time, which is faster.
        return self.c2c_model.device.type != "cpu"

    def _prefill_sharers(self, batch: PromptBatch, seeds: Sequence[int]) -> C2CCache:
        """Prefill the sharers, change their states by the control, and return a cache that the model continues."""
        cache = C2CCache(DynamicCache(config=self.c2c_model.receiver.config.get_text_config()))
        texts = zip(batch.sharer_input_ids, batch.sharer_attention_mask, strict=True)
        for index, (sharer, (ids, mask)) in enumerate(zip(self.c2c_model.sharers, texts, strict=True)):
            if self.prefills is None:
                sharer_cache = prefill_sharer(sharer, ids, mask)
            else:
                sharer_cache = self.prefills.prefill(index, sharer, ids, mask)
            self.control.change_states(sharer_cache, seeds)
            cache.sharer_caches.append(sharer_cache)
        return cache

    @contextmanager
    def _gate_weights_recorded(self, batch: PromptBatch) -> Iterator[None]:
        fusers = [fuser for fuser in self.c2c_model.fuser if isinstance(fuser, C2CFuser)]
        if not fusers or self.c2c_model.config.fuse_response:
            # Memory fusers have no gates; response fusion opens them anew for every token of the answer.
            yield
            return
        with record_gate_weights(fusers, batch.sharer_alignment) as self.gate_weights:
            yield

    @contextmanager
    def _fusion_timed(self) -> Iterator[None]:
        starts: list[float] = []

        def start(module: nn.Module, inputs: object) -> None:
            starts.append(synchronized_time())

        def end(module: nn.Module, inputs: object, outputs: object) -> None:
            self.seconds.fusion += synchronized_time() - starts.pop()

        hooks = [fuser.register_forward_pre_hook(start) for fuser in self.c2c_model.fuser]
        hooks += [fuser.register_forward_hook(end) for fuser in self.c2c_model.fuser]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
