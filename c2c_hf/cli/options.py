"""Options that several commands share, and loading what they name."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..modeling_c2c import C2CForCausalLM
    from ..processing_c2c import C2CProcessor

TokenAlignment = Literal["identity", "first", "longest", "span"]
DType = Literal["float32", "bfloat16", "float16"]

FUSER_HELP = "Folder or Hub id of a fuser; general or memory: one that comes with this package, on the demo's pair."

Fuser: TypeAlias = Annotated[str | None, typer.Option("--model", metavar="FUSER", help=FUSER_HELP)]
Receiver: TypeAlias = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Folder or Hub id; with a fuser, in place of the recorded one.")
]
Sharers: TypeAlias = Annotated[
    list[str] | None, typer.Option("--sharer", metavar="MODEL", help="The same for a sharer; once per sharer.")
]
Alignment: TypeAlias = Annotated[TokenAlignment | None, typer.Option(help="For an untrained pair.")]
Precision: TypeAlias = Annotated[DType, typer.Option("--dtype", help="Of the base models.")]
Device: TypeAlias = Annotated[str, typer.Option(metavar="DEVICE", help="Such as cuda or cuda:1.")]
NewTokens: TypeAlias = Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def hide_loading_bars() -> None:
    """Leave out transformers' bars of loading weights where nobody watches: standard error is no terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def check_place(option: str, name: str | None) -> None:
    """Refuse a name that can be neither a folder nor a Hub id.

    Args:
        option: Names it in the error.
        name: The name; `None` is not checked.

    Raises:
        ValueError: There is no such folder, and the Hub's ids have another form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name is None or Path(name).exists():
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{option}: the folder {name!r} does not exist.") from None


def check_places(fuser: str | None, receiver: str | None, sharers: list[str] | None) -> None:
    """Refuse the name of a fuser or base model as `check_place` does."""
    check_place("the fuser", fuser)
    check_place("`--receiver`", receiver)
    for sharer in sharers or []:
        check_place("`--sharer`", sharer)


def document_text(option: str, path: Path) -> str:
    """Return the text of a document.

    Args:
        option: Names it in the error.
        path: Of a UTF-8 file.

    Raises:
        ValueError: It is empty or no text.
        OSError: There is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {str(path)!r} is not UTF-8 text ({error}).") from error
    if not text.strip():
        raise ValueError(f"{option}: {str(path)!r} is empty.")
    return text


def move_to_device(model: "PreTrainedModel", device: str) -> None:
    """Move a model to the device of `--device`.

    Raises:
        ValueError: It cannot be used.
    """
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device {device}` cannot be used: {error}") from error


def load_texts(name: str | Path, column: str, max_texts: int | None = None, unique: bool = True) -> list[str]:
    """Load texts: a column of JSON Lines or of a data set of the Hub, or the lines of a plain text file.

    Args:
        name: A file, or a Hub id.
        column: Holds the texts; a plain text file has none.
        max_texts: The first so many; `None`: all.
        unique: Drop repeats, such as the passage of several questions.

    Returns:
        The texts, without blank ones.

    Raises:
        ValueError: The file holds no text, is not UTF-8, or has no such column.
        OSError: There is no such file.
    """
    from ..training.dataset import is_file_name, load_rows

    if is_file_name(str(name)) or not (isinstance(name, Path) or Path(name).is_file()):
        rows = load_rows(str(name))
        if column not in (rows.column_names or []):
            raise ValueError(f"{name} has the columns {sorted(rows.column_names or [])}; name one with `--column`.")
        texts = [row[column] for row in rows]
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise ValueError(f"Row {number} of {name}: {column!r} must be a text, but got {text!r:.60}.")
    else:
        try:
            texts = Path(name).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(name)!r} is not UTF-8 text ({error}).") from error
    texts = [text for text in texts if text.strip()]
    texts = list(dict.fromkeys(texts)) if unique else texts
    if not texts:
        raise ValueError(f"{str(name)!r} holds no text.")
    return texts[:max_texts]


def load_model(
    fuser: str | None,
    receiver: str | None,
    sharers: list[str] | None,
    token_alignment: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> "tuple[C2CForCausalLM, C2CProcessor]":
    """Load a fuser with its base models, or build an untrained pair, with the processor.

    Args:
        fuser: Folder, Hub id, `"general"` or `"memory"`. `None`: an untrained pair of the next two.
        receiver: Folder or Hub id. `None`: the one that the fuser records.
        sharers: The same, one for each sharer.
        token_alignment: Of an untrained pair; `None`: by the vocabularies.
        dtype: Of the base models.
        device: Of the model.

    Raises:
        ValueError: Neither a fuser nor a pair is named, a folder does not exist, or the device cannot be used.
    """
    # Everything that can be said without torch comes first.
    if fuser is None and (receiver is None or not sharers):
        raise ValueError("name a fuser, or both `--receiver` and `--sharer`.")
    if fuser is not None and token_alignment is not None:
        raise ValueError("`--token-alignment` goes with `--receiver` and `--sharer`: a saved fuser records its own.")
    check_places(fuser, receiver, sharers)

    from accelerate import PartialState

    from ..demo import from_pretrained

    # Each of several processes gets a CUDA device of its own as its current one.
    PartialState()
    hide_loading_bars()
    if fuser is not None:
        model, processor = from_pretrained(fuser, receiver, sharers or None, dtype=dtype)
    else:
        model, processor = _untrained_pair(receiver, sharers, token_alignment, {"dtype": dtype})
    move_to_device(model, device)
    return model, processor


def _untrained_pair(
    receiver: str | None, sharers: list[str] | None, token_alignment: str | None, model_kwargs: dict[str, str]
) -> "tuple[C2CForCausalLM, C2CProcessor]":
    from .. import C2CForCausalLM, C2CProcessor

    model = C2CForCausalLM.from_receiver_and_sharers(
        receiver, sharers, receiver_kwargs=model_kwargs, sharer_kwargs=model_kwargs, token_alignment=token_alignment
    )
    typer.echo("The fuser is untrained, its gates are closed: the answers are the receiver's own.", err=True)
    return model, C2CProcessor.from_receiver_and_sharers(receiver, sharers, token_alignment)
