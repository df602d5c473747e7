"""The commands that measure: `c2c evaluate` and `c2c lm-eval`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    FUSER_HELP,
    Alignment,
    AsJson,
    Device,
    Precision,
    Receiver,
    Sharers,
    load_model,
)


def evaluate(
    model: Annotated[str | None, typer.Argument(metavar="FUSER", help=FUSER_HELP)] = None,
    receiver: Receiver = None,
    sharers: Sharers = None,
    token_alignment: Alignment = None,
    dtype: Precision = "float32",
    device: Device = "cpu",
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK...", help="Names; ? lists all.", show_default="arc_challenge openbookqa"),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD...",
            help="Names; ? lists all.",
            show_default="receiver sharer c2c mismatched fusion_off",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of the run.", show_default="evaluation/NAME OF THE FUSER")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="JSON Lines in place of data from the Hub.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="Of the task reading: JSON Lines of context, question, answers.",
            show_default="none",
        ),
    ] = None,
    max_length: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of a passage of the task reading, in characters.")
    ] = 2000,
    baselines: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keeps the answers of the task reading that no fuser changes.",
            show_default="reading_baselines.jsonl beside the run's folder",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Items per task, drawn at random.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1)] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Length of a generated answer.", show_default="the task's")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draw, of random controls and of the bootstrap.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Generate answers without chat template.")] = False,
    background_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of the background of the method text_to_text.")
    ] = 256,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="LORA", help="For the method receiver_with_adapter.", show_default="the fuser's own"),
    ] = None,
    self_fuser: Annotated[
        str | None,
        typer.Option(metavar="FUSER", help="Whose sharer is the receiver, for the method receiver_as_sharer."),
    ] = None,
    fusion_fuser: Annotated[
        str | None, typer.Option(metavar="FUSER", help="With mode='fusion', for the method same_text_fusion.")
    ] = None,
    swapped_fuser: Annotated[
        str | None,
        typer.Option(metavar="FUSER", help="Whose receiver is the first sharer, for the method swapped_pair."),
    ] = None,
    two_sharer_fuser: Annotated[
        str | None, typer.Option(metavar="FUSER", help="With several sharers, for the method two_sharers.")
    ] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="""For every template: '{"enable_thinking": false}'.""")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a fuser with baselines and controls on benchmarks.

    The same command continues an interrupted run.
    """
    from accelerate import PartialState

    from ..evaluation.evaluate import DEFAULT_TASKS
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.methods.registry import METHODS
    from ..evaluation.reading import headline
    from ..evaluation.tasks.reading import READING
    from ..evaluation.tasks.task import task_names

    if tasks == ["?"] or methods == ["?"]:
        print("Tasks: " + ", ".join([*task_names(), f"{READING} (with --data)"]))
        print("\n".join(["Methods:", *(f"  {name:<21} {text}" for name, text in METHODS.items())]))
        return
    template_kwargs = _parse_kwargs(chat_template_kwargs)
    options = (token_alignment, dtype, device)
    c2c, processor = load_model(model, receiver, sharers, *options)
    other_fusion = None if fusion_fuser is None else load_model(fusion_fuser, receiver, sharers, *options)
    itself = None if receiver is None else [receiver]
    other_self = None if self_fuser is None else load_model(self_fuser, receiver, itself, *options)
    first_sharer = None if not sharers else sharers[0]
    other_swapped = None if swapped_fuser is None else load_model(swapped_fuser, first_sharer, itself, *options)
    other_sharers = None if two_sharer_fuser is None else load_model(two_sharer_fuser, receiver, None, *options)
    folder = output or Path("evaluation") / ("untrained" if model is None else Path(model).resolve().name)
    metrics = run(
        c2c,
        processor,
        folder,
        tasks=tasks or ([READING] if data else DEFAULT_TASKS),
        methods=methods,
        data_dir=data_dir,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        chat=not plain,
        max_new_tokens=max_new_tokens,
        adapter=adapter,
        self_fuser=other_self,
        chat_template_kwargs=template_kwargs,
        background_tokens=background_tokens,
        fusion_fuser=other_fusion,
        data=data or (),
        max_length=max_length,
        baselines=baselines,
        swapped_fuser=other_swapped,
        two_sharer_fuser=other_sharers,
    )
    if not PartialState().is_main_process:
        return
    if as_json:
        print(json.dumps({**metrics, "report": str(folder / "report.md")}, ensure_ascii=False))
        return
    for line in headline(metrics["reading"]):
        print(line.replace("**", ""))
    for result in metrics["results"]:
        low, high = result["interval"]
        print(
            f"{result['task']:<24} {result['method']:<21} {result['metric']:<16} {100 * result['value']:5.1f} "
            f"[{100 * low:.1f}, {100 * high:.1f}]  {result['num_items']} items"
        )
    for gain in metrics["pairing_gain"]:
        low, high = gain["interval"]
        print(
            f"{gain['task']:<24} pairing gain {100 * gain['value']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    print(f"The report is {folder / 'report.md'}.")


def lm_eval(ctx: typer.Context) -> None:
    """Run lm-evaluation-harness with the model type c2c; takes all of its arguments."""
    try:
        from ..evaluation.lm_eval_model import run_lm_eval
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: run `pip install "c2c_hf[eval]"`.') from error
    run_lm_eval(ctx.args)


def _parse_kwargs(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        kwargs = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`--chat-template-kwargs` is not JSON ({error}): {text!r}.") from error
    if not isinstance(kwargs, dict):
        raise ValueError(f"`--chat-template-kwargs` must be a JSON object, but got {text!r}.")
    return kwargs
