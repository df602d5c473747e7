"""The side by side demo as a page in the browser, of the extra `[demo-web]`."""

import html
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .compare import (
    Answer,
    Method,
    document_methods,
    encode_question,
    prefill_document,
    question_methods,
    stream,
)
from .shipped_fusers import from_pretrained, questions, shipped_fuser
from .state_changes import StateChanges, measure_state_changes


class Pair(NamedTuple):
    """A model and its processor."""

    model: C2CForCausalLM
    processor: C2CProcessor


#: What the page calls the methods of `compare`, in its order. The first five answer a question, all but C2C and its
#: control a question about a document likewise.
_TITLES = {
    "receiver": "Receiver alone",
    "sharer": "Sharer alone",
    "text to text": "Text-to-text: the sharer writes background",
    "C2C": "C2C: fused cache",
    "mismatched": "Control: C2C from another question",
    "no document": "Receiver alone, no document",
    "in the prompt": "Receiver, document in its prompt",
    "memory slots": "C2C: memory slots",
    "another page": "Control: slots of another document",
}
_NUM_CARDS = 6
_OTHER_QUESTION = "Which gas do plants take in from the air to make sugar?"
_OTHER_DOCUMENT = (
    "The harbour office opens at seven. Its clerk, Lena Voss, stamps the papers of every barge, and keeps a list of "
    "those that carry timber. In winter the canal freezes, and the office moves to the mill. The rent of the mill is "
    "forty crowns a month, paid on the first day."
)
_EXAMPLE_QUESTION = "How much water does the kettle hold?"
_EXAMPLE_DOCUMENT = (
    "The kettle K-20 holds 1.7 litres of water. Press the green button to start it. It switches off by itself when "
    "the water boils. Clean it with vinegar once a month. The service of the maker Brevik is in Bergen."
)
_INTRODUCTION = """# Cache-to-Cache

A small frozen **receiver** answers. Another frozen model, the **sharer**, helps without writing a word: a trained
fuser projects its key/value states into the receiver's cache ([arXiv 2510.03215](https://arxiv.org/abs/2510.03215)).
A document is prefilled by the sharer alone, and the receiver gets memory slots."""
_MAX_FILE_BYTES = 2**20
_STYLE = (
    ".c2c-map{line-height:2;overflow-wrap:anywhere}.c2c-map span{padding:2px 0;border-radius:3px;white-space:pre-wrap}"
    ".c2c-layers{display:flex;gap:2px;align-items:center;flex-wrap:wrap;margin:4px 0}"
    ".c2c-layers b{width:4em}.c2c-layers i{width:16px;height:16px;border-radius:3px;border:1px solid #8888}"
    ".c2c-layers i.closed{border-style:dotted}.c2c-error{color:#b91c1c;font-weight:600}"
)


def load_pairs(dtype: str = "float32") -> tuple[Pair, Pair]:
    """Load the fusers that come with the package, `general` and `memory`, on one pair of base models."""
    model, processor = from_pretrained("general", dtype=dtype)
    sharers: list[Any] = list(model.sharers)
    memory = C2CForCausalLM.from_pretrained(shipped_fuser("memory"), receiver=model.receiver, sharers=sharers)
    tokenizers = (processor.tokenizer, processor.sharer_tokenizers)
    return Pair(model, processor), Pair(memory, C2CProcessor.from_config(memory.config, *tokenizers))


def build_page(fusion: Pair, memory: Pair) -> gr.Blocks:
    """Build the page.

    Args:
        fusion: Answers questions; a pair with `mode="fusion"`.
        memory: Answers questions about documents; a pair with `mode="memory"`.
    """
    # Reading a document again takes seconds, asking again does not.
    prefilled = lru_cache(maxsize=8)(lambda document: prefill_document(*memory, document))

    def methods(question: str, document: str, max_new_tokens: int) -> dict[str, Method]:
        if document:
            right, other = prefilled(document), prefilled(_OTHER_DOCUMENT)
            return document_methods(*memory, question, right, other, max_new_tokens, with_sharer=True)
        # The format of the fuser's training data.
        prompt, other_prompt = (f"Question: {text}\nAnswer:" for text in (question, _OTHER_QUESTION))
        return question_methods(*fusion, prompt, max_new_tokens, plain=True, other_question=other_prompt)

    def ask(question: str, document: str, path: str | None, max_new_tokens: float) -> Iterator[list[Any]]:
        """Yield the notice below the buttons, all cards and the map below them, after every piece of text."""
        try:
            document = _document_text(document, path)
            if not question.strip():
                raise ValueError("Write a question first.")
            yield _outputs("The sharer prefills the document ..." if document else "", [])
            named = methods(question.strip(), document, int(max_new_tokens))
            cards: list[tuple[str, str, str]] = []
            for name, method in named.items():
                cards.append((_title(name), "", "..."))
                pieces = stream(method)
                try:
                    for piece in pieces:
                        text = cards[-1][1] + piece if isinstance(piece, str) else piece.text
                        cards[-1] = (cards[-1][0], text, "..." if isinstance(piece, str) else _figures(piece))
                        yield _outputs("", cards)
                finally:
                    pieces.close()  # type: ignore[attr-defined]
            yield _outputs("", cards, show_changes(question.strip(), document))
        except (ValueError, OSError) as error:
            # gradio's own errors would cover every card.
            yield _outputs(f'<p role="alert" class="c2c-error">{html.escape(str(error))}</p>', [])

    def show_changes(question: str, document: str) -> str:
        pair = memory if document else fusion
        prompt = question if document else f"Question: {question}\nAnswer:"
        inputs = encode_question(pair.processor, prompt, plain=not document, sharer_context=document or None)
        return changes_as_html(measure_state_changes(*pair, inputs.to(pair.model.device)))

    # Nothing is loaded from, or reported to, elsewhere.
    with gr.Blocks(title="Cache-to-Cache", analytics_enabled=False) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                question = gr.Textbox(label="Question", lines=2, max_length=2000, elem_id="question")
                document = gr.Textbox(
                    label="Document that only the sharer sees (optional)", lines=6, max_length=_MAX_FILE_BYTES
                )
                upload = gr.File(label="... or a text file", file_types=[".txt", ".md"], elem_id="upload")
                length = gr.Slider(4, 128, value=32, step=4, label="Longest answer, in tokens")
                with gr.Row():
                    ask_button = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop_button = gr.Button("Stop")
                notice = gr.HTML(elem_id="notice")
                examples = [
                    [_EXAMPLE_QUESTION, _EXAMPLE_DOCUMENT],
                    *([item["question"], ""] for item in questions()[:3]),
                ]
                labels = [f"{examples[0][0]} (with a document)", *(text for text, _ in examples[1:])]
                gr.Examples(examples, [question, document], example_labels=labels, cache_examples=False)
            with gr.Column(scale=2, min_width=300):
                outputs: list[gr.components.Component] = [notice]
                for first in range(0, _NUM_CARDS, 2):
                    with gr.Row():
                        for index in (first, first + 1):
                            with gr.Column(min_width=260):
                                outputs.append(
                                    gr.Textbox(
                                        label="", lines=3, interactive=False, visible=False, elem_id=f"card-{index}"
                                    )
                                )
                                outputs.append(gr.Markdown(visible=False, elem_id=f"figures-{index}"))
                outputs.append(gr.HTML(elem_id="changes"))
        inputs = [question, document, upload, length]
        event = gr.on([ask_button.click, question.submit], ask, inputs, outputs, concurrency_limit=1, api_name="ask")
        stop_button.click(None, cancels=[event], queue=False)
    page.queue(max_size=16)
    return page


def launch(page: gr.Blocks, **kwargs: Any) -> None:
    """Serve the page until it is interrupted.

    Args:
        page: Of [`build_page`].
        **kwargs: Of gradio's `launch`, such as `server_port`. On a Space, gradio's own settings come first.
    """
    page.launch(css=_STYLE, max_file_size=_MAX_FILE_BYTES, footer_links=[], ssr_mode=False, **kwargs)


def changes_as_html(changes: StateChanges) -> str:
    """Show words on a background, and layers as squares, the stronger the more they changed."""
    largest = max(chain((change for _, change in changes.words), [1e-9]))
    words = "".join(
        f'<span style="background:{_shade(change / largest)}" title="{change:.3f}">{html.escape(word)}</span>'
        for word, change in changes.words
    )
    rows = []
    largest_layer = max(chain(*changes.layers.values(), [1e-9]))
    for name, layers in changes.layers.items():
        gates = [True] * len(layers) if changes.open_gates is None else changes.open_gates[name]
        squares = "".join(
            f'<i class="{"open" if is_open else "closed"}" style="background:{_shade(change / largest_layer)}" '
            f'title="layer {layer}: {change:.3f}, gate {"open" if is_open else "closed"}"></i>'
            for layer, (change, is_open) in enumerate(zip(layers, gates, strict=True))
        )
        rows.append(f'<div class="c2c-layers"><b>{name}</b>{squares}</div>')
    note = "" if changes.open_gates is None else " A dotted square has a closed gate."
    return (
        f"<h3>What the sharer changed in the receiver's cache</h3>"
        f"<p>By word, the change of the value states relative to their size (at most {largest:.2f}):</p>"
        f'<div class="c2c-map">{words}</div><p>By layer, from the first to the last.{note}</p>{"".join(rows)}'
    )


def _shade(share: float) -> str:
    return f"rgba(234, 88, 12, {0.85 * min(1.0, max(0.0, share)):.2f})"


def _document_text(document: str, path: str | None) -> str:
    if path is None:
        return document.strip()
    if document.strip():
        raise ValueError("Give the document as text or as a file, not both.")
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{Path(path).name} is not UTF-8 text.") from error
    if not text:
        raise ValueError(f"{Path(path).name} is empty.")
    return text


def _title(name: str) -> str:
    # Several sharers are numbered.
    return _TITLES.get(name, name.capitalize())


def _figures(answer: Answer) -> str:
    return (
        f"{answer.num_tokens} tokens, first after {answer.first_token_seconds:.2f} s, "
        f"then {answer.tokens_per_second:.1f} a second"
    )


def _outputs(notice: str, cards: Sequence[tuple[str, str, str]], below: str = "") -> list[Any]:
    """Return the updates of the notice, of all cards (title, text and figures; others are hidden), and below them."""
    updates: list[Any] = [notice]
    for index in range(_NUM_CARDS):
        title, text, figures = cards[index] if index < len(cards) else ("", "", "")
        updates.append(gr.update(label=title, value=text, visible=index < len(cards)))
        updates.append(gr.update(value=figures, visible=index < len(cards)))
    return [*updates, below]
