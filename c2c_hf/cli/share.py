"""The commands around a fuser's folder: `c2c convert`, `c2c inspect` and `c2c push`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import FUSER_HELP, AsJson, check_place

Subfolder = Annotated[str | None, typer.Option(metavar="FOLDER", help="For several fusers in one repository.")]


def convert(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="FOLDER...", help="One checkpoint folder for each sharer.")
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the fuser goes.")],
    receiver: Annotated[
        str | None, typer.Option(metavar="MODEL", help="In place of the one that the checkpoint names.")
    ] = None,
    sharers: Annotated[
        list[str] | None, typer.Option("--sharer", metavar="MODEL", help="The same for a sharer; once per sharer.")
    ] = None,
    fusion_mode: Annotated[
        Literal["parallel", "sequential"], typer.Option(help="How the fusers of several sharers work together.")
    ] = "parallel",
) -> None:
    """Convert checkpoints of the reference implementation to a fuser folder."""
    for name in checkpoints:
        if not Path(name).is_dir():
            raise ValueError(f"the checkpoint folder {name!r} does not exist.")
    check_place("`--receiver`", receiver)
    for sharer in sharers or []:
        check_place("`--sharer`", sharer)

    from .. import C2CProcessor, convert_reference_checkpoint

    model = convert_reference_checkpoint(checkpoints, receiver, sharers or None, fusion_mode=fusion_mode)
    model.save_pretrained(output)
    num_weights = sum(parameter.numel() for parameter in model.fuser.parameters())
    print(f"Saved a fuser of {num_weights:,} weights to {output}.")
    try:
        processor = C2CProcessor.from_config(model.config)
    except (OSError, ValueError) as error:
        print(f"No processor saved, because the tokenizers could not be loaded: {error}", file=sys.stderr)
        return
    processor.save_pretrained(output)


def inspect(
    fuser: Annotated[str, typer.Argument(metavar="FUSER", help=FUSER_HELP)],
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit.")] = None,
    subfolder: Subfolder = None,
    as_json: AsJson = False,
) -> None:
    """Describe a fuser: pair, sizes, gates, card; loads no base model."""
    check_place("the fuser", fuser)

    from ..checkpoints.describe import describe_fuser

    given = {"revision": revision, "subfolder": subfolder}
    lines = describe_fuser(fuser, **{name: value for name, value in given.items() if value is not None})
    if as_json:
        print(json.dumps(dict(lines), ensure_ascii=False, indent=2))
        return
    for label, text in lines:
        print(f"{label:<16} {text}")


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved fuser with its processor.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME; made if needed.")],
    receiver: Annotated[
        str | None, typer.Option(metavar="ID", help="Hub id to record where the receiver is a local folder.")
    ] = None,
    sharers: Annotated[
        list[str] | None, typer.Option("--sharer", metavar="ID", help="The same for a sharer; once per sharer.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the fuser.", show_default="by the base models' licenses")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of `c2c evaluate`; its results go on the card.")
    ] = None,
    training: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with what the card says about the training.")
    ] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", metavar="ID", help="Trained on; once per data set.")
    ] = None,
    tags: Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="Of the card; once per tag.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Made if needed.")] = None,
    subfolder: Subfolder = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")] = None,
) -> None:
    """Publish a saved fuser with a model card, in one commit."""
    if not folder.is_dir():
        raise ValueError(f"the folder {str(folder)!r} does not exist.")

    from ..hub.publish import publish_fuser

    commit = publish_fuser(
        folder,
        repo,
        receiver=receiver,
        sharers=sharers or None,
        license=license,
        evaluation=evaluation,
        training=None if training is None else _load_fields(training),
        datasets=datasets or (),
        tags=tags or (),
        private=private or None,
        revision=revision,
        subfolder=subfolder,
        create_pr=create_pr,
        commit_message=message,
    )
    print(commit.pr_url or commit.commit_url)


def _load_fields(path: Path) -> dict[str, object]:
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`--training {path}` is not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"`--training {path}` must hold `field: value` lines.")
    return fields
