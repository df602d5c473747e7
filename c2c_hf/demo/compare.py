"""The same question answered side by side: by each model, or about a document with and without memory slots."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, cast

from transformers import BatchEncoding, BatchFeature, PreTrainedModel, PreTrainedTokenizerBase

from ..inference.inputs import rescale_alignment, tensor_per_sharer
from ..inference.sharer_cache import SharerCache
from ..inference.text_stream import TextStream
from ..inference.text_to_text import BACKGROUND_BEGINNING, background_prefix, background_prompt, background_request
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor


@dataclass
class Answer:
    """A generated answer and how long it took.

    Attributes:
        text: The answer without special tokens and surrounding whitespace.
        seconds: Wall-clock time of tokenization and generation.
        first_token_seconds: Of it, until the first token.
        num_tokens: Number of generated tokens.
    """

    text: str
    seconds: float
    first_token_seconds: float
    num_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding, without the first token; 0 where there is no other."""
        return max(0, self.num_tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-9)


class Method(Protocol):
    """Answers one question; all but the listeners is bound."""

    def __call__(
        self, *, emit: Callable[[str], None] | None = None, is_cancelled: Callable[[], bool] | None = None
    ) -> Answer:
        """Answer.

        Args:
            emit: Called with every piece of the text. `None`: not.
            is_cancelled: Asked after every token whether to stop. `None`: never.
        """


def stream(method: Method) -> Iterator[str | Answer]:
    """Yield the pieces of an answer while it is generated in a thread, then the answer.

    A caller that closes the iterator early stops the generation at the next token.
    """
    pieces: SimpleQueue[str | None] = SimpleQueue()
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(method, emit=pieces.put, is_cancelled=cancelled.is_set)
            future.add_done_callback(lambda _: pieces.put(None))
            while (piece := pieces.get()) is not None:
                yield piece
            yield future.result()
        finally:
            cancelled.set()


def encode_question(
    processor: C2CProcessor, question: str, plain: bool = False, sharer_context: str | None = None
) -> BatchFeature:
    """Tokenize a user's message for all models.

    Args:
        processor: Of the pair.
        question: The message.
        plain: Take it as plain text, without chat templates, as a receiver without one does anyway.
        sharer_context: Text that only the sharers see.
    """
    if plain or processor.tokenizer.chat_template is None:
        return processor(question, sharer_context=sharer_context)
    return cast(BatchFeature, processor.apply_chat_template([_user(question)], sharer_context=sharer_context))


def answer_with_fusion(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    question: str,
    max_new_tokens: int = 48,
    plain: bool = False,
    sharer_context: str | None = None,
    sharer_cache: SharerCache | None = None,
    other_question: str | None = None,
    emit: Callable[[str], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> Answer:
    """Generate an answer greedily, the sharers' states fused into the receiver's cache.

    Args:
        model: The pair.
        processor: Its processor.
        question: A user's message.
        max_new_tokens: Length of the answer.
        plain: Take the question as plain text, without chat templates.
        sharer_context: Text that only the sharers see.
        sharer_cache: The sharer's cache of the context. `None`: it prefills here.
        other_question: The mismatched-sharer control: what the sharers prefill in place of the question. `None`: the
            question.
        emit: See [`Method`].
        is_cancelled: See there.
    """
    start = time.perf_counter()
    inputs = encode_question(processor, question, plain, sharer_context)
    if other_question is not None:
        other = encode_question(processor, other_question, plain, sharer_context)
        names = ("sharer_alignment", "sharer_attention_mask")
        columns = [tensor_per_sharer(model.config, name, inputs[name]) for name in names]
        columns.append(tensor_per_sharer(model.config, names[1], other[names[1]]))
        inputs["sharer_alignment"] = [rescale_alignment(*tensors) for tensors in zip(*columns, strict=True)]
        inputs.update({name: other[name] for name in ("sharer_input_ids", "sharer_attention_mask")})
    options: dict[str, Any] = {"sharer_caches": sharer_cache, "max_new_tokens": max_new_tokens}
    return _generate(start, model, processor.tokenizer, inputs, emit, is_cancelled, **options)


def answer_with_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    max_new_tokens: int = 48,
    plain: bool = False,
    emit: Callable[[str], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> Answer:
    """Generate an answer greedily with one base model.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        question: A user's message.
        max_new_tokens: Length of the answer.
        plain: Take the question as plain text, without chat template.
        emit: See [`Method`].
        is_cancelled: See there.
    """
    start = time.perf_counter()
    inputs = _encode(tokenizer, question, plain)
    return _generate(start, model, tokenizer, inputs, emit, is_cancelled, max_new_tokens=max_new_tokens)


def answer_with_background(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    question: str,
    max_new_tokens: int = 48,
    plain: bool = False,
    sharer_context: str | None = None,
    emit: Callable[[str], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> Answer:
    """Answer text-to-text: the first sharer writes a sentence of background for the receiver's prompt.

    Args:
        model: The pair.
        processor: Its processor.
        question: A user's message.
        max_new_tokens: Length of the answer, and of the sentence.
        plain: Take the question as plain text, without chat templates.
        sharer_context: Text in front of the sharer's prompt.
        emit: See [`Method`].
        is_cancelled: See there.
    """
    start = time.perf_counter()
    context = "" if sharer_context is None else f"{sharer_context}\n\n"
    tokenizer = processor.sharer_tokenizers[0]
    if plain or tokenizer.chat_template is None:
        inputs = _encode(tokenizer, context + background_prompt(question), plain=True)
    else:
        request = [_user(context + background_request(question))]
        request.append({"role": "assistant", "content": BACKGROUND_BEGINNING})
        inputs = tokenizer.apply_chat_template(
            request, continue_final_message=True, return_tensors="pt", return_dict=True
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    background = _generate(start, model.sharers[0], tokenizer, inputs, None, is_cancelled, ("\n",), **options)
    inputs = _encode(processor.tokenizer, background_prefix(background.text) + question, plain)
    return _generate(start, model.receiver, processor.tokenizer, inputs, emit, is_cancelled, **options)


def question_methods(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    question: str,
    max_new_tokens: int = 48,
    plain: bool = False,
    other_question: str | None = None,
) -> dict[str, Method]:
    """Return the ways to answer a question.

    Args:
        model: The pair.
        processor: Its processor.
        question: A user's message.
        max_new_tokens: Length of each answer.
        plain: Take the question as plain text, without chat templates.
        other_question: For the mismatched-sharer control; adds it and text-to-text. `None`: neither.

    Returns:
        By name: `"receiver"`, `"sharer"` (numbered where there are several), `"C2C"`, and with `other_question`
        `"text to text"` and `"mismatched"`.
    """
    options = (question, max_new_tokens, plain)
    methods: dict[str, Method] = {
        "receiver": partial(answer_with_model, model.receiver, processor.tokenizer, *options)
    }
    for index, (sharer, tokenizer) in enumerate(zip(model.sharers, processor.sharer_tokenizers, strict=True)):
        name = "sharer" if len(model.sharers) == 1 else f"sharer {index}"
        methods[name] = partial(answer_with_model, sharer, tokenizer, *options)
    if other_question is not None:
        methods["text to text"] = partial(answer_with_background, model, processor, *options)
    fused = partial(answer_with_fusion, model, processor, *options)
    methods["C2C"] = fused
    if other_question is not None:
        methods["mismatched"] = partial(fused, other_question=other_question)
    return methods


def compare_models(
    model: C2CForCausalLM, processor: C2CProcessor, question: str, max_new_tokens: int = 48, plain: bool = False
) -> dict[str, Answer]:
    """Answer a question with the receiver, with every sharer, and with the receiver on the fused cache.

    Returns:
        Answers by the names of [`question_methods`], which has the arguments.
    """
    methods = question_methods(model, processor, question, max_new_tokens, plain)
    return {name: method() for name, method in methods.items()}


@dataclass
class PrefilledDocument:
    """A document that the sharer has prefilled, for any number of questions.

    Attributes:
        text: The document.
        cache: The sharer's cache of it.
    """

    text: str
    cache: SharerCache


def prefill_document(model: C2CForCausalLM, processor: C2CProcessor, document: str) -> PrefilledDocument:
    """Prefill the first sharer with a document, for any number of questions about it.

    Args:
        model: A pair with `mode="memory"`.
        processor: Its processor.
        document: The text.
    """
    # What stands in the prompt does not matter: the sharer sees the context only.
    inputs = processor("?", sharer_context=document)
    cache = SharerCache.prefill(model.sharers[0], inputs["sharer_input_ids"], inputs["sharer_attention_mask"])
    return PrefilledDocument(document, cache)


def document_methods(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    question: str,
    document: PrefilledDocument,
    other: PrefilledDocument | None = None,
    max_new_tokens: int = 48,
    with_sharer: bool = False,
) -> dict[str, Method]:
    """Return the ways to answer a question about a document.

    Args:
        model: A pair with `mode="memory"`.
        processor: Its processor.
        question: A user's message.
        document: The document, see [`prefill_document`].
        other: Another one, for the control: memory slots of a document that the question is not about. `None`: none.
        max_new_tokens: Length of each answer.
        with_sharer: Add the sharer alone and text-to-text, the document in the sharer's prompt.

    Returns:
        By name: `"no document"`, `"in the prompt"`, `"memory slots"` and, with `other`, `"another page"`; `"sharer"`
        and `"text to text"`.
    """
    receiver = partial(answer_with_model, model.receiver, processor.tokenizer, max_new_tokens=max_new_tokens)
    memory = partial(answer_with_fusion, model, processor, question, max_new_tokens)
    in_prompt = f"{document.text}\n\n{question}"
    methods: dict[str, Method] = {
        "no document": partial(receiver, question),
        "in the prompt": partial(receiver, in_prompt),
    }
    if with_sharer:
        sharer = (model.sharers[0], processor.sharer_tokenizers[0])
        options = (question, max_new_tokens, False, document.text)
        methods["sharer"] = partial(answer_with_model, *sharer, in_prompt, max_new_tokens)
        methods["text to text"] = partial(answer_with_background, model, processor, *options)
    methods["memory slots"] = partial(memory, sharer_context=document.text, sharer_cache=document.cache)
    if other is not None:
        methods["another page"] = partial(memory, sharer_context=other.text, sharer_cache=other.cache)
    return methods


def compare_contexts(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    question: str,
    document: PrefilledDocument,
    other: PrefilledDocument | None = None,
    max_new_tokens: int = 48,
) -> dict[str, Answer]:
    """Answer a question about a document without it, with it in the receiver's prompt, and from memory slots.

    Returns:
        Answers by the names of [`document_methods`], which has the arguments.
    """
    methods = document_methods(model, processor, question, document, other, max_new_tokens)
    return {name: method() for name, method in methods.items()}


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Say whether a text contains one of the accepted answers as whole words, upper or lower case."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers)


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def _encode(tokenizer: PreTrainedTokenizerBase, question: str, plain: bool) -> BatchEncoding:
    if plain or tokenizer.chat_template is None:
        return tokenizer(question, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        [_user(question)], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def _generate(
    start: float,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchEncoding | BatchFeature,
    emit: Callable[[str], None] | None,
    is_cancelled: Callable[[], bool] | None,
    stop: Sequence[str] = (),
    **kwargs: Any,
) -> Answer:
    text = TextStream(tokenizer, inputs["input_ids"].shape[1], emit, stop, is_cancelled=is_cancelled)
    model.generate(**inputs.to(model.device), do_sample=False, stopping_criteria=[text], **kwargs)
    text.finish()
    end = time.perf_counter()
    first = end if text.first_token_time is None else text.first_token_time
    return Answer(text.text.strip(), end - start, first - start, text.num_tokens)
