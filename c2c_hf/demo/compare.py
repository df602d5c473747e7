"""One question, three answers: the receiver alone, a sharer alone, and both through their caches."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..inference.sharer_cache import SharerCache
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor


@dataclass
class Answer:
    """What a model wrote and how long it took.

    Attributes:
        text: The answer without special tokens.
        seconds: Wall-clock time of tokenization and generation.
    """

    text: str
    seconds: float


def answer_side_by_side(
    model: C2CForCausalLM, processor: C2CProcessor, question: str, max_new_tokens: int = 48, plain: bool = False
) -> dict[str, Answer]:
    """Let the receiver alone, every sharer alone and the fused model answer the same question, greedily.

    Args:
        model: The pair.
        processor: Its processor.
        question: A user's message.
        max_new_tokens: Length of each answer.
        plain: Ask in plain text, without chat templates.

    Returns:
        Answers by `"receiver alone"`, `"sharer alone"` (numbered where there are several) and `"C2C"`.
    """
    messages = [{"role": "user", "content": question}]

    def by_itself(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
        if plain or tokenizer.chat_template is None:
            inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False)
        else:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        inputs = inputs.to(base.device)
        out = base.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    answers = {"receiver alone": _timed(partial(by_itself, model.receiver, processor.tokenizer))}
    for index, (sharer, tokenizer) in enumerate(zip(model.sharers, processor.sharer_tokenizers, strict=True)):
        name = "sharer alone" if len(model.sharers) == 1 else f"sharer {index} alone"
        answers[name] = _timed(partial(by_itself, sharer, tokenizer))
    answers["C2C"] = _timed(partial(answer_fused, model, processor, question, max_new_tokens, plain))
    return answers


def answer_fused(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    question: str,
    max_new_tokens: int = 48,
    plain: bool = False,
    context: str | None = None,
    state: SharerCache | None = None,
) -> str:
    """Let the fused model answer, greedily.

    Args:
        model: The pair.
        processor: Its processor.
        question: A user's message.
        max_new_tokens: Length of the answer.
        plain: Ask in plain text, without chat templates.
        context: Text that the sharers alone read.
        state: What the sharer has read already; `None`: it reads here.
    """
    if plain or processor.tokenizer.chat_template is None:
        inputs = processor(question, sharer_context=context, return_tensors="pt")
    else:
        inputs = processor.apply_chat_template([{"role": "user", "content": question}], sharer_context=context)
    inputs = inputs.to(model.device)
    out = model.generate(**inputs, sharer_caches=state, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _timed(answer: Callable[[], str]) -> Answer:
    start = time.perf_counter()
    text = answer()
    return Answer(text.strip(), time.perf_counter() - start)
