"""The command `c2c`: the groups of commands, and errors as one sentence."""

import logging
import os
import sys
from collections.abc import Collection, Sequence
from typing import Annotated

import typer
from typer.main import get_command

from . import analyze, answer, evaluate, prefill, serve, share, train

logger = logging.getLogger("c2c_hf")

#: Options that take several values in a row, as `--tasks A B`; typer itself takes `--tasks A --tasks B` only.
MANY_VALUES = {"evaluate": ("--tasks", "--methods", "--data")}

app = typer.Typer(no_args_is_help=True)


@app.callback()
def set_up(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show full error traces and debug messages.")] = False,
) -> None:
    """Language models that communicate through their key/value caches (arXiv 2510.03215)."""
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(message)s")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    # Idle threads that spin slow the others down on machines with few cores. Torch reads it when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


#: All words after `c2c lm-eval`, and all after the file in `c2c train FILE`, go to another parser.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

app.command(rich_help_panel="Answer")(answer.demo)
app.command(rich_help_panel="Answer")(answer.generate)
app.command(rich_help_panel="Answer")(answer.chat)
app.command(rich_help_panel="Answer", context_settings={"allow_extra_args": True})(serve.serve)
app.command(rich_help_panel="Answer")(prefill.prefill)
app.command(rich_help_panel="Train", context_settings=_PASS_ON)(train.train)
app.command(rich_help_panel="Train")(train.fit)
app.command(rich_help_panel="Evaluate")(evaluate.evaluate)
app.command("lm-eval", rich_help_panel="Evaluate", context_settings={**_PASS_ON, "help_option_names": []})(
    evaluate.lm_eval
)
app.add_typer(analyze.app, name="analyze", rich_help_panel="Evaluate")
app.command(rich_help_panel="Share")(share.convert)
app.command(rich_help_panel="Share")(share.inspect)
app.command(rich_help_panel="Share")(share.push)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; `None`: those of the process.

    Returns:
        0; 1 after an error and 2 after wrong arguments, with one sentence on standard error; 130 after an
        interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in words if not word.startswith("-")), "")
    words = repeat_options(words, MANY_VALUES.get(command, ()))
    try:
        status = get_command(app).main(args=words, prog_name="c2c", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        status, message = error.exit_code, error.format_message()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if logger.isEnabledFor(logging.DEBUG):
            raise
        status, message = 1, str(error)
        if not isinstance(error, ValueError | TypeError | OSError | ImportError):
            # These four are raised for what the user gave; anything else may be a fault of the package.
            message = f"{type(error).__name__}: {message} (`c2c --verbose {command} ...` shows where)"
    print(f"{f'c2c {command}'.strip()}: {' '.join(message.split())}", file=sys.stderr)
    return status


def repeat_options(words: Sequence[str], options: Collection[str]) -> list[str]:
    """Repeat options before each of their values: `--tasks A B` becomes `--tasks A --tasks B`."""
    repeated: list[str] = []
    option: str | None = None
    for word in words:
        if word.startswith("-"):
            option = word if word in options else None
        elif option is not None and repeated[-1] != option:
            repeated.append(option)
        repeated.append(word)
    return repeated
