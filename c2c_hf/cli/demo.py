"""The command `c2c demo`, which imports what it needs when it runs, as all commands do."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_demo_command(commands: Any, positive: Callable[[str], int]) -> None:
    """Add the command.

    Args:
        commands: The subparsers of `c2c`.
        positive: Type of an argument that is a number from 1 on.
    """
    demo = commands.add_parser(
        "demo",
        help="run the real pair that installs from PyPI on a few questions, or on your document",
        description="Run the real pair that installs from PyPI: on a few benchmark questions, or with `--document` on "
        "a text that the sharer reads and the receiver never sees.",
    )
    demo.add_argument("--questions", type=positive, default=3, metavar="N", help="how many questions (default 3)")
    demo.add_argument("--document", type=Path, metavar="FILE", help="UTF-8 text that only the sharer reads")
    demo.add_argument("--question", action="append", metavar="TEXT", help="about the document; may be given again")
    demo.add_argument("--max-new-tokens", type=positive, default=32, metavar="N")
    demo.set_defaults(run=_demo)


def _demo(parsed: argparse.Namespace) -> None:
    import torch

    if (parsed.document is None) != (parsed.question is None):
        raise ValueError("give both `--document` and `--question`, or neither.")
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))
    document = None
    if parsed.document is not None:
        try:
            document = parsed.document.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"`--document`: {str(parsed.document)!r} is no UTF-8 text ({error}).") from error
        if not document.strip():
            raise ValueError(f"`--document`: {str(parsed.document)!r} is empty.")
    print("Receiver: SmolLM2-135M-Instruct. Sharer: Gemma 3 270M. (The first run converts them, about a minute.)")
    if document is None:
        _answer_questions(parsed.questions, parsed.max_new_tokens)
    else:
        _answer_about(document, parsed.question, parsed.max_new_tokens)


def _answer_questions(count: int, max_new_tokens: int) -> None:
    from ..demo.compare import answer_side_by_side
    from ..demo.local_pair import from_pretrained, questions

    # In float32 a prompt read in two chunks gives the receiver's own answer, word for word.
    model, processor = from_pretrained("general", dtype="float32")
    print("The fuser is the trained one that comes with this package (model_cards/general.md).")
    for item in questions()[:count]:
        # As the fuser was trained: the answer in words.
        question = f"Question: {item['question']}\nAnswer:"
        print(f"\n{item['question']} ({item['source']}; right: {item['choices'][item['answer']]})")
        for name, answer in answer_side_by_side(model, processor, question, max_new_tokens, True).items():
            print(_line(name, answer.seconds, answer.text))


def _answer_about(document: str, questions: list[str], max_new_tokens: int) -> None:
    """Answer from what the sharer has read once; beside it the receiver without the document, and reading it."""
    import time

    from ..demo.compare import answer_fused
    from ..demo.local_pair import from_pretrained
    from ..inference.sharer_cache import SharerCache

    model, processor = from_pretrained("memory", dtype="float32")
    print("The memory fuser is the trained one that comes with this package (model_cards/memory.md).")
    inputs = processor("?", sharer_context=document)
    start = time.perf_counter()
    read = (inputs["sharer_input_ids"], inputs["sharer_attention_mask"])
    state = SharerCache.prefill(model.sharers[0], *read)
    print(f"The sharer read {read[0].shape[1]} tokens in {time.perf_counter() - start:.2f} s.")
    for question in questions:
        print(f"\n{question}")
        for name, message, given in (
            ("without it", question, None),
            ("reading it", f"{document}\n\n{question}", None),
            ("from memory", question, state),
        ):
            start = time.perf_counter()
            context = None if given is None else document
            text = answer_fused(model, processor, message, max_new_tokens, context=context, state=given)
            print(_line(name, time.perf_counter() - start, text))


def _line(name: str, seconds: float, text: str) -> str:
    import textwrap

    return f"  {name:<15} {seconds:5.2f} s  {textwrap.shorten(text.replace(chr(10), ' '), 110, placeholder=' ...')}"
