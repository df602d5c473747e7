"""The same question answered side by side: by each model, or about a document with and without memory slots."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase

from ..inference.sharer_cache import SharerCache
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor


@dataclass
class Answer:
    """A generated answer and how long it took.

    Attributes:
        text: The answer without special tokens and surrounding whitespace.
        seconds: Wall-clock time of tokenization and generation.
    """

    text: str
    seconds: float


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
) -> str:
    """Generate an answer greedily, the sharers' states fused into the receiver's cache.

    Args:
        model: The pair.
        processor: Its processor.
        question: A user's message.
        max_new_tokens: Length of the answer.
        plain: Take the question as plain text, without chat templates.
        sharer_context: Text that only the sharers see.
        sharer_cache: The sharer's cache of the context. `None`: it prefills here.
    """
    inputs = encode_question(processor, question, plain, sharer_context).to(model.device)
    out = model.generate(**inputs, sharer_caches=sharer_cache, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_with_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    max_new_tokens: int = 48,
    plain: bool = False,
) -> str:
    """Generate an answer greedily with one base model.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        question: A user's message.
        max_new_tokens: Length of the answer.
        plain: Take the question as plain text, without chat template.
    """
    if plain or tokenizer.chat_template is None:
        inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False)
    else:
        inputs = tokenizer.apply_chat_template(
            [_user(question)], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    inputs = inputs.to(model.device)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def compare_models(
    model: C2CForCausalLM, processor: C2CProcessor, question: str, max_new_tokens: int = 48, plain: bool = False
) -> dict[str, Answer]:
    """Answer a question with the receiver, with every sharer, and with the receiver on the fused cache.

    Args:
        model: The pair.
        processor: Its processor.
        question: A user's message.
        max_new_tokens: Length of each answer.
        plain: Take the question as plain text, without chat templates.

    Returns:
        Answers by `"receiver"`, `"sharer"` (numbered where there are several) and `"C2C"`.
    """
    options = (question, max_new_tokens, plain)
    answers = {"receiver": partial(answer_with_model, model.receiver, processor.tokenizer, *options)}
    for index, (sharer, tokenizer) in enumerate(zip(model.sharers, processor.sharer_tokenizers, strict=True)):
        name = "sharer" if len(model.sharers) == 1 else f"sharer {index}"
        answers[name] = partial(answer_with_model, sharer, tokenizer, *options)
    answers["C2C"] = partial(answer_with_fusion, model, processor, *options)
    return _timed(answers)


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


def compare_contexts(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    question: str,
    document: PrefilledDocument,
    other: PrefilledDocument | None = None,
    max_new_tokens: int = 48,
) -> dict[str, Answer]:
    """Answer a question about a document without it, with it in the receiver's prompt, and from memory slots.

    Args:
        model: A pair with `mode="memory"`.
        processor: Its processor.
        question: A user's message.
        document: The document, see [`prefill_document`].
        other: Another one, for the control: memory slots of a document that the question is not about. `None`: none.
        max_new_tokens: Length of each answer.

    Returns:
        Answers by `"no document"`, `"in the prompt"`, `"memory slots"` and, with `other`, `"another page"`.
    """
    receiver = partial(answer_with_model, model.receiver, processor.tokenizer, max_new_tokens=max_new_tokens)
    memory = partial(answer_with_fusion, model, processor, question, max_new_tokens)
    answers = {
        "no document": partial(receiver, question),
        "in the prompt": partial(receiver, f"{document.text}\n\n{question}"),
        "memory slots": partial(memory, sharer_context=document.text, sharer_cache=document.cache),
    }
    if other is not None:
        answers["another page"] = partial(memory, sharer_context=other.text, sharer_cache=other.cache)
    return _timed(answers)


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Say whether a text contains one of the accepted answers as whole words, upper or lower case."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers)


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def _timed(answers: Mapping[str, Callable[[], str]]) -> dict[str, Answer]:
    timed = {}
    for name, answer in answers.items():
        start = time.perf_counter()
        text = answer().strip()
        timed[name] = Answer(text, time.perf_counter() - start)
    return timed
