"""Methods by name: who answers, and with what of the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ..checkpoints.receiver_adapter import ADAPTER_FOLDER, add_adapter, has_adapter
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .answering import Answerer, ContinuationScore, PlainAnswerer, Query, Seconds, Written, put_in_front
from .controls import CONTROLS
from .fused_answering import C2CAnswerer
from .payload import PAYLOADS

#: What each method is, for the command line and the report.
METHODS = {
    "receiver": "the receiver by itself, without an adapter",
    "reader": "the receiver by itself, which reads the context that else only the sharers read",
    "sharer": "each sharer by itself, with its own tokenizer and template; it reads the context, if there is one",
    "text_to_text": "the first sharer writes a sentence of background, the receiver reads it",
    "routing": "the half of the questions that the receiver is least sure of goes to the largest sharer",
    "lora": "the receiver with a LoRA adapter, its fuser's own unless another is given",
    "c2c": "the receiver with the sharers' caches fused in",
    "fusion": "C2C by another fuser, to which the context comes through the question's own positions",
    "mismatched": "C2C, but the sharers read another question, or another one's context",
    "shuffled": "C2C, but the sharers' positions are handed out in random order",
    "zero": "C2C, but the sharers' states are zero",
    "noise": "C2C, but the sharers' states are noise of the same norm",
    "first_quarter": "C2C, but only the first quarter of the positions fuses",
    "first_half": "C2C, but only the first half of the positions fuses",
    "last_quarter": "C2C, but only the last quarter of the positions fuses",
    "last_half": "C2C, but only the last half of the positions fuses",
    "top_quarter": "C2C, but only the quarter of the positions fuses whose values change most",
    "top_half": "C2C, but only the half of the positions fuses whose values change most",
    "int8": "C2C, but the sharers' states are rounded to 8 bits",
    "int4": "C2C, but the sharers' states are rounded to 4 bits",
    "gates_off": "C2C with every gate closed: equals the receiver up to rounding",
    "alone": "C2C with fusion switched off: equals the receiver, with the adapter if the fuser brings one",
    "self": "C2C with a fuser whose sharer is the receiver itself",
}
#: Everything that may change on the way from the sharers to the receiver.
_CHANGES = {**CONTROLS, **PAYLOADS}
#: Worked out of other methods' predictions.
DERIVED = ("routing",)

_REQUEST = (
    "Write one sentence of background knowledge that helps to answer the question. Do not answer it.\n\n"
    "Question: {question}"
)
# The sentence is begun, since a base model would start with a new line or a list.
_BEGINNING = "It helps to know that"


@dataclass
class TextToText:
    """The sharer writes, the receiver reads: communication in words.

    Args:
        writer: The sharer.
        reader: The receiver.
        max_new_tokens: Longest background.
    """

    writer: PlainAnswerer
    reader: PlainAnswerer
    max_new_tokens: int = 256
    seconds: Seconds = field(default_factory=Seconds, init=False)
    #: No fuser is at work.
    gate_weights: list[float] = field(default_factory=list, init=False)

    def score(self, queries: Sequence[Query], continuations: Sequence[Sequence[str]]) -> list[list[ContinuationScore]]:
        """Let the sharer write about each question, and score continuations behind prompt and background."""
        told = self._told(queries)
        scores = self.reader.score([query for query, _ in told], continuations)
        self._add_seconds()
        return scores

    def write(self, queries: Sequence[Query], max_new_tokens: int, stop: Sequence[str] = ()) -> list[Written]:
        """Let the sharer write about each question, and the receiver answer it; tokens of both count."""
        told = self._told(queries)
        answers = self.reader.write([query for query, _ in told], max_new_tokens, stop)
        self._add_seconds()
        return [
            Written(
                answer.text,
                answer.num_tokens + background.num_tokens,
                answer.prompt_tokens + background.prompt_tokens,
            )
            for answer, (_, background) in zip(answers, told, strict=True)
        ]

    def _told(self, queries: Sequence[Query]) -> list[tuple[Query, Written]]:
        written = self.writer.write([self._asked(query) for query in queries], self.max_new_tokens, ("\n",))
        told = []
        for query, background in zip(queries, written, strict=True):
            head = f"Background: {_BEGINNING} {background.text.strip()}\n\n"
            told.append((Query(put_in_front(head, query.prompt)), background))
        return told

    @staticmethod
    def _asked(query: Query) -> Query:
        request = _REQUEST.format(question=query.question)
        if isinstance(query.prompt, str):
            return Query(f"{request}\nBackground: {_BEGINNING}", context=query.context)
        begun = {"role": "assistant", "content": _BEGINNING}
        return Query([{"role": "user", "content": request}, begun], continues=True)

    def _add_seconds(self) -> None:
        writing, reading = self.writer.seconds, self.reader.seconds
        self.seconds = Seconds(writing.total + reading.total, writing.total, 0.0, reading.prefill, reading.decode)


Method = Answerer | TextToText


def build_methods(
    names: Sequence[str],
    model: C2CForCausalLM,
    processor: C2CProcessor,
    adapter: str | None = None,
    self_fuser: tuple[C2CForCausalLM, C2CProcessor] | None = None,
    template_kwargs: dict[str, Any] | None = None,
    background_tokens: int = 256,
    fusion_fuser: tuple[C2CForCausalLM, C2CProcessor] | None = None,
) -> dict[str, Method]:
    """Build methods; with several sharers `sharer` becomes `sharer_0`, `sharer_1`, ...

    Args:
        names: Of [`METHODS`], but for those that are worked out of others.
        model: The pair.
        processor: Its processor.
        adapter: Folder or Hub id of a LoRA adapter for the receiver, or folder of a fuser that brings one, for `lora`.
            `None`: the one that the receiver has.
        self_fuser: A pair whose sharer is its receiver, for `self`.
        template_kwargs: Handed to every chat template.
        background_tokens: Longest background of `text_to_text`.
        fusion_fuser: A pair with `mode="fusion"`, for `fusion`.

    Raises:
        ValueError: A name is unknown, or what its method needs is missing.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"`methods` must be among {list(METHODS)}, but got {unknown}.")
    if "gates_off" in names and model.config.mode == "memory":
        raise ValueError("`methods`: 'gates_off' needs gates, which a memory fuser does not have.")
    receiver = PlainAnswerer(model.receiver, processor.tokenizer)
    sharers = [
        PlainAnswerer(sharer, tokenizer, reads_context=True)
        for sharer, tokenizer in zip(model.sharers, processor.sharer_tokenizers, strict=True)
    ]
    methods: dict[str, Method] = {}
    for name in names:
        if name in _CHANGES:
            methods[name] = C2CAnswerer(model, processor, _CHANGES[name])
        elif name == "receiver":
            methods[name] = receiver
        elif name == "reader":
            methods[name] = PlainAnswerer(model.receiver, processor.tokenizer, reads_context=True)
        elif name == "sharer":
            one = len(sharers) == 1
            methods.update({name if one else f"{name}_{i}": sharer for i, sharer in enumerate(sharers)})
        elif name == "text_to_text":
            methods[name] = TextToText(sharers[0], receiver, background_tokens)
        elif name == "lora":
            adapted = model.receiver if adapter is None else _adapted(model.receiver, adapter)
            if adapter is None and not has_adapter(adapted):
                raise ValueError("`methods`: 'lora' needs `adapter`, the folder or Hub id of a LoRA for the receiver.")
            methods[name] = PlainAnswerer(adapted, processor.tokenizer, with_adapter=True)
        elif name == "self":
            if self_fuser is None:
                raise ValueError("`methods`: 'self' needs `self_fuser`, a fuser whose sharer is the receiver.")
            methods[name] = C2CAnswerer(*self_fuser)
        elif name == "fusion":
            if fusion_fuser is None:
                raise ValueError("`methods`: 'fusion' needs `fusion_fuser`, a fuser with `mode='fusion'`.")
            methods[name] = C2CAnswerer(*fusion_fuser)
    for answerer in (receiver, *sharers, *methods.values()):
        if isinstance(answerer, Answerer):
            answerer.template_kwargs = template_kwargs or {}
    return methods


def _adapted(receiver: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Return a second receiver with an adapter from a folder or the Hub, or from a fuser's folder that has one."""
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    # A copy, since the adapter changes the layers that it is put into; without the one that the first may have.
    weights = {name.replace(".base_layer.", "."): value for name, value in receiver.state_dict().items()}
    copied = AutoModelForCausalLM.from_config(receiver.config, dtype=receiver.dtype)
    copied.load_state_dict({name: weights[name] for name in copied.state_dict()})
    beside = Path(adapter) / ADAPTER_FOLDER
    source = str(beside if beside.is_dir() else adapter)
    add_adapter(copied, PeftConfig.from_pretrained(source))
    set_peft_model_state_dict(copied, load_peft_weights(source, device="cpu"), adapter_name="default")
    return copied.to(receiver.device).requires_grad_(False).eval()
