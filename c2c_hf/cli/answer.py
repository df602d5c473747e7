"""The commands that answer: `c2c demo`, `c2c generate` and `c2c chat`."""

import json
import os
import textwrap
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, cast

import typer

from .options import (
    Alignment,
    AsJson,
    Device,
    Fuser,
    NewTokens,
    Precision,
    Receiver,
    Sharers,
    document_text,
    hide_loading_bars,
    load_model,
)

if TYPE_CHECKING:
    from transformers import BatchFeature

    from ..demo.compare import Answer

_PAIR = "Receiver: SmolLM2-135M-Instruct. Sharer: Gemma 3 270M. (The first run converts them, about a minute.)"

NoFusion = Annotated[bool, typer.Option("--no-fusion", help="Switch fusion off: the receiver by itself.")]


def demo(
    count: Annotated[int, typer.Option("--questions", metavar="N", min=1, help="How many questions.")] = 3,
    documents: Annotated[
        list[Path] | None,
        typer.Option("--document", metavar="FILE", help="UTF-8 text that only the sharer sees; once per document."),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            metavar="TEXT",
            help="About the document; once per question. Without any, those with known answers in the file of the "
            "same name with the ending .jsonl, which are counted.",
        ),
    ] = None,
    max_new_tokens: NewTokens = 32,
    web: Annotated[
        bool, typer.Option("--web", help="Show a page in the browser, where you ask; the other options do not apply.")
    ] = False,
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Of the page.")] = 7860,
) -> None:
    """Run the pair that installs from PyPI on a few questions, or on your document."""
    hide_loading_bars()
    if web:
        _show_page(port)
        return

    import torch

    if questions and (documents is None or len(documents) != 1):
        raise ValueError("give one `--document` with `--question`.")
    asked = [
        _AskedDocument(
            path, document_text("`--document`", path), [(q, []) for q in questions or ()] or _known_questions(path)
        )
        for path in documents or []
    ]
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))
    print(_PAIR)
    if asked:
        _answer_about(asked, max_new_tokens)
    else:
        _answer_questions(count, max_new_tokens)


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
    as_json: AsJson = False,
) -> None:
    """Answer prompts with a saved fuser or an untrained pair."""
    c2c, processor = load_model(model, receiver, sharers, token_alignment, dtype, device)

    from ..demo.compare import encode_question

    with c2c.disable_fusion() if no_fusion else nullcontext():
        for prompt in prompts:
            inputs = encode_question(processor, prompt, plain, context).to(c2c.device)
            out = c2c.generate(**inputs, max_new_tokens=max_new_tokens)[0, inputs["input_ids"].shape[1] :]
            answer = processor.tokenizer.decode(out, skip_special_tokens=True)
            if as_json:
                numbers = {"prompt_tokens": inputs["input_ids"].shape[1], "answer_tokens": len(out)}
                answer = json.dumps({"prompt": prompt, "answer": answer, **numbers}, ensure_ascii=False)
            print(answer, flush=True)


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


def _show_page(port: int) -> None:
    # gradio asks at every start whether there is a newer one.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        from ..demo.web import build_page, launch, load_pairs
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: run `pip install "c2c_hf[demo-web]"`.') from error
    print(_PAIR, flush=True)
    page = build_page(*load_pairs())
    print(f"The page is at http://127.0.0.1:{port}; Ctrl+C ends it.", flush=True)
    launch(page, server_name="127.0.0.1", server_port=port, quiet=True)


class _AskedDocument(NamedTuple):
    """A document and its questions, each with the accepted answers; none where they are not known."""

    path: Path
    text: str
    questions: list[tuple[str, list[str]]]


def _known_questions(document: Path) -> list[tuple[str, list[str]]]:
    path = document.with_suffix(".jsonl")
    if not path.is_file():
        raise ValueError(f"give `--question`, or questions with `answers` in {str(path)!r}.")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            questions.append((str(row["question"]), [str(answer) for answer in row["answers"]]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Row {number} of {path.name} must hold `question` and `answers`, but {line!r:.60} does not."
            ) from error
    return questions


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


def _answer_about(documents: list[_AskedDocument], max_new_tokens: int) -> None:
    from ..demo import from_pretrained
    from ..demo.compare import compare_contexts, contains_answer, prefill_document

    model, processor = from_pretrained("memory", dtype="float32")
    print("Fuser: `memory`, which comes with this package (model_cards/memory.md).")
    prefilled = []
    for document in documents:
        start = time.perf_counter()
        prefilled.append(prefill_document(model, processor, document.text))
        num_tokens, seconds = prefilled[-1].cache.input_ids.shape[1], time.perf_counter() - start
        print(f"The sharer prefilled {document.path.name}, {num_tokens} tokens, in {seconds:.2f} s.")
    num_right: Counter[str] = Counter()
    num_asked = 0
    for index, document in enumerate(documents):
        # The control: memory of the next page.
        other = prefilled[(index + 1) % len(prefilled)] if len(prefilled) > 1 else None
        for question, accepted in document.questions:
            print(f"\n{question}" + (f" (right: {accepted[0]})" if accepted else ""))
            answers = compare_contexts(model, processor, question, prefilled[index], other, max_new_tokens)
            _print_answers(answers)
            if accepted:
                right = {name for name, answer in answers.items() if contains_answer(answer.text, accepted)}
                num_asked += 1
                num_right.update(right)
                num_right["prompt and slots"] += {"in the prompt", "memory slots"} <= right
    if num_asked:
        names = [name for name in ("no document", "in the prompt", "memory slots", "another page") if name in answers]
        print(f"\nOf {num_asked} questions, the answer contains the right one: ", end="")
        print(", ".join(f"{name} {num_right[name]}" for name in names), end=". ")
        print(
            f"Of the {num_right['in the prompt']} that the receiver answers with the document in its prompt, memory "
            f"slots answer {num_right['prompt and slots']}."
        )


def _print_answers(answers: "Mapping[str, Answer]") -> None:
    for name, answer in answers.items():
        text = textwrap.shorten(answer.text.replace("\n", " "), 110, placeholder=" ...")
        print(f"  {name:<15} {answer.seconds:5.2f} s  {text}")
