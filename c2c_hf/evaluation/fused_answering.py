"""`C2CAnswerer`: a receiver answers with what its sharers have read, or with what a control makes of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .._compat import CACHE_ARGUMENT
from ..inference.cache import C2CCache
from ..inference.prefill import position_ids_from_mask, read_text
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .answering import Answerer, Inputs, Query, now
from .controls import Control
from .gate_weights import watch_gate_weights


@dataclass
class C2CAnswerer(Answerer):
    """A receiver with its sharers, or under a control.

    Args:
        c2c_model: The model.
        processor: Its processor.
        control: What changes on the way from the sharers to the receiver.
    """

    c2c_model: C2CForCausalLM
    processor: C2CProcessor
    control: Control = field(default_factory=Control)

    @property
    def model(self) -> PreTrainedModel:
        """The pair."""
        return self.c2c_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The receiver's tokenizer."""
        return self.processor.tokenizer

    def _inputs(self, queries: Sequence[Query], strip: bool) -> Inputs:
        return self.control.choose_positions(self.c2c_model, self._controlled(queries, strip))

    def _controlled(self, queries: Sequence[Query], strip: bool) -> Inputs:
        if not self.control.reads_sharers:
            queries = [replace(query, context="") for query in queries]
        if self.control.needs_donors and any(query.context for query in queries):
            # The question stays: what the sharers know of it is another one's.
            return self._process([replace(query, context=query.donor_context) for query in queries], strip)
        inputs, donors = self._process(queries, strip), None
        if self.control.needs_donors:
            others = [replace(query, prompt=query.donor) for query in queries if query.donor is not None]
            if len(others) < len(queries):
                raise ValueError("`donor` must be given with this control: another question's prompt.")
            donors = self._process(others, strip)
        return self.control.change_inputs(inputs, donors, [query.seed for query in queries])

    def _process(self, queries: Sequence[Query], strip: bool) -> Inputs:
        kinds = {(isinstance(query.prompt, str), query.continues) for query in queries}
        if len(kinds) > 1:
            raise ValueError("`queries` of one batch must all be plain texts, or all chats that end alike.")
        cut: dict[str, Any] = {"truncation": self.max_length is not None, "max_length": self.max_length}
        if any(query.context for query in queries):
            cut["sharer_context"] = [query.context for query in queries]
        if self.tokenizer.chat_template and not isinstance(queries[0].prompt, str):
            chats: Any = [list(query.prompt) for query in queries]
            batch: Any = self.processor.apply_chat_template(chats, **cut, **self._template_kwargs(queries[0]))
        else:
            texts = [self._render(query) for query in queries]
            batch = self.processor([text.rstrip() if strip else text for text in texts], **cut)
        device = self.model.device
        inputs: Inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        for name in ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment"):
            # One sharer's tensors come bare.
            tensors = batch[name] if isinstance(batch[name], list) else [batch[name]]
            inputs[name] = [tensor.to(device) for tensor in tensors]
        return inputs

    @contextmanager
    def _reading(self, inputs: Inputs, queries: Sequence[Query]) -> Iterator[dict[str, Any]]:
        with self.control.around(self.c2c_model):
            if not self.control.reads_sharers:
                plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                yield {**plain, "position_ids": position_ids_from_mask(inputs["attention_mask"])}
                return
            if self._reads_first():
                start = now()
                inputs = {**inputs, CACHE_ARGUMENT: self._read_sharers(inputs, [query.seed for query in queries])}
                self.seconds.sharer = now() - start
            with self._fusion_timed(), self._gates_watched(inputs):
                yield inputs

    def _reads_first(self) -> bool:
        """Say whether the sharers read before the model is called, in time of their own."""
        if self.control.changes_states or self.c2c_model.config.mode == "memory":
            return True
        # On a processor the model lets receiver and sharers read at the same time, which this would undo.
        return self.c2c_model.device.type != "cpu"

    def _read_sharers(self, inputs: Inputs, seeds: Sequence[int]) -> C2CCache:
        """Let the sharers read first: the model finds in the cache what they have read, and goes on from there."""
        cache = C2CCache(DynamicCache(config=self.c2c_model.receiver.config.get_text_config()))
        texts = zip(inputs["sharer_input_ids"], inputs["sharer_attention_mask"], strict=True)
        shapes: Any = [sharer.layer_shapes for sharer in self.c2c_model.config.sharers]
        for sharer, (ids, mask), layers in zip(self.c2c_model.sharers, texts, shapes, strict=True):
            state = read_text(sharer, ids, mask, num_layers=len(layers))
            self.control.change_state(state, seeds)
            cache.sharer_caches.append(state)
        return cache

    @contextmanager
    def _gates_watched(self, inputs: Inputs) -> Iterator[None]:
        config = self.c2c_model.config
        if config.mode == "memory" or config.fuse_response:
            # There are no gates, or they open anew for every token of the answer.
            yield
            return
        with watch_gate_weights(self.c2c_model, inputs["sharer_alignment"]) as self.gate_weights:
            yield

    @contextmanager
    def _fusion_timed(self) -> Iterator[None]:
        starts: list[float] = []

        def end(*_: Any) -> None:
            self.seconds.fusion += now() - starts.pop()

        hooks = [fuser.register_forward_pre_hook(lambda *_: starts.append(now())) for fuser in self.c2c_model.fuser]
        hooks += [fuser.register_forward_hook(end) for fuser in self.c2c_model.fuser]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
