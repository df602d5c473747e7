"""The commands `c2c push` and `c2c inspect`. Each imports what it needs when it runs, as those of `cli` do."""

import argparse
from pathlib import Path
from typing import Any


def add_hub_commands(commands: Any) -> None:
    """Add both commands to the parser of `c2c`."""
    push = commands.add_parser("push", help="publish a saved fuser with a model card, in one commit")
    push.add_argument("folder", type=Path, metavar="FOLDER", help="a saved fuser with its processor")
    push.add_argument("repo", metavar="REPO", help="where to: name or owner/name; made if needed")
    push.add_argument("--receiver", metavar="ID", help="Hub id to record where the receiver is a local folder")
    push.add_argument("--sharer", action="append", metavar="ID", help="likewise; once per sharer")
    push.add_argument("--license", metavar="NAME", help="of the fuser (default: what the base models' licenses leave)")
    push.add_argument(
        "--evaluation", type=Path, metavar="FOLDER", help="of `c2c evaluate`; its results go on the card"
    )
    push.add_argument("--training", type=Path, metavar="FILE", help="YAML with what the card says about the training")
    push.add_argument("--dataset", action="append", default=[], metavar="ID", help="trained on; once per data set")
    push.add_argument("--tag", action="append", default=[], metavar="TAG", help="of the card; may be repeated")
    push.add_argument("--private", action="store_true", default=None, help="make a private repository")
    push.add_argument("--revision", metavar="BRANCH", help="made if needed")
    push.add_argument("--subfolder", metavar="FOLDER", help="for several fusers in one repository")
    push.add_argument("--create-pr", action="store_true", help="open a pull request")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.set_defaults(run=_push)

    inspect = commands.add_parser("inspect", help="describe a fuser: pair, sizes, gates, card; loads no base model")
    inspect.add_argument("fuser", metavar="FUSER", help="Hub id or folder")
    inspect.add_argument("--revision", metavar="REVISION", help="branch, tag or commit")
    inspect.add_argument("--subfolder", metavar="FOLDER")
    inspect.set_defaults(run=_inspect)


def _push(parsed: argparse.Namespace) -> None:
    import yaml

    from ..hub.publish import publish_fuser

    training = None
    if parsed.training is not None:
        training = yaml.safe_load(parsed.training.read_text(encoding="utf-8"))
        if not isinstance(training, dict):
            raise ValueError(f"`--training {parsed.training}` must hold `field: value` lines.")
    commit = publish_fuser(
        parsed.folder,
        parsed.repo,
        receiver=parsed.receiver,
        sharers=parsed.sharer,
        license=parsed.license,
        evaluation=parsed.evaluation,
        training=training,
        datasets=parsed.dataset,
        tags=parsed.tag,
        private=parsed.private,
        revision=parsed.revision,
        subfolder=parsed.subfolder,
        create_pr=parsed.create_pr,
        commit_message=parsed.message,
    )
    print(commit.pr_url or commit.commit_url)


def _inspect(parsed: argparse.Namespace) -> None:
    from ..checkpoints.describe import describe_fuser

    where = {"revision": parsed.revision, "subfolder": parsed.subfolder}
    for label, text in describe_fuser(
        parsed.fuser, **{key: value for key, value in where.items() if value is not None}
    ):
        print(f"{label:<16} {text}")
