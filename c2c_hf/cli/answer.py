"""The commands that answer: `c2c demo`, `c2c generate` and `c2c chat`."""

import os
import textwrap
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .options import Alignment, Device, Fuser, NewTokens, Precision, Receiver, Sharers, load_model

if TYPE_CHECKING:
    from transformers import BatchFeature

    from ..demo.compare import Answer

NoFusion = Annotated[bool, typer.Option("--no-fusion", help="Switch fusion off: the receiver by itself.")]


def demo(
    count: Annotated[int, typer.Option("--questions", metavar="N", min=1, help="How many questions.")] = 3,
    document: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text that only the sharer sees.")
    ] = None,
    questions: Annotated[
        list[str] | None, typer.Option("--question", metavar="TEXT", help="About the document; once per question.")
    ] = None,
    max_new_tokens: NewTokens = 32,
) -> None:
    """Run the pair that installs from PyPI on a few questions, or on your document."""
    import torch

    if (document is None) != (not questions):
        raise ValueError("give both `--document` and `--question`, or neither.")
    text = None if document is None else _document_text(document)
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))
    print("Receiver: SmolLM2-135M-Instruct. Sharer: Gemma 3 270M. (The first run converts them, about a minute.)")
    if text is None:
        _answer_questions(count, max_new_tokens)
    else:
        _answer_about(text, questions or [], max_new_tokens)


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...")],
    model: Fuser = None,
    receiver: Receiver = None,
    sharers: Sharers = None,
    token_alignment: Alignment = None,
    dtype: Precision = "float32",
    device: Device = "cpu",
    max_new_tokens: NewTokens = 64,
    no_fusion: NoFusion = False,
    context: Annotated[str | None, typer.Option(metavar="TEXT", help="Text that only the sharers see.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Take prompts as plain text, without chat template.")] = False,
) -> None:
    """Answer prompts with a saved fuser or an untrained pair."""
    c2c, processor = load_model(model, receiver, sharers, token_alignment, dtype, device)

    from ..demo.compare import encode_question

    with c2c.disable_fusion() if no_fusion else nullcontext():
        for prompt in prompts:
            inputs = encode_question(processor, prompt, plain, context).to(c2c.device)
            out = c2c.generate(**inputs, max_new_tokens=max_new_tokens)
            print(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def chat(
    model: Fuser = None,
    receiver: Receiver = None,
    sharers: Sharers = None,
    token_alignment: Alignment = None,
    dtype: Precision = "float32",
    device: Device = "cpu",
    max_new_tokens: NewTokens = 64,
    no_fusion: NoFusion = False,
) -> None:
    """Talk to a saved fuser or an untrained pair; an empty line ends the chat."""
    from transformers import TextStreamer

    c2c, processor = load_model(model, receiver, sharers, token_alignment, dtype, device)
    if processor.tokenizer.chat_template is None:
        raise ValueError("the receiver has no chat template; use `c2c generate --plain`.")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        inputs = cast("BatchFeature", processor.apply_chat_template(messages)).to(c2c.device)
        with c2c.disable_fusion() if no_fusion else nullcontext():
            out = c2c.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
        answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def _document_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`--document`: {str(path)!r} is not UTF-8 text ({error}).") from error
    if not text.strip():
        raise ValueError(f"`--document`: {str(path)!r} is empty.")
    return text


def _answer_questions(count: int, max_new_tokens: int) -> None:
    from ..demo import from_pretrained, questions
    from ..demo.compare import compare_models

    # In float32 a prompt prefilled in two chunks gives the receiver's own answer, token for token.
    model, processor = from_pretrained("general", dtype="float32")
    print("Fuser: `general`, which comes with this package (model_cards/general.md).")
    for item in questions()[:count]:
        print(f"\n{item['question']} ({item['source']}; right: {item['choices'][item['answer']]})")
        # The format of the fuser's training data.
        prompt = f"Question: {item['question']}\nAnswer:"
        _print_answers(compare_models(model, processor, prompt, max_new_tokens, plain=True))


def _answer_about(document: str, questions: list[str], max_new_tokens: int) -> None:
    from ..demo import from_pretrained
    from ..demo.compare import compare_contexts, prefill_document

    model, processor = from_pretrained("memory", dtype="float32")
    print("Fuser: `memory`, which comes with this package (model_cards/memory.md).")
    start = time.perf_counter()
    sharer_cache = prefill_document(model, processor, document)
    num_tokens, seconds = sharer_cache.input_ids.shape[1], time.perf_counter() - start
    print(f"The sharer prefilled the document, {num_tokens} tokens, in {seconds:.2f} s.")
    for question in questions:
        print(f"\n{question}")
        _print_answers(compare_contexts(model, processor, question, document, sharer_cache, max_new_tokens))


def _print_answers(answers: "Mapping[str, Answer]") -> None:
    for name, answer in answers.items():
        text = textwrap.shorten(answer.text.replace("\n", " "), 110, placeholder=" ...")
        print(f"  {name:<15} {answer.seconds:5.2f} s  {text}")
