"""The commands that look into a fuser: `c2c analyze fuser`, `c2c analyze tokenizers` and `c2c analyze privacy`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .options import FUSER_HELP, Device, Precision, Receiver, Sharers, TokenAlignment, check_place, load_texts

if TYPE_CHECKING:
    from ..modeling_c2c import C2CForCausalLM
    from ..processing_c2c import C2CProcessor

app = typer.Typer(no_args_is_help=True, help="See what a fuser does, how tokenizers align, what a cache reveals.")

Fuser = Annotated[str, typer.Argument(metavar="FUSER", help=FUSER_HELP)]
Column = Annotated[str, typer.Option(metavar="NAME", help="Column of JSON Lines that holds the texts.")]
MaxTexts = Annotated[int | None, typer.Option(metavar="N", min=1, help="Texts of each file.", show_default="all")]
MaxLength = Annotated[int, typer.Option(metavar="N", min=2, help="Tokens after which a text is cut.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of all draws.")]
TEXTS_HELP = "UTF-8 text, one sample a line, or JSON Lines."


@app.command()
def fuser(
    fuser: Fuser,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Of the page, its figures and their numbers.")],
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help=TEXTS_HELP, show_default="the demo's twelve questions")
    ] = None,
    column: Column = "text",
    max_texts: MaxTexts = None,
    max_length: MaxLength = 512,
    layer: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Whose states are plotted.", show_default="the middle one")
    ] = None,
    seed: Seed = 0,
    receiver: Receiver = None,
    sharers: Sharers = None,
    dtype: Precision = "float32",
    device: Device = "cpu",
) -> None:
    """Write a page that shows what a fuser does: gates, ranks, similarity, states in a plane, change by word."""
    samples = None if texts is None else load_texts(texts, column, max_texts)
    model, processor = _load(fuser, receiver, sharers, dtype, device)

    from ..analysis.fuser_report import analyze_fuser
    from ..demo import questions

    if samples is None:
        samples = [f"{item['question']} {', '.join(item['choices'])}" for item in questions()]
    analyze_fuser(model, processor, samples, output, Path(fuser).name, layer, max_length, seed)
    print(f"The page is {output / 'index.html'}.")


@app.command()
def tokenizers(
    receiver: Annotated[str, typer.Argument(metavar="RECEIVER", help="Folder or Hub id.")],
    sharer: Annotated[str, typer.Argument(metavar="SHARER", help="Folder or Hub id.")],
    text: Annotated[Path, typer.Argument(metavar="FILE", help=TEXTS_HELP)],
    token_alignment: Annotated[
        TokenAlignment | None, typer.Option(show_default="by the vocabularies", help="How tokens are aligned.")
    ] = None,
    column: Column = "text",
    failures: Annotated[int, typer.Option(metavar="N", min=0, help="Number of failures that are listed.")] = 20,
) -> None:
    """Report how the tokens of two tokenizers align on a text, with the tokens that do not."""
    samples = load_texts(text, column)
    check_place("the receiver", receiver)
    check_place("the sharer", sharer)

    from .. import C2CProcessor

    processor = C2CProcessor.from_receiver_and_sharers(receiver, sharer, token_alignment)
    report = asdict(processor.alignment_report(samples))
    report["num_failures"] = len(report["failures"])
    report["failures"] = report["failures"][:failures]
    print(json.dumps({"token_alignment": processor.token_alignments[0], **report}, indent=2, ensure_ascii=False))


@app.command()
def privacy(
    fuser: Fuser,
    train: Annotated[Path, typer.Option(metavar="FILE", help=f"The probe is fitted on it. {TEXTS_HELP}")],
    test: Annotated[Path, typer.Option(metavar="FILE", help="The probe is tested on it, likewise.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON with the numbers.", show_default="none")
    ] = None,
    column: Column = "text",
    max_texts: MaxTexts = None,
    max_length: MaxLength = 256,
    layers: Annotated[int, typer.Option(metavar="N", min=1, help="Number of layers, evenly spaced.")] = 6,
    payload: Annotated[
        Literal["cache", "fuser", "both"], typer.Option(help="The sharer's cache, or what the fuser makes of it.")
    ] = "both",
    test_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Number of tokens tested on.")] = 600,
    seed: Seed = 0,
    receiver: Receiver = None,
    sharers: Sharers = None,
    dtype: Precision = "float32",
    device: Device = "cpu",
) -> None:
    """Measure how many tokens of a text a linear probe recovers from a cache, and from what a fuser makes of it."""
    train_texts, test_texts = (load_texts(path, column, max_texts) for path in (train, test))
    model, processor = _load(fuser, receiver, sharers, dtype, device)

    from ..analysis.privacy import PAYLOADS, probe_privacy, recovery_table

    payloads = PAYLOADS if payload == "both" else (payload,)
    options = (layers, max_length, test_tokens, seed, payloads)
    recoveries = probe_privacy(model, processor, train_texts, test_texts, *options)
    print("\n".join(recovery_table(recoveries)))
    if output is not None:
        output.write_text(json.dumps([asdict(own) for own in recoveries], indent=2), encoding="utf-8")


def _load(
    fuser: str, receiver: str | None, sharers: list[str] | None, dtype: str, device: str
) -> "tuple[C2CForCausalLM, C2CProcessor]":
    from .options import load_model

    return load_model(fuser, receiver, sharers, None, dtype, device)
