"""The commands `c2c evaluate` and `c2c lm-eval`; like all commands they import what they need when they run."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from ..modeling_c2c import C2CForCausalLM
    from ..processing_c2c import C2CProcessor

#: Loads the model and processor that the command line names.
Load: TypeAlias = "Callable[[argparse.Namespace], tuple[C2CForCausalLM, C2CProcessor]]"


def add_evaluation_commands(
    commands: Any, add_model_arguments: Callable[..., None], load: Load, positive: Callable[[str], int]
) -> None:
    """Add both commands.

    Args:
        commands: The subparsers of `c2c`.
        add_model_arguments: Adds the arguments that all commands with a model share.
        load: Loads what they name.
        positive: Type of an argument that is a number from 1 on.
    """
    evaluate = commands.add_parser(
        "evaluate",
        help="compare a fuser with baselines and controls on benchmarks",
        description="Compare a fuser with baselines and controls on benchmarks; a run that was stopped goes on.",
    )
    evaluate.add_argument(
        "model",
        nargs="?",
        metavar="FUSER",
        help="folder or Hub id; `general` or `memory`: the one that comes with this package, on the demo's pair",
    )
    add_model_arguments(evaluate, named=False)
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="default arc_challenge openbookqa; ? lists all")
    evaluate.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="default receiver sharer c2c mismatched fusion_off; ? lists all"
    )
    evaluate.add_argument("--output", type=Path, metavar="FOLDER", help="default: evaluation/NAME OF THE FUSER")
    evaluate.add_argument("--data-dir", type=Path, metavar="FOLDER", help="JSON Lines in place of data from the Hub")
    evaluate.add_argument("--limit", type=positive, metavar="N", help="items per task, drawn at random by the seed")
    evaluate.add_argument("--batch-size", type=positive, default=8, metavar="N")
    evaluate.add_argument("--seed", type=int, default=0, metavar="N")
    evaluate.add_argument("--plain", action="store_true", help="ask for written answers without chat template")
    evaluate.add_argument(
        "--background-tokens", type=positive, default=256, metavar="N", help="of the method text_to_text (default 256)"
    )
    evaluate.add_argument(
        "--adapter", metavar="LORA", help="for the method receiver_with_adapter (default: the fuser's own)"
    )
    evaluate.add_argument(
        "--self-fuser", metavar="FUSER", help="fuser whose sharer is the receiver, for the method receiver_as_sharer"
    )
    evaluate.add_argument(
        "--fusion-fuser", metavar="FUSER", help="fuser with mode=fusion, for the method same_text_fusion"
    )
    evaluate.add_argument(
        "--chat-template-kwargs",
        type=json.loads,
        metavar="JSON",
        help="""for every chat template, such as '{"enable_thinking": false}'""",
    )
    evaluate.set_defaults(run=partial(_evaluate, load), alone=False)

    # No prefix: every word goes on to lm-evaluation-harness, `--help` too.
    lm_eval = commands.add_parser(
        "lm-eval", help="lm-evaluation-harness with the model type c2c", add_help=False, prefix_chars="\0"
    )
    lm_eval.add_argument("arguments", nargs="*")
    lm_eval.set_defaults(run=_lm_eval)


def _evaluate(load: Load, parsed: argparse.Namespace) -> None:
    from ..evaluation.evaluate import DEFAULT_METHODS, DEFAULT_TASKS, evaluate
    from ..evaluation.methods.registry import METHODS
    from ..evaluation.tasks.task import task_names

    if parsed.tasks == ["?"] or parsed.methods == ["?"]:
        print("Tasks: " + ", ".join(task_names()))
        print("\n".join(["Methods:", *(f"  {name:<22}{text}" for name, text in METHODS.items())]))
        return
    name = "untrained" if parsed.model is None else Path(parsed.model).resolve().name
    model, processor = load(parsed)
    self_fuser = fusion_fuser = None
    if parsed.fusion_fuser is not None:
        parsed.model = parsed.fusion_fuser
        fusion_fuser = load(parsed)
    if parsed.self_fuser is not None:
        parsed.model, parsed.sharer = parsed.self_fuser, parsed.receiver and [parsed.receiver]
        self_fuser = load(parsed)
    output = parsed.output or Path("evaluation") / name
    metrics = evaluate(
        model,
        processor,
        output,
        parsed.tasks or DEFAULT_TASKS,
        parsed.methods or DEFAULT_METHODS,
        parsed.data_dir,
        parsed.limit,
        parsed.batch_size,
        parsed.seed,
        not parsed.plain,
        parsed.max_new_tokens,
        parsed.adapter,
        self_fuser,
        parsed.chat_template_kwargs,
        parsed.background_tokens,
        fusion_fuser,
    )
    for result in metrics["results"]:
        low, high = result["interval"]
        print(
            f"{result['task']:<24} {result['method']:<22} {result['metric']:<16} {100 * result['value']:5.1f} "
            f"[{100 * low:.1f}, {100 * high:.1f}]  {result['num_items']} items"
        )
    for gain in metrics["pairing_gain"]:
        low, high = gain["interval"]
        print(
            f"{gain['task']:<24} pairing gain {100 * gain['value']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    print(f"The report is {output / 'report.md'}.")


def _lm_eval(parsed: argparse.Namespace) -> None:
    try:
        from ..evaluation.lm_eval_model import run_lm_eval
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: run `pip install "c2c_hf[eval]"`.') from error
    run_lm_eval(parsed.arguments)
